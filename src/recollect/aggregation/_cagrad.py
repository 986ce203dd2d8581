"""CAGrad: the direction near the average gradient that is best for the worst-off objective."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._complementarity import solve
from recollect.aggregation._dual_cone import equilibrated
from recollect.aggregation._settings import NOT_NEGATIVE
from recollect.aggregation._subsets import solve_on
from recollect.aggregation._weighting import Weighting

__all__ = ["CAGradWeighting"]

_RIDGE = 1e-12  # added to the diagonal of G / trace(G)
_ACCURACY = 1e-12
_EVALUATIONS = 100


class CAGradWeighting(Weighting, settings={"c": NOT_NEGATIVE, "norm_eps": NOT_NEGATIVE}):
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
        ValueError: ``c`` or ``norm_eps`` is negative or not finite.

    Example:
        >>> import torch
        >>> from recollect.aggregation import CAGradWeighting
        >>> jacobian = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> weights = CAGradWeighting(c=0.5)(jacobian @ jacobian.T)
        >>> average, update = jacobian.mean(0), weights @ jacobian
        >>> torch.allclose((update - average).norm(), 0.5 * average.norm())  # at the edge of the ball
        True
        >>> jacobian @ average, jacobian @ update  # what it wins, it wins for the first objective
        (tensor([0.5000, 2.0000]), tensor([1.0590, 2.0000]))
    """

    def __init__(self, c: float, norm_eps: float = 1e-4) -> None:
        super().__init__()
        self.c = c
        self.norm_eps = norm_eps

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        matrix, factor, scale = equilibrated(gramian, _RIDGE)
        average = 1 / (len(matrix) * scale)
        products = average @ matrix
        radius = self.c * (products @ average).sqrt()
        above = _reach(matrix, factor, scale, products, radius) * scale if bool(radius > 0) else torch.zeros_like(scale)
        # Jᵀ w for the convex combination w = x / sum(x) of algorithm 1 has the norm radius / sum(x).
        stuck = radius < self.norm_eps * above.sum()
        return torch.where(stuck, 0.0, 1 / len(matrix) + above)


def _reach(matrix: Tensor, factor: Tensor, scale: Tensor, products: Tensor, radius: Tensor) -> Tensor:
    """Return the x >= 0 for the smallest product μ at which Jᵀ x has the norm ``radius``, by Newton's method.

    While the same entries are positive, x moves along a line with μ, and the norm's square is a quadratic function of
    it: so each step solves for μ as if they stayed. Below the lower end of the bracket x is zero; above the upper one
    even a lone objective could not gain as much.
    """
    low, high = (products / scale).amin(), ((products + radius) / scale).amin()
    product, x = high, torch.zeros_like(scale)
    for _ in range(_EVALUATIONS):
        x = solve(matrix, factor, (products - product * scale)[None])[0][0]
        excess = x @ matrix @ x - radius**2
        if bool((excess.abs() <= _ACCURACY * radius**2) | (high - low <= _ACCURACY * high.abs())):
            break
        low, high = torch.where(excess < 0, product, low), torch.where(excess < 0, high, product)
        along = solve_on(matrix, (x > 0)[None], scale[None])[0]
        slope, bend = x @ scale, along @ scale
        product = product + ((slope**2 - bend * excess).sqrt() - slope) / bend
        product = torch.where((low < product) & (product < high), product, (low + high) / 2)
    return x
