"""Where, on its way from the output, the gradient of the batch meets something that has none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recollect.autogram._independence import Independence
from recollect.autogram._probe import Layouts
from recollect.autogram._sites import is_passed_on, is_product
from recollect.autogram._walk import Graph, Use

__all__ = ["Target", "TargetFinder", "mixing_captures"]


@dataclass(frozen=True, slots=True)
class Target:
    """An edge from a node with a batch to something that has none.

    Attributes:
        position: which of the node's edges.
        child: the number of the node that it leads to.
        index: which of that node's outputs.
        shape: of that output.
        parameters: the ids of all parameters that are reached from there.
        transposed: whether it leads to the one parameter transposed, and no further.
        direct: whether it leads to the one parameter itself.
        called: whether the node itself has to be asked for the gradient.
    """

    position: int
    child: int
    index: int
    shape: torch.Size
    parameters: tuple[int, ...]
    direct: bool
    transposed: bool
    called: bool


def mixing_captures(graph: Graph, layouts: Layouts) -> set[int]:
    """Return the captures of layers that mix the batch or have none: no rule may take rows of theirs for elements.

    Inside a layer only what is made of its parameters may have a gradient that mixes the batch. Where layouts
    along several axes fit a layer's gradient, its inputs may have the batch in another one of them.
    """
    mixing = {capture for capture in graph.captures if capture in layouts.free or capture in layouts.crossed}
    for node in layouts.free:
        owner = graph.owners.get(node)
        if owner is not None and owner not in mixing and graph.touches_data(node):
            mixing.add(owner)
    return mixing


class TargetFinder:
    """Finds the nodes at which a batch's rows come apart, for uses of parameters that no rule accounts for.

    Args:
        graph: the output's.
        layouts: where the batch is.
        independence: refuses what mixes it.

    Attributes:
        sites: for each such node, the edges to what has no batch.
        entangled: the ids of parameters whose rows do not come apart: where the batch lies in no regular order; and
            those that are used at such a node, and behind that where the batch is again, for what reaches them one way
            cannot be told from what reaches them the other.
    """

    def __init__(self, graph: Graph, layouts: Layouts, independence: Independence) -> None:
        self.sites: dict[int, list[Target]] = {}
        self.entangled: set[int] = set()
        self._graph = graph
        self._layouts = layouts
        self._independence = independence

    def find(self, use: Use, parameter: int) -> None:
        """Go from a use of a parameter towards the output as long as nodes have no batch, and note where one does."""
        start = (use.node, use.position)
        edges, seen = [start], {start}
        while edges:
            node, position = edges.pop()
            if node not in self._layouts.found:
                continue  # nothing comes this way
            if node in self._layouts.scattered:
                self.entangled.add(parameter)
                continue
            if node in self._layouts.free:
                above = [edge for edge in self._edges_to(node) if edge not in seen]
                seen.update(above)
                edges.extend(above)
                continue
            if (node, position) != start:
                self._independence.check(self._graph, use, node, position, self._layouts)
            self._note(node, position)

    def _edges_to(self, node: int) -> list[tuple[int, int]]:
        parents, edges = set(self._graph.parents[node]), self._graph.edges
        return [(parent, k) for parent in parents for k, child in enumerate(edges[parent]) if child == node]

    def _note(self, node: int, position: int) -> None:
        targets = self.sites.setdefault(node, [])
        if any(target.position == position for target in targets):
            return
        graph, at = self._graph, self._graph.nodes[node]
        number, index = graph.edges[node][position], graph.indices[node][position]
        free, ends = self._reached(number, stop=True)
        for end in ends:
            self.entangled.update(free.keys() & self._reached(end, stop=False)[0].keys())
        targets.append(
            Target(
                position,
                number,
                index,
                graph.shape(number, index),
                tuple(free),
                direct=number in graph.leaves,
                transposed=graph.names[number] == "TBackward0" and graph.edges[number][0] in graph.leaves,
                called=not (is_passed_on(at, position) or is_product(at, position, self._layouts.found[node])),
            )
        )

    def _reached(self, start: int, stop: bool) -> tuple[dict[int, None], set[int]]:
        """Return the ids of the parameters behind a node, and the nodes where the search stopped at the batch."""
        graph, layouts = self._graph, self._layouts
        found: dict[int, None] = {}
        ends: set[int] = set()
        waiting, seen = [start], {start}
        while waiting:
            node = waiting.pop()
            if node in graph.leaves:
                found[graph.leaves[node]] = None
                continue
            for child in graph.edges[node]:
                if child < 0 or child in seen:
                    continue
                seen.add(child)
                (ends.add if stop and child in layouts.found and child not in layouts.free else waiting.append)(child)
        return found, ends
