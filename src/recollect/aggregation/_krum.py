"""Krum: the gradients that have the closest company."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._gramian import normalized
from recollect.aggregation._settings import Number
from recollect.aggregation._weighting import Weighting

__all__ = ["KrumWeighting"]


_SETTINGS = {
    "n_byzantine": Number(lambda n: n >= 0, "be at least 0", whole=True),
    "n_selected": Number(lambda n: n >= 1, "be at least 1", whole=True),
}


class KrumWeighting(Weighting, settings=_SETTINGS):
    r"""Average the gradients that are closest to their nearest neighbours; the others may be anything.

    (Multi-)Krum, section 4 of "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent" (Blanchard et
    al. 2017): the score of gradient i is the sum of :math:`\|g_i - g_j\|^2` over its m - n_byzantine - 2 closest
    neighbours, and those with the smallest scores are chosen.

    Args:
        n_byzantine: how many gradients may come from an adversary.
        n_selected: how many are averaged.

    Raises:
        TypeError: a number that is not whole.
        ValueError: a negative ``n_byzantine``, an ``n_selected`` below one; at the call, fewer objectives than
            ``n_byzantine + 3`` or than ``n_selected``.

    Example:
        >>> import torch
        >>> from recollect.aggregation import KrumWeighting
        >>> jacobian = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.3], [-50.0, 50.0]])
        >>> KrumWeighting(n_byzantine=1, n_selected=2)(jacobian @ jacobian.T)
        tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        super().__init__()
        self.n_byzantine = n_byzantine
        self.n_selected = n_selected

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``: 1 / n_selected for those chosen, 0 for the others."""
        least = max(self.n_byzantine + 3, self.n_selected)
        if len(gramian) < least:
            raise ValueError(
                f"Krum with n_byzantine={self.n_byzantine} and n_selected={self.n_selected} needs at least {least} "
                f"objectives; the Gramian has {len(gramian)}"
            )
        matrix = normalized(gramian)
        squares = matrix.diagonal()
        distances = (squares[:, None] + squares - 2 * matrix).clamp(min=0)
        distances.fill_diagonal_(torch.inf)  # nobody is their own neighbour
        closest = distances.topk(len(matrix) - self.n_byzantine - 2, largest=False).values
        chosen = closest.sum(1).topk(self.n_selected, largest=False).indices
        return torch.zeros_like(squares).index_fill(0, chosen, 1 / self.n_selected)
