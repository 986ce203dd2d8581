"""Where, on its way from the output, a gradient that has the losses apart meets something that has them not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from recollect.autogram._operations import Lost
from recollect.autogram._sites import is_passed_on, is_product
from recollect.autogram._structure import Layouts
from recollect.autogram._walk import Graph, Use

__all__ = ["Stuck", "Target", "TargetFinder"]


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


@dataclass(frozen=True, slots=True)
class Stuck:
    """Why the rows of a parameter do not come apart.

    Attributes:
        use: the use of it where they do not.
        lost: what happened on the way there.
        hooked: whether it is that the parameter has a hook, which is made for one loss' gradient.
    """

    use: Use | None = None
    lost: Lost | None = None
    hooked: bool = False


class TargetFinder:
    """Finds the nodes at which a pass' losses come apart, for uses of parameters that no rule accounts for.

    Args:
        graph: the output's.
        layouts: where the losses are apart.
        without: the ids of parameters that are not looked for.

    Attributes:
        sites: for each such node, the edges to what has no losses apart.
        entangled: the ids of parameters whose rows do not come apart, and why: something that
            depends on data lies between it and such a node. (Rows of it could be as large as those of a whole network.)
    """

    def __init__(self, graph: Graph, layouts: Layouts, without: Collection[int]) -> None:
        self.sites: dict[int, list[Target]] = {}
        self.entangled: dict[int, Stuck] = {}
        self._graph = graph
        self._layouts = layouts
        self._without = without

    def find(self, use: Use, parameter: int) -> None:
        """Go from a use of a parameter towards the output as long as nodes have no losses apart, and note what does."""
        start = (use.node, use.position)
        edges, seen = [start], {start}
        while edges:
            node, position = edges.pop()
            if node not in self._layouts.found:
                continue  # nothing comes this way
            if node in self._layouts.free:
                above = [edge for edge in self._edges_to(node) if edge not in seen]
                seen.update(above)
                edges.extend(above)
            elif (node, position) != start and self._graph.touches_data(self._graph.edges[node][position]):
                self.entangled[parameter] = Stuck(use, self._layouts.free[use.node])
            else:
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
        targets.append(
            Target(
                position,
                number,
                index,
                graph.shape(number, index),
                self._reached(number),
                direct=number in graph.leaves,
                transposed=graph.kinds[number] == "TBackward0" and graph.edges[number][0] in graph.leaves,
                called=not (is_passed_on(at, position) or is_product(at, position, self._layouts.found[node])),
            )
        )

    def _reached(self, start: int) -> tuple[int, ...]:
        """Return the ids of the parameters behind a node."""
        found: dict[int, None] = {}
        waiting, seen = [start], {start}
        while waiting:
            node = waiting.pop()
            if node in self._graph.leaves:
                found[self._graph.leaves[node]] = None
                continue
            for child in self._graph.edges[node]:
                if child >= 0 and child not in seen:
                    seen.add(child)
                    waiting.append(child)
        return tuple(parameter for parameter in found if parameter not in self._without)
