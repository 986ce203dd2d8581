"""How a program calls its regions: how a region reaches its pieces, what it takes, and what it returns.

A way of calling is ``make(world, run)`` for a function ``run`` of one tensor; it returns ``call(h)``, which gives the
next tensor and a list of what else came out.
"""

from __future__ import annotations

import functools
import importlib.util
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from seam_world import GLOBALS, Hazard, Piece, World, hazard
from torch import Tensor, nn

Call = Callable[[Tensor], tuple[Tensor, list[Any]]]
CALLS: dict[str, Hazard] = {}
WIDTH = 6
way = functools.partial(hazard, table=CALLS)

Pair = namedtuple("Pair", "h scale")


@dataclass
class State:
    h: Tensor
    scale: Any
    note: str = ""


class Holder:
    """A plain object that owns the pieces."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces

    def run(self, h: Tensor) -> Tensor:
        for piece in self.pieces:
            h = piece(h)
        return h

    __call__ = run


class Region(nn.Module):
    """A module that owns the pieces."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(piece for piece in pieces if isinstance(piece, nn.Module))
        self.pieces = pieces

    def forward(self, h: Tensor) -> Tensor:
        for piece in self.pieces:
            h = piece(h)
        return h


def reach(world: World, pieces: Sequence[Piece], parts: bool = True) -> Piece:
    """Return a function that runs the pieces one after the other, which it reaches in one of many ways."""
    kinds = ["closure", "module", "holder", "callable", "partial", "forward", "dict", "global", "default", "direct"]
    kind = world.choose(*kinds, *(["comprehension"] if parts else []))
    if kind == "module":
        return world.add(Region(pieces))
    if kind == "holder":
        return Holder(pieces).run
    if kind == "callable":
        return Holder(pieces)
    if kind == "partial":
        return functools.partial(Holder.run, Holder(pieces))
    if kind == "forward":
        return world.add(Region(pieces)).forward
    if kind == "direct":  # their attributes and buffers are nobody's to see: no module is called
        world.refusable.append("forward called directly")
        return lambda h: Holder([getattr(piece, "forward", piece) for piece in pieces]).run(h)
    if kind == "dict":
        table = {"pieces": dict(enumerate(pieces))}
        return lambda h: functools.reduce(lambda h, i: table["pieces"][i](h), range(len(pieces)), h)
    if kind == "global":
        name = f"pieces {len(GLOBALS)}"
        GLOBALS[name] = pieces

        def run_global(h: Tensor) -> Tensor:
            for piece in GLOBALS[name]:
                h = piece(h)
            return h

        return run_global
    if kind == "default":
        holder = Holder(pieces)
        return lambda h, holder=holder: holder.run(h)
    if kind == "comprehension":
        return lambda h: torch.cat([Holder(pieces).run(part) for part in h.chunk(2)])

    def run(h: Tensor) -> Tensor:
        for piece in pieces:
            h = piece(h)
        return h

    return run


# Arguments.


@way(weight=6, autocast=True)
def tensor(world: World, run: Piece) -> Call:
    return lambda h: (world.wrap.checkpoint(run, h), [])


def _scaled(run: Piece) -> Callable[..., Tensor]:
    def region(h: Tensor, scale: Any = 1.0) -> Tensor:
        return run(h) * scale

    return region


@way(autocast=True)
def keyword(world: World, run: Piece) -> Call:
    scale = world.leaf(WIDTH)
    return lambda h: (world.wrap.checkpoint(_scaled(run), h, scale=scale), [])


@way()
def all_by_keyword(world: World, run: Piece) -> Call:
    return lambda h: (world.wrap.checkpoint(_scaled(run), h=h, scale=2.0), [])


@way(refusable=True)
def argument_changed_after(world: World, run: Piece) -> Call:
    mask = torch.arange(WIDTH) % 2 > 0
    named = world.choose("keyword", "positional", "partial")

    def region(h: Tensor, mask: Tensor) -> Tensor:
        return run(h).masked_fill(~mask, 0.5)

    def call(h: Tensor) -> tuple[Tensor, list[Any]]:
        if named == "keyword":
            return world.wrap.checkpoint(region, h, mask=mask), []
        if named == "positional":
            return world.wrap.checkpoint(region, h, mask), []
        return world.wrap.checkpoint(functools.partial(region, mask=mask), h), []

    world.between.append(mask.logical_not_)
    return call


def _open(state: Any) -> tuple[Tensor, Any]:
    if isinstance(state, dict):
        return state["h"], state["scale"]
    if isinstance(state, State):
        return state.h, state.scale
    if isinstance(state, (list, tuple)):
        h, scale = state
        return h, scale[0] if isinstance(scale, list) else scale
    return state.x, state.scale


def _close(kind: str, h: Tensor, scale: Any) -> Any:
    if kind == "data":
        from torch_geometric.data import Data

        return Data(x=h, scale=scale)
    make = {
        "dict": lambda: {"h": h, "scale": scale},
        "ordered": lambda: OrderedDict(h=h, scale=scale),
        "namedtuple": lambda: Pair(h, scale),
        "dataclass": lambda: State(h, scale),
        "list": lambda: [h, [scale]],
        "tuple": lambda: (h, scale),
    }[kind]
    return make()


GRAPHS = ("data",) if importlib.util.find_spec("torch_geometric") else ()
CONTAINERS = ("dict", "ordered", "namedtuple", "dataclass", "list", "tuple", *GRAPHS)


