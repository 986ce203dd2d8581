"""Scale and shift by channel, initialised by the first batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from recollect.frames import in_backward
from recollect.invertible._algebra import wide
from recollect.invertible._log_det import channels_log_det
from recollect.invertible._module import Module

__all__ = ["ActNorm"]


class ActNorm(Module):
    """y = (x - loc) * exp(log_scale) by channel (Kingma and Dhariwal 2018, arXiv 1807.03039, section 3.1).

    The first batch in training mode sets both so that its outputs have mean 0 and standard deviation 1; from then on
    they are trained like other parameters. Reversed, it is the outputs of the inverse that it normalises. A batch with
    fewer than two values per channel, or with values that are not finite, sets nothing; a channel that is constant
    keeps the scale 1. The log-determinant is the sum of log_scale over channels and positions.

    Processes that train together see different first batches: run one before wrapping the model in
    ``DistributedDataParallel``, which then gives all of them the same parameters.

    Args:
        num_features: channels.
        dim: of the channels.
        device: of the parameters.
        dtype: of the parameters.
        **options: ``anchor_every`` and ``drift_threshold``; see :class:`Module`.

    Shapes:
        - x: [batch, ...], with ``num_features`` in ``dim``; output: the same; log-determinant: [batch].

    Raises:
        ValueError: an input of another shape; ``num_features`` below 1, or ``dim`` 0, which is the batch.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> norm = inn.ActNorm(3)
        >>> y = norm(5 + 2 * torch.randn(1000, 3))
        >>> torch.allclose(y.std(0), torch.ones(3), atol=1e-5)
        True
    """

    initialized: Tensor

    def __init__(
        self,
        num_features: int,
        dim: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if num_features < 1 or dim == 0:
            raise ValueError(
                f"ActNorm needs at least one channel, along another dimension than 0, the batch (got "
                f"num_features={num_features}, dim={dim})"
            )
        self.num_features = num_features
        self.dim = dim
        self.loc = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))

    @property
    def reversible(self) -> bool:
        """Always."""
        return True

    def function(self, x: Tensor) -> Tensor:
        """Return (x - loc) * exp(log_scale)."""
        self._check(x)
        if not self.reversed:
            self._initialize(x)
        return (x - self._along(self.loc, x)) * self._along(self.log_scale, x).exp()

    def inverse(self, y: Tensor) -> Tensor:
        """Return y * exp(-log_scale) + loc."""
        self._check(y)
        if self.reversed:
            self._initialize(y)
        return y * (-self._along(self.log_scale, y)).exp() + self._along(self.loc, y)

    def function_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and log|det| of shape [batch]."""
        return self.function(x), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the inverse's log|det| of shape [batch]."""
        return self.inverse(y), -self._log_det(y)

    def _log_det(self, x: Tensor) -> Tensor:
        positions = math.prod(x.shape[1:]) // self.num_features
        return channels_log_det(self.log_scale, positions, x.shape[0])

    def _initialize(self, x: Tensor) -> None:
        """Let the first batch decide, in the direction that training runs in."""
        if not self.training or in_backward() or self.initialized:
            return
        values = x.detach().movedim(self.dim, 0).flatten(1)
        if values.size(1) < 2:
            return
        deviation, mean = torch.std_mean(values.to(wide(values.dtype)), 1)
        if not torch.isfinite(deviation + mean).all():
            return
        # What rounding leaves of a constant channel, and what has no inverse in the parameters' type, is no scale.
        least = (1e-6 * mean.abs()).clamp_min(torch.finfo(self.log_scale.dtype).tiny)
        deviation = torch.where(deviation > least, deviation, torch.ones_like(deviation))
        with torch.no_grad():
            self.loc.copy_(-mean / deviation if self.reversed else mean)
            self.log_scale.copy_(deviation.log() if self.reversed else -deviation.log())
            self.initialized.fill_(True)

    def _check(self, x: Tensor) -> None:
        if not -x.dim() <= self.dim < x.dim() or self.dim % x.dim() == 0 or x.size(self.dim) != self.num_features:
            raise ValueError(
                f"ActNorm: an input has {self.num_features} channels in dimension {self.dim}, which is not the first "
                f"(got shape {list(x.shape)})"
            )

    def _along(self, values: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.dim] = self.num_features
        return values.view(shape)

    def reset_parameters(self) -> None:
        """Forget; the next batch in training mode initialises anew."""
        with torch.no_grad():
            self.loc.zero_()
            self.log_scale.zero_()
            self.initialized.fill_(False)

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return f"{self.num_features}, dim={self.dim}, {super().extra_repr()}"
