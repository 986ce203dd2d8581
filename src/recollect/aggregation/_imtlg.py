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
    for Multi-Objective Optimization" (arXiv 2406.16232): :math:`w = G^+ d` with :math:`d_i = \|g_i\|`, divided by its
    sum, so that :math:`(G w)_i / \|g_i\|` is one number for all i. Where gradients depend on each other linearly,
    these are the shortest weights, and where no update projects equally onto all, those with which the squared errors
    of :math:`G w = d` are least. Weights may be negative. Gradients that are zero get no weight. If there is no
    solution with the sum one, all weights are zero.

    It is computed from the gradients' cosines, so that norms of very different size do no harm.

    Example:
        >>> import torch
        >>> from recollect.aggregation import IMTLGWeighting
        >>> jacobian = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> weights = IMTLGWeighting()(jacobian @ jacobian.T)
        >>> weights
        tensor([0.6667, 0.3333])
        >>> weights @ jacobian  # as long along either gradient
        tensor([0.6667, 0.6667])
    """

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        cosines, norms = correlations(gramian)
        there = norms > 0
        values, vectors = torch.linalg.eigh(cosines)
        # Rounding of the Gramian's own type decides what counts as dependent.
        kept = values > len(cosines) * torch.finfo(gramian.dtype).eps * values.amax()
        values, vectors = values[kept], vectors[:, kept]
        if len(values) == there.sum():
            smallest = torch.where(there, norms, torch.inf).amin()
            weights = torch.where(there, (vectors / values @ vectors.T @ there.double()) * smallest / norms, 0.0)
        else:
            weights = _shortest(vectors * values.sqrt(), norms)
        total = weights.sum()
        lost = ~(total.abs() > 1e-12 * weights.abs().sum())
        return torch.where(lost, 0.0, weights / torch.where(lost, 1.0, total))


def _shortest(directions: Tensor, norms: Tensor) -> Tensor:
    """Return the pseudo-inverse of a Gramian, times the norms, but for a positive factor.

    With the root B = diag(norms) U of the Gramian, and its QR factors, that is Q R⁻ᵀ R⁻¹ Qᵀ d. Householder's
    reflections want long rows first.

    Args:
        directions: U [m, rank], of as many columns as are independent; U Uᵀ holds the cosines.
        norms: d [m].
    """
    order = norms.argsort(descending=True)
    lengths = norms[order] / norms.amax()
    q, r = torch.linalg.qr(directions[order] * lengths[:, None])
    seen = q.T @ lengths
    if float(seen.norm()) <= 1e-12 * float(lengths.norm()):  # of the norms the gradients can make up nothing
        return torch.zeros_like(norms)
    update = torch.linalg.solve_triangular(r, seen[:, None], upper=True)
    found = q @ torch.linalg.solve_triangular(r.T, update, upper=False)[:, 0]
    return torch.zeros_like(norms).index_copy(0, order, found)
