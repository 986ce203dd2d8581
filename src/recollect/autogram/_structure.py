"""Where each tensor of a graph has the losses apart: decided from the graph's operations, without a backward pass.

Every axis of the losses is carried from the losses down, node by node (:mod:`recollect.autogram._operations`). Where a
tensor that several operations use has it in one and the same place by all of these ways, each loss has entries of its
own in the tensor's gradient, whatever the data are. An axis that a view takes apart is taken apart itself: losses of
all tokens [B T] become [B, T].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from recollect.autogram._layout import Axis, Layout
from recollect.autogram._operations import Lost, Place, Split, Step, carry, reaches
from recollect.autogram._walk import Graph

__all__ = ["Layouts", "Structure", "find_structure"]

_State = tuple[Place | Lost, ...]
"""Where a tensor has each axis of the losses."""


@dataclass(frozen=True, slots=True)
class Layouts:
    """Where the outputs of each node of a graph have the losses of one backward pass.

    Attributes:
        axes: the numbers of the losses' axes that the pass is for.
        batch: the number of losses, B.
        found: for each node that gets a gradient, the layout of each of its outputs; None where one gets none.
        free: the nodes of those whose gradient has the losses nowhere apart, and why.
    """

    axes: tuple[int, ...] = ()
    batch: int = 1
    found: dict[int, tuple[Layout | None, ...]] = field(default_factory=dict)
    free: dict[int, Lost] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Structure:
    """Where every tensor has which axes of the losses.

    Attributes:
        sizes: of the losses' axes, by which the losses are counted in the order of their entries.
        dims: for each of these axes, the dimension of the output that it is a part of.
        states: for each node that gets a gradient, and each of its outputs.
    """

    sizes: tuple[int, ...]
    dims: tuple[int, ...]
    states: dict[int, tuple[_State | None, ...]]

    def layouts(self, axes: Sequence[int]) -> Layouts:
        """Return where the losses are apart in a pass for all along these axes, and one along the others."""
        layouts = Layouts(tuple(axes), math.prod(self.sizes[axis] for axis in axes))
        for node, states in self.states.items():
            found: list[Layout | None] = []
            for state in states:
                if state is None:
                    found.append(None)
                    continue
                places = [state[axis] for axis in axes]
                lost = next((place for place in places if isinstance(place, Lost)), None)
                if lost is not None:
                    layouts.free.setdefault(node, lost)
                    found.append(None)
                else:
                    found.append(_layout(places, [self.sizes[axis] for axis in axes]))
            layouts.found[node] = tuple(found)
        return layouts


def _layout(places: Sequence[Place | Lost], sizes: Sequence[int]) -> Layout:
    pairs = zip(places, sizes, strict=True)
    return Layout(tuple(Axis(place.dim, size, place.inner) for place, size in pairs if isinstance(place, Place)))


def find_structure(graph: Graph, shape: Sequence[int]) -> Structure:
    """Return where every tensor of a graph has which axes of the losses.

    Args:
        graph: the losses'.
        shape: theirs.
    """
    axes = [_Axis(size, dim, 1) for dim, size in enumerate(shape) if size > 1]
    order = _from_the_output(graph)
    while True:
        result = _carry_all(graph, order, axes, len(shape))
        if not isinstance(result, _Cut):
            return Structure(tuple(axis.size for axis in axes), tuple(axis.dim for axis in axes), result)
        cut = axes[result.axis]
        outer = replace(cut, size=cut.size // result.inner, inner=cut.inner * result.inner)
        axes[result.axis : result.axis + 1] = [outer, replace(cut, size=result.inner)]


@dataclass(frozen=True, slots=True)
class _Axis:
    """An axis of the losses, which is a dimension of the output or a part of one."""

    size: int
    dim: int
    inner: int


@dataclass(frozen=True, slots=True)
class _Cut:
    """Which axis is to be taken apart, and how large its inner part is."""

    axis: int
    inner: int


def _from_the_output(graph: Graph) -> list[int]:
    """Return all nodes, each behind all that lead to it."""
    waiting = [len(parents) for parents in graph.parents]
    order = [0]
    for node in order:
        for child in graph.edges[node]:
            if child >= 0:
                waiting[child] -= 1
                if waiting[child] == 0:
                    order.append(child)
    return order


def _carry_all(
    graph: Graph, order: Sequence[int], axes: Sequence[_Axis], dims: int
) -> dict[int, tuple[_State | None, ...]] | _Cut:
    states: dict[int, list[_State | None]] = {}
    start = tuple(Place(axis.dim, axis.inner) for axis in axes)
    _outputs(graph, states, 0)[graph.output] = start
    for node in order:
        outputs = states.get(node)
        if outputs is None or graph.edges[node] == ():
            continue
        step = graph.step(node)
        for edge, (child, index) in enumerate(zip(graph.edges[node], graph.indices[node], strict=True)):
            if child < 0 or child in graph.leaves or graph.kinds[child] == "AccumulateGrad":
                continue
            for output, state in enumerate(outputs):
                if state is None or not reaches(step, output, edge):
                    continue
                arriving = _carry_state(step, node, output, state, axes, edge)
                if isinstance(arriving, _Cut):
                    return arriving
                places = _outputs(graph, states, child)
                known = places[index]
                places[index] = arriving if known is None else _both(known, arriving, node)
    return {node: tuple(outputs) for node, outputs in states.items()}


def _outputs(graph: Graph, states: dict[int, list[_State | None]], node: int) -> list[_State | None]:
    if node not in states:
        states[node] = [None] * max(1, len(graph.shapes[node]))
    return states[node]


def _carry_state(step: Step, node: int, output: int, state: _State, axes: Sequence[_Axis], edge: int) -> _State | _Cut:
    """Return the state that comes to an input."""
    arriving: list[Place | Lost] = []
    for number, place in enumerate(state):
        if isinstance(place, Lost):
            arriving.append(place)
            continue
        carried = carry(step, output, place, axes[number].size, edge)
        if isinstance(carried, Split):
            return _Cut(number, carried.inner)
        if isinstance(carried, Lost):
            carried = Lost(carried.why, node)
        arriving.append(carried)
    return tuple(arriving)


def _both(known: _State, arriving: _State, node: int) -> _State:
    return tuple(_meet(node, *pair) for pair in zip(known, arriving, strict=True))


def _meet(node: int, first: Place | Lost, second: Place | Lost) -> Place | Lost:
    if first == second:
        return first
    if isinstance(first, Lost) and isinstance(second, Lost):
        return first if first.why != "summed" else second
    lost = first if isinstance(first, Lost) else second
    if isinstance(lost, Lost) and lost.why not in ("summed", "met"):
        return lost
    return Lost("met", node)
