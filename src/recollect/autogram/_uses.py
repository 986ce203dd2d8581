"""What norms of single losses' gradients are good for: clipping, and how much noise a mean gradient has."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect._devices import widened

__all__ = ["NoiseScale", "clip_weights", "gradient_noise_scale"]


def clip_weights(norms: Tensor, max_norm: float) -> Tensor:
    """Return the weights min(1, C / ‖g_i‖), with which ``losses.backward(weights)`` gives a sum of clipped gradients.

    No gradient in this sum is longer than C, as in algorithm 1 of "Deep Learning with Differential Privacy" (arXiv
    1607.00133), whose noise is still to be added to it, and whose accountant this is not.

    Args:
        norms: ‖g_i‖ of any shape, as of :meth:`Engine.compute_norms`.
        max_norm: C, above zero; with infinity nothing is clipped.

    Returns:
        Weights of the norms' shape and dtype; 1 where a norm is 0.

    Raises:
        TypeError: the norms are no tensor of floating point, or ``max_norm`` is no number.
        ValueError: a norm is below zero or not finite, or ``max_norm`` is not above zero.

    Example:
        >>> import torch
        >>> from recollect.autogram import clip_weights
        >>> clip_weights(torch.tensor([0.5, 2.0, 4.0]), max_norm=1.0)
        tensor([1.0000, 0.5000, 0.2500])
    """
    _check_norms(norms)
    try:
        bound = float(max_norm)
    except (TypeError, ValueError) as error:
        raise TypeError(f"max_norm must be a number (got {max_norm!r})") from error
    if not bound > 0:
        raise ValueError(f"max_norm is {max_norm}; give a number above zero, the largest norm that is left")
    if bound > torch.finfo(norms.dtype).max:  # infinity, or as good as that in this type: nothing is clipped
        return torch.ones_like(norms)
    return (norms.clamp(min=bound) / bound).reciprocal()


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """How much noise there is in the mean gradient of a batch.

    Attributes:
        squared_norm: |G|², an unbiased estimate for the gradient of the mean over all data. It may be below zero where
            noise is most of what there is.
        trace: tr Σ, an unbiased estimate for the covariance of one sample's gradient.

    Example:
        >>> from recollect.autogram import NoiseScale
        >>> scale = NoiseScale(squared_norm=0.5, trace=16.0)
        >>> scale.simple  # samples
        32.0
    """

    squared_norm: float
    trace: float

    @property
    def simple(self) -> float:
        """B_simple = tr Σ / |G|², the batch size up to which more samples pay; infinite where |G|² is not above zero.

        A quotient of unbiased estimates is not unbiased: average |G|² and tr Σ over some steps and divide then.
        """
        return self.trace / self.squared_norm if self.squared_norm > 0 else math.inf


def gradient_noise_scale(
    gramian: Tensor | None = None, *, norms: Tensor | None = None, mean_norm: Tensor | float | None = None
) -> NoiseScale:
    """Return the noise scale of gradients, from the gradients of B losses, each of one sample.

    After "An Empirical Model of Large-Batch Training" (arXiv 1812.06162, appendix A.1) with batches of 1 and of B, as
    in "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in Transformers" (arXiv
    2411.00999). With the mean gradient ḡ and the mean of ‖g_i‖², |G|² = (B ‖ḡ‖² - mean ‖g_i‖²) / (B - 1) and
    tr Σ = (mean ‖g_i‖² - ‖ḡ‖²) B / (B - 1).

    Args:
        gramian: of the losses' gradients, [m, m], as of ``engine.compute_gramian(losses, flat=True)``.
        norms: in its place, ‖g_i‖ of any shape, as of :meth:`Engine.compute_norms`.
        mean_norm: with norms: ‖ḡ‖, the norm of the gradient of the losses' mean.

    Raises:
        TypeError: something is no tensor of floating point.
        ValueError: there are neither a Gramian, nor norms with the mean gradient's, or both; or they are not finite, of
            fewer than two losses, or of another shape.

    Example:
        >>> import torch
        >>> from recollect.autogram import gradient_noise_scale
        >>> gradients = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> gradient_noise_scale(gradients @ gradients.T)
        NoiseScale(squared_norm=7.0, trace=2.0)
        >>> scale = gradient_noise_scale(norms=gradients.norm(dim=1), mean_norm=gradients.mean(0).norm())
        >>> round(scale.squared_norm, 3), round(scale.trace, 3), round(scale.simple, 3)
        (7.0, 2.0, 0.286)
    """
    if (gramian is None) == (norms is None) or (norms is None) != (mean_norm is None):
        raise ValueError(
            "the noise scale follows from a Gramian, gradient_noise_scale(gramian), or from norms and the norm of the "
            "mean gradient, gradient_noise_scale(norms=..., mean_norm=...); give one of the two"
        )
    if gramian is not None:
        if not isinstance(gramian, Tensor) or not gramian.is_floating_point():
            raise TypeError(f"gramian must be a tensor of a floating-point type, and is {_described(gramian)}")
        if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1]:
            raise ValueError(
                f"gramian has the shape {list(gramian.shape)}, and must be [m, m]: compute it with flat=True"
            )
        exact = widened(gramian.detach().cpu())  # the one wait for a device
        squares, mean = exact.diagonal(), exact.mean()
        if not bool(exact.isfinite().all()):
            raise ValueError("gramian has entries that are not finite; leave this step out")
    else:
        _check_type(norms)
        assert norms is not None
        flat, whole = norms.detach().flatten(), torch.as_tensor(mean_norm).detach()
        if whole.dim() == 0 and whole.device == flat.device:  # both in one copy, the one wait for a device
            dtype = torch.promote_types(flat.dtype, whole.dtype)
            together = torch.cat([flat.to(dtype), whole.to(dtype).view(1)]).cpu()
            flat, whole = together[:-1], together[-1]
        flat = flat.cpu()
        _check_norms(flat)
        squares, mean = widened(flat).square(), widened(whole.cpu()).square()
        if mean.dim() or not bool(mean.isfinite()):
            raise ValueError(f"mean_norm is {mean_norm}; give one finite number, the norm of the mean gradient")
    count = squares.numel()
    if count < 2:
        raise ValueError(f"there are gradients of {count} losses; their noise is only seen in two or more")
    of_one, of_all = float(squares.mean()), float(mean)
    return NoiseScale((count * of_all - of_one) / (count - 1), (of_one - of_all) * count / (count - 1))


def _check_type(norms: object) -> None:
    if not isinstance(norms, Tensor) or not norms.is_floating_point():
        raise TypeError(f"norms must be a tensor of a floating-point type, and is {_described(norms)}")


def _check_norms(norms: Tensor) -> None:
    _check_type(norms)
    if not bool(((norms >= 0) & norms.isfinite()).all()):
        raise ValueError("norms must be finite and not below zero; where gradients overflow, leave this step out")


def _described(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
