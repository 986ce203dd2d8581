"""From a parameter's factors to their Gramian, by whichever way takes the fewest operations, or to that of two lists.

The rows of J are formed a piece at a time and squared while they are in the cache, J Jᵀ += J_k J_kᵀ; or, where
positions are few, they are never formed: for outer products of left g and right a,
(J Jᵀ)[i, j] = sum over positions t, s of (g[i, t]·g[j, s]) (a[i, t]·a[j, s]), as in Goodfellow, arXiv 1510.01799, for
norms, and in section 3.1 of Novak et al., arXiv 2206.08720.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect.autogram._factors import (
    Blocks,
    Factor,
    Lookups,
    Outer,
    Picked,
    Rows,
    alike,
    form_rows,
    merge,
    row_elements,
)
from recollect.autogram._lookups import entries_of, lookup_pieces
from recollect.autogram._pieces import (
    as_laid,
    block_pieces,
    even,
    group_pieces,
    onednn_pieces,
    slab_pieces,
)
from recollect.autogram._products import product
from recollect.autogram._square import Space, SquareSum, wide

__all__ = ["add_cross", "add_gramian", "gramian", "with_bias"]

# How many bytes of rows are held at once where they have to be formed whole.
_WHOLE = 2**27
# From so many objectives on, those of a single position are written to memory that is there.
_MANY = 256
# A product of two scalars that waits for memory costs as much as so many in a matrix product.
_ELEMENT = 24


def gramian(factors: Sequence[Factor], dtype: torch.dtype | None = None) -> Tensor:
    """Return the Gramian [m, m] of one parameter's Jacobian, which is the sum of the factors.

    Args:
        factors: one for each use of the parameter, all with m rows.
        dtype: of the result; None: the factors', at least float32.
    """
    values = _values(factors[0])
    total = SquareSum(factors[0].num_rows, wide(values.dtype) if dtype is None else dtype, values.device)
    add_gramian(total, factors)
    return total.total()


def add_gramian(total: SquareSum, factors: Sequence[Factor]) -> None:
    """Add the Gramian of one parameter's Jacobian to those of others; see :func:`gramian`."""
    factors = merge(factors)
    only = factors[0] if len(factors) == 1 else None
    if isinstance(only, Outer):
        _add_outer(total, only)
    elif isinstance(only, Picked | Lookups):
        (entries,) = entries_of(only)
        step = max(1, forms_of(total.device).row_bytes // (only.num_rows * only.shape[1] * total.dtype.itemsize))
        for piece in lookup_pieces(entries, step, total.dtype):
            total.add_product(piece)
    elif isinstance(only, Blocks):
        at_once = _elements_at_once(total, only.sources) * only.shape[only.axis]
        for piece in block_pieces(only, even(at_once / max(1, only.num_rows * only.shape.numel()))):
            total.add_product(as_laid(piece))
            del piece  # before the next one is formed
    else:
        _add_formed(total, factors)


def _values(factor: Factor) -> Tensor:
    if isinstance(factor, Outer):
        return factor.left
    if isinstance(factor, Picked | Lookups):
        return factor.grad
    return form_rows([factor], slice(0, 1))


def _add_formed(total: SquareSum, factors: Sequence[Factor]) -> None:
    """Form whole rows, all of them if they fit and else a block for each pair of blocks."""
    m, size = factors[0].num_rows, total.dtype.itemsize
    elements = factors[0].shape.numel()
    if len(factors) == 1 and isinstance(factors[0], Rows):
        total.add_product(form_rows(factors, slice(0, m)))
        return
    step = _rows_at_once(total, factors)
    if m * elements * size <= _WHOLE:
        formed = total.new_rows(elements)
        for i in range(0, m, step):
            formed[i : i + step] = form_rows(factors, slice(i, min(i + step, m)))
        total.add_product(formed)
        return
    step = max(step, _WHOLE // (2 * size * elements))  # every block is formed again for each that comes before it
    for i in range(0, m, step):
        rows = slice(i, min(i + step, m))
        first = form_rows(factors, rows).to(total.dtype)
        total.add_block(product(first, first), rows, rows)
        for j in range(rows.stop, m, step):
            below = slice(j, min(j + step, m))
            total.add_block(product(form_rows(factors, below).to(total.dtype), first), below, rows)


def _add_outer(total: SquareSum, factor: Outer) -> None:
    m = factor.num_rows
    _, T, G, a = factor.left.shape
    b = factor.right.shape[3]
    if not T * G * a * b:  # as of an empty graph: all rows are zeros, or have no elements
        return
    if _has_few_positions(factor):
        _add_pairs(total, factor)
    elif G == 1:
        elements = max(1, _elements_at_once(total, factor.left.numel() + factor.right.numel()) // m)
        pieces = onednn_pieces(factor, elements, total.space) or slab_pieces(factor, elements, total.space)
        for piece in pieces:
            total.add_product(piece)
    else:
        step = max(1, forms_of(factor.left.device).row_bytes // (m * a * b * total.dtype.itemsize))
        for piece in group_pieces(factor, step):
            total.add_product(piece)


def _has_few_positions(factor: Outer) -> bool:
    """Whether products of pairs of positions take fewer operations than rows that are formed."""
    m, (_, T, _, a), b = factor.num_rows, factor.left.shape, factor.right.shape[3]
    formed = m * T * a * b + m * m * a * b // 2
    return m * m * (a + b + _ELEMENT) * T * T // (1 if T == 1 else 2) < formed


def with_bias(weight: Factor, bias: Rows) -> Outer | None:
    """Return the Jacobian of a layer's weight and bias together, if that takes fewer operations than both do apart.

    With one position the bias has the gradient that is the weight's left side: (g gᵀ) ∘ (a aᵀ + 1) counts for both, and
    its first product is computed once.
    """
    if not isinstance(weight, Outer) or weight.left.shape[1:3] != (1, 1) or not _has_few_positions(weight):
        return None
    left, values = weight.left[:, 0, 0], bias.values
    if (left.shape, left.stride(), left.dtype) != (values.shape, values.stride(), values.dtype):
        return None
    if left.data_ptr() != values.data_ptr():
        return None
    ones = weight.right.new_ones(1).expand(*weight.right.shape[:-1], 1)
    height, width = left.shape[1], weight.right.shape[3] + 1
    return Outer(weight.left, torch.cat([weight.right, ones], -1), torch.Size((height, width)))


def _add_pairs(total: SquareSum, factor: Outer) -> None:
    """(g gᵀ) ∘ (a aᵀ), summed over positions, without any row of J."""
    m = factor.num_rows
    T, G = factor.left.shape[1:3]
    left, right = _by_groups(factor, total.dtype)
    if len(left[0]) == len(right[0]) and T == 1 and m >= _MANY:
        for one, other in zip(left[:, :, 0].unbind(), right[:, :, 0].unbind(), strict=True):
            total.add_products((one, one), (other, other))
        return
    elements = max(1, forms_of(left.device).row_bytes // (total.dtype.itemsize * T * T * G))
    forms = forms_of(left.device)
    width = min(forms.position_columns if T > 1 else forms.single_columns, math.isqrt(elements))
    height = elements // width
    for j in range(0, m, width):
        columns = slice(j, min(j + width, m))
        for i in range(j, m, height):
            rows = slice(i, min(i + height, m))
            total.add_block(_pairs((left, left), (right, right), rows, columns), rows, columns)


def _by_groups(factor: Outer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return both sides as [G, m or 1, T, elements]."""
    return factor.left.permute(2, 0, 1, 3).to(dtype), factor.right.permute(2, 0, 1, 3).to(dtype)


def _pairs(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], rows: slice, columns: slice) -> Tensor:
    """Return the sum over groups and positions of products, [n, n'] or what broadcasts to it.

    Args:
        left: of the rows' factor and of the columns', [G, m or 1, T, a].
        right: the same, [G, m or 1, T, b].
        rows: which.
        columns: which.
    """
    products = []
    for side in (left, right):
        first, second = (
            some if some.shape[1] == 1 else some[:, part] for some, part in zip(side, (rows, columns), strict=True)
        )
        both = first.flatten(1, 2), second.transpose(1, 2).flatten(1, 2)  # sums go over entries that lie side by side
        found = product(both[0][0], both[1][0]) if len(first) == 1 else both[0] @ both[1].mT
        products.append(found.view(*first.shape[:3], second.shape[2], second.shape[1]))  # [G, n, T, T', n']
    first, second = products
    return (first.mul_(second) if first.shape == second.shape else first * second).sum((0, 2, 3))


def add_cross(block: Tensor, first: Sequence[Factor], second: Sequence[Factor]) -> None:
    """Add J Kᵀ [m, n] of the Jacobians of two lists of losses with respect to one parameter.

    Args:
        block: [m, n].
        first: sums up to J.
        second: sums up to K.
    """
    first, second = merge(first), merge(second)
    if len(first) == 1 and len(second) == 1:
        match first[0], second[0]:
            case Outer() as one, Outer() as other if alike(one, other):
                _cross_outer(block, one, other)
                return
            case (Picked() | Lookups()) as one, (Picked() | Lookups()) as other:
                step = _step(block, one.shape[1])
                for pair in zip(
                    *(lookup_pieces(some, step, block.dtype) for some in entries_of(one, other)), strict=True
                ):
                    _multiply(block, *pair)
                return
            case Blocks() as one, Blocks() as other if one.axis == other.axis:
                parts = one.shape[one.axis]
                step = even(_step(block, 1) * parts / max(1, one.shape.numel()))
                for upper, lower in zip(block_pieces(one, step), block_pieces(other, step), strict=True):
                    _multiply(block, upper.flatten(1), lower.flatten(1))
                return
    _cross_formed(block, first, second)


def _cross_outer(block: Tensor, first: Outer, second: Outer) -> None:
    (m, n), (T, S) = block.shape, (first.left.shape[1], second.left.shape[1])
    G, a, b = *first.left.shape[2:], first.right.shape[3]
    if not T * S * G * a * b:
        return
    if m * n * (a + b + _ELEMENT) * T * S < (m * T + n * S + m * n) * a * b:
        (left, right), (under, beside) = _by_groups(first, block.dtype), _by_groups(second, block.dtype)
        step = max(1, int((forms_of(block.device).row_bytes / (block.itemsize * T * S * G)) ** 0.5))
        for i, j in itertools.product(range(0, m, step), range(0, n, step)):
            rows, columns = slice(i, min(i + step, m)), slice(j, min(j + step, n))
            block[rows, columns] += _pairs((left, under), (right, beside), rows, columns)
    elif G == 1:
        step, (upper, lower) = _step(block, 1), (Space(rows, block.dtype, block.device) for rows in block.shape)
        for pair in zip(slab_pieces(first, step, upper), slab_pieces(second, step, lower), strict=True):
            _multiply(block, *pair)
    else:
        step = _step(block, a * b)
        for pair in zip(group_pieces(first, step), group_pieces(second, step), strict=True):
            _multiply(block, *pair)


def _cross_formed(block: Tensor, first: Sequence[Factor], second: Sequence[Factor]) -> None:
    """Form whole rows, of each of both so many at once as may be held."""
    heights = []
    for factors in (first, second):
        plain = len(factors) == 1 and isinstance(factors[0], Rows)
        bound = max(1, _WHOLE // (2 * block.itemsize * max(1, row_elements(factors))))
        heights.append(factors[0].num_rows if plain else min(bound, factors[0].num_rows))
    for i in range(0, len(block), heights[0]):
        rows = slice(i, min(i + heights[0], len(block)))
        formed = form_rows(first, rows)
        for j in range(0, block.shape[1], heights[1]):
            columns = slice(j, min(j + heights[1], block.shape[1]))
            _multiply(block[rows, columns], formed, form_rows(second, columns))


def _multiply(block: Tensor, first: Tensor, second: Tensor) -> None:
    block += product(first.to(block.dtype), second.to(block.dtype))


def _step(block: Tensor, elements: int) -> int:
    """Return how many parts of so many elements each are formed at once for all rows and all columns."""
    return max(1, forms_of(block.device).dense_bytes[1] // (block.itemsize * max(1, sum(block.shape) * elements)))


def _rows_at_once(total: SquareSum, factors: Sequence[Factor]) -> int:
    return min(
        factors[0].num_rows, max(1, forms_of(total.device).row_bytes // (total.dtype.itemsize * row_elements(factors)))
    )


def _elements_at_once(total: SquareSum, sources: int | None) -> int:
    """Return how many elements of rows to form at once from so many (None: unknown)."""
    least, most = (bound // total.dtype.itemsize for bound in forms_of(total.device).dense_bytes)
    return max(1, most if sources is None else min(max(least, sources), most))
