"""The exact fallback with many losses in a pass: rows at nodes where something without them meets a gradient with them.

That something is a parameter mostly, or what is computed from parameters alone.

Nothing is run again: autograd's own node is asked for the gradient, for all rows at once where its operation works
element by element or is a matrix product, and else for one row after another.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recollect.autogram._factors import Factor, Outer, Rows
from recollect.autogram._layout import Layout
from recollect.autogram._operations import Lost, goes_by_entry
from recollect.autogram._structure import Layouts
from recollect.autogram._walk import Graph, Use

__all__ = ["Stuck", "Target", "TargetFinder", "is_passed_on", "is_product", "is_scaled", "rows_at"]

# Edges along which the incoming gradient goes on, summed over what was broadcast; and the name of its factor, if any.
_PASSED_ON = {
    ("ExpandBackward0", 0): "",
    ("AddBackward0", 0): "",
    ("AddBackward0", 1): "_saved_alpha",
    ("AddcmulBackward0", 0): "",
    ("AddmmBackward0", 0): "_saved_beta",
}
# Edges to the right sides of matrix products, and the names of the left side and of its factor, if any.
_PRODUCTS = {("AddmmBackward0", 2): ("_saved_mat1", "_saved_alpha"), ("MmBackward0", 1): ("_saved_self", "")}
# Edges along which it goes on times a tensor, and the names of that tensor and of its factor, if any.
_SCALED = {
    ("MulBackward0", 0): ("_saved_other", ""),
    ("MulBackward0", 1): ("_saved_self", ""),
    ("AddcmulBackward0", 1): ("_saved_tensor2", "_saved_value"),
    ("AddcmulBackward0", 2): ("_saved_tensor1", "_saved_value"),
}


def is_passed_on(node: Any, position: int) -> bool:
    """Whether an edge's gradient is the node's own, summed over what was broadcast."""
    factor = _PASSED_ON.get((type(node).__name__, position))
    return factor is not None and getattr(node, factor, 1) == 1


def is_scaled(node: Any, position: int) -> bool:
    """Whether an edge's gradient is the node's own times a tensor that it has saved, summed over what was broadcast."""
    names = _SCALED.get((type(node).__name__, position))
    return names is not None and getattr(node, names[1], 1) == 1


def _without_asking(node: Any, position: int, grad: Tensor) -> Tensor | None:
    """Return an edge's gradient before it is summed, if that takes no call of the node, which computes all edges'."""
    if is_passed_on(node, position):
        return grad
    if not is_scaled(node, position):
        return None
    scale: Tensor = getattr(node, _SCALED[type(node).__name__, position][0])
    return grad * scale


def is_product(node: Any, position: int, layouts: tuple[Layout | None, ...]) -> bool:
    """Whether an edge leads to the right side of a matrix product whose left side has the batch in its rows."""
    names = _PRODUCTS.get((type(node).__name__, position))
    layout = layouts[0]
    if names is None or layout is None or getattr(node, names[1], 1) != 1:
        return False
    return all(axis.dim == 0 for axis in layout.axes)


def _call(node: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Return the gradients that a node gives for these gradients of its outputs."""
    # A node that is written in Python is called by its method.
    result = (node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node)(*grads)
    return result if isinstance(result, tuple) else (result,)


def rows_at(
    node: Any,
    grads: tuple[Tensor | None, ...],
    layouts: tuple[Layout | None, ...],
    batch: int,
    targets: Sequence[tuple[int, torch.Size]],
) -> list[Factor | None]:
    """Return the Jacobian of each row with respect to what some of a node's edges lead to.

    Args:
        node: of the graph, with a gradient that has a batch.
        grads: of its outputs.
        layouts: where these have the batch; None where they have no gradient, or zeros.
        batch: B.
        targets: the positions of edges, and the shapes of what they lead to, which has no batch.
    """
    found: list[Factor | None] = [None] * len(targets)
    if all(layout is None for layout in layouts):
        return found  # zeros
    left: list[int] = []
    called: tuple[Tensor | None, ...] | None = None
    for k, (position, shape) in enumerate(targets):
        if is_product(node, position, layouts):
            found[k] = _product(node, position, grads[0], layouts[0], shape)
            continue
        full = None if grads[0] is None else _without_asking(node, position, grads[0])
        if full is None:
            called = _call(node, grads) if called is None else called
            full = called[position]
        if full is None:
            continue
        rows = _unsummed(full, grads, layouts, shape) if goes_by_entry(node, position) else None
        if rows is None:
            left.append(k)
        else:
            found[k] = Rows(rows)
    del called
    if left:
        masked = _one_by_one(node, grads, layouts, batch, [targets[k] for k in left])
        for k, rows in zip(left, masked, strict=True):
            found[k] = Rows(rows)
    return found


def _unsummed(
    full: Tensor,
    grads: tuple[Tensor | None, ...],
    layouts: tuple[Layout | None, ...],
    shape: torch.Size,
) -> Tensor | None:
    """Sum what a node that works element by element gives, and autograd would sum for what was broadcast."""
    grad, layout = grads[0], layouts[0]
    if len(grads) != 1 or grad is None or layout is None or full.shape != grad.shape:
        return None
    natural = layout.left(grad.shape)
    lead = len(natural) - len(shape)
    if lead < 0 or any(n not in (1, natural[lead + k]) for k, n in enumerate(shape)):
        return None
    if grad.shape == shape:
        return None  # nothing was broadcast: each row has a place of its own in the parameter
    rows = layout.rows(full)
    if lead:
        rows = rows.flatten(1, lead).sum(1)
    over = [k + 1 for k, n in enumerate(shape) if n == 1 and rows.shape[k + 1] != 1]
    return rows.sum(over, keepdim=True) if over else rows


def _product(node: Any, position: int, grad: Tensor | None, layout: Layout | None, shape: torch.Size) -> Outer | None:
    if grad is None or layout is None:
        return None
    left = getattr(node, _PRODUCTS[type(node).__name__, position][0])
    return Outer(layout.rows(left).unsqueeze(2), layout.rows(grad).unsqueeze(2), shape)


def _one_by_one(
    node: Any,
    grads: tuple[Tensor | None, ...],
    layouts: tuple[Layout | None, ...],
    batch: int,
    targets: Sequence[tuple[int, torch.Size]],
) -> list[Tensor]:
    rows: list[list[Tensor]] = [[] for _ in targets]
    passed_on = all(is_passed_on(node, position) or is_scaled(node, position) for position, _ in targets)
    for row in range(batch):
        masked = [
            None if grad is None or layout is None else layout.mask(grad, row)
            for grad, layout in zip(grads, layouts, strict=True)
        ]
        gradients = () if passed_on else _call(node, masked)
        for k, (position, shape) in enumerate(targets):
            gradient = None if masked[0] is None else _without_asking(node, position, masked[0])
            if gradient is None and gradients:
                gradient = gradients[position]
            rows[k].append(_fit(gradient, shape, grads) if gradient is not None else _zeros(grads, shape))
    return [torch.stack(found) for found in rows]


def _fit(gradient: Tensor, shape: torch.Size, grads: tuple[Tensor | None, ...]) -> Tensor:
    gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def _zeros(grads: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
    like = next(grad for grad in grads if grad is not None)
    return like.new_zeros(shape)


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
                called=not (
                    is_passed_on(at, position)
                    or is_scaled(at, position)
                    or is_product(at, position, self._layouts.found[node])
                ),
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
