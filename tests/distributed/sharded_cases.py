"""fully_shard around, inside and beside frames, against the same network unsharded under plain autograd."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from processes import TOLERANCE, Wrap, assert_close, average, full, gradients, parameters
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import recollect
import recollect.invertible as inn
from recollect.reversible import GroupAddRev

WIDTH, ROWS = 8, 6


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


class Block(nn.Module):
    """Norm, linear, tanh, dropout, linear and a residual; ``inside`` wraps its body."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(2 * width, width)
        self.inside: Wrap = plain

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.first(self.norm(x)))))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        y: Tensor = x + self.inside(self.body, x)
        return y


class Net(nn.Module):
    """A chain of four blocks; ``around`` wraps each, ``pair`` two at a time, ``after`` is applied with them."""

    def __init__(self, after: Callable[[Tensor], Tensor] | None = None, twice: bool = False, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(**options) for _ in range(4))
        self.around: Wrap = plain
        self.per = 1
        self.after = after
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for _ in range(2 if self.twice else 1):
            for i in range(0, len(self.blocks), self.per):
                part = list(self.blocks[i : i + self.per])
                h = self.around(part[0] if self.per == 1 and self.after is None else self.run(part), h)
        return h

    def run(self, part: list[nn.Module]) -> Callable[[Tensor], Tensor]:
        def run(h: Tensor) -> Tensor:
            for block in part:
                h = block(h)
            return h if self.after is None else self.after(h)

        return run


class Reversible(nn.Module):
    """A chain of four layers of GroupAddRev."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.layers = nn.ModuleList(
            GroupAddRev(nn.ModuleList(Block(**options) for _ in range(2)), fuse=False) for _ in range(4)
        )
        self.last = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = layer(h, None)
        return self.last(h)


class Coupled(nn.Module):
    """A chain of four couplings."""

    def __init__(self, kind: type[nn.Module], out: int) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind(*(self.make(out) for _ in range(2)), dim=1) for _ in range(4))

    @staticmethod
    def make(out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH // 2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, out * WIDTH // 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = layer(h)
        return h


def batches(world: int, dtype: torch.dtype, number: int) -> list[list[Tensor]]:
    """Return ``number`` batches, each as the ranks' shares."""
    generator = torch.Generator().manual_seed(1)
    return [
        list(torch.randn(world * ROWS, WIDTH, dtype=dtype, generator=generator).chunk(world)) for _ in range(number)
    ]


def loss_of(net: nn.Module, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    y: Tensor = net(x)
    return y.float().sin().square().mean() if y.dtype == torch.bfloat16 else y.sin().square().mean()


def switch_off(net: nn.Module) -> nn.Module:
    """Make a network plain: no frame acts in it."""
    for module in net.modules():
        if isinstance(module, GroupAddRev):
            module.disable = True
        if isinstance(module, inn.Module):
            module.invertible = module.checkpoint = False
    return net


def train(
    net: nn.Module,
    shares: list[list[Tensor]],
    seeds: list[int],
    *,
    mode: str = "steps",
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Tensor]:
    """Train on batches; the gradients of the last stay. Returns the losses of the first share.

    Args:
        net: the network.
        shares: for each step the shares that this process computes, over which gradients are averaged.
        seeds: of the random numbers of each share.
        mode: ``steps``; ``accumulate``: one gradient over all batches, synchronised at the last; ``both``: all
            forwards before one backward; ``reversed``: all forwards, then a backward of each, in their order.
        optimizer: stepped after each batch but the last.
    """
    losses = []
    together: list[Tensor] = []
    for number, step in enumerate(shares):
        if mode == "steps":
            net.zero_grad()
        if mode == "accumulate" and hasattr(net, "set_requires_gradient_sync"):
            net.set_requires_gradient_sync(number == len(shares) - 1)
        values = [loss_of(net, x, seed + 100 * number) for x, seed in zip(step, seeds, strict=True)]
        losses.append(values[0].detach())
        loss = sum(values) / len(values)
        if mode in ("both", "reversed"):
            together.append(loss)
            continue
        loss.backward()
        if optimizer is not None and number < len(shares) - 1:
            optimizer.step()
    if mode == "both":
        sum(together).backward()
    for loss in together if mode == "reversed" else ():
        loss.backward()
    return losses


def check(
    make: Callable[[], nn.Module],
    prepare: Callable[[nn.Module], None],
    rank: int,
    world: int,
    *,
    dtype: torch.dtype = torch.float64,
    number: int = 2,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    tolerance: float | None = None,
    mode: str = "steps",
    averaged: bool = True,
    none_is_zero: bool = False,
) -> None:
    """Compare losses, gradients and parameters of a sharded network with those of the plain one on all shares.

    Args:
        make: returns the network.
        prepare: shards it.
        rank: of this process.
        world: how many there are.
        dtype: of the parameters.
        number: of batches.
        optimizer: as in :func:`train`; made anew for each network.
        tolerance: relative.
        mode: as in :func:`train`.
        averaged: whether the test has to average the gradients of what is not sharded.
        none_is_zero: take no gradient for zeros.
    """
    torch.manual_seed(7)
    net = make().to(dtype)
    oracle = switch_off(copy.deepcopy(net))
    prepare(net)
    shares = batches(world, dtype, number)
    step, oracle_step = (optimizer(n.parameters()) if optimizer is not None else None for n in (net, oracle))
    own = train(net, [[step_[rank]] for step_ in shares], [rank], mode=mode, optimizer=step)
    order = [rank, *(r for r in range(world) if r != rank)]
    expected = train(oracle, [[s[r] for r in order] for s in shares], order, mode=mode, optimizer=oracle_step)
    if averaged:
        average(net)
    for model in (net, oracle) if none_is_zero else ():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    for i, (found, value) in enumerate(zip(own, expected, strict=True)):
        assert_close(found, value, tolerance, f"loss {i}")
    assert_close(gradients(net), gradients(oracle), tolerance, "gradient")
    assert_close(parameters(net), parameters(oracle), tolerance, "parameter")
    for name, buffer in oracle.named_buffers():
        if world == 1:  # each rank keeps statistics of its own share
            assert_close(full(net.get_buffer(name)), buffer, tolerance, name)


def shard(net: nn.Module, units: Callable[[nn.Module], list[nn.Module]], root: bool, **options: Any) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for unit in units(net):
        fully_shard(unit, mesh=mesh, **options)
    if root:
        fully_shard(net, mesh=mesh, **options)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, Block)]


