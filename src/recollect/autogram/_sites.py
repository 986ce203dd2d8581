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

__all__ = ["call_node", "rows_at"]

# Nodes that sum over what was expanded themselves, so that their incoming gradient serves as the unsummed one.
_EXPANDING = ("ExpandBackward0",)
# The positions of matrix products' right sides; their left sides are saved under this name.
_PRODUCTS = {"AddmmBackward0": (2, "_saved_mat1"), "MmBackward0": (1, "_saved_self")}


def call_node(node: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
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
        layouts: where these have the batch.
        batch: B.
        targets: the positions of edges, and the shapes of what they lead to, which has no batch.
    """
    found: list[Factor | None] = [None] * len(targets)
    left: list[int] = []
    name = type(node).__name__
    summed: tuple[Tensor | None, ...] | None = None
    for k, (position, shape) in enumerate(targets):
        product = _product(node, name, grads, layouts, batch, position, shape)
        if product is not None:
            found[k] = product
            continue
        if summed is None:
            summed = grads if name in _EXPANDING else call_node(node, grads)
        if summed[position] is None:
            continue
        rows = _unsummed(summed[position], grads, layouts, batch, shape)
        if rows is None:
            left.append(k)
        else:
            found[k] = Rows(rows)
    del summed
    if left:
        masked = _one_by_one(node, grads, layouts, batch, [targets[k] for k in left])
        for k, rows in zip(left, masked, strict=True):
            found[k] = Rows(rows)
    return found


def _unsummed(
    full: Tensor | None,
    grads: tuple[Tensor | None, ...],
    layouts: tuple[Layout | None, ...],
    batch: int,
    shape: torch.Size,
) -> Tensor | None:
    """Sum what a node that works element by element gives, and autograd would sum for what was broadcast."""
    grad, layout = grads[0], layouts[0]
    if len(grads) != 1 or grad is None or layout is None or full is None or full.shape != grad.shape:
        return None
    natural = list(grad.shape)
    natural[layout.dim] //= batch
    lead = len(natural) - len(shape)
    if lead < 0 or any(n not in (1, natural[lead + k]) for k, n in enumerate(shape)):
        return None
    if grad.shape == shape:
        return None  # nothing was broadcast: each row has a place of its own in the parameter
    rows = layout.rows(full, batch)
    if lead:
        rows = rows.flatten(1, lead).sum(1)
    over = [k + 1 for k, n in enumerate(shape) if n == 1 and rows.shape[k + 1] != 1]
    return rows.sum(over, keepdim=True) if over else rows


def _product(
    node: Any,
    name: str,
    grads: tuple[Tensor | None, ...],
    layouts: tuple[Layout | None, ...],
    batch: int,
    position: int,
    shape: torch.Size,
) -> Outer | None:
    """Of a matrix product with a left side that has the batch, and a right side that has none."""
    right, saved = _PRODUCTS.get(name, (-1, ""))
    grad, layout = grads[0], layouts[0]
    if position != right or grad is None or layout is None or layout.dim != 0 or getattr(node, "_saved_alpha", 1) != 1:
        return None
    left = getattr(node, saved)
    return Outer(layout.rows(left, batch).unsqueeze(2), layout.rows(grad, batch).unsqueeze(2), shape)


def _one_by_one(
    node: Any,
    grads: tuple[Tensor | None, ...],
    layouts: tuple[Layout | None, ...],
    batch: int,
    targets: Sequence[tuple[int, torch.Size]],
) -> list[Tensor]:
    rows: list[list[Tensor]] = [[] for _ in targets]
    for row in range(batch):
        masked = [
            None if grad is None or layout is None else layout.mask(grad, batch, row)
            for grad, layout in zip(grads, layouts, strict=True)
        ]
        gradients = call_node(node, masked)
        for k, (position, shape) in enumerate(targets):
            gradient = gradients[position]
            rows[k].append(_fit(gradient, shape, grads) if gradient is not None else _zeros(grads, shape))
    return [torch.stack(found) for found in rows]


def _fit(gradient: Tensor, shape: torch.Size, grads: tuple[Tensor | None, ...]) -> Tensor:
    gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return gradient if gradient.shape == shape else gradient.sum_to_size(shape)


def _zeros(grads: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
    like = next(grad for grad in grads if grad is not None)
    return like.new_zeros(shape)
