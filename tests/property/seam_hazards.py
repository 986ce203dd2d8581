"""What an ordinary region may do that a rebuild could get wrong: one function for each hazard.

A hazard is ``make(world, width)``, which returns a function of a tensor ``[rows, width]`` that keeps its shape, and
tells the world what else counts: modules and objects to compare afterwards, actions between forward and backward,
tensors that are left behind and used in the loss.
"""

from __future__ import annotations

import random
import types
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

Piece = Callable[[Tensor], Tensor]
GLOBALS: dict[str, Any] = {}


class Cell(nn.Module):
    """A linear layer, and a body that says what is done with it: ``body(cell, h)``."""

    def __init__(self, width: int, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)
        self.body = body

    def forward(self, h: Tensor) -> Tensor:
        return self.body(self, h)


@dataclass
class World:
    """Everything around a program's regions: how they are wrapped, and what its hazards left word of."""

    rng: random.Random  # of the choices: the same in both runs
    wrap: Any
    autocast: bool = False
    modules: list[nn.Module] = field(default_factory=list)
    watched: list[Callable[[], Any]] = field(default_factory=list)  # further state to compare
    between: list[Callable[[], Any]] = field(default_factory=list)  # done between forward and backward
    after: list[Callable[[], Any]] = field(default_factory=list)  # done after backward
    left: list[Callable[[], Tensor | None]] = field(default_factory=list)  # tensors left behind by a forward
    leaves: list[Tensor] = field(default_factory=list)
    contexts: list[Callable[[], AbstractContextManager[Any]]] = field(default_factory=list)  # around each forward
    log: list[str] = field(default_factory=list)

    def cell(self, width: int, body: Callable[[Any, Tensor], Tensor], **state: Any) -> Cell:
        """Make a cell; tensors in ``state`` become buffers, modules submodules, and the rest attributes."""
        cell = Cell(width, body)
        for name, value in state.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                cell.register_buffer(name, value)
            else:
                setattr(cell, name, value)
        return self.add(cell)

    def add(self, module: Any) -> Any:
        self.modules.append(module)
        return module

    def leaf(self, *shape: int) -> Tensor:
        tensor = torch.randn(shape, requires_grad=True)
        self.leaves.append(tensor)
        return tensor

    def choose(self, *options: Any) -> Any:
        choice = self.rng.choice(options)
        self.log.append(str(choice))
        return choice


@dataclass(frozen=True)
class Hazard:
    make: Callable[..., Any]
    refusable: bool  # a FrameError is an answer too
    weight: float
    autocast: bool  # runs under autocast


HAZARDS: dict[str, Hazard] = {}


def hazard(
    refusable: bool = False, weight: float = 1.0, autocast: bool = False, table: dict[str, Hazard] = HAZARDS
) -> Any:
    def register(make: Callable[..., Any]) -> Callable[..., Any]:
        table[make.__name__] = Hazard(make, refusable, weight, autocast)
        return make

    return register


def mean(h: Tensor) -> Tensor:
    return h.detach().mean(0)


# Buffers.


@hazard()
def buffer_through_data(world: World, width: int) -> Piece:
    def body(cell, h):
        h = cell.lin(h)
        cell.mean.data.lerp_(mean(h), 0.5)
        return (h - cell.mean).tanh()

    return world.cell(width, body, mean=torch.zeros(width))


@hazard()
def buffer_in_place(world: World, width: int) -> Piece:
    reads = world.choose("before", "after", "never")

    def body(cell, h):
        h = cell.lin(h)
        old = cell.mean.clone()
        with torch.no_grad():
            cell.mean.mul_(0.9).add_(mean(h))
        return h.tanh() if reads == "never" else (h * (1 + (old if reads == "before" else cell.mean.clone()))).tanh()

    return world.cell(width, body, mean=torch.zeros(width))


@hazard()
def buffer_by_index(world: World, width: int) -> Piece:
    def body(cell, h):
        h = cell.lin(h)
        old = cell.bank[: len(h)].clone()
        cell.bank[: len(h)] = old * 0.5 + h.detach()
        return h * (1 + old.tanh())

    return world.cell(width, body, bank=torch.zeros(9, width))


@hazard()
def functional_batch_norm(world: World, width: int) -> Piece:
    def body(cell, h):
        return F.batch_norm(cell.lin(h), cell.m, cell.v, None, None, cell.training, 0.1).tanh()

    return world.cell(width, body, m=torch.zeros(width), v=torch.ones(width))


