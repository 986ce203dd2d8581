"""Weightings for losses of any shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recollect.aggregation._gramian import checked, flattened
from recollect.aggregation._weighting import checked_weights

__all__ = ["Flattening"]


class Flattening(nn.Module):
    """Weigh losses of any shape ``[m1, .., mk]`` as if they were one list of them.

    Args:
        weighting: from a Gramian ``[m, m]`` to weights ``[m]``, with m the product of all mi.

    Shapes:
        - generalised Gramian: [m1, .., mk, mk, .., m1], its second half mirroring the first; [] for a lone loss.
        - weights: [m1, .., mk].

    Example:
        >>> import torch
        >>> from recollect.aggregation import Flattening, MeanWeighting
        >>> Flattening(MeanWeighting())(torch.eye(6).reshape(2, 3, 2, 3).movedim((2, 3), (3, 2))).shape
        torch.Size([2, 3])
    """

    if TYPE_CHECKING:  # a module's own takes and returns anything

        def __call__(self, gramian: Tensor) -> Tensor: ...

    def __init__(self, weighting: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weighting = weighting

    @torch.no_grad()
    def forward(self, gramian: Tensor) -> Tensor:
        """Return the weights.

        Raises:
            TypeError: the Gramian is no tensor, or the weighting returns none.
            ValueError: another shape, or what :class:`Weighting` refuses; objectives are named by their place.
        """
        matrix, shape = flattened(gramian)
        weights = self.weighting(checked(matrix, shape))
        return checked_weights(weights, len(matrix), "the wrapped weighting").reshape(shape)
