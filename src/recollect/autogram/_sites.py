"""The exact fallback with a batch: rows at the nodes where something without a batch, a parameter mostly, meets one.

Nothing is run again: autograd's own node is asked for the gradient, for all rows at once where its operation works
element by element or is a matrix product, and else for one row after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.autogram._factors import Factor, Outer, Rows
from recollect.autogram._layout import Layout
from recollect.autogram._operations import goes_by_entry

__all__ = ["is_passed_on", "is_product", "rows_at"]

# Edges along which the incoming gradient goes on, summed over what was broadcast; and the name of its factor, if any.
_PASSED_ON = {("ExpandBackward0", 0): "", ("AddBackward0", 0): "", ("AddmmBackward0", 0): "_saved_beta"}
# Edges to the right sides of matrix products, and the names of the left side and of its factor, if any.
_PRODUCTS = {("AddmmBackward0", 2): ("_saved_mat1", "_saved_alpha"), ("MmBackward0", 1): ("_saved_self", "")}


def is_passed_on(node: Any, position: int) -> bool:
    """Whether an edge's gradient is the node's own, summed over what was broadcast."""
    factor = _PASSED_ON.get((type(node).__name__, position))
    return factor is not None and getattr(node, factor, 1) == 1


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
        if is_passed_on(node, position):
            full = grads[0]
        else:
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
    passed_on = all(is_passed_on(node, position) for position, _ in targets)  # for these autograd computes nothing
    for row in range(batch):
        masked = [
            None if grad is None or layout is None else layout.mask(grad, row)
            for grad, layout in zip(grads, layouts, strict=True)
        ]
        gradients = () if passed_on else _call(node, masked)
        for k, (position, shape) in enumerate(targets):
            gradient = masked[0] if is_passed_on(node, position) else gradients[position]
            rows[k].append(_fit(gradient, shape, grads) if gradient is not None else _zeros(grads, shape))
    return [torch.stack(found) for found in rows]


def _fit(gradient: Tensor, shape: torch.Size, grads: tuple[Tensor | None, ...]) -> Tensor:
    gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def _zeros(grads: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
    like = next(grad for grad in grads if grad is not None)
    return like.new_zeros(shape)
