"""Nash-MTL: the objectives bargain for the direction of the update."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._fairgrad import fair_shares
from recollect.aggregation._gramian import correlations
from recollect.aggregation._settings import Number
from recollect.aggregation._weighting import Weighting

__all__ = ["NashMTLWeighting"]


class NashMTLWeighting(Weighting, settings={"max_norm": Number(lambda x: x >= 0, "not be negative")}):
    r"""Solve :math:`G w = 1 / w` for w > 0: the Nash bargaining solution of the objectives.

    "Multi-Task Learning as a Bargaining Game" (Navon et al. 2022, arXiv 2202.01017): the equation of its claim 3.1,
    with the update's norm limited as in its authors' code. The equation says that the gradient of the convex
    :math:`\tfrac12 w^\top G w - \sum_i \log w_i` is zero; Newton's method, damped, solves it to rounding, where the
    paper takes a sequence of convex approximations. Gradients that are zero cannot bargain and get no weight.

    Args:
        max_norm: the norm that Jᵀ w may have at most; 0: any.

    Raises:
        ValueError: ``max_norm`` is negative.

    Example:
        >>> import torch
        >>> from recollect.aggregation import NashMTLWeighting
        >>> gramian = torch.diag(torch.tensor([1.0, 4.0]))
        >>> weights = NashMTLWeighting(max_norm=0)(gramian)
        >>> weights, gramian @ weights  # each is one divided by the other
        (tensor([1.0000, 0.5000]), tensor([1., 2.]))
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        super().__init__()
        self.max_norm = max_norm

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``, none of them negative."""
        cosines, norms = correlations(gramian)
        there = norms > 0
        # In units of each gradient's norm the equation is the same, for the cosines.
        shares, length = fair_shares(cosines + torch.diag(~there).to(cosines), torch.ones_like(norms), 1.0)
        weights = torch.where(there, shares / norms, 0.0)
        return weights * (self.max_norm / length).clamp(max=1) if self.max_norm else weights
