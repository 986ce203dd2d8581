"""Factors as plain numbers: some rows of the Jacobian, each flattened."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recollect.autogram._factors import Blocks, Factor, Outer, Picked, Rows
from recollect.autogram._square import wide

__all__ = ["as_rows", "form_rows", "held_elements", "row_elements"]


def form_rows(factors: Sequence[Factor], rows: slice) -> Tensor:
    """Return these rows of the sum of the factors, [n, number of the parameter's elements], in at least float32."""
    total = _form(factors[0], rows)
    for factor in factors[1:]:
        total = total + _form(factor, rows)
    return total


def as_rows(factors: Sequence[Factor], shape: torch.Size) -> Rows:
    """Return the sum of the factors of a parameter of this shape, formed."""
    num_rows = factors[0].num_rows
    return Rows(form_rows(factors, slice(0, num_rows)).view(num_rows, *shape))


def row_elements(factors: Sequence[Factor]) -> int:
    """Return how many elements forming one row takes, the row included."""
    return max(f.row_elements if isinstance(f, Blocks) else 2 * f.shape.numel() for f in factors)


def held_elements(factors: Sequence[Factor]) -> int:
    """Return how many elements are held by holding the factors, as far as it is known."""
    return sum(map(_held, factors))


def _held(factor: Factor) -> int:
    if isinstance(factor, Outer):
        return factor.left.numel() + factor.right.numel()
    if isinstance(factor, Picked):
        return factor.grad.numel() + factor.index.numel()
    return factor.values.numel() if isinstance(factor, Rows) else 0


def _form(factor: Factor, rows: slice) -> Tensor:
    if isinstance(factor, Rows):
        formed = factor.values[rows]
        return formed.flatten(1).to(wide(formed.dtype)) if formed.dim() > 1 else formed.unsqueeze(1)
    if isinstance(factor, Blocks):
        formed = factor.form(rows, slice(0, factor.shape[factor.axis]))
        return formed.flatten(1).to(wide(formed.dtype))
    if isinstance(factor, Picked):
        return _form_picked(factor, rows)
    return _form_outer(factor, rows)


def _form_outer(factor: Outer, rows: slice) -> Tensor:
    left, right = _pick(factor.left, rows), _pick(factor.right, rows)
    dtype = wide(left.dtype, right.dtype)
    product = left.to(dtype).permute(0, 2, 3, 1) @ right.to(dtype).transpose(1, 2)  # [n or 1, G, a, b]
    return product.flatten(1).expand(rows.stop - rows.start, -1)


def _form_picked(factor: Picked, rows: slice) -> Tensor:
    grad, index = factor.grad[rows], _pick(factor.index, rows)
    n, T, d = grad.shape
    formed = grad.new_zeros(n * factor.num_entries, d, dtype=wide(grad.dtype))
    places = index + factor.num_entries * torch.arange(n, device=index.device).unsqueeze(1)
    return formed.index_add_(0, places.flatten(), grad.reshape(n * T, d).to(formed.dtype)).view(n, -1)


def _pick(side: Tensor, rows: slice) -> Tensor:
    return side if side.shape[0] == 1 else side[rows]
