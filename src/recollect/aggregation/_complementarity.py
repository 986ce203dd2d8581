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
_ROUNDS_EACH = 10  # downhill, for each objective; from the guess, fewer than one are needed
_FEW = 4  # so few objectives are pivoted at once: a guess would take as long


def solve(matrix: Tensor, factor: Tensor, offset: Tensor) -> tuple[Tensor, float]:
    """Find ``z >= 0`` with ``y = H z + q >= 0`` and ``zᵀ y = 0`` for every row q.

    These are the optimality conditions of min ½ zᵀ H z + qᵀ z over z >= 0. A few steps of :func:`modulus`, in float32,
    guess which entries are positive; :func:`_pivot` solves exactly on that guess and mends it where signs are wrong.
    Rows on which that does not end are left to :func:`descend`, which is slower and sure.

    Args:
        matrix: H ``[m, m]`` in float64, symmetric positive definite, best with a diagonal of ones.
        factor: its lower Cholesky factor.
        offset: q, one problem a row, ``[r, m]``, best with entries of at most about one.

    Returns:
        z ``[r, m]``, and the residual: the worst row's largest ``|min(z, y)|``, relative to ``1 + max(z)``. Above
        1e-6 there is a RuntimeWarning.
    """
    if bool((offset >= 0).all()):
        return torch.zeros_like(offset), 0.0
    guess = -offset
    if len(matrix) > _FEW:
        # det(H)^(1/m), the geometric mean of the eigenvalues; where most are tiny, what the others ask for.
        shift = factor.diagonal().log().mean().mul(2).exp().clamp(min=_LEAST_SHIFT)
        guess = modulus(matrix.float(), offset.float(), shift.float())
    found, left = _pivot(matrix, offset, guess > 0)
    if len(left):
        begin = guess[left].clamp(min=0).nan_to_num(0.0).to(offset)
        most = _ROUNDS_EACH * len(matrix)
        found[left] = descend(matrix, offset[left], begin, tolerance=_TOLERANCE, most=most)
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


def _residual(matrix: Tensor, offset: Tensor, z: Tensor) -> Tensor:
    return torch.minimum(z, torch.addmm(offset, z, matrix)).abs().amax(1) / (1 + z.amax(1))


def _pivot(matrix: Tensor, offset: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Block principal pivoting, all rows at once; return z and the rows that are not done.

    Kim and Park 2011, "Fast nonnegative matrix factorization: an active-set-like method and comparisons", algorithm 2
    without its backup rule: solve on the set of entries taken as positive, move all entries with a wrong sign to the
    other side, repeat. Rows leave when they are done, and also when the count of their wrong signs has not fallen for
    some rounds.
    """
    found, good, wrong = _attempt(matrix, offset, positive)
    left = rows = (~good).nonzero()[:, 0]
    given_up = [rows[:0]]
    fewest = torch.full_like(rows, len(matrix) + 1)
    patience = torch.full_like(rows, _PATIENCE)
    while len(rows):
        offset, positive, wrong = offset[left], positive[left], wrong[left]
        count = wrong.sum(1)
        patience = torch.where(count < fewest, _PATIENCE, patience - 1)
        fewest = torch.minimum(fewest, count)
        going = (patience > 0) & (count > 0)
        given_up.append(rows[~going])
        positive = positive ^ wrong
        rows, offset, positive, fewest, patience = (x[going] for x in (rows, offset, positive, fewest, patience))
        if not len(rows):
            break
        found[rows], good, wrong = _attempt(matrix, offset, positive)
        left = (~good).nonzero()[:, 0]
        rows, fewest, patience = rows[left], fewest[left], patience[left]
    return found, torch.cat(given_up)


def _attempt(matrix: Tensor, offset: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Solve on the sets of entries taken as positive; return z, which rows are done, and which signs are wrong."""
    z = solve_on(matrix, positive, -offset)
    y = torch.addmm(offset, z, matrix)
    least = (1 + z.amax(1, keepdim=True)) * -_TOLERANCE
    good = (torch.where(positive, torch.minimum(z, -y.abs()), y) >= least).all(1)
    return z, good, torch.where(positive, z, y) < least