@hazard()
def buffers_of_a_holder(world: World, width: int) -> Piece:
    """Buffers of a submodule that is never called."""

    def body(cell, h):
        stats = cell.stats
        stats.n += 1
        return F.batch_norm(cell.lin(h), stats.running_mean, stats.running_var, None, None, True, 0.3).tanh()

    stats = nn.Module()
    stats.register_buffer("running_mean", torch.zeros(width))
    stats.register_buffer("running_var", torch.ones(width))
    stats.register_buffer("n", torch.zeros(()))
    return world.cell(width, body, stats=stats)


@hazard()
def buffer_replaced(world: World, width: int) -> Piece:
    def body(cell, h):
        h = cell.lin(h)
        old = cell.mean
        cell.mean = 0.5 * cell.mean + mean(h)
        return h * old.cos()

    return world.cell(width, body, mean=torch.rand(width))


@hazard()
def buffer_none_before(world: World, width: int) -> Piece:
    def body(cell, h):
        count = (h > 0.3).sum(0).to(h.dtype)
        cell.load = count if cell.load is None else cell.load + count
        return cell.lin(h).tanh() * (1 + 0.1 * cell.load)

    cell = world.cell(width, body)
    cell.register_buffer("load", None)
    return cell


@hazard()
def buffer_registered_in_forward(world: World, width: int) -> Piece:
    def body(cell, h):
        h = cell.lin(h)
        if not hasattr(cell, "scale"):
            cell.register_buffer("scale", 1 / (1 + mean(h).abs()))
        return h * cell.scale

    return world.cell(width, body)


@hazard()
def parameter_born_in_forward(world: World, width: int) -> Piece:
    def body(cell, h):
        if cell.gain is None:
            cell.gain = nn.Parameter(1 / (1 + mean(h).abs()))
        return cell.lin(h) * cell.gain

    cell = world.cell(width, body)
    cell.register_parameter("gain", None)
    return cell


@hazard()
def lazy_layers(world: World, width: int) -> Piece:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [nn.LazyLinear(width)] + ([nn.LazyBatchNorm1d()] if world.choose("norm", "") else [])
    return world.add(nn.Sequential(*layers, nn.Tanh()))


@hazard(refusable=True, weight=0.08)
def buffer_of_a_million(world: World, width: int) -> Piece:
    def body(cell, h):
        h = cell.lin(h)
        old = cell.bank[: len(h), None].clone()
        cell.bank[: len(h)] = old[:, 0] * 0.5 + h.detach().sum(1)
        return h * (1 + old.tanh())

    return world.cell(width, body, bank=torch.zeros((1 << 20) + 8))


@hazard(autocast=True)
def batch_norm(world: World, width: int) -> Piece:
    momentum = world.choose(0.1, None, 0.7)
    return world.add(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width, momentum=momentum), nn.Tanh()))


@hazard()
def scalar_buffer_that_branches(world: World, width: int) -> Piece:
    def body(cell, h):
        cell.steps += 1
        return cell.lin(h).tanh() if cell.steps.item() % 2 else cell.lin(h).sin() + cell.lin(h)

    return world.cell(width, body, steps=torch.zeros((), dtype=torch.long))


@hazard()
def codebook(world: World, width: int) -> Piece:
    def body(cell, h):
        h = cell.lin(h)
        nearest = cell.code[torch.cdist(h.detach(), cell.code).argmin(1)]
        with torch.no_grad():
            cell.code.mul_(0.9)
        return h + 0.1 * (h - nearest).square()

    return world.cell(width, body, code=torch.randn(5, width))


@hazard()
def renormalised_embedding(world: World, width: int) -> Piece:
    table = nn.Embedding(6, width, max_norm=0.5)

    def body(cell, h):
        return cell.lin(h).tanh() + cell.table(torch.arange(len(h)) % 4)

    return world.cell(width, body, table=table)


# Attributes, and what hangs on closures.


@hazard()
def plain_tensor_in_an_attribute(world: World, width: int) -> Piece:
    way = world.choose("in place", "data", "replaced", "in a dict", "in a list")

    def body(cell, h):
        h = cell.lin(h)
        table = {"in a dict": lambda: cell.held["t"], "in a list": lambda: cell.held[0]}.get(way, lambda: cell.table)()
        old = table.clone()
        if way == "data":
            table.data.add_(mean(h))
        elif way == "replaced":
            cell.table = table + mean(h)
        else:
            table += mean(h)
        return h * (1 + 0.1 * old)

    cell = world.cell(width, body)
    cell.table = torch.zeros(width)
    cell.held = {"t": torch.zeros(width)} if way == "in a dict" else [torch.zeros(width)]
    return cell


