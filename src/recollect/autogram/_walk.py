"""The graph behind an output: which captures are in it, and who uses which parameter."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

from recollect.autogram._capture import Capture, Recorder
from recollect.autogram._operations import Step, kind_of, looks_up, settings_of

__all__ = ["Anatomy", "Graph", "Use", "forget", "walk"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Use:
    """An edge of the graph that ends in a parameter.

    Attributes:
        node: the number of the node that it leaves.
        position: which of that node's edges it is.
        capture: the number of the capture in whose layer this happens; None: in no layer that has a rule.
    """

    node: int
    position: int
    capture: int | None


@dataclass(slots=True)
class Graph:
    """What autograd recorded, its nodes numbered in an order that depends on nothing but the graph's form.

    Attributes:
        nodes: autograd's nodes.
        kinds: theirs.
        edges: for each node, the numbers of the nodes behind its edges; -1 where there is none.
        indices: for each node, which outputs of these nodes the edges come from.
        settings: what each node keeps of how its operation was called.
        shapes: of each node's outputs; None for a tensor that has none, as a nested one.
        output: which output of the first node the losses are.
        leaves: the accumulators of the parameters that count, and casts of a parameter (autocast makes one for all of
            its uses): the parameter's id by the number of the node.
        sources: for each of an engine's captures, the nodes that its layer's inputs come from.
        dtypes: of the losses, and of these parameters.
        anatomy: what follows from all that.
    """

    nodes: list[Any] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)
    edges: list[tuple[int, ...]] = field(default_factory=list)
    indices: list[tuple[int, ...]] = field(default_factory=list)
    settings: list[tuple[Any, ...]] = field(default_factory=list)
    shapes: list[tuple[torch.Size | None, ...]] = field(default_factory=list)
    output: int = 0
    leaves: dict[int, int] = field(default_factory=dict)
    sources: dict[int, tuple[int, ...]] = field(default_factory=dict)
    dtypes: list[torch.dtype] = field(default_factory=list)
    anatomy: Anatomy | None = None

    @property
    def form(self) -> tuple[Any, ...]:
        """What two graphs of the same form have in common, hashable."""
        calls = [self.nodes[capture].call for capture in self.sources]
        parts = (self.kinds, self.edges, self.indices, self.settings, self.shapes, self.dtypes)
        layers = tuple((call.layer, call.layer.training, call.shapes) for call in calls)
        return self.output, layers, *map(tuple, parts), *(tuple(part.items()) for part in (self.leaves, self.sources))

    def find_anatomy(self) -> Anatomy:
        """Return what follows from the graph's form."""
        if self.anatomy is None:
            self.anatomy = _dissect(self)
        return self.anatomy

    @property
    def captures(self) -> list[int]:
        """The numbers of the captures whose layers' insides nobody else uses, outermost first."""
        return self.find_anatomy().captures

    @property
    def uses(self) -> dict[int, list[Use]]:
        """For each parameter (by id) that is reached, all edges that end there."""
        return self.find_anatomy().uses

    @property
    def owners(self) -> dict[int, int]:
        """For each node inside a layer that has a rule, the number of its capture."""
        return self.find_anatomy().owners

    @property
    def parents(self) -> list[list[int]]:
        """For each node, the numbers of those with an edge to it."""
        return self.find_anatomy().parents

    @property
    def functions(self) -> list[int]:
        """The nodes of functions in Python that are not of torch or of this package, and torch's checkpoints."""
        return self.find_anatomy().functions

    @property
    def towards_captures(self) -> set[int]:
        """The nodes that a backward pass down to all captures comes by."""
        return self.find_anatomy().towards_captures

    @property
    def idle(self) -> list[int]:
        """The nodes inside a layer that has a rule by which a backward pass down to all captures does not come."""
        return [node for node in self.owners if node not in self.towards_captures]

    def touches_data(self, node: int) -> bool:
        """Whether anything that needs no gradient comes in behind a node, as data does.

        Indices are data too, and whole networks start from them; but what is looked up in one parameter alone, as
        embeddings of positions are, is no more than a parameter.
        """
        waiting, seen = [node], {node}
        leaves, indices = 0, False
        while waiting:
            number = waiting.pop()
            if number in self.leaves:
                leaves += 1
                continue
            indices = indices or looks_up(self.kinds[number])
            for child in self.edges[number]:
                if child < 0:
                    return True
                if child not in seen:
                    seen.add(child)
                    waiting.append(child)
        return indices and leaves > 1

    def shape(self, node: int, output: int) -> torch.Size:
        """Return the shape of a node's output, which is that of its gradient."""
        shape = self.shapes[node][output]
        assert shape is not None
        return shape

    def step(self, node: int) -> Step:
        """Return a node's operation."""
        ins = [
            None if child < 0 else self.shapes[child][index]
            for child, index in zip(self.edges[node], self.indices[node], strict=True)
        ]
        return Step(self.kinds[node], self.settings[node], self.shapes[node], ins)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What follows from a graph's form: see the attributes of these names of :class:`Graph`."""

    captures: list[int]
    uses: dict[int, list[Use]]
    owners: dict[int, int]
    parents: list[list[int]]
    towards_captures: set[int]
    functions: list[int]


