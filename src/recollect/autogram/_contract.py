"""From a parameter's factors to their Gramian, by whichever way takes the fewest operations.

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

from recollect.autogram._factors import Blocks, Factor, Outer, Picked, Rows
from recollect.autogram._merge import merge
from recollect.autogram._rows import form_rows, row_elements
from recollect.autogram._square import SquareSum, of_device, on_one_another, wide

__all__ = ["add_gramian", "gramian"]

# How many bytes of rows are formed at once: in a CPU's cache, a launch's worth on a GPU.
_PIECE = {"cpu": 2**23, "cuda": 2**26}
# The same of dense layers' rows, which are most of the work: as many as they are formed from, within these bounds.
# (More than 32 MiB, the C library takes page by page from the system each time, which takes as long as forming them.)
_LEAST, _MOST = {"cpu": 2**22, "cuda": 2**26}, {"cpu": 2**24, "cuda": 2**28}
# How many bytes of rows are held at once where they have to be formed whole.
_WHOLE = 2**27
# How many elements of the larger side a piece has at least, if it can: a matrix product likes tall results.
_TALL = 128
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
    elif isinstance(only, Picked):
        _add_picked(total, only)
    elif isinstance(only, Blocks):
        _add_blocks(total, only)
    else:
        _add_formed(total, factors)


def _values(factor: Factor) -> Tensor:
    if isinstance(factor, Outer):
        return factor.left
    if isinstance(factor, Picked):
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
        total.add_block(first @ first.mT, rows, rows)
        for j in range(rows.stop, m, step):
            below = slice(j, min(j + step, m))
            total.add_block(form_rows(factors, below).to(total.dtype) @ first.mT, below, rows)


def _add_blocks(total: SquareSum, factor: Blocks) -> None:
    """Form J for some of the parameter's parts at a time, for all objectives."""
    m, parts = factor.num_rows, factor.shape[factor.axis]
    step = _even(_elements_at_once(total, factor.sources) * parts / max(1, m * factor.shape.numel()))
    for start in range(0, parts, step):
        total.add_product(factor.form(slice(0, m), slice(start, min(start + step, parts))).flatten(1))


def _even(parts: float) -> int:
    """Return about so many parts, up to half more, that rows are whole vectors: matrix products like those better."""
    for unit in (16, 8):
        if parts >= 0.7 * unit:
            return round(parts / unit) * unit
    return max(1, int(parts))


def _add_outer(total: SquareSum, factor: Outer) -> None:
    m = factor.num_rows
    _, T, G, a = factor.left.shape
    b = factor.right.shape[3]
    if not T * G * a * b:  # as of an empty graph: all rows are zeros, or have no elements
        return
    formed = m * T * a * b + m * m * a * b // 2
    paired = m * m * (a + b + _ELEMENT) * T * T // (1 if T == 1 else 2)
    if paired < formed:
        _add_pairs(total, factor)
    elif G == 1:
        _add_slabs(total, factor)
    else:
        _add_groups(total, factor)


def _add_pairs(total: SquareSum, factor: Outer) -> None:
    """(g gᵀ) ∘ (a aᵀ), summed over positions, without any row of J."""
    m = factor.num_rows
    T, G = factor.left.shape[1:3]
    dtype = total.dtype
    left, right = (side.permute(2, 0, 1, 3).to(dtype) for side in (factor.left, factor.right))  # [G, m, T, a]
    step = max(1, int((of_device(_PIECE, left.device) / (dtype.itemsize * T * T * G)) ** 0.5))
    for i in range(0, m, step):
        rows = slice(i, min(i + step, m))
        for j in range(0, i + 1, step):
            columns = slice(j, min(j + step, m))
            product = _pair(left, rows, columns) * _pair(right, rows, columns)
            total.add_block(product.sum((0, 2, 4)), rows, columns)


