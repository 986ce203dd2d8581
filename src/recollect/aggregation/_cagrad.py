"""CAGrad: the direction near the average gradient that is best for the worst-off objective."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._complementarity import solve
from recollect.aggregation._dual_cone import equilibrated
from recollect.aggregation._weighting import Weighting

__all__ = ["CAGradWeighting"]

_RIDGE = 1e-10  # added to the diagonal of G / trace(G)
_ACCURACY = 1e-12
_EVALUATIONS = 100


class CAGradWeighting(Weighting):
    r"""Maximise the smallest :math:`\langle g_i, d \rangle` over all d within :math:`c \|g_0\|` of the average g₀.

    Algorithm 1 of "Conflict-Averse Gradient Descent for Multi-task Learning" (Liu et al. 2021, arXiv 2110.14048).
    The best d is g₀ + Jᵀ x for an x >= 0, and x solves min ½ xᵀ G x + (G 1 / m - μ 1)ᵀ x over x >= 0 for the one
    number μ, the smallest product, at which :math:`\|J^\top x\| = c \|g_0\|`. This norm grows with μ; so one number is
    searched for, and each value of it is a quadratic program of the kind that UPGrad solves.

    Args:
        c: the radius of the ball as a share of the average gradient's norm; the paper takes it from [0, 1).
        norm_eps: where the convex combination that the algorithm finds is shorter than this, with the Jacobian's
            Frobenius norm as one, the point counts as Pareto-stationary, and the weights are zero.

    Raises:
        ValueError: ``c`` or ``norm_eps`` is negative.
    """

    def __init__(self, c: float, norm_eps: float = 1e-4) -> None:
        super().__init__()
        if not (c >= 0 and norm_eps >= 0):
            raise ValueError(f"c and norm_eps must not be negative (got {c} and {norm_eps})")
        self.c = c
        self.norm_eps = norm_eps

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        matrix, scale = equilibrated(gramian, _RIDGE)
        average = 1 / (len(matrix) * scale)
        products = average @ matrix
        radius = self.c * (products @ average).sqrt()
        above = _reach(matrix, scale, products, radius) * scale if bool(radius > 0) else torch.zeros_like(scale)
        # Jᵀ w for the convex combination w = x / sum(x) of algorithm 1 has the norm radius / sum(x).
        stuck = radius < self.norm_eps * above.sum()
        return torch.where(stuck, 0.0, 1 / len(matrix) + above)


def _reach(matrix: Tensor, scale: Tensor, products: Tensor, radius: Tensor) -> Tensor:
    """Return the x >= 0 for the smallest product at which Jᵀ x has the norm ``radius``, by regula falsi.

    Below the lower end of the bracket x is zero; above the upper one even a lone objective could not gain as much.
    """
    low, high = (products / scale).amin(), ((products + radius) / scale).amin()
    below, beyond = -radius, torch.full_like(radius, torch.nan)
    x, side = torch.zeros_like(scale), 0
    for _ in range(_EVALUATIONS):
        middle = high if bool(beyond.isnan()) else (low * beyond - high * below) / (beyond - below)
        x = solve(matrix, (products - middle * scale)[None])[0][0]
        excess = (x @ matrix @ x).sqrt() - radius
        if bool((excess.abs() <= _ACCURACY * radius) | (high - low <= _ACCURACY * high.abs())):
            break
        # Illinois: an end that stays twice counts half, else it would stay for ever.
        if bool(excess > 0):
            high, beyond, below = middle, excess, below / 2 if side == 1 else below
            side = 1
        else:
            low, below, beyond = middle, excess, beyond / 2 if side == -1 else beyond
            side = -1
    return x