def couplings_blocks(net: nn.Module) -> list[nn.Module]:
    return [block for layer in net.layers for block in layer.blocks]


CASES: dict[str, Callable[[Wrap, int, int], None]] = {}


def case(name: str, **settings: Any) -> Callable[..., Any]:
    """Register a function ``(wrap, net) -> None``, which says where checkpoints go, with the options of a check."""

    def register(place: Callable[[Wrap, nn.Module], None]) -> Callable[[Wrap, nn.Module], None]:
        options = {"make": Net, "units": blocks_of, "root": True, "shard": {"reshard_after_forward": True}, **settings}

        def run(wrap: Wrap, rank: int, world: int) -> None:
            def prepare(net: nn.Module) -> None:
                shard(net, options["units"], options["root"], **options["shard"])
                place(wrap, net)

            skip = ("make", "units", "root", "shard")
            check(options["make"], prepare, rank, world, **{k: v for k, v in options.items() if k not in skip})

        CASES[name] = run
        return place

    return register


def around(wrap: Wrap, net: nn.Module) -> None:
    net.around = wrap


def inside(wrap: Wrap, net: nn.Module) -> None:
    for block in net.blocks:
        block.inside = wrap


def nested(wrap: Wrap, net: nn.Module) -> None:
    around(wrap, net)
    inside(wrap, net)


def pairs(wrap: Wrap, net: nn.Module) -> None:
    net.around, net.per = wrap, 2


def whole(wrap: Wrap, net: nn.Module) -> None:
    net.forward = functools.partial(wrap, net.forward)


def nowhere(wrap: Wrap, net: nn.Module) -> None:
    """The frames are in the layers themselves."""