@hazard(refusable=True)
def plain_tensor_in_a_closure(world: World, width: int) -> Piece:
    table, reads = torch.zeros(width), world.choose(True, False)
    world.watched.append(lambda: table)

    def body(cell, h):
        h = cell.lin(h)
        old = table.clone()
        table.mul_(0.5).add_(mean(h))
        return h * (1 + 0.1 * old) if reads else h.tanh()

    return world.cell(width, body)


@dataclass
class Count:
    n: int = 0


def _counting(kind: str) -> tuple[Any, Callable[[Any], None], Callable[[Any], int]]:
    """Return a holder of a counter, how it is moved on, and how it is read."""

    def item(key: Any) -> tuple[Callable[[Any], None], Callable[[Any], int]]:
        return lambda box: box.__setitem__(key, box[key] + 1), lambda box: box[key]

    def attribute() -> tuple[Callable[[Any], None], Callable[[Any], int]]:
        return lambda box: setattr(box, "n", box.n + 1), lambda box: box.n

    if kind == "list":
        return [0], *item(0)
    if kind == "dict":
        return {"n": 0}, *item("n")
    if kind == "deep":
        return {"a": [{"n": 0}]}, lambda b: b["a"][0].update(n=b["a"][0]["n"] + 1), lambda b: b["a"][0]["n"]
    if kind == "dataclass":
        return Count(), *attribute()
    if kind == "namespace":
        return types.SimpleNamespace(n=0), *attribute()
    if kind == "deque":
        return deque(maxlen=50), lambda box: box.append(1), len
    if kind == "set":
        return set(), lambda box: box.add(len(box)), len
    return [], lambda box: box.append("x"), len


COUNTERS = ("list", "dict", "deep", "dataclass", "namespace", "deque", "set", "grows")


def _temper(h: Tensor, n: int, shown: bool) -> Tensor:
    return (h / (1 + 0.3 * n)).tanh() if shown else h.tanh()


@hazard(autocast=True)
def counter(world: World, width: int) -> Piece:
    shown = world.choose(True, False)

    def body(cell, h):
        cell.n += 1
        return _temper(cell.lin(h), cell.n, shown)

    return world.cell(width, body, n=0)


@hazard(weight=2, autocast=True)
def counter_in_an_attribute(world: World, width: int) -> Piece:
    box, move, read = _counting(world.choose(*COUNTERS))
    shown = world.choose(True, False)

    def body(cell, h):
        move(cell.box)
        return _temper(cell.lin(h), read(cell.box), shown)

    return world.cell(width, body, box=box)


@hazard(refusable=True)
def counter_in_a_closure(world: World, width: int) -> Piece:
    box, move, read = _counting(world.choose(*COUNTERS))
    shown = world.choose(True, False)
    world.watched.append(lambda: box)

    def body(cell, h):
        move(box)
        return _temper(cell.lin(h), read(box), shown)

    return world.cell(width, body)


@hazard(refusable=True)
def counter_nonlocal(world: World, width: int) -> Piece:
    n, shown = 0, world.choose(True, False)
    world.watched.append(lambda: n)

    def body(cell, h):
        nonlocal n
        n += 1
        return _temper(cell.lin(h), n, shown)

    return world.cell(width, body)


@hazard(refusable=True)
def counter_in_a_global(world: World, width: int) -> Piece:
    GLOBALS["n"] = 0
    world.watched.append(lambda: GLOBALS["n"])

    def body(cell, h):
        GLOBALS["n"] += 1
        return _temper(cell.lin(h), GLOBALS["n"], True)

    return world.cell(width, body)


@hazard()
def history_of_tensors(world: World, width: int) -> Piece:
    def body(cell, h):
        h = cell.lin(h)
        cell.history.append(mean(h))
        return h - 0.1 * sum(cell.history)

    return world.cell(width, body, history=[])


# Changed between forward and backward.


def _toggle(holder: Any, name: str, a: Any, b: Any) -> Callable[[], None]:
    """Return an action that sets the attribute to ``b``, and back to ``a`` the next time."""

    def act() -> None:
        setattr(holder, name, b if getattr(holder, name) == a else a)

    return act


