"""Many linear systems at once: each row picks its own principal submatrix of one shared matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["solve_on"]

_EXACT = 1e-11  # rounding in an exchange beyond which it is not used
_SMALL = 2**15  # so many numbers in all the rows' matrices: not worth the picking
_CHUNK = 2**17  # numbers in one chunk: a mebibyte stays in a CPU's cache


def solve_on(matrix: Tensor, members: Tensor, target: Tensor) -> Tensor:
    """Solve ``H[A, A] x[A] = b[A]`` with ``x = 0`` outside A, for every row's own set A.

    What most rows solve for is solved for all of them at once: on the set B of the indices that are in more than half
    of the sets, x and the residual H x - b change places (Tucker 1960, "A combinatorial equivalence of matrices").
    Of each row only the indices are left that are in one of A and B, and not in the other.

    Args:
        matrix: H ``[m, m]``, symmetric positive definite.
        members: the sets, ``[r, m]`` of bool.
        target: b ``[r, m]``.

    Returns:
        x ``[r, m]``; where a submatrix is not positive definite, it solves the system or is not finite.
    """
    count, size = members.shape
    target = torch.where(members, target, 0.0)
    if count * size * size <= _SMALL:
        return _masked(matrix, members, target)
    most = 2 * members.sum(0) > count
    exchanged = _exchange(matrix, most) if bool(most.any()) else None
    if exchanged is None:
        return _picked(matrix, members, target, _solve)
    constant = torch.where(most, target, 0.0) @ exchanged.T - torch.where(most, 0.0, target)
    changed = _picked(exchanged, members ^ most, -constant, _solve_any)
    return torch.where(members, torch.where(most, torch.addmm(constant, changed, exchanged.T), changed), 0.0)


def _exchange(matrix: Tensor, chosen: Tensor) -> Tensor | None:
    """Return M with v = M w for y = H x, where x and y have changed places on a set: w is y there, and v is x.

    None where rounding would show in the answers.
    """
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    into = torch.where(chosen[:, None], matrix, identity)
    out = torch.where(chosen[:, None], identity, matrix)
    exchanged = torch.linalg.solve_ex(into, out, left=False)[0]
    return exchanged if bool(torch.addmm(out, exchanged, into, beta=-1).abs().amax() < _EXACT) else None


def _masked(matrix: Tensor, members: Tensor, target: Tensor) -> Tensor:
    """Solve with whole matrices, the identity outside the sets."""
    inside = members.to(matrix)
    matrices = matrix * inside[:, :, None] * inside[:, None, :]
    matrices.diagonal(dim1=1, dim2=2).add_(1 - inside)
    return _solve(matrices, target)


def _picked(matrix: Tensor, members: Tensor, target: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
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
    start = 0
    space = matrix.new_empty(min(count, max(1, _CHUNK // largest[0] ** 2)) * largest[0] ** 2)
    while start < count and (width := largest[start]):
        rows = order[start : start + len(space) // width**2]
        picks = index[rows, :width]
        short = picks.int()  # half the bytes to fetch by
        places = (short * (size + 1))[:, :, None] + short[:, None, :]
        flat = space[: places.numel()]
        submatrices = torch.index_select(entries, 0, places.flatten(), out=flat).view(places.shape)
        submatrices.diagonal(dim1=1, dim2=2).add_(picks == size)
        found[rows] = found[rows].scatter(1, picks, solve(submatrices, target[rows].gather(1, picks)))
        start += len(rows)
    return found[:, :size]


def _solve(matrices: Tensor, target: Tensor) -> Tensor:
    """Solve symmetric ``[r, k, k]`` systems by Cholesky's factors; not finite where a matrix has none."""
    factor, failed = torch.linalg.cholesky_ex(matrices)
    solution = torch.cholesky_solve(target[:, :, None], factor)[:, :, 0]
    return torch.where(failed[:, None] == 0, solution, torch.nan)


def _solve_any(matrices: Tensor, target: Tensor) -> Tensor:
    """Solve ``[r, k, k]`` systems that need not be symmetric."""
    solution: Tensor = torch.linalg.solve_ex(matrices, target)[0]
    return solution
