"""IMTL-G: an update with equal projections onto all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._gramian import correlations
from recollect.aggregation._weighting import Weighting

__all__ = ["IMTLGWeighting"]


class IMTLGWeighting(Weighting):
    r"""Give the update the same scalar projection onto every gradient, with weights that sum to one.

    IMTL-G of "Towards Impartial Multi-task Learning" (Liu et al. 2021, ICLR), in the general form of "Jacobian Descent
    for Multi-Objective Optimization" (arXiv 2406.16232): :math:`(G w)_i / \|g_i\|` is one number for all i. Weights
    may be negative. The equations are solved for the gradients' cosines, so that norms of very different size do no
    harm; where gradients depend on each other linearly, by the pseudo-inverse of these cosines. Gradients that are
    zero get no weight. If the solution cannot be scaled to the sum one, because its own sum is zero, all weights are
    zero.
    """

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        cosines, norms = correlations(gramian)
        there = norms > 0
        # Rounding of the Gramian's own type decides what counts as dependent.
        rounding = len(cosines) * torch.finfo(gramian.dtype).eps
        equal = torch.linalg.pinv(cosines, rtol=rounding, hermitian=True) @ there.double()
        smallest = torch.where(there, norms, torch.inf).amin()
        weights = torch.where(there, equal * smallest / norms, 0.0)
        total = weights.sum()
        lost = total.abs() <= 1e-12 * weights.abs().sum()
        return torch.where(lost, 0.0, weights / torch.where(lost, 1.0, total))
