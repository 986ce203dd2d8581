"""FairGrad: a fair share of progress for each objective, in the sense of alpha-fairness."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._gramian import cholesky, correlations, regularized
from recollect.aggregation._settings import NOT_NEGATIVE
from recollect.aggregation._weighting import Weighting

__all__ = ["FairGradWeighting", "fair_shares"]

_RIDGE = 1e-8  # beside the ones on the diagonal: keeps weights bounded where gradients cancel
_STEPS = 100
_CORRECTIONS = 5
_PART = 1e-3  # no full step leaves less of an entry, or of its right side
_LEAST, _VAST = 1e-200, 1e200  # no share is smaller, no derivative larger


class FairGradWeighting(Weighting, settings={"alpha": NOT_NEGATIVE}):
    r"""Solve :math:`G w = w^{-1/\alpha}` for w > 0: alpha-fair progress of the objectives.

    Equation 4 of "Fair Resource Allocation in Multi-Task Learning" (Ban and Ji 2024, arXiv 2402.15638). It says that
    the gradient of a convex function is zero; Newton's method, damped so that it converges from anywhere, solves it to
    rounding. Alpha 1 is proportional fairness, the equation of :class:`NashMTLWeighting`; the larger alpha, the more
    the objective with the least progress counts. Gradients that are zero make no progress and get no weight. For
    gradients of k times the length the weights are :math:`k^{-2 \alpha / (1 + \alpha)}` times as large.

    Args:
        alpha: which fairness; 0: the mean, as in the paper's section 3.

    Raises:
        ValueError: ``alpha`` is negative or not finite.

    Example:
        >>> import torch
        >>> from recollect.aggregation import FairGradWeighting
        >>> FairGradWeighting(alpha=1.0)(torch.diag(torch.tensor([1.0, 4.0])))
        tensor([1.0000, 0.5000])
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``, none of them negative."""
        if self.alpha == 0:
            return torch.full_like(gramian[0], 1 / len(gramian))
        cosines, norms = correlations(gramian)
        there = norms > 0
        lengths = torch.where(there, norms, 1.0)
        # Orthogonal gradients have w = lengths ** exponent; in these units the equation is that of the cosines.
        exponent = -2 * self.alpha / (1 + self.alpha)
        sizes = lengths.log().mul(1 + exponent)
        shares, _ = fair_shares(cosines + torch.diag(~there).to(cosines), (sizes - sizes.amax()).exp(), self.alpha)
        return torch.where(there, shares * lengths**exponent, 0.0)


def fair_shares(cosines: Tensor, sizes: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    r"""Solve :math:`\sum_j C_{ij} s_j p_j = s_i p_i^{-1/\alpha}` for p > 0.

    In q = s p these are the conditions of a minimum of ½ qᵀ C q - Σ φ(q_i), with the concave φ of the equation's right
    side. A small multiple of qᵀ q keeps q bounded where there is no solution, as gradients cancel; a second minimum,
    with the squared distance to the first in its place, takes back what that has changed where there is one.

    Args:
        cosines: C ``[m, m]`` in float64, with ones on its diagonal.
        sizes: s ``[m]``, positive.
        alpha: positive.

    Returns:
        p ``[m]``, and the norm of the combination of unit vectors, of these cosines, with the factors q.
    """
    matrix = regularized(cosines, _RIDGE)[0]
    q = _descended(matrix, torch.zeros_like(sizes), sizes, alpha, sizes, _STEPS)
    q = _descended(matrix, _RIDGE * q, sizes, alpha, q, _CORRECTIONS)
    length = (q @ matrix @ q - _RIDGE * q @ q).clamp(min=0).sqrt()
    return q / sizes, length


def _descended(matrix: Tensor, offset: Tensor, sizes: Tensor, alpha: float, q: Tensor, most: int) -> Tensor:
    r"""Solve :math:`H q - b = s p^{-1/\alpha}`, p = q / s, for p > 0 by Newton's method, from the q that is given.

    A step in which the entry that shrinks most loses the share d of itself is shortened to :math:`(1 - (1 + d /
    \alpha)^{-\alpha}) / d`, that is 1 / (1 + d) for alpha 1: up to there, the second derivative along the step stays
    small enough that the convex function, of which this is the gradient, falls all the way. So it converges from
    anywhere. A full step is taken where the function falls deeper by it; it is one in :math:`p^{-1/\alpha}` for the
    entries that their right side rules.
    """
    least, absolute = sizes * _LEAST, matrix.abs()
    for _ in range(most):
        p = q / sizes
        right = sizes * (p ** (-1 / alpha)).clamp(max=_VAST)
        slope = matrix @ q - offset - right
        rounding = torch.finfo(q.dtype).eps * (absolute @ q + right)
        done = bool((slope.abs() <= 16 * rounding).all())  # but for one more step, which takes the rest
        bend = (p ** (-1 / alpha - 1) / alpha).clamp(max=_VAST)
        # The Hessian H + diag(bend), scaled: no entry is large because a p is small.
        scale = (1 + bend).rsqrt()
        factor = cholesky(matrix * scale[:, None] * scale + torch.diag(bend * scale**2))[0]
        loss = torch.cholesky_solve((slope * scale)[:, None], factor)[:, 0] * scale / q
        largest = loss.amax().clamp(min=_LEAST)
        part = (-torch.expm1(-alpha * torch.log1p(largest / alpha)) / largest).clamp(max=1)
        full = torch.where(bend > 1, (1 + loss / alpha).clamp(min=_PART) ** -alpha, (1 - loss).clamp(min=_PART))
        sure, full = torch.maximum(q * torch.stack([1 - part * loss, full]), least)
        # The difference of the two values, of small parts each: values themselves would hide it by their rounding.
        power, low, high = 1 - 1 / alpha, (sure / sizes).log(), (full / sizes).log()
        gain = (power * low).exp() * torch.expm1(power * (high - low)) / power if power else high - low
        deeper = ((full - sure) * (matrix @ (full + sure) / 2 - offset) - gain * sizes**2).sum() < 0
        q = torch.where(deeper, full, sure)
        if done:
            break
    return q
