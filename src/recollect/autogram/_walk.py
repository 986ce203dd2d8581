"""The graph behind an output: which captures are in it, and who uses which parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from recollect.autogram._capture import Capture, Recorder
from recollect.autogram._operations import Step, kind_of, looks_up, settings_of

__all__ = ["Graph", "Use", "walk"]


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
        edges: for each node, the numbers of the nodes behind its edges; -1 where there is none.
        indices: for each node, which outputs of these nodes the edges come from.
        captures: the numbers of an engine's captures, outermost first.
        uses: for each parameter (by id) that is reached, all edges that end there.
        owners: for each node inside a layer that has a rule, the number of its capture.
        kinds: of the nodes.
        settings: what each keeps of how its operation was called.
        shapes: of each node's outputs; None for a tensor that has none, as a nested one.
        output: which output of the first node the losses are.
        leaves: the accumulators of the parameters that count, and casts of a parameter (autocast makes one for all of
            its uses): the parameter's id by the number of the node.
        parents: for each node, the numbers of those with an edge to it.
        towards_captures: the nodes that a backward pass down to all captures comes by.
    """

    nodes: list[Any] = field(default_factory=list)
    edges: list[tuple[int, ...]] = field(default_factory=list)
    indices: list[tuple[int, ...]] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)
    settings: list[tuple[Any, ...]] = field(default_factory=list)
    shapes: list[tuple[torch.Size | None, ...]] = field(default_factory=list)
    output: int = 0
    captures: list[int] = field(default_factory=list)
    uses: dict[int, list[Use]] = field(default_factory=dict)
    owners: dict[int, int] = field(default_factory=dict)
    leaves: dict[int, int] = field(default_factory=dict)
    towards_captures: set[int] = field(default_factory=set)
    parents: list[list[int]] = field(default_factory=list)

    @property
    def form(self) -> tuple[Any, ...]:
        """What two graphs of the same form have in common, hashable."""
        calls = [self.nodes[capture].call for capture in self.captures]
        parts = (self.kinds, self.edges, self.indices, self.settings, self.shapes, self.captures, self.leaves.items())
        return self.output, tuple((call.layer, call.shapes) for call in calls), *map(tuple, parts)

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
    numbers = _number(edge.node, graph)
    _find_leaves(graph, parameters)
    owners = graph.owners
    leaky: set[int] = set()
    captures = [k for k in graph.captures if graph.nodes[k].recorder is recorder]
    graph.captures = []
    for capture in captures:
        if capture not in owners:  # else: a layer inside a layer that has a rule
            _claim(graph, capture, numbers, owners, leaky)
            graph.captures.append(capture)
    _find_leaks(graph, owners, leaky)
    graph.captures = [capture for capture in graph.captures if capture not in leaky]
    graph.owners = {node: owner for node, owner in owners.items() if owner not in leaky}
    for node, children in enumerate(graph.edges):
        for position, child in enumerate(children):
            if child in graph.leaves and node not in graph.leaves:
                use = Use(node, position, graph.owners.get(node))
                graph.uses.setdefault(graph.leaves[child], []).append(use)
    graph.parents = [[] for _ in graph.nodes]
    for node, children in enumerate(graph.edges):
        for child in children:
            if child >= 0:
                graph.parents[child].append(node)
    graph.towards_captures = _above(graph, graph.captures)
    return graph


def _above(graph: Graph, nodes: list[int]) -> set[int]:
    """Return these nodes and all that lead to them."""
    waiting, found = list(nodes), set(nodes)
    while waiting:
        for parent in graph.parents[waiting.pop()]:
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def _number(root: Any, graph: Graph) -> dict[Any, int]:
    """Number all nodes, parents before what only they lead to."""
    numbers = {root: 0}
    graph.nodes.append(root)
    k = 0
    while k < len(graph.nodes):
        node = graph.nodes[k]
        children = []
        for child, _ in node.next_functions:
            if child is None:
                children.append(-1)
                continue
            number = numbers.get(child)
            if number is None:
                number = numbers[child] = len(graph.nodes)
                graph.nodes.append(child)
            children.append(number)
        graph.edges.append(tuple(children))
        graph.indices.append(tuple(index for _, index in node.next_functions))
        kind = kind_of(node)
        graph.kinds.append(kind)
        graph.shapes.append(_shapes(node, kind))
        graph.settings.append(settings_of(node, kind))
        if kind is Capture:
            graph.captures.append(k)
        k += 1
    return numbers


def _shapes(node: Any, kind: Any) -> tuple[torch.Size | None, ...]:
    if kind == "AccumulateGrad":
        return (None if node.variable.is_nested else node.variable.shape,)
    return tuple(None if out.is_nested_tensor else torch.Size(out.shape) for out in node._input_metadata)


def _find_leaves(graph: Graph, parameters: Mapping[int, Tensor]) -> None:
    for number, kind in enumerate(graph.kinds):
        if kind == "AccumulateGrad" and id(graph.nodes[number].variable) in parameters:
            graph.leaves[number] = id(graph.nodes[number].variable)
    for number, kind in enumerate(graph.kinds):
        if kind == "ToCopyBackward0" and graph.edges[number][0] in graph.leaves:
            graph.leaves[number] = graph.leaves[graph.edges[number][0]]


def _claim(graph: Graph, capture: int, numbers: Mapping[Any, int], owners: dict[int, int], leaky: set[int]) -> None:
    """Find the nodes of a capture's layer: from its outputs to where its inputs come from."""
    ends = {numbers[source] for source in graph.nodes[capture].call.sources if source in numbers}
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