def _pair(side: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return the products [G, n, T, n', T] of what stands at each position with what stands at each other."""
    G, m, T, _ = side.shape
    first, second = (side, side) if m == 1 else (side[:, rows], side[:, columns])
    product = first.flatten(1, 2) @ second.flatten(1, 2).mT
    return product.view(G, first.shape[1], T, second.shape[1], T)


def _add_slabs(total: SquareSum, factor: Outer) -> None:
    """Form J for some of both sides' elements at a time, for all objectives."""
    m, dtype = factor.num_rows, total.dtype
    left, right = factor.left.squeeze(2), factor.right.squeeze(2)
    if left.shape[2] < right.shape[2]:
        left, right = right, left  # the parameter transposed has the same Gramian
    a, b = left.shape[2], right.shape[2]
    height, width = _tile(a, b, max(1, _elements_at_once(total, left.numel() + right.numel()) // m))
    right = right.to(dtype).expand(m, -1, -1)
    for top in range(0, a, height):
        upper = left[:, :, top : top + height].to(dtype).mT.expand(m, -1, -1)  # [m, height, T]
        for start in range(0, b, width):
            part = right[:, :, start : start + width]
            shape = (upper.shape[1], part.shape[2])
            rows = total.space(math.prod(shape))
            torch.bmm(upper, part, out=torch.unflatten(rows, 1, shape))
            total.add_product(rows)


def _tile(a: int, b: int, elements: int) -> tuple[int, int]:
    """Return height and width of pieces of [a, b] with about so many elements: tall, not too narrow, and alike."""
    height = min(a, max(elements // b, min(_TALL, max(1, elements // 16))))
    height, width = _alike(a, height), _alike(b, min(b, max(1, elements // height)))
    if height < a and on_one_another(height * width):
        height += 1
    return height, width


def _alike(whole: int, part: int) -> int:
    """Return the size of equal parts of a whole, of as many as there are of this size."""
    return math.ceil(whole / math.ceil(whole / part))


def _add_groups(total: SquareSum, factor: Outer) -> None:
    """Form J for some of the groups at a time, for all objectives."""
    m = factor.num_rows
    G, a = factor.left.shape[2:]
    b = factor.right.shape[3]
    step = max(1, of_device(_PIECE, factor.left.device) // (m * a * b * total.dtype.itemsize))
    for start in range(0, G, step):
        left, right = (side[:, :, start : start + step] for side in (factor.left, factor.right))
        shape = torch.Size((left.shape[2], a, b))
        total.add_product(form_rows([Outer(left, right, shape)], slice(0, m)))


def _add_picked(total: SquareSum, factor: Picked) -> None:
    """Form J for some of the entries that were looked up at a time, for all objectives."""
    m, T, d = factor.grad.shape
    entries, places = torch.unique(factor.index, return_inverse=True)
    order = places.expand(m, T).flatten().argsort(stable=True)
    sorted_places = places.expand(m, T).flatten()[order]
    grads = factor.grad.reshape(m * T, d)
    step = max(1, of_device(_PIECE, grads.device) // (m * d * total.dtype.itemsize))
    starts = torch.arange(0, len(entries) + step, step, device=places.device)
    bounds = torch.searchsorted(sorted_places, starts).tolist()
    for k, (low, high) in enumerate(itertools.pairwise(bounds)):
        chosen = order[low:high]
        slab = grads.new_zeros(m * step, d, dtype=total.dtype)
        slab.index_add_(0, chosen // T * step + sorted_places[low:high] - k * step, grads[chosen].to(total.dtype))
        total.add_product(slab.view(m, -1))


def _rows_at_once(total: SquareSum, factors: Sequence[Factor]) -> int:
    return min(
        factors[0].num_rows, max(1, of_device(_PIECE, total.device) // (total.dtype.itemsize * row_elements(factors)))
    )


def _elements_at_once(total: SquareSum, sources: int | None) -> int:
    """Return how many elements of rows to form at once from so many (None: unknown)."""
    least, most = (of_device(bounds, total.device) // total.dtype.itemsize for bounds in (_LEAST, _MOST))
    return max(1, most if sources is None else min(max(least, sources), most))
