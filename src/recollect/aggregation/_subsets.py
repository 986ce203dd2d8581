"""Many linear systems at once: each row picks its own principal submatrix of one shared matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["solve_on"]

_SMALL = 2**15  # so many numbers in all the rows' matrices: not worth the picking
_CHUNK = {"cpu": 2**17}  # numbers in one chunk: a mebibyte stays in a CPU's cache
_CHUNK_ELSEWHERE = 2**24


def solve_on(matrix: Tensor, inverse: Tensor | None, members: Tensor, target: Tensor) -> Tensor:
    """Solve ``H[A, A] x[A] = b[A]`` with ``x = 0`` outside A, for every row's own set A.

    A row whose set holds more than half of the indices is solved on the other side: with K = H⁻¹ and F the indices
    outside A, H[A, A]⁻¹ = K[A, A] - K[A, F] K[F, F]⁻¹ K[F, A]. No system is then larger than m / 2.

    Args:
        matrix: H ``[m, m]``, symmetric positive definite.
        inverse: K ``[m, m]``; None: there is no accurate one, and all is solved with H.
        members: the sets, ``[r, m]`` of bool.
        target: b ``[r, m]``.

    Returns:
        x ``[r, m]``; not finite where a submatrix is not positive definite.
    """
    count, size = members.shape
    target = torch.where(members, target, 0.0)
    if count * size * size <= _SMALL:
        return _masked(matrix, members, target)
    if inverse is None:
        return _picked(matrix, members, target)
    many = members.sum(1) > size // 2
    few_rows, many_rows = (~many).nonzero()[:, 0], many.nonzero()[:, 0]
    if not len(many_rows):
        return _picked(matrix, members, target)
    found = torch.empty_like(target)
    if len(few_rows):
        found[few_rows] = _picked(matrix, members[few_rows], target[few_rows])
    across = target[many_rows] @ inverse
    outside = _picked(inverse, ~members[many_rows], across)
    found[many_rows] = torch.where(members[many_rows], across - outside @ inverse, 0.0)
    return found


def _masked(matrix: Tensor, members: Tensor, target: Tensor) -> Tensor:
    """Solve with whole matrices, the identity outside the sets."""
    inside = members.to(matrix)
    matrices = matrix * inside[:, :, None] * inside[:, None, :]
    matrices.diagonal(dim1=1, dim2=2).add_(1 - inside)
    return _solve(matrices, target)


def _picked(matrix: Tensor, members: Tensor, target: Tensor) -> Tensor:
    """Solve with the picked submatrices only, rows of like size together, in chunks of bounded memory."""
    count, size = members.shape
    sizes, order = members.sum(1).sort(descending=True)
    largest = sizes.tolist()
    row, column = members.nonzero(as_tuple=True)
    if not len(row):
        return torch.zeros_like(target)
    # Index `size` stands for nothing: a row and column of zeros, with ones set on the diagonal below.
    index = torch.full((count, largest[0]), size, device=matrix.device)
    index[row, members.cumsum(1)[row, column] - 1] = column
    entries, target = F.pad(matrix, (0, 1, 0, 1)).flatten(), F.pad(target, (0, 1))
    found = torch.zeros_like(target)
    start, room = 0, _CHUNK.get(matrix.device.type, _CHUNK_ELSEWHERE)
    space = matrix.new_empty(min(count, max(1, room // largest[0] ** 2)) * largest[0] ** 2)
    while start < count and (width := largest[start]):
        rows = order[start : start + len(space) // width**2]
        picks = index[rows, :width]
        short = picks.int()  # half the bytes to fetch by
        places = (short * (size + 1))[:, :, None] + short[:, None, :]
        flat = space[: places.numel()]
        submatrices = torch.index_select(entries, 0, places.flatten(), out=flat).view(places.shape)
        submatrices.diagonal(dim1=1, dim2=2).add_(picks == size)
        found[rows] = found[rows].scatter(1, picks, _solve(submatrices, target[rows].gather(1, picks)))
        start += len(rows)
    return found[:, :size]


def _solve(matrices: Tensor, target: Tensor) -> Tensor:
    """Solve ``[r, k, k]`` systems by Cholesky's factors; not finite where a matrix has none."""
    factor, failed = torch.linalg.cholesky_ex(matrices)
    solution = torch.cholesky_solve(target[:, :, None], factor)[:, :, 0]
    return torch.where(failed[:, None] == 0, solution, torch.nan)
