"""Weightings for losses of any shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recollect._transfer import sent
from recollect.aggregation._gramian import check_tensor, checked, flattened
from recollect.aggregation._settings import Configurable, weighting_of_any_kind
from recollect.aggregation._weighting import Weighting, checked_weights

__all__ = ["Flattening"]


class Flattening(Configurable, settings={"weighting": weighting_of_any_kind}):
    """Weigh losses of any shape ``[m1, .., mk]`` as if they were one list of them.

    Args:
        weighting: from a Gramian ``[m, m]`` to weights ``[m]``, with m the product of all mi; one that takes residuals
            too gets them as they are given here, as ``[m]``.

    Raises:
        TypeError: ``weighting`` is a class, or cannot be called.

    Shapes:
        - generalised Gramian: [m1, .., mk, mk, .., m1], its second half mirroring the first; [] for a lone loss.
        - weights, and residuals: [m1, .., mk].

    Example:
        >>> import torch
        >>> from recollect.aggregation import Flattening, MeanWeighting
        >>> Flattening(MeanWeighting())(torch.eye(6).reshape(2, 3, 2, 3).movedim((2, 3), (3, 2))).shape
        torch.Size([2, 3])
    """

    if TYPE_CHECKING:  # a module's own takes and returns anything

        def __call__(self, gramian: Tensor, *vectors: Tensor) -> Tensor: ...

    def __init__(self, weighting: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weighting = weighting

    @property
    def takes_residuals(self) -> bool:
        """Whether the wrapped weighting does."""
        return bool(getattr(self.weighting, "takes_residuals", False))

    @torch.no_grad()
    def forward(self, gramian: Tensor, *vectors: Tensor) -> Tensor:
        """Return the weights, on the Gramian's device. The wrapped weighting gets everything in host memory.

        Args:
            gramian: the generalised Gramian.
            *vectors: what the wrapped weighting takes beside it, in the shape of the losses.

        Raises:
            TypeError: the Gramian is no tensor, or the weighting returns none.
            ValueError: another shape, or what the weighting refuses; objectives are named by their place.
        """
        matrix, shape = flattened(gramian)
        for vector in vectors:
            check_tensor("what comes beside the Gramian", vector)
            if tuple(vector.shape) != shape:
                found = list(vector.shape)
                raise ValueError(f"losses have the shape {list(shape)}; what comes beside their Gramian has {found}")
        matrix, *beside = self.on_host(matrix, *vectors)
        # The weighting would name objectives by their number.
        check = self.weighting.check_gramian if isinstance(self.weighting, Weighting) else checked
        weights = self.weighting(check(matrix, shape), *(vector.flatten() for vector in beside))
        return sent(checked_weights(weights, len(matrix), "the wrapped weighting").reshape(shape), gramian.device)
