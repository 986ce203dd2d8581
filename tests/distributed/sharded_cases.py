"""fully_shard around, inside and beside frames, against the same network unsharded under plain autograd."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ddp_cases import OfRows, Rows, certified, exact_stack
from networks import (
    Adapted,
    Block,
    Coupled,
    Inverted,
    Net,
    Reversible,
    batches,
    check,
    loss_of,
    plain,
    switch_off,
    train,
)
from processes import TOLERANCE, Wrap, assert_close, full, gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

import recollect
import recollect.invertible as inn
from recollect.reversible import BDIA, GroupAddRev, Midpoint


def shard(
    net: nn.Module, units: Callable[[nn.Module], list[nn.Module]], root: bool, hybrid: bool = False, **options: Any
) -> None:
    """Shard the units, and the network too if ``root``; ``hybrid`` keeps a replica on each rank."""
    world = torch.distributed.get_world_size()
    mesh = (
        init_device_mesh("cpu", (world, 1), mesh_dim_names=("replica", "shard"))
        if hybrid
        else init_device_mesh("cpu", (world,))
    )
    for unit in units(net):
        fully_shard(unit, mesh=mesh, **options)
    if root:
        fully_shard(net, mesh=mesh, **options)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, Block)]


def couplings_blocks(net: nn.Module) -> list[nn.Module]:
    return [block for layer in net.layers for block in layer.blocks]


def inverted_layers(net: nn.Module) -> list[nn.Module]:
    """The layers, with their inverse among the methods that bring the parameters."""
    for layer in net.blocks:
        fully_shard(layer)
        register_fsdp_forward_method(layer, "inverse")
    return []


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
case("around-hybrid", shard={"hybrid": True, **RESHARD})(around)
case("inside-hybrid", shard={"hybrid": True, **RESHARD})(inside)
case("around-linears", units=lambda net: [m for b in net.blocks for m in (b.first, b.last)])(around)
case("around_more-root_only", make=PLACES["around_more"][1], units=lambda _: [])(around)

case("inverse-blocks", make=Inverted)(around)
case("inverse-stay", make=Inverted, shard=KEEP)(around)
case("inverse-sgd", make=Inverted, **SETTINGS["sgd"])(around)
case("inverse-layers", make=Inverted, units=inverted_layers)(around)
for place_name, place in {"around": around, "inside": inside, "nested": nested}.items():
    case(f"{place_name}-frozen", make=Adapted)(place)
    case(f"{place_name}-frozen_stay", make=Adapted, shard=KEEP)(place)

REVERSIBLE: dict[str, dict[str, Any]] = {
    "blocks": {"units": blocks_of},
    "blocks_stay": {"units": blocks_of, "shard": KEEP},
    "hybrid": {"units": blocks_of, "shard": {"hybrid": True, **RESHARD}},
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
    # The blocks' norms amplify what an inverse rounds: in float64 up to 1.3e-9, depending on the processor.
    dtype = setting.get("dtype", torch.float64)
    tolerance = (30 if dtype is torch.float64 else 10) * TOLERANCE[dtype]
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
    with pytest.raises(recollect.frames.FrameError):
        loss.backward()


def freed(make: Callable[[], nn.Module], place: Callable[[Wrap, nn.Module], None]) -> Callable[[Wrap, int, int], None]:
    """Between forward and backward nothing holds the whole parameters of a unit."""

    def run(wrap: Wrap, rank: int, world: int) -> None:
        net = make().double()
        seen: list[weakref.ref[Tensor]] = []
        for block in blocks_of(net):
            block.first.register_forward_pre_hook(lambda part, _: seen.append(weakref.ref(part.weight)))
        shard(net, blocks_of, True, **RESHARD)
        place(wrap, net)
        loss = loss_of(net, batches(world, torch.float64, 1)[0][rank], rank)
        whole = [tensor for tensor in (reference() for reference in seen) if tensor is not None]
        assert len(seen) == len(blocks_of(net))
        assert sum(tensor.untyped_storage().nbytes() for tensor in whole) == 0
        loss.backward()
        assert sum(tensor.untyped_storage().nbytes() for tensor in whole) == 0

    return run


def exact_case(kind: Callable[..., nn.Module], units: Callable[[nn.Module], list[Any]], steps: int = 2) -> Any:
    """Gradients of all ranks, bit for bit those of the same network sharded alike with everything kept."""

    def run(wrap: Wrap, rank: int, world: int) -> None:
        found: list[list[Tensor]] = []
        for disable in (False, True):
            torch.manual_seed(0)
            net = kind()
            for module in net.modules():
                if hasattr(module, "disable"):
                    module.disable = disable
            shard(net, units, True, **RESHARD)
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            torch.manual_seed(1 + rank)
            found.append([])
            for _ in range(steps):
                optimizer.zero_grad()
                net(torch.randn(6, 8)).sin().sum().backward()
                found[-1] += [whole for p in net.parameters() if (whole := full(p.grad)) is not None]
                optimizer.step()
        assert len(found[0]) == steps * len(list(net.parameters()))
        assert all(map(torch.equal, *found))

    return run


def exact_groups() -> nn.Module:
    def block() -> nn.Module:
        return Rows(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout(0.2), nn.Tanh()))

    layers = [GroupAddRev(nn.ModuleList([block(), block()]), exact=True) for _ in range(5)]
    return nn.Sequential(nn.Linear(8, 8), *map(OfRows, layers))


def exact_blocks(net: nn.Module) -> list[Any]:
    stacks = [block for module in net.modules() if isinstance(module, (Midpoint, BDIA)) for block in module.blocks]
    found = [*stacks, *(module for module in net.modules() if isinstance(module, Rows))]
    assert len(found) in (5, 10)
    return found


def exact_units(net: nn.Module) -> list[Any]:
    """The reversible layers, or the stack, as a whole."""
    found = [module for module in net.modules() if isinstance(module, (Midpoint, BDIA, GroupAddRev))]
    assert len(found) in (1, 5)
    return found


for name, kind in {
    "exact": exact_groups,
    "midpoint": functools.partial(exact_stack, Midpoint),
    "bdia": functools.partial(exact_stack, BDIA),
}.items():
    CASES[f"{name}-blocks"] = exact_case(kind, exact_blocks)
    CASES[f"{name}-units"] = exact_case(kind, exact_units)
    CASES[f"{name}-root"] = exact_case(kind, lambda _: [])


def fully_sharded(wrap: Wrap, net: nn.Module) -> nn.Module:
    if isinstance(net, Net):
        around(wrap, net)
    shard(net, blocks_of, True, **RESHARD)
    return net


CASES["certified-around"] = certified(Net, fully_sharded)
CASES["certified-rev"] = certified(Reversible, fully_sharded)
CASES["around-freed"] = freed(Net, around)
CASES["nested-freed"] = freed(Net, nested)
CASES["inverse-freed"] = freed(Inverted, around)
CASES["rev-freed"] = freed(Reversible, nowhere)
for place_name, (place, make) in PLACES.items():
    CASES[f"{place_name}-bfloat16"] = mixed_precision(make, place)
CASES["changed_between"] = changed_between
CASES["around-bfloat16_output"] = mixed_precision(Net, around, output_dtype=torch.float32)
CASES["rev-bfloat16"] = mixed_precision(Reversible, nowhere, root=False, output_dtype=torch.float32)
