"""Hazards: state that a region reads and writes, in buffers, attributes, closures and globals."""

from __future__ import annotations

import types
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from seam_world import GLOBALS, Piece, World, hazard
from torch import Tensor, nn
from torch.nn import functional as F


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


@hazard(refusable=True)  # where they draw their first values between other random numbers
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
    # What does not show in the output is the region's own affair: it can ask recollect.in_backward().
    box, move, read = _counting(world.choose(*COUNTERS))
    world.watched.append(lambda: box)

    def body(cell, h):
        move(box)
        return _temper(cell.lin(h), read(box), True)

    return world.cell(width, body)


@hazard(refusable=True)
def counter_nonlocal(world: World, width: int) -> Piece:
    n = 0
    world.watched.append(lambda: n)

    def body(cell, h):
        nonlocal n
        n += 1
        return _temper(cell.lin(h), n, True)

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
