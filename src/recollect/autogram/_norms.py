"""From a parameter's factors to the squared norms of its Jacobian's rows, by whichever way takes fewer operations.

Of an outer product with one position it is ‖g‖² ‖a‖², of which no row is formed: Goodfellow, arXiv 1510.01799. With
several, either pairs of positions are multiplied, the sum over t, s of (g[t]·g[s]) (a[t]·a[s]), as in Li et al., arXiv
2110.05679, or rows are formed, some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect.autogram._factors import Factor, Lookups, Outer, Picked, Rows, form_rows, merge, row_elements
from recollect.autogram._lookups import laid_out, places_of

__all__ = ["squared_norms"]


def squared_norms(factors: Sequence[Factor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the squared norms [m] of the rows of one parameter's Jacobian, which is the sum of the factors.

    Args:
        factors: one for each use of the parameter, all with m rows.
        dtype: what is summed in.
        device: where.
    """
    factors = merge(factors)
    only = factors[0] if len(factors) == 1 else None
    if isinstance(only, Rows):
        return _squares(only.values, dtype)
    if isinstance(only, Outer):
        return _of_outer(only, dtype, device)
    if isinstance(only, Picked | Lookups):
        return _of_lookups(only, dtype)
    return _of_formed(factors, dtype, device)


def _squares(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums of squares of the rows [m, ...]."""
    return _norms(values.flatten(1) if values.dim() > 1 else values.unsqueeze(1), dtype).square()


def _norms(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norms along the last axis."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.promote_types(values.dtype, dtype))
    return norms.to(dtype)


def _of_formed(factors: Sequence[Factor], dtype: torch.dtype, device: torch.device) -> Tensor:
    step = _at_once(row_elements(factors), dtype, device)
    return _in_parts(factors[0].num_rows, step, lambda rows: _squares(form_rows(factors, rows), dtype))


def _of_outer(factor: Outer, dtype: torch.dtype, device: torch.device) -> Tensor:
    m = factor.num_rows
    _, T, G, a = factor.left.shape
    b = factor.right.shape[3]
    if not T * G * a * b:  # as of an empty graph: all rows are zeros, or have no elements
        return torch.zeros(m, dtype=dtype, device=device)
    if T == 1:
        left, right = (_norms(side.squeeze(1), dtype) for side in (factor.left, factor.right))  # [m or 1, G]
        return (left * right).square().sum(1).expand(m)
    if T * T * (a + b + 1) > (T + 1) * a * b:
        return _of_formed([factor], dtype, device)
    left, right = (side.transpose(1, 2).to(dtype) for side in (factor.left, factor.right))  # [m or 1, G, T, a]

    def pairs(rows: slice) -> Tensor:
        products = [some @ some.mT for some in (side if len(side) == 1 else side[rows] for side in (left, right))]
        return (products[0] * products[1]).sum((1, 2, 3)).expand(rows.stop - rows.start)

    return _in_parts(m, _at_once(3 * G * T * T, dtype, device), pairs)


def _of_lookups(factor: Picked | Lookups, dtype: torch.dtype) -> Tensor:
    """Sum the gradients of lookups of one entry for one objective, and then their squares."""
    if isinstance(factor, Picked) and factor.grad.shape[1] == 1:
        return _squares(factor.grad, dtype)
    flat = laid_out(factor)
    number, places = places_of(flat.index + flat.num_entries * flat.owner)
    rows = torch.zeros(number, flat.shape[1], dtype=dtype, device=flat.grad.device)
    rows.index_add_(0, places, flat.grad.to(dtype))
    squares = torch.zeros(flat.num_rows, dtype=dtype, device=rows.device)
    owners = flat.owner.new_zeros(number).scatter_(0, places, flat.owner)
    return squares.index_add_(0, owners, _squares(rows, dtype))


def _at_once(elements: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return for how many objectives so many elements each are formed at once."""
    return max(1, forms_of(device).norm_bytes // (dtype.itemsize * max(1, elements)))


def _in_parts(m: int, step: int, squares: Callable[[slice], Tensor]) -> Tensor:
    return torch.cat([squares(slice(start, min(start + step, m))) for start in range(0, m, step)])
