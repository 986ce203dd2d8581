"""Networks with places for frames, and the comparison of a network on shares with a plain one on all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from processes import TOLERANCE, Wrap, assert_close, average, full, gradients, parameters
from torch import Tensor, nn

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


class Swap(nn.Module):
    """(a, b) -> (b + f(a), a), with an inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([b + self.block(a), a], -1)

    def inverse(self, y: Tensor) -> Tensor:
        b, a = y.chunk(2, -1)
        return torch.cat([a, b - self.block(a)], -1)


class Inverted(Net):
    """A chain of four layers with inverses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Swap() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = self.around(block, h, **({"inverse": block.inverse} if self.around is recollect.checkpoint else {}))
        return h


class Adapted(Net):
    """Frozen blocks with small trained parts."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.requires_grad_(False)
            block.norm.requires_grad_(True)
        self.first.requires_grad_(False)


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
    kinds = [type(parameter) for parameter in net.parameters()]
    shares = batches(world, dtype, number)
    step, oracle_step = (optimizer(n.parameters()) if optimizer is not None else None for n in (net, oracle))
    own = train(net, [[step_[rank]] for step_ in shares], [rank], mode=mode, optimizer=step)
    order = [rank, *(r for r in range(world) if r != rank)]
    expected = train(oracle, [[s[r] for r in order] for s in shares], order, mode=mode, optimizer=oracle_step)
    assert [type(p) for p in net.parameters()] == kinds, "a unit was left unsharded"
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
