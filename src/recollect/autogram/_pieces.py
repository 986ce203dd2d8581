"""A parameter's Jacobian a piece at a time: some columns of it, for all objectives."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recollect.autogram._factors import Blocks, Outer, form_rows
from recollect.autogram._products import CALL, batched_gain, batched_product
from recollect.autogram._square import Space, on_one_another

__all__ = [
    "as_laid",
    "block_pieces",
    "even",
    "group_pieces",
    "onednn_pieces",
    "slab_pieces",
    "tile",
]

# How many elements of the larger side a piece has at least, if it can: a matrix product likes tall results.
_TALL = 128


def block_pieces(factor: Blocks, step: int) -> Iterator[Tensor]:
    """Yield J [m, *shape] for so many of the parameter's parts at a time."""
    parts = factor.shape[factor.axis]
    for start in range(0, parts, step):
        yield factor.form(slice(0, factor.num_rows), slice(start, min(start + step, parts)))


def as_laid(piece: Tensor) -> Tensor:
    """Return J [m, columns], whose columns come as they lie in memory, of J [m, *shape]."""
    order = sorted(range(1, piece.dim()), key=piece.stride, reverse=True)
    return piece.permute(0, *order).flatten(1)


def even(parts: float) -> int:
    """Return about so many parts, up to half more, that rows are whole vectors: matrix products like those better."""
    for unit in (16, 8):
        if 3 * parts >= 2 * unit:
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
            # A product of positions, or the only one scaled, which takes a tenth of the time.
            multiply = torch.mul if part.shape[1:] == (1, 1) else torch.bmm
            multiply(upper, part, out=torch.unflatten(rows, 1, shape))
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