@hazard(autocast=True)
def adapter_switched(world: World, width: int) -> Piece:
    def body(cell, h):
        return (cell.lin(h) + cell.adapters[cell.active](h)).tanh()

    adapters = nn.ModuleDict({k: nn.Linear(width, width) for k in "ab"})
    cell = world.cell(width, body, adapters=adapters, active="a")
    world.between.append(_toggle(cell, "active", "a", "b"))
    return cell


@hazard(autocast=True)
def dropout_rescheduled(world: World, width: int) -> Piece:
    net = world.add(nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2), nn.Linear(width, width)))
    world.between.append(_toggle(net[1], "p", 0.2, 0.6))
    return net


@hazard(autocast=True)
def temperature_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: (cell.lin(h) / cell.temperature).tanh(), temperature=1.0)
    world.between.append(_toggle(cell, "temperature", 1.0, 0.5))
    return cell


@hazard(autocast=True)
def training_flag_changed(world: World, width: int) -> Piece:
    net = world.add(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Tanh()))
    world.between.append(net.eval)
    world.after.append(net.train)
    return net


@hazard()
def settings_changed(world: World, width: int) -> Piece:
    """A dict in an attribute, changed in place."""
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh() * cell.cfg["scale"][0], cfg={"scale": [2.0]})
    world.between.append(lambda: cell.cfg["scale"].__setitem__(0, cell.cfg["scale"][0] * 1.5))
    return cell


@hazard(refusable=True)
def settings_of_a_closure_changed(world: World, width: int) -> Piece:
    cfg = {"scale": 2.0}
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh() * cfg["scale"])
    world.between.append(lambda: cfg.update(scale=cfg["scale"] * 1.5))
    return cell


@hazard()
def function_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.act(cell.lin(h)), act=torch.sin)
    world.between.append(_toggle(cell, "act", torch.sin, torch.tanh))
    return cell


@hazard(refusable=True)
def submodule_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.act(cell.lin(h)), act=nn.Tanh())
    world.between.append(lambda: setattr(cell, "act", nn.SiLU()))
    return cell


@hazard()
def statistics_exchanged(world: World, width: int) -> Piece:
    """Buffers that a forward in training mode writes and does not read, and how fast they follow."""
    net = world.add(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)))

    def act() -> None:
        net[1].running_mean = torch.zeros(width, dtype=net[1].weight.dtype)
        net[1].momentum = 0.7

    world.between.append(act)
    return net


@hazard()
def buffer_exchanged(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.lin(h) * cell.scale, scale=torch.rand(width) + 0.5)
    world.between.append(lambda: setattr(cell, "scale", torch.rand(width, generator=torch.Generator()) + 0.5))
    return cell


@hazard()
def what_is_not_read_changes(world: World, width: int) -> Piece:
    """A spare layer's parameters and buffers."""
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh(), spare=nn.BatchNorm1d(width), note=torch.zeros(3))
    way = world.choose("in place", "data", "replaced", "step")

    def act() -> None:
        with torch.no_grad():
            if way == "in place":
                cell.spare.weight.add_(1)
                cell.spare.running_mean.add_(1)
                cell.note.add_(1)
            elif way == "data":
                cell.spare.weight.data.add_(1)
                cell.note.data.add_(1)
            elif way == "replaced":
                cell.spare.weight = nn.Parameter(torch.ones(width))
                cell.note = torch.ones(3)
            else:
                cell.spare.bias.grad = torch.ones(width)
                torch.optim.SGD(cell.spare.parameters(), 0.1).step()

    world.between.append(act)
    return cell


@hazard()
def critic_is_stepped(world: World, width: int) -> Piece:
    """An object holds two networks; the region runs one of them, and the optimizer steps the other."""
    pair = types.SimpleNamespace(generator=nn.Linear(width, width), critic=nn.Linear(width, 1))
    world.modules += [pair.generator, pair.critic]
    optimizer = torch.optim.SGD(pair.critic.parameters(), 0.1)

    def act() -> None:
        pair.critic.weight.grad = torch.ones_like(pair.critic.weight)
        optimizer.step()

    world.between.append(act)
    return lambda h: pair.generator(h).tanh()


@hazard(refusable=True)
def parameters_are_stepped(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: (cell.lin(h) + cell.bias).tanh(), bias=nn.Parameter(torch.rand(width)))
    which = world.choose("weight", "bias")

    def act() -> None:
        parameter = cell.lin.weight if which == "weight" else cell.bias
        with torch.no_grad():
            parameter.sub_(0.1)

    world.between.append(act)
    return cell


