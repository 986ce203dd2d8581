"""Nash-MTL: the objectives bargain for the direction of the update."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._gramian import correlations, regularized
from recollect.aggregation._weighting import Weighting

__all__ = ["NashMTLWeighting"]

_RIDGE = 1e-8  # beside the ones on the diagonal: keeps weights bounded where gradients cancel
_STEPS = 100


class NashMTLWeighting(Weighting):
    r"""Solve :math:`G w = 1 / w` for w > 0: the Nash bargaining solution of the objectives.

    "Multi-Task Learning as a Bargaining Game" (Navon et al. 2022, arXiv 2202.01017): the equation of its claim 3.1,
    with the update's norm limited as in its authors' code. The equation says that the gradient of the convex
    :math:`\tfrac12 w^\top G w - \sum_i \log w_i` is zero; Newton's method, damped, solves it to rounding, where the
    paper takes a sequence of convex approximations. Gradients that are zero cannot bargain and get no weight.

    Args:
        max_norm: the norm that Jᵀ w may have at most; 0: any.

    Raises:
        ValueError: ``max_norm`` is negative.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        super().__init__()
        if not max_norm >= 0:
            raise ValueError(f"max_norm must not be negative (got {max_norm})")
        self.max_norm = max_norm

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``, none of them negative."""
        cosines, norms = correlations(gramian)
        there = norms > 0
        # In units of each gradient's norm the equation is the same, for the cosines.
        shares = torch.where(there, _bargain(regularized(cosines + torch.diag(~there).to(cosines), _RIDGE)[0]), 0.0)
        weights = torch.where(there, shares / norms, 0.0)
        length = (shares @ cosines @ shares).clamp(min=0).sqrt()  # of Jᵀ w; the root of m, unless gradients cancel
        return weights * (self.max_norm / length).clamp(max=1) if self.max_norm else weights


def _bargain(matrix: Tensor) -> Tensor:
    """Minimise ½ pᵀ C p - Σ log p by damped Newton steps, which converge from anywhere: it is self-concordant."""
    p = matrix.new_ones(len(matrix))
    identity = torch.eye(len(p), dtype=p.dtype, device=p.device)
    for _ in range(_STEPS):
        slope = (matrix @ p) * p - 1
        # The Hessian C + diag(1 / p²), in units of p: no entry is large because a p is small.
        factor = torch.linalg.cholesky_ex(matrix * p[:, None] * p + identity)[0]
        step = torch.cholesky_solve(slope[:, None], factor)[:, 0]
        decrement = float((slope @ step).clamp(min=0).sqrt())
        p = p * (1 - step / (1 + decrement if decrement > 0.25 else 1.0))
        if decrement < 1e-12:
            break
    return p
