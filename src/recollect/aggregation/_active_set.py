"""Quadratic programs that resist: one constraint at a time, downhill all the way."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._subsets import solve_on

__all__ = ["descend"]


def descend(matrix: Tensor, offset: Tensor, z: Tensor, *, tolerance: float, most: int) -> Tensor:
    """Minimise ½ zᵀ H z + qᵀ z over z >= 0 for every row q, from the z that is given.

    The active-set method of Lawson and Hanson 1974 ("Solving Least Squares Problems", chapter 23), all rows together:
    go towards the minimum over the entries that are positive; where one of them would turn negative, stop there and
    give it up; at the minimum, take up the entry that promises most. The value falls in every round, so that it ends
    where block pivoting may circle, but in rounds as many as entries change.

    Args:
        matrix: H ``[m, m]``, symmetric positive definite.
        offset: q, ``[r, m]``.
        z: where to begin, ``[r, m]``; not negative.
        tolerance: slopes count as negative beyond this, relative to ``1 + max(z)``.
        most: rounds at most; from a good beginning few are needed, from any other about as many as objectives.

    Returns:
        z ``[r, m]``, not negative.
    """
    found = z.clone()
    rows = torch.arange(len(z), device=z.device)
    positive = z > 0
    for _ in range(most):
        goal = solve_on(matrix, positive, -offset)
        lost = ~goal.isfinite().all(1, keepdim=True)  # rounding has made a submatrix singular: stay
        goal = torch.where(lost, z, goal)
        blocking = positive & ~(goal > 0)
        reach = torch.where(blocking, z / (z - goal), torch.inf)
        part = reach.amin(1, keepdim=True).clamp(max=1)
        stopped = blocking & (reach <= part)
        z = torch.where(stopped, 0.0, torch.where(part < 1, z + part * (goal - z), goal))
        positive = positive & ~stopped
        slope = torch.where(positive, torch.inf, torch.addmm(offset, z, matrix))
        steepest = slope.amin(1, keepdim=True)
        arrived = ~blocking.any(1, keepdim=True)
        wanting = steepest < -tolerance * (1 + z.amax(1, keepdim=True))
        found[rows] = z
        going = ((~arrived | wanting) & ~lost)[:, 0].nonzero()[:, 0]
        positive = positive | (arrived & wanting & (slope == steepest))
        rows, offset, z, positive = (x[going] for x in (rows, offset, z, positive))
        if not len(rows):
            break
    return found