@hazard(refusable=True)
def what_is_read_changes_through_data(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: (cell.lin(h) + cell.shift).tanh(), shift=torch.rand(width))
    which = world.choose("shift", "bias")
    world.between.append(lambda: (cell.shift if which == "shift" else cell.lin.bias).data.add_(0.5))
    return cell


@hazard(refusable=True)
def parameter_exchanged(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh())
    world.leaves.append(cell.lin.weight)
    world.between.append(lambda: setattr(cell.lin, "weight", nn.Parameter(torch.ones(width, width) / 3)))
    return cell


@hazard(refusable=True)
def requires_grad_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.more(cell.lin(h).tanh()), more=nn.Linear(width, width))
    world.between.append(lambda: cell.more.requires_grad_(False))
    world.after.append(lambda: cell.more.requires_grad_(True))
    return cell


@hazard()
def default_dtype_changed(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.lin(h) * torch.full((width,), 0.3) + torch.tensor(0.7))
    world.between.append(lambda: torch.set_default_dtype(torch.float32))
    world.after.append(lambda: torch.set_default_dtype(torch.float64))
    return cell


# Random numbers.


@hazard(weight=2, autocast=True)
def random_of_torch(world: World, width: int) -> Piece:
    kind = world.choose(
        "dropout", "functional", "rand", "randperm", "multinomial", "normal_", "fork", "seeded", "noise"
    )

    def body(cell, h):
        h = cell.lin(h)
        if kind == "dropout":
            return cell.drop(h)
        if kind == "functional":
            return F.dropout(h, 0.3)
        if kind == "rand":
            return h * torch.rand(width)
        if kind == "randperm":
            return h[torch.randperm(len(h))]
        if kind == "multinomial":
            return h * (1 + torch.multinomial(torch.full((width,), 0.5), width, replacement=True))
        if kind == "normal_":
            return h + torch.empty(width).normal_()
        if kind == "noise":
            with torch.no_grad():
                noise = torch.bernoulli(torch.full_like(h, 0.5))
            return h * noise + noise
        if kind == "fork":
            with torch.random.fork_rng([]):
                torch.manual_seed(3)
                return h * torch.rand(width)
        torch.manual_seed(17)
        return h * torch.rand(width)

    return world.cell(width, body, drop=nn.Dropout(0.3))


@hazard(refusable=True)
def generator_of_the_module(world: World, width: int) -> Piece:
    cell = world.cell(width, lambda cell, h: cell.lin(h) * torch.rand(width, generator=cell.generator))
    cell.generator = torch.Generator().manual_seed(5)
    return cell


@hazard(refusable=True, weight=1.5)
def random_of_others(world: World, width: int) -> Piece:
    kind = world.choose("numpy", "python", "rows", "numpy's generator", "dropped layer", "hidden")

    def body(cell, h):
        h = cell.lin(h)
        if kind == "numpy":
            return h * float(np.random.rand())  # noqa: NPY002
        if kind == "python":
            return h * random.random()
        if kind == "rows":
            return h[random.sample(range(len(h)), len(h))]
        if kind == "dropped layer":
            return h.tanh() if random.random() < 0.5 else cell.lin(h).tanh()
        if kind == "hidden":
            np.random.rand()  # noqa: NPY002 - moves the stream, and changes nothing else
            return h
        return h * float(cell.generator.random())

    return world.cell(width, body, generator=np.random.default_rng(5))


# Modules used in other ways than by a call.


@hazard(autocast=True)
def weight_of_another(world: World, width: int) -> Piece:
    other = world.add(nn.Linear(width, width))
    return world.cell(width, lambda cell, h: F.linear(cell.lin(h).tanh(), other.weight))


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w + w.mT) / 2


@hazard(weight=2)
def parametrized(world: World, width: int) -> Piece:
    kind = world.choose(
        "own", "cached", "weight norm", "spectral norm", "old weight norm", "old spectral norm", "pruned"
    )
    cell = world.cell(width, lambda cell, h: cell.lin(cell.lin(h).tanh()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in ("own", "cached"):
            parametrize.register_parametrization(cell.lin, "weight", Symmetric())
        if kind == "cached":
            world.contexts.append(parametrize.cached)
        if kind == "weight norm":
            parametrizations.weight_norm(cell.lin)
        if kind == "spectral norm":
            parametrizations.spectral_norm(cell.lin)
        if kind == "old weight norm":
            nn.utils.weight_norm(cell.lin)
        if kind == "old spectral norm":
            nn.utils.spectral_norm(cell.lin)
        if kind == "pruned":
            prune.l1_unstructured(cell.lin, "weight", 3)
    return cell


@hazard(autocast=True)
def tied(world: World, width: int) -> Piece:
    net = world.add(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)))
    net[2].weight = net[0].weight
    return net


