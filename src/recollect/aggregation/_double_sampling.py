"""MoDo and SDMGrad: weights that take steps on the simplex, by gradients of two independent batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recollect.aggregation._gramian import check_tensor, checked_cross
from recollect.aggregation._settings import FRACTION, NOT_NEGATIVE, POSITIVE, Number
from recollect.aggregation._weighting import PreferenceWeighting, StatefulWeighting

__all__ = ["MoDoWeighting", "SDMGradWeighting"]

_VAST = 1e200  # of numbers no larger than this, sums of products are finite


class _CrossWeighting(StatefulWeighting):
    """A weighting that takes J₁ J₂ᵀ for the Jacobians of the same objectives on two batches.

    Products of a noisy gradient with itself are too large on average; those with a gradient of another batch are not.
    The weights are of no use for the proofs of these methods if both batches are the same, but they are defined.
    """

    def check_gramian(self, gramian: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return the cross-Gramian in float64. It need not be symmetric, and its diagonal may be negative.

        Raises:
            TypeError: it is no tensor.
            ValueError: it is not square, empty, of another type than floating point, or not finite.
        """
        check_tensor("the cross-Gramian", gramian)
        return checked_cross(gramian, shape)


class MoDoWeighting(_CrossWeighting, settings={"gamma": POSITIVE, "rho": NOT_NEGATIVE}):
    r"""Move the weights by one projected gradient step of MGDA's program, with gradients of two independent batches.

    Equation 2.9a of "Three-Way Trade-Off in Multi-Objective Learning" (Chen et al. 2023, arXiv 2305.20057):
    :math:`\lambda \leftarrow \Pi_\Delta (\lambda - \gamma (J_1 J_2^\top + \rho I) \lambda)`, where
    :math:`\Pi_\Delta` projects onto the weights that are not negative and sum to one. Their update is
    :math:`J_3^\top \lambda`, with a third batch, or with the mean of both.

    The step depends on the size of gradients: for gradients of k times the length, gamma is to be 1 / k² of it.

    Args:
        gamma: the length of a step.
        rho: pulls towards equal weights.

    Attributes:
        state: λ ``[m]``; None before the first call, which begins with equal weights.

    Raises:
        ValueError: ``gamma`` is not positive or ``rho`` is negative; at the call, another number of objectives than in
            the calls before.

    Example:
        >>> import torch
        >>> from recollect.aggregation import MoDoWeighting
        >>> first, second = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
        >>> MoDoWeighting(gamma=0.1, rho=0.0)(first @ second.T)
        tensor([0.6250, 0.3750])
    """

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        self.gamma = gamma
        self.rho = rho

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]`` after a step for a cross-Gramian ``[m, m]``, and remember them."""
        weights = self.recalled(torch.full_like(gramian[0], 1 / len(gramian)))
        self.state = _stepped(weights, gramian @ weights + self.rho * weights, self.gamma)
        return self.state.clone()


_SETTINGS = {
    "lr": POSITIVE,
    "momentum": FRACTION,
    "n_iter": Number(lambda n: n >= 1, "be at least 1", whole=True),
    "lambda_": NOT_NEGATIVE,
}


class SDMGradWeighting(_CrossWeighting, PreferenceWeighting, settings=_SETTINGS):
    r"""Find the shortest convex combination of gradients beside a preferred one, with gradients of independent batches.

    Algorithm 1 of "Direction-oriented Multi-objective Learning" (Xiao et al. 2023, arXiv 2305.18409):
    :math:`\min_w \tfrac12 \|J^\top (w + \lambda \tilde w)\|^2` over the w that are not negative and sum to one, by
    projected gradient steps :math:`w \leftarrow \Pi_\Delta (w - \beta J_1 J_2^\top (w + \lambda \tilde w))` with
    momentum, from the last call's w on; the weights are :math:`(w + \lambda \tilde w) / (1 + \lambda)`, for the
    gradients of a third batch. As in its authors' code, the matrix is divided by the squared mean of the roots of its
    diagonal, so that the unit of gradients does not matter; where no entry of that is positive, by its largest entry.

    Args:
        lr: β, the length of a step.
        momentum: of the steps within a call, from 0 to below 1.
        n_iter: how many steps a call takes.
        lambda_: λ, how much the preferred combination counts beside the shortest one.
        pref_vector: :math:`\tilde w` ``[m]``, finite and not negative; None: 1 / m each.

    Attributes:
        state: w ``[m]``; None before the first call, which begins with equal weights.

    Raises:
        TypeError: a setting is of another type.
        ValueError: a setting is out of its range; at the call, another number of objectives than in the calls before.

    Example:
        >>> import torch
        >>> from recollect.aggregation import SDMGradWeighting
        >>> first = second = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # of two batches without noise
        >>> SDMGradWeighting(lr=0.2, n_iter=200, lambda_=0.0)(first @ second.T)  # as MGDA
        tensor([0.8000, 0.2000])
    """

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        pref_vector: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.momentum = momentum
        self.n_iter = n_iter
        self.lambda_ = lambda_
        self.pref_vector = pref_vector

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]`` for a cross-Gramian ``[m, m]``, and remember where the steps have led."""
        weights = self.recalled(torch.full_like(gramian[0], 1 / len(gramian)))
        pull = self.lambda_ * self.preference(gramian)
        size = gramian.diagonal().clamp(min=0).sqrt().mean()
        size = torch.where(size > 0, size, gramian.abs().amax().sqrt())
        size = torch.where(size > 0, size, 1.0)
        matrix = (gramian / size / size).clamp(-_VAST, _VAST)
        velocity = torch.zeros_like(weights)
        for _ in range(self.n_iter):
            velocity = self.momentum * velocity + matrix @ (weights + pull)
            weights = _stepped(weights, velocity, self.lr)
        self.state = weights
        return (weights + pull) / (1 + self.lambda_)


def _stepped(weights: Tensor, slope: Tensor, rate: float) -> Tensor:
    """Return the weights after a step against the slope, projected onto those that are not negative and sum to one."""
    # What is added to all entries alike changes no projection: none is large, however long the step.
    moved = weights - (slope - slope.amin()) * rate
    moved = moved - moved.amax()
    ordered = moved.sort(descending=True).values
    counts = torch.arange(1, len(moved) + 1, dtype=moved.dtype, device=moved.device)
    levels = (ordered.cumsum(0) - 1) / counts
    level = torch.where(ordered > levels, levels, -torch.inf).amax()  # levels rise while entries are above them
    return (moved - level).clamp(min=0)
