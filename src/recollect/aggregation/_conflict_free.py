"""ConFIG: one direction with the same cosine to all gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._gramian import correlations
from recollect.aggregation._weighting import PreferenceWeighting

__all__ = ["ConFIGWeighting"]


class ConFIGWeighting(PreferenceWeighting):
    r"""Take the direction whose cosines to the gradients are as preferred, as long as the gradients reach along it.

    Equation 2 of "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks" (Liu, Chu and Thuerey
    2024, arXiv 2408.11104): the direction of :math:`U^+ p` for the unit gradients U, times the sum of the gradients'
    projections onto it. With the cosines C of the gradients and their norms n that is :math:`w = (a / n) (\sum_i n_i (C
    a)_i) / (p^\top a)` for :math:`a = C^+ p`. Gradients that are zero get no weight. Where unit gradients are dependent
    up to the rounding of the Gramian's type, cosines are as preferred in the sense of least squares; if there is no
    direction with any of what is preferred, all weights are zero.

    Args:
        pref_vector: p ``[m]``, finite and not negative; None: all alike. Their common size does not matter.

    Raises:
        TypeError: ``pref_vector`` is no tensor.
        ValueError: a wrong ``pref_vector``.

    Example:
        >>> import torch
        >>> from recollect.aggregation import ConFIGWeighting
        >>> jacobian = torch.tensor([[1.0, 0.0], [-2.0, 2.0]])
        >>> update = ConFIGWeighting()(jacobian @ jacobian.T) @ jacobian
        >>> torch.cosine_similarity(jacobian, update[None])
        tensor([0.3827, 0.3827])
    """

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        cosines, norms = correlations(gramian)
        there = norms > 0
        preference = torch.where(there, self.preference(gramian), 0.0)
        values, vectors = torch.linalg.eigh(cosines)
        rounding = len(cosines) * torch.finfo(gramian.dtype).eps
        wanted = vectors.T @ preference
        parts = torch.where(values > rounding * values[-1], wanted / values, 0.0)
        agreed = wanted @ parts  # the squared length of the direction
        reached = vectors @ (parts * values)
        lost = reached.norm() <= rounding * preference.norm()
        size = torch.where(lost, 0.0, (norms @ reached) / torch.where(lost, 1.0, agreed))
        return torch.where(there, vectors @ parts / torch.where(there, norms, 1.0), 0.0) * size