@hazard()
def called_functionally(world: World, width: int) -> Piece:
    def body(cell, h):
        new = {"weight": cell.lin.weight * cell.gain, "bias": cell.lin.bias}
        return torch.func.functional_call(cell.lin, new, h).tanh()

    return world.cell(width, body, gain=nn.Parameter(torch.rand(width)))


@hazard(weight=0.1)
def scripted(world: World, width: int) -> Piece:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return world.add(nn.Sequential(torch.jit.script(nn.Linear(width, width)), nn.Tanh()))


@hazard(weight=0.1)
def many_layers(world: World, width: int) -> Piece:
    layers = [*(nn.Identity() for _ in range(260)), world.add(nn.BatchNorm1d(width))]

    def run(h: Tensor) -> Tensor:
        for layer in layers:
            h = layer(h)
        return h

    return run


# What is left behind, hooks, and autograd inside.


@hazard(autocast=True)
def left_on_the_module(world: World, width: int) -> Piece:
    kind = world.choose("loss", "features", "in a list")

    def body(cell, h):
        h = cell.lin(h).tanh()
        value = h.square().mean() if kind == "loss" else h * 2
        cell.aux = [value] if kind == "in a list" else value
        return h

    cell = world.cell(width, body, aux=None)
    world.left.append(lambda: cell.aux[0] if isinstance(cell.aux, list) else cell.aux)
    return cell


@hazard(autocast=True)
def forward_hook(world: World, width: int) -> Piece:
    kind = world.choose("stores", "changes", "changes the input")
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh())
    if kind == "stores":
        cell.lin.register_forward_hook(lambda module, args, output: setattr(module, "seen", output))
        world.left.append(lambda: getattr(cell.lin, "seen", None))
    elif kind == "changes":
        cell.lin.register_forward_hook(lambda module, args, output: output * 2)
    else:
        cell.lin.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    return cell


@hazard(refusable=True)
def forward_hook_that_collects(world: World, width: int) -> Piece:
    collected: list[Tensor] = []
    world.watched.append(lambda: collected)
    cell = world.cell(width, lambda cell, h: cell.lin(h).tanh())
    cell.lin.register_forward_hook(lambda module, args, output: collected.append(output.detach()))
    return cell


@hazard()
def backward_hook(world: World, width: int) -> Piece:
    kind = world.choose("module", "tensor", "changes")

    def body(cell, h):
        h = cell.lin(h)
        if kind != "module" and h.requires_grad:
            h.register_hook(lambda g: g * 2 if kind == "changes" else cell.seen.append(1))
        return h.tanh()

    cell = world.cell(width, body, seen=[])
    if kind == "module":
        cell.lin.register_full_backward_hook(lambda module, gi, go: cell.seen.append(1))
    return cell


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.factor = factor
        return factor * h**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        return ctx.factor * 3 * h**2 * grads[0], None


@hazard(autocast=True)
def custom_function(world: World, width: int) -> Piece:
    return world.cell(width, lambda cell, h: Cube.apply(cell.lin(h).tanh(), 0.5))


@hazard()
def gradient_inside(world: World, width: int) -> Piece:
    create = world.choose(True, False)

    def body(cell, h):
        z = h.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(cell.lin(z).sin().square().sum(), z, create_graph=create)
        return cell.lin(h).tanh() + 0.1 * g

    return world.cell(width, body)


@hazard(autocast=True)
def partly_without_grad(world: World, width: int) -> Piece:
    kind = world.choose("no_grad", "detach", "frozen")
    cell = world.cell(width, lambda cell, h: h)
    if kind == "frozen":
        cell.lin.requires_grad_(False)

    def body(cell, h):
        if kind == "no_grad":
            with torch.no_grad():
                gate = cell.lin(h).sigmoid()
            return h * gate
        return cell.lin(h).tanh() * (h.detach() if kind == "detach" else h)

    cell.body = body
    return cell


@hazard(autocast=True)
def in_place_inside(world: World, width: int) -> Piece:
    return world.cell(width, lambda cell, h: cell.lin(h).mul_(0.5).add_(h).tanh_())


@hazard(weight=3, autocast=True)
def plain_layers(world: World, width: int) -> Piece:
    return world.add(nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, width)))