def walk(output: Tensor, recorder: Recorder, parameters: Mapping[int, Tensor]) -> Graph:
    """Return the graph behind a tensor.

    Args:
        output: requires a gradient.
        recorder: whose captures are looked for.
        parameters: those that count, by id.
    """
    graph = Graph()
    edge = get_gradient_edge(output)
    graph.output = edge.output_nr
    graph.dtypes.append(output.dtype)
    numbers = _number(edge.node, graph)
    for number, kind in enumerate(graph.kinds):
        if kind == "AccumulateGrad":
            key = id(graph.nodes[number].variable)
            if key in parameters:
                graph.leaves[number] = key
                graph.dtypes.append(parameters[key].dtype)
        elif kind is Capture and graph.nodes[number].recorder is recorder:
            sources = (numbers.get(source, -1) for source in graph.nodes[number].call.sources)
            graph.sources[number] = _same(tuple(sources), _NUMBERS)
    for number, kind in enumerate(graph.kinds):
        if kind == "ToCopyBackward0" and graph.edges[number][0] in graph.leaves:
            graph.leaves[number] = graph.leaves[graph.edges[number][0]]
    return graph


def forget(node: Any) -> None:
    """Free the tensors that a node has saved, as a backward pass that comes by it does at its end."""
    kind: Any = type(node)
    for name in _saved_names(kind):
        with suppress(RuntimeError):  # it is free, or holds nothing
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple) else (saved,):
                with suppress(RuntimeError):  # it has hooks, as inside a frame, or holds nothing
                    one.register_hooks(_drop, _refuse)


