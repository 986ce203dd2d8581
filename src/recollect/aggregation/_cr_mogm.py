"""CR-MOGM: the weights of any method, smoothed over the calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recollect.aggregation._gramian import check_tensor, checked
from recollect.aggregation._settings import UNIT, Check, Vector, weighting_of_gramians
from recollect.aggregation._weighting import StatefulWeighting, Weighting, checked_weights

__all__ = ["CRMOGMWeighting"]


_SETTINGS: dict[str, Check] = {
    "weighting": weighting_of_gramians,
    "alpha": UNIT,
    "initial_weights": Vector(negative=True),
}


class CRMOGMWeighting(StatefulWeighting, settings=_SETTINGS):
    r"""Return :math:`\lambda_k = \alpha \lambda_{k-1} + (1 - \alpha) \hat\lambda_k` for the weights of another method.

    The momentum of the composite weights in algorithm 1 of "On the Convergence of Stochastic Multi-Objective Gradient
    Manipulation and Beyond" (Zhou et al. 2022, NeurIPS): weights that hang on a random batch less keep the method from
    going astray. The paper lets alpha grow towards one as the learning rate falls; assign it between steps for that.

    Args:
        weighting: from a Gramian to the weights :math:`\hat\lambda_k`.
        alpha: how much of the last weights stays, from 0 to 1.
        initial_weights: :math:`\lambda_0` ``[m]``, finite; None: those of the first call.

    Attributes:
        state: :math:`\lambda_{k-1}` ``[m]``; None before the first call.

    Raises:
        TypeError: ``weighting`` is a class, or cannot be called with a Gramian alone; ``initial_weights`` is no tensor.
        ValueError: ``alpha`` is not from 0 to 1, or wrong ``initial_weights``; at the call, another number of
            objectives than before.

    Example:
        >>> import torch
        >>> from recollect.aggregation import CRMOGMWeighting, UPGradWeighting
        >>> weighting = CRMOGMWeighting(UPGradWeighting(), alpha=0.9)
        >>> weighting(torch.eye(2))  # the first weights are those of UPGrad
        tensor([0.5000, 0.5000])
    """

    initial_weights: Tensor | None

    def __init__(
        self, weighting: Callable[[Tensor], Tensor], alpha: float = 0.9, initial_weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weighting = weighting
        self.alpha = alpha
        self.initial_weights = initial_weights

    def reset(self) -> None:
        """Forget all weights, and what the wrapped weighting remembers."""
        super().reset()
        if isinstance(self.weighting, StatefulWeighting):
            self.weighting.reset()

    def check_gramian(self, gramian: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return the matrix as the wrapped weighting takes it."""
        if isinstance(self.weighting, Weighting):
            return self.weighting.check_gramian(gramian, shape)
        check_tensor("the Gramian", gramian)
        return checked(gramian, shape)

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the smoothed weights ``[m]``, and remember them."""
        count, first = len(gramian), self.initial_weights
        if first is not None and len(first) != count:
            raise ValueError(f"initial_weights is for {len(first)} objectives; the Gramian has {count}")
        last = self.recalled(torch.zeros(count, dtype=torch.float64, device=gramian.device))
        given = checked_weights(self.weighting(gramian), count, "the wrapped weighting").to(last)
        if self.state is None:
            last = given if first is None else first.to(last)
        self.state = self.alpha * last + (1 - self.alpha) * given
        return self.state.clone()
