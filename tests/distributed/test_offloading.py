"""Parameters that hooks bring before a module runs and take away after it, in one process.

The hooks here are those of fully_shard and of offloading in small: a unit's parameters are there from before its
forward until after it, and again from when the gradient of its output arrives until the gradient of its input does.
Plain autograd under the same hooks, and without any, are the oracles.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import recollect
import recollect.invertible as inn
from recollect.reversible import GroupAddRev

WIDTH = 6


class Unit:
    """Keeps a module's parameters elsewhere while the module does not need them; subclasses say how."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.owners = [(part, name) for part in module.modules() for name in part._parameters]
        self.masters: list[Any] = [part._parameters[name] for part, name in self.owners]
        self.backward = False  # between the gradient of the output and that of the input
        self.there = True
        self.start()
        self.take()
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after)

    def start(self) -> None:
        pass

    def bring(self) -> None:
        if not self.there:
            self.there = True
            self.put()

    def take(self) -> None:
        if self.there:
            self.there = False
            self.remove()

    def put(self) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        raise NotImplementedError

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.bring()
        if not self.backward and args[0].requires_grad:
            args[0].register_hook(self.ended)

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not self.backward:
            self.take()
            if output.requires_grad:
                output.register_hook(self.began)

    def began(self, _: Tensor) -> None:
        self.backward = True
        self.bring()

    def ended(self, _: Tensor) -> None:
        self.backward = False
        self.take()

    def gradients(self) -> list[Tensor | None]:
        return [master.grad for master in self.masters]


class Emptied(Unit):
    """The parameters' storages are emptied and filled again, as fully_shard does it."""

    def start(self) -> None:
        self.host = [master.detach().clone() for master in self.masters]

    def put(self) -> None:
        for master, host in zip(self.masters, self.host, strict=True):
            master.untyped_storage().resize_(host.nbytes)
            master.data.copy_(host)

    def remove(self) -> None:
        for master in self.masters:
            master.untyped_storage().resize_(0)


class Swapped(Unit):
    """The parameters' ``data`` is exchanged for an empty tensor and back, as ZeRO does it."""

    def start(self) -> None:
        self.host = [master.detach().clone() for master in self.masters]

    def put(self) -> None:
        for master, host in zip(self.masters, self.host, strict=True):
            master.data = host.clone()

    def remove(self) -> None:
        for master in self.masters:
            master.data = master.data.new_empty(0)


class Replaced(Unit):
    """Other parameters take the place of the masters in the module while it runs: always the same ones."""

    def start(self) -> None:
        self.full = [nn.Parameter(master.detach().clone()) for master in self.masters]
        self.host = [master.detach().clone() for master in self.masters]
        for master in self.masters:
            master.data.fill_(torch.nan)  # as a shard, they are no good for computing

    def put(self) -> None:
        for (part, name), full, host in zip(self.owners, self.full, self.host, strict=True):
            full.untyped_storage().resize_(host.nbytes)
            full.data.copy_(host)
            part._parameters[name] = full

    def remove(self) -> None:
        for (part, name), full, master in zip(self.owners, self.full, self.masters, strict=True):
            full.untyped_storage().resize_(0)
            part._parameters[name] = master

    def gradients(self) -> list[Tensor | None]:
        return [full.grad for full in self.full]


class Fresh(Unit):
    """Frozen parameters come from the host anew each time, and are on meta in between."""

    def start(self) -> None:
        self.host = [master.detach().clone() for master in self.masters]
        self.brought: list[weakref.ref[Tensor]] = []

    def put(self) -> None:
        for (part, name), host in zip(self.owners, self.host, strict=True):
            part._parameters[name] = nn.Parameter(host.clone(), requires_grad=False)
            self.brought.append(weakref.ref(part._parameters[name]))

    def remove(self) -> None:
        for (part, name), host in zip(self.owners, self.host, strict=True):
            part._parameters[name] = nn.Parameter(host.to("meta"), requires_grad=False)

    def gradients(self) -> list[Tensor | None]:
        return []


