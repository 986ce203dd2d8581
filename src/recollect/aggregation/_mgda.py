"""MGDA: the shortest vector between all gradients."""

from __future__ import annotations

from torch import Tensor

from recollect.aggregation._complementarity import solve
from recollect.aggregation._gramian import correlations, regularized
from recollect.aggregation._weighting import Weighting

__all__ = ["MGDAWeighting"]

_RIDGE = 1e-10  # beside the ones on the diagonal: chooses one of several solutions


class MGDAWeighting(Weighting):
    r"""Find the convex combination of the gradients that is shortest.

    :math:`\min_w \|J^\top w\|^2` subject to :math:`w \ge 0, \sum_i w_i = 1`: the multiple-gradient descent algorithm
    (Désidéri 2012), equation 3 of "Multi-Task Learning as Multi-Objective Optimization" (Sener and Koltun 2018, arXiv
    1810.04650). Where Frank-Wolfe steps come close, this is solved to rounding: w is proportional to the z >= 0 with
    :math:`G z \ge 1` and equality where z > 0. No objective minds the update, and a gradient that is zero takes all
    the weight: MGDA follows the smallest gradients.

    Example:
        >>> import torch
        >>> from recollect.aggregation import MGDAWeighting
        >>> jacobian = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> weights = MGDAWeighting()(jacobian @ jacobian.T)
        >>> weights
        tensor([0.8000, 0.2000])
        >>> jacobian @ (weights @ jacobian)  # both losses fall as fast
        tensor([0.8000, 0.8000])
    """

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``; they sum to one."""
        cosines, norms = correlations(gramian)
        zero = norms == 0
        if bool(zero.any()):
            return zero.double() / zero.sum()
        # In units of each gradient's norm the matrix has ones on its diagonal, however different the norms are.
        scale = norms.amin() / norms
        found = solve(*regularized(cosines, _RIDGE), -scale[None])[0][0] * scale
        return found / found.sum()
