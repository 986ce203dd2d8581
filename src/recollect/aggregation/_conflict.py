"""How much objectives conflict, as numbers for a training report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.aggregation._gramian import check_tensor, checked, correlations, flattened
from recollect.aggregation._host import fetched

__all__ = ["Conflict", "conflict"]


@dataclass(frozen=True)
class Conflict:
    """Measures of conflict between objectives.

    Attributes:
        negative_share: of all pairs of objectives, how many have gradients with a negative product; 0 to 1.
        cosines: between the update Jᵀ w and each gradient, in the shape of the weights, float64, in host memory; 0
            where one of them is zero. Where it is negative, a small step makes the objective worse.
        min_cosine: the smallest cosine with a gradient that is not zero; 0 if there is none.

    Example:
        >>> import torch
        >>> from recollect.aggregation import Conflict, conflict
        >>> found = conflict(torch.eye(2))
        >>> isinstance(found, Conflict), found.negative_share, round(found.min_cosine, 4)
        (True, 0.0, 0.7071)
    """

    negative_share: float
    cosines: Tensor
    min_cosine: float


@torch.no_grad()
def conflict(gramian: Tensor, weights: Tensor | None = None) -> Conflict:
    """Measure conflict from the Gramian alone. The host waits for the device once.

    Args:
        gramian: ``[m1, .., mk, mk, .., m1]``; with one axis of objectives that is ``[m, m]``.
        weights: of the update, ``[m1, .., mk]``; None: equal ones, the update of the mean loss.

    Returns:
        The share of conflicting pairs, the cosines between the update and each gradient, and the smallest of these.

    Raises:
        TypeError: the Gramian or the weights are no tensor.
        ValueError: what weightings refuse, or weights of another shape or not finite.

    Example:
        >>> import torch
        >>> from recollect.aggregation import conflict
        >>> jacobian = torch.tensor([[1.0, 0.0], [-3.0, 1.0]])
        >>> found = conflict(jacobian @ jacobian.T)
        >>> found.negative_share
        1.0
        >>> found.cosines  # the mean loss falls, and the first one rises
        tensor([-0.8944,  0.9899], dtype=torch.float64)
    """
    matrix, shape = flattened(gramian)
    matrix, weights = fetched([matrix, weights])
    matrix = checked(matrix, shape)
    if weights is None:
        weights = matrix.new_ones(shape)
    check_tensor("weights", weights)
    if tuple(weights.shape) != shape or not bool(weights.isfinite().all()):
        raise ValueError(f"weights must be finite and of the shape {list(shape)}; found {list(weights.shape)}")
    between, norms = correlations(matrix)
    count = len(matrix)
    # Beside rounding, what is orthogonal is in no conflict.
    negative = int((between < -4 * torch.finfo(gramian.dtype).eps).sum())
    there = norms > 0
    parts = weights.to(between).flatten() * (norms / norms.amax())
    parts = torch.where(there, parts / torch.where(parts.abs().amax() > 0, parts.abs().amax(), 1.0), 0.0)
    products = between @ parts
    length = (parts @ products).clamp(min=0).sqrt()
    cosines = torch.where(length > 0, products / length, 0.0).clamp(-1, 1)
    smallest = torch.where(there, cosines, torch.inf).amin()
    share = negative / max(count * (count - 1), 1)
    return Conflict(share, cosines.reshape(shape), float(torch.where(there.any(), smallest, 0.0)))