class Block(nn.Module):
    """Linear, tanh, linear; ``inside`` wraps its body."""

    def __init__(self, width: int, out: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.last = nn.Linear(2 * width, out * width)
        self.inside: Callable[..., Any] = plain

    def body(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(torch.tanh(self.first(x)))
        return y

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        y: Tensor = self.inside(self.body, x)
        return y


class Swap(nn.Module):
    """(a, b) -> (b + f(a), a)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([b + self.block(a), a], -1)

    def inverse(self, y: Tensor) -> Tensor:
        b, a = y.chunk(2, -1)
        return torch.cat([a, b - self.block(a)], -1)


def plain(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    return function(*args)


class Net(nn.Module):
    """Three layers of a kind of frame; ``wrap`` makes the checkpoints."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        half = WIDTH // 2
        make: Callable[[], nn.Module] = {
            "coupling": lambda: GroupAddRev(nn.ModuleList(Block(half) for _ in range(2)), fuse=False),
            "affine": lambda: inn.AffineCoupling(Block(half, 2), Block(half, 2), dim=1),
            "inverse": Swap,
        }.get(kind, lambda: Block(WIDTH))
        self.kind = kind
        self.layers = nn.ModuleList(make() for _ in range(3))
        self.wrap: Callable[..., Any] = plain

    def use(self, wrap: Callable[..., Any]) -> None:
        self.wrap = wrap
        for block in self.blocks if self.kind in ("inside", "nested") else ():
            block.inside = wrap
        for layer in self.layers if wrap is plain else ():
            if isinstance(layer, GroupAddRev):
                layer.disable = True
            elif isinstance(layer, inn.Module):
                layer.invertible = layer.checkpoint = False

    @property
    def blocks(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.kind in ("around", "nested"):
                x = self.wrap(layer, x)
            elif self.kind == "around_more":
                x = self.wrap(lambda h, layer=layer: layer(h).sin() * h, x)
            elif self.kind == "inverse":
                x = self.wrap(layer, x, inverse=layer.inverse)
            else:
                x = layer(x, None) if self.kind == "coupling" else layer(x)
        return x


KINDS = ("around", "around_more", "inside", "nested", "inverse", "coupling", "affine")
LEVELS: dict[str, Callable[[Net], list[nn.Module]]] = {
    "blocks": lambda net: list(net.blocks),
    "linears": lambda net: [linear for block in net.blocks for linear in (block.first, block.last)],
    "layers": lambda net: list(net.layers),
}


def train(net: Net, units: list[Unit], mode: str) -> tuple[list[Tensor | None], Tensor, list[Unit]]:
    """Return the gradients of the parameters, or of what stood for them, and of the input."""
    batch = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    losses = [net(x * 1.0).sin().square().sum() for x in batch]
    if mode == "apart":
        for loss in losses:
            loss.backward(retain_graph=False)
    else:
        sum(losses).backward()
    found = [gradient for unit in units for gradient in unit.gradients()]
    return found, batch.grad, units


def results(
    kind: str, unit: type[Unit] | None, level: str, wrap: Callable[..., Any], mode: str
) -> tuple[list[Tensor | None], Tensor, list[Unit]]:
    torch.manual_seed(1)
    net = Net(kind).double()
    frozen = unit is Fresh
    if frozen:
        net.requires_grad_(False)
    net.use(wrap)
    units = [unit(module) for module in LEVELS[level](net)] if unit is not None else []
    found, dx, units = train(net, units, mode)
    if unit is None:
        found = [] if frozen else [p.grad for part in LEVELS[level](net) for p in part.parameters()]
    return found, dx, units


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["together", "apart"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("unit", [Emptied, Swapped, Replaced, Fresh], ids=lambda unit: unit.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rebuild_uses_the_parameters_that_are_there(kind, unit, level, mode):
    wrap = recollect.checkpoint
    expected, expected_dx, _ = results(kind, None, level, plain, mode)
    hooked, hooked_dx, _ = results(kind, unit, level, plain, mode)
    if unit is not Fresh:
        assert_same(hooked, expected)
    assert_same([hooked_dx], [expected_dx])
    found, dx, units = results(kind, unit, level, wrap, mode)
    assert_same(found, hooked)
    assert_same([dx], [hooked_dx])
    assert not any(part.there for part in units), "the rebuild left parameters that the hooks had taken away"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_keeps_what_hooks_took_away(kind):
    torch.manual_seed(1)
    net = Net(kind).double().requires_grad_(False)
    net.use(recollect.checkpoint)
    units = [Fresh(block) for block in net.blocks]
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    loss = net(x * 1.0).sin().sum()
    assert [ref for unit in units for ref in unit.brought if ref() is not None] == []
    loss.backward()
    assert x.grad is not None
    del loss
    assert [ref for unit in units for ref in unit.brought if ref() is not None] == []


@pytest.mark.parametrize("unit", [Emptied, Swapped, Replaced, Fresh], ids=lambda unit: unit.__name__)
def test_a_unit_under_torchs_own_checkpoint(unit):
    """The hooks of this file are sound: torch's checkpoint works with them."""

    def wrap(function: Callable[..., Any], *args: Any) -> Any:
        return torch_checkpoint(function, *args, use_reentrant=False)

    expected, expected_dx, _ = results("around", unit, "blocks", plain, "together")
    found, dx, _ = results("around", unit, "blocks", wrap, "together")
    assert_same(found, expected)
    assert_same([dx], [expected_dx])


def test_a_copy_of_a_network_with_hooks_trains_apart():
    """Hooks that were copied with a module act on the copy's parameters; frames must not mix the two up."""
    torch.manual_seed(1)
    net = Net("around").double()
    net.use(recollect.checkpoint)
    other = copy.deepcopy(net)
    units = [Emptied(block) for block in net.blocks]
    other_units = [Emptied(block) for block in other.blocks]
    assert_same(train(net, units, "together")[0], train(other, other_units, "together")[0])
