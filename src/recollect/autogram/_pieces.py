"""A parameter's Jacobian a piece at a time: some columns of it, for all objectives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recollect.autogram._factors import Blocks, Outer, Picked, form_rows
from recollect.autogram._products import CALL, batched_gain, batched_product
from recollect.autogram._square import Space, on_one_another

__all__ = [
    "block_pieces",
    "entries_of",
    "even",
    "group_pieces",
    "onednn_pieces",
    "picked_pieces",
    "places_of",
    "slab_pieces",
    "tile",
]

# How many elements of the larger side a piece has at least, if it can: a matrix product likes tall results.
_TALL = 128


def block_pieces(factor: Blocks, step: int) -> Iterator[Tensor]:
    """Yield J [m, columns] for so many of the parameter's parts at a time."""
    parts = factor.shape[factor.axis]
    for start in range(0, parts, step):
        yield factor.form(slice(0, factor.num_rows), slice(start, min(start + step, parts))).flatten(1)


def even(parts: float) -> int:
    """Return about so many parts, up to half more, that rows are whole vectors: matrix products like those better."""
    for unit in (16, 8):
        if parts >= 0.7 * unit:
            return round(parts / unit) * unit
    return max(1, int(parts))


def slab_pieces(factor: Outer, elements: int, space: Space) -> Iterator[Tensor]:
    """Yield J [m, columns] for so many of both sides' elements at a time, of one group.

    Args:
        factor: has one group.
        elements: about how many of one row a piece has.
        space: returns memory [m, columns] to be written; a piece is there until the next one is asked for.
    """
    m = factor.num_rows
    left, right = _sides(factor)  # columns may come in any order
    a, b = left.shape[2], right.shape[2]
    height, width = tile(a, b, elements)
    right = right.to(space.dtype).expand(m, -1, -1)
    for top in range(0, a, height):
        upper = left[:, :, top : top + height].to(right.dtype).mT.expand(m, -1, -1)  # [m, height, T]
        for start in range(0, b, width):
            part = right[:, :, start : start + width]
            shape = (upper.shape[1], part.shape[2])
            rows = space(math.prod(shape))
            torch.bmm(upper, part, out=torch.unflatten(rows, 1, shape))
            yield rows


def onednn_pieces(factor: Outer, elements: int, space: Space) -> Iterator[Tensor] | None:
    """Do the same by oneDNN, which takes one side whole, a part of the other; None where that takes longer."""
    _, T, _, a = factor.left.shape
    if T * min(a * factor.right.shape[3], elements) <= CALL:
        return None
    sides = [side.expand(factor.num_rows, -1, -1).mT for side in _sides(factor)]  # [m, a, T], [m, b, T]
    if any(side.dtype != space.dtype for side in sides):
        return None
    cuts = [_cut(sides[0], sides[1], elements), _cut(sides[1], sides[0], elements)]
    cut, whole = max(cuts, key=lambda pair: batched_gain(pair[0][0], pair[1]))
    if batched_gain(cut[0], whole) <= 0:
        return None

    def pieces() -> Iterator[Tensor]:
        for part in cut:
            shape = (part.shape[1], whole.shape[1])
            rows = space(math.prod(shape))
            batched_product(part, whole, torch.unflatten(rows, 1, shape))
            yield rows

    return pieces()


def _cut(cut: Tensor, whole: Tensor, elements: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return a side in equal parts, so that a piece has about so many elements of one row, and the other side."""
    size = _alike(cut.shape[1], max(1, min(cut.shape[1], elements // whole.shape[1])))
    return torch.split(cut, size, 1), whole


def _sides(factor: Outer) -> tuple[Tensor, Tensor]:
    """Return both sides of the only group, [m or 1, T, elements], the longer one first."""
    left, right = factor.left.squeeze(2), factor.right.squeeze(2)
    return (right, left) if left.shape[2] < right.shape[2] else (left, right)


def tile(a: int, b: int, elements: int) -> tuple[int, int]:
    """Return height and width of pieces of [a, b] with about so many elements: tall, not too narrow, and alike."""
    height = min(a, max(elements // b, min(_TALL, max(1, elements // 16))))
    height, width = _alike(a, height), _alike(b, min(b, max(1, elements // height)))
    if height < a and on_one_another(height * width):
        height += 1
    return height, width


def _alike(whole: int, part: int) -> int:
    """Return the size of equal parts of a whole, of as many as there are of this size."""
    return math.ceil(whole / math.ceil(whole / part))


def group_pieces(factor: Outer, step: int) -> Iterator[Tensor]:
    """Yield J [m, columns] for so many of the groups at a time."""
    G, a = factor.left.shape[2:]
    for start in range(0, G, step):
        left, right = (side[:, :, start : start + step] for side in (factor.left, factor.right))
        shape = torch.Size((left.shape[2], a, right.shape[3]))
        yield form_rows([Outer(left, right, shape)], slice(0, factor.num_rows))


def entries_of(*factors: Picked) -> list[Picked]:
    """Return lookups of one parameter with no entries but those that any of them looked up.

    On other devices than the CPU with no more entries than lookups: how many were looked up would have to be read.
    """
    index = torch.cat([factor.index.flatten() for factor in factors])
    if not index.is_cpu and factors[0].num_entries <= index.numel():
        return list(factors)
    number, places = places_of(index)
    parts = torch.split(places, [factor.index.numel() for factor in factors])
    return [
        Picked(factor.grad, part.view_as(factor.index), number) for factor, part in zip(factors, parts, strict=True)
    ]


def places_of(keys: Tensor) -> tuple[int, Tensor]:
    """Number the distinct keys [K] of integers in ascending order, from 0.

    Returns:
        How many there are, or on other devices than the CPU, where that would have to be read, K; and the number of
        each key [K].
    """
    if keys.is_cpu:
        found, places = torch.unique(keys, return_inverse=True)
        return len(found), places
    ordered, order = keys.sort()
    return keys.numel(), torch.empty_like(keys).scatter_(0, order, ordered.diff(prepend=ordered[:1]).ne(0).cumsum(0))


def picked_pieces(factor: Picked, step: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield J [m, columns] for so many of the entries at a time."""
    if not factor.grad.is_cpu:
        yield from _unread_pieces(factor, min(step, factor.num_entries), dtype)
        return
    m, T, d = factor.grad.shape
    places = factor.index.expand(m, T).flatten()
    order = places.argsort(stable=True)
    places, grads = places[order], factor.grad.reshape(m * T, d)
    starts = torch.arange(0, factor.num_entries + step, step, device=places.device)
    bounds = torch.searchsorted(places, starts).tolist()
    for k, (low, high) in enumerate(itertools.pairwise(bounds)):
        chosen = order[low:high]
        slab = grads.new_zeros(m * step, d, dtype=dtype)
        slab.index_add_(0, chosen // T * step + places[low:high] - k * step, grads[chosen].to(dtype))
        yield slab.view(m, -1)


def _unread_pieces(factor: Picked, step: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Do the same without reading which lookups are of a piece: each takes all, and zeros of those of others."""
    m, T, d = factor.grad.shape
    grads = factor.grad.reshape(m * T, d).to(dtype)
    places = factor.index.expand(m, T).flatten()
    rows = torch.arange(m, device=places.device).repeat_interleave(T, output_size=m * T) * step
    for start in range(0, factor.num_entries, step):
        inside = places.div(step, rounding_mode="floor") == start // step
        slab = grads.new_zeros(m * step, d)
        slab.index_add_(0, rows + places % step, grads * inside.unsqueeze(1))
        yield slab.view(m, -1)