@functools.cache
def _saved_names(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _drop(tensor: Tensor) -> None:
    return None


def _refuse(nothing: None) -> Tensor:
    raise RuntimeError(
        "going backward through a graph that compute_gramian(..., retain_graph=False) or compute_norms(..., "
        "retain_graph=False) has freed; give retain_graph=True if a backward pass follows"
    )


def _dissect(graph: Graph) -> Anatomy:
    owners: dict[int, int] = {}
    leaky: set[int] = set()
    captures = []
    for capture in graph.sources:
        if capture not in owners:  # else: a layer inside a layer that has a rule
            _claim(graph, capture, owners, leaky)
            captures.append(capture)
    _find_leaks(graph, owners, leaky)
    captures = [capture for capture in captures if capture not in leaky]
    owners = {node: owner for node, owner in owners.items() if owner not in leaky}
    uses: dict[int, list[Use]] = {}
    parents: list[list[int]] = [[] for _ in graph.nodes]
    for node, children in enumerate(graph.edges):
        for position, child in enumerate(children):
            if child >= 0:
                parents[child].append(node)
            if child in graph.leaves and node not in graph.leaves:
                uses.setdefault(graph.leaves[child], []).append(Use(node, position, owners.get(node)))
    functions = [node for node, kind in enumerate(graph.kinds) if not isinstance(kind, str) and _is_foreign(kind)]
    return Anatomy(captures, uses, owners, parents, _above(parents, captures), functions)


def _is_foreign(function: Any) -> bool:
    """Whether what a function does in its backward is known neither here nor to torch."""
    return function is CheckpointFunction or function.__module__.partition(".")[0] not in ("torch", "recollect")


def _above(parents: list[list[int]], nodes: list[int]) -> set[int]:
    """Return these nodes and all that lead to them."""
    waiting, found = list(nodes), set(nodes)
    while waiting:
        for parent in parents[waiting.pop()]:
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def _number(root: Any, graph: Graph) -> dict[Any, int]:
    """Number all nodes, parents before what only they lead to."""
    numbers = {root: 0}
    nodes = graph.nodes
    nodes.append(root)
    for node in nodes:  # which grows
        edges, indices = [], []
        for child, index in node.next_functions:
            indices.append(index)
            if child is None:
                edges.append(-1)
                continue
            number = numbers.get(child)
            if number is None:
                number = numbers[child] = len(nodes)
                nodes.append(child)
            edges.append(number)
        kind = kind_of(node)
        graph.kinds.append(kind)
        graph.edges.append(_same(tuple(edges), _NUMBERS))
        graph.indices.append(_same(tuple(indices), _NUMBERS))
        graph.shapes.append(_same(_shapes(node, kind), _SHAPES))
        graph.settings.append(_same((kind, settings_of(node, kind)), _SETTINGS)[1])
    return numbers


def _shapes(node: Any, kind: Any) -> tuple[torch.Size | None, ...]:
    if kind == "AccumulateGrad":
        return (None if node.variable.is_nested else node.variable.shape,)
    found = node._input_metadata
    if len(found) == 1 and not found[0].is_nested_tensor:
        return (torch.Size(found[0].shape),)
    return tuple(None if out.is_nested_tensor else torch.Size(out.shape) for out in found)


# Tuples that come again with every graph are kept once: new ones by the thousand set off garbage collections, which
# take longer than the walk. (Each sort for itself, and settings with their kind: a size equals a tuple of its numbers.)
_NUMBERS: dict[Any, Any] = {}
_SHAPES: dict[Any, Any] = {}
_SETTINGS: dict[Any, Any] = {}
_MOST = 2**16


def _same(value: _T, seen: dict[Any, Any]) -> _T:
    """Return what is equal to a value and was seen before."""
    if len(seen) > _MOST:
        seen.clear()
    known: _T = seen.setdefault(value, value)
    return known


def _claim(graph: Graph, capture: int, owners: dict[int, int], leaky: set[int]) -> None:
    """Find the nodes of a capture's layer: from its outputs to where its inputs come from."""
    ends = set(graph.sources[capture])
    waiting = list(graph.edges[capture][1:])  # the first leads to the engine's leaf
    while waiting:
        node = waiting.pop()
        if node < 0 or node in ends or graph.kinds[node] == "AccumulateGrad" or node in graph.leaves:
            continue
        if node not in owners:
            owners[node] = capture
            waiting.extend(graph.edges[node])
        elif owners[node] != capture:
            leaky |= {owners[node], capture}


def _find_leaks(graph: Graph, owners: Mapping[int, int], leaky: set[int]) -> None:
    """A layer whose inside is used by others is not what its captured outputs say: nothing is claimed of it."""
    for node, children in enumerate(graph.edges):
        own = owners.get(node, node)
        for child in children:
            owner = owners.get(child)
            if owner is not None and owner != own:
                leaky.add(owner)