@way(weight=2)
def container(world: World, run: Piece) -> Call:
    kind, returned, scale = world.choose(*CONTAINERS), world.choose(*CONTAINERS), world.leaf(WIDTH)

    def region(state: Any) -> Any:
        h, scale = _open(state)
        h = run(h) * scale
        return _close(returned, h, scale * 2)

    def call(h: Tensor) -> tuple[Tensor, list[Any]]:
        h, more = _open(world.wrap.checkpoint(region, _close(kind, h, scale)))
        return h, [more]

    return call


@way(refusable=True)
def container_mutated_by_the_region(world: World, run: Piece) -> Call:
    kind = world.choose("dict", "ordered", "dataclass", *GRAPHS)

    def region(state: Any) -> Any:
        h, scale = _open(state)
        if isinstance(state, dict):
            state["h"] = run(h) * scale
        else:
            setattr(state, "h" if isinstance(state, State) else "x", run(h) * scale)
        return state

    def call(h: Tensor) -> tuple[Tensor, list[Any]]:
        return _open(world.wrap.checkpoint(region, _close(kind, h, torch.tensor(0.7))))[0], []

    return call


@way()
def container_mutated_by_the_caller(world: World, run: Piece) -> Call:
    lists: list[list[Any]] = []

    def call(h: Tensor) -> tuple[Tensor, list[Any]]:
        lists.append([h, torch.tensor(0.7)])
        return world.wrap.checkpoint(lambda state: run(state[0]) * state[1], lists[-1]), []

    def act() -> None:
        for one in lists:
            one[1] = torch.tensor(5.0)

    world.between.append(act)
    return call


@way(refusable=True)
def settings_mutated_by_the_caller(world: World, run: Piece) -> Call:
    settings = {"scale": [0.7]}
    world.between.append(lambda: settings["scale"].__setitem__(0, settings["scale"][0] + 1))
    return lambda h: (world.wrap.checkpoint(lambda h, settings: run(h) * settings["scale"][0], h, settings), [])


@way()
def partial_of_tensors(world: World, run: Piece) -> Call:
    scale = world.leaf(WIDTH)
    region = functools.partial(lambda w, h, shift: run(h) * w + shift, scale, shift=torch.ones(WIDTH))
    return lambda h: (world.wrap.checkpoint(region, h), [])


@way()
def one_tensor_twice(world: World, run: Piece) -> Call:
    return lambda h: (world.wrap.checkpoint(lambda a, b: run(a) * 2 if a is b else run(a), h, h), [])


@way()
def other_arguments(world: World, run: Piece) -> Call:
    leaf, index = world.leaf(3, WIDTH), torch.tensor([0, 2, 1, 0, 2, 1])

    def region(h: Tensor, index: Tensor, none: Any, name: str, table: Tensor) -> Tensor:
        return run(h) + table[index[: len(h)]] if none is None and name == "add" else h

    return lambda h: (world.wrap.checkpoint(region, h, index, None, "add", leaf), [])


@way()
def strided(world: World, run: Piece) -> Call:
    def call(h: Tensor) -> tuple[Tensor, list[Any]]:
        row = torch.ones(1, WIDTH).expand(len(h), WIDTH)
        return world.wrap.checkpoint(lambda t, r: run(t.mT.contiguous()) * r, h.mT, row), []

    return call


@way()
def parameter(world: World, run: Piece) -> Call:
    weight = nn.Parameter(torch.rand(WIDTH))
    world.leaves.append(weight)
    return lambda h: (world.wrap.checkpoint(lambda h, w: run(h) * w.cos(), h, weight), [])


@way(refusable=True)
def argument_in_place(world: World, run: Piece) -> Call:
    def region(h: Tensor) -> Tensor:
        h.mul_(0.9)
        return run(h)

    return lambda h: (world.wrap.checkpoint(region, h.clone()), [])


# Outputs.


@way(weight=3)
def outputs(world: World, run: Piece) -> Call:
    kinds = ("aux", "dict", "dataclass", "namedtuple", "nested", "input", "view", "constant", "leaf", "integer")
    kind = world.choose(*kinds, "others", "detached", "twice", *GRAPHS)
    leaf = world.leaf(WIDTH)

    def region(other: Tensor, h: Tensor) -> Any:
        y = run(h)
        return {
            "aux": lambda: (y, y.square().mean()),
            "dict": lambda: {"y": y, "aux": {"more": y.sin()}},
            "dataclass": lambda: State(y, [y.sin(), 3]),
            "namedtuple": lambda: Pair(y, y.sum(0)),
            "nested": lambda: (y, [None, 3, (y.exp(),)]),
            "input": lambda: (y, h),
            "view": lambda: (y, y[1:], y.mT),
            "constant": lambda: (y, torch.ones(3)),
            "leaf": lambda: (y * leaf, leaf),
            "integer": lambda: (y, y.detach().argmax(1)),
            "others": lambda: (y * other, other),
            "detached": lambda: (y, y.detach() * 2),
            "twice": lambda: (y, y),
            "data": lambda: _close("data", y, y.sin()),
        }[kind]()

    def call(h: Tensor) -> tuple[Tensor, list[Any]]:
        other = leaf * 1.5
        out = world.wrap.checkpoint(lambda h: region(other, h), h)
        if isinstance(out, dict):
            return out["y"], [out["aux"]["more"]]
        if kind in ("dataclass", "data"):
            y, more = _open(out)
            return y, [more]
        return out[0], list(out[1:])

    return call