PLACES = {
    "around": (around, Net),
    "around_more": (around, functools.partial(Net, after=torch.tanh)),  # asked for before the units' own hooks run
    "inside": (inside, Net),
    "nested": (nested, Net),
    "pairs": (pairs, Net),
    "twice": (around, functools.partial(Net, twice=True)),
}
KEEP, RESHARD = {"reshard_after_forward": False}, {"reshard_after_forward": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "reshard": {},
    "stay": {"shard": KEEP},
    "float32": {"dtype": torch.float32},
    "no_root": {"root": False},
    "both": {"mode": "both"},
    "reversed": {"mode": "reversed"},
    "accumulate": {"mode": "accumulate", "number": 3},
    "sgd": {"number": 4, "optimizer": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
    "adam_stay": {"number": 3, "optimizer": torch.optim.Adam, "shard": KEEP},
    "dropout": {"options": {"dropout": 0.3}},
    "batch_norm": {"options": {"batch_norm": True}},
}
for place_name, (place, make) in PLACES.items():
    for setting_name, setting in SETTINGS.items():
        more = {key: value for key, value in setting.items() if key != "options"}
        case(f"{place_name}-{setting_name}", make=functools.partial(make, **setting.get("options", {})), **more)(place)
case("whole-reshard")(whole)
case("whole-blocks_only", root=False)(whole)
case("around-offload", shard={"offload_policy": CPUOffloadPolicy(pin_memory=False), **RESHARD})(around)
case("around-linears", units=lambda net: [m for b in net.blocks for m in (b.first, b.last)])(around)
case("around_more-root_only", make=PLACES["around_more"][1], units=lambda _: [])(around)

REVERSIBLE: dict[str, dict[str, Any]] = {
    "blocks": {"units": blocks_of},
    "blocks_stay": {"units": blocks_of, "shard": KEEP},
    "layers": {"units": lambda net: list(net.layers)},
    "blocks_and_layers": {"units": lambda net: [*blocks_of(net), *net.layers]},
    "no_root": {"units": blocks_of, "root": False},
    "float32": {"units": blocks_of, "dtype": torch.float32},
    "sgd": {"units": blocks_of, **SETTINGS["sgd"]},
    "both": {"units": blocks_of, "mode": "both"},
    "reversed": {"units": blocks_of, "mode": "reversed"},
    "accumulate": {"units": blocks_of, "mode": "accumulate", "number": 3},
    "dropout": {"units": blocks_of, "make": functools.partial(Reversible, dropout=0.3)},
}
for name, setting in REVERSIBLE.items():
    tolerance = 10 * TOLERANCE[setting.get("dtype", torch.float64)]  # the blocks' norms amplify what an inverse rounds
    case(f"rev-{name}", **{"make": Reversible, "tolerance": tolerance, **setting})(nowhere)
for kind, out in ((inn.AdditiveCoupling, 1), (inn.AffineCoupling, 2)):
    make = functools.partial(Coupled, kind, out)
    case(f"{kind.__name__}-blocks", make=make, units=couplings_blocks)(nowhere)
    case(f"{kind.__name__}-stay", make=make, units=couplings_blocks, shard=KEEP)(nowhere)
    case(f"{kind.__name__}-layers", make=make, units=lambda net: list(net.layers))(nowhere)
    case(f"{kind.__name__}-sgd", make=make, units=couplings_blocks, **SETTINGS["sgd"])(nowhere)


def mixed_precision(
    make: Callable[[], nn.Module], place: Callable[[Wrap, nn.Module], None], root: bool = True, **options: Any
) -> Callable[[Wrap, int, int], None]:
    """Compare with the same network sharded in the same way, without frames: the same casts, so the same numbers.

    Without ``root`` only the blocks compute in bfloat16: an inverse in it would drift too far.
    """

    def run(wrap: Wrap, rank: int, world: int) -> None:
        results = []
        for how in (wrap, plain):
            torch.manual_seed(7)
            net = make()
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, **options)
            if how is plain:
                switch_off(net)
            shard(net, blocks_of, root, mp_policy=policy, **RESHARD)
            if not root:
                shard(net, lambda _: [], True)
            place(how, net)
            losses = train(net, [[s[rank]] for s in batches(world, torch.float32, 2)], [rank])
            results.append((losses, gradients(net)))
        (losses, found), (expected_losses, expected) = results
        for loss, value in zip(losses, expected_losses, strict=True):
            assert_close(loss, value, 0.0, "loss")
        # What an inverse brings back may be rounded to another number of bfloat16.
        assert_close(found, expected, 0.0 if root else 0.05, "gradient")
        assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in found.values())

    return run


def changed_between(wrap: Wrap, rank: int, world: int) -> None:
    """A step between forward and backward is refused although hooks bring the parameters."""
    net = Net().double()
    shard(net, blocks_of, True, **RESHARD)
    net.around = wrap
    loss = loss_of(net, batches(world, torch.float64, 1)[0][rank], rank)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    try:
        loss.backward()
    except recollect.frames.FrameError as error:
        assert len(str(error)) > 40
    else:
        raise AssertionError("an optimizer step between forward and backward went unseen")


for place_name, (place, make) in PLACES.items():
    CASES[f"{place_name}-bfloat16"] = mixed_precision(make, place)
CASES["changed_between"] = changed_between
CASES["around-bfloat16_output"] = mixed_precision(Net, around, output_dtype=torch.float32)
CASES["rev-bfloat16"] = mixed_precision(Reversible, nowhere, root=False, output_dtype=torch.float32)


if __name__ == "__main__":
    print("\n".join(CASES))
