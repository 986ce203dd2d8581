"""Linear complementarity problems with one shared matrix, all solved together to rounding."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from recollect.aggregation._active_set import descend
from recollect.aggregation._modulus import modulus
from recollect.aggregation._subsets import solve_on

__all__ = ["solve"]

_NOTABLE = 1e-6  # residuals above this are told
_TOLERANCE = 1e-11  # a sign, or an equation, counts as wrong beyond this, beside a row's largest entry
_PATIENCE = 3  # rounds without progress before a row is given up
_LEAST_SHIFT = 1e-2


def solve(matrix: Tensor, offset: Tensor) -> tuple[Tensor, float]:
    """Find ``z >= 0`` with ``y = H z + q >= 0`` and ``zᵀ y = 0`` for every row q.

    These are the optimality conditions of min ½ zᵀ H z + qᵀ z over z >= 0. A few steps of :func:`modulus`, in float32,
    guess which entries are positive; :func:`_pivot` solves exactly on that guess and mends it where signs are wrong.
    Rows on which that does not end are left to :func:`descend`, which is slower and sure.

    Args:
        matrix: H ``[m, m]`` in float64, symmetric positive definite, best with a diagonal of ones.
        offset: q, one problem a row, ``[r, m]``, best with entries of at most about one.

    Returns:
        z ``[r, m]``, and the residual: the worst row's largest ``|min(z, y)|``, relative to ``1 + max(z)``. Above
        1e-6 there is a RuntimeWarning.
    """
    if not bool((offset < 0).any()):
        return torch.zeros_like(offset), 0.0
    factor = torch.linalg.cholesky_ex(matrix)[0]
    # det(H)^(1/m), the geometric mean of the eigenvalues; where most are tiny, what the others ask for.
    shift = factor.diagonal().log().mean().mul(2).exp().clamp(min=_LEAST_SHIFT)
    inverse = _accurate_inverse(matrix, factor)
    guess = modulus(matrix.float(), offset.float(), shift.float())
    found, left = _pivot(matrix, inverse, offset, guess > 0)
    if len(left):
        begin = guess[left].clamp(min=0).nan_to_num(0.0).to(offset)
        found[left] = descend(matrix, inverse, offset[left], begin, _TOLERANCE)
    found = found.clamp(min=0)
    residual = float(_residual(matrix, offset, found).amax())
    if not residual <= _NOTABLE:
        warnings.warn(
            f"the weights are optimal only up to {residual:.1e}, where rounding leaves 1e-12: the Gramian is nearly "
            "singular, or not positive semi-definite. A larger reg_eps helps, where the weighting has one",
            RuntimeWarning,
            stacklevel=2,
        )
    return found, residual


def _accurate_inverse(matrix: Tensor, factor: Tensor) -> Tensor | None:
    """Invert the matrix from its Cholesky factor; None where rounding would show in the answers."""
    inverse = torch.cholesky_inverse(factor)
    product = matrix @ inverse
    product.diagonal().sub_(1)
    return inverse if bool(product.abs().amax() < _TOLERANCE) else None


def _residual(matrix: Tensor, offset: Tensor, z: Tensor) -> Tensor:
    return torch.minimum(z, torch.addmm(offset, z, matrix)).abs().amax(1) / (1 + z.amax(1))


def _pivot(matrix: Tensor, inverse: Tensor | None, offset: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Block principal pivoting, all rows at once; return z and the rows that are not done.

    Kim and Park 2011, "Fast nonnegative matrix factorization: an active-set-like method and comparisons", algorithm 2
    without its backup rule: solve on the set of entries taken as positive, move all entries with a wrong sign to the
    other side, repeat. Rows leave when they are done, and also when the count of their wrong signs has not fallen for
    some rounds. A round reads from the device which rows remain and how large their sets are, nothing else.
    """
    found = torch.empty_like(offset)
    rows = torch.arange(len(offset), device=matrix.device)
    given_up = [rows[:0]]
    fewest = torch.full_like(rows, len(matrix) + 1)
    patience = torch.full_like(rows, _PATIENCE)
    while True:
        z = solve_on(matrix, inverse, positive, -offset)
        y = torch.addmm(offset, z, matrix)
        allowed = _TOLERANCE * (1 + z.abs().amax(1, keepdim=True))
        wrong = torch.where(positive, z, y) < -allowed
        count = wrong.sum(1)
        found[rows] = z
        good = (count == 0) & ~((y.abs() > allowed) & positive).any(1) & z.isfinite().all(1)
        left = (~good).nonzero()[:, 0]
        if not len(left):
            return found, torch.cat(given_up)
        patience = torch.where(count < fewest, _PATIENCE, patience - 1)[left]
        fewest = torch.minimum(fewest, count)[left]
        going = (patience > 0) & (count[left] > 0)
        given_up.append(rows[left[~going]])
        left = left[going]
        rows, offset, positive = rows[left], offset[left], (positive ^ wrong)[left]
        fewest, patience = fewest[going], patience[going]
        if not len(rows):
            return found, torch.cat(given_up)
