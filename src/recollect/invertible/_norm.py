"""Normalisation by channel: by the batch's statistics, and by parameters that the first batch sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm

from recollect._devices import forms_of
from recollect._torch import is_fake, is_recorded
from recollect._verdicts import later
from recollect.frames import in_backward
from recollect.invertible._algebra import channels_log_det, wide
from recollect.invertible._module import Module

__all__ = ["ActNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


def _raise_for(name: str, lost: Sequence[int]) -> None:
    """Refuse an inverse where channels have lost their input."""
    if any(lost):
        raise ValueError(
            f"{name}: the weight of channel(s) {[k for k, each in enumerate(lost) if each]} is 0, or so small beside "
            "the bias that the output has lost the input; keep it away from 0, or set invertible=False"
        )


class _Read:
    """A value that was read from a buffer, which waits for its device; good for as long as the buffer is unchanged."""

    __slots__ = ("_buffer", "_version", "value")

    def __init__(self, buffer: Tensor, value: int) -> None:
        self._buffer = buffer
        self._version = _version_of(buffer)
        self.value = value

    def holds(self, buffer: Tensor) -> bool:
        """Whether this is the buffer, and nobody wrote to it since."""
        return self._buffer is buffer and self._version == _version_of(buffer)


def _version_of(buffer: Tensor) -> int:
    # torch.compile does not see versions, and inference tensors have none.
    return 0 if torch.compiler.is_compiling() or buffer.is_inference() else buffer._version


class _BatchNorm(Module, batchnorm._BatchNorm):
    """Torch's batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167), with an inverse.

    Outputs, gradients and running statistics are those of torch's layer; the running statistics change once a step.
    In training :meth:`function` hides the batch's mean and 1 / sqrt(variance + eps), from which the inverse is exact;
    :meth:`inverse` without them, and in evaluation, goes by the running statistics.

    The log-determinant is the sum of log|weight / sqrt(variance + eps)| over channels and positions. In training it
    takes the statistics as constants, as RealNVP does (Dinh et al. 2017, arXiv 1605.08803, section 3.7).

    Args:
        num_features: as torch's, like all that follow.
        eps: added to the variance.
        momentum: of the running statistics; ``None``: their average over all batches.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics.
        **options: ``device`` and ``dtype``; ``anchor_every`` and ``drift_threshold`` (see :class:`Module`).

    Shapes:
        - x: as torch's layer; output: the same; log-determinant: [batch].

    Raises:
        ValueError: as torch's layer, and for another number of channels; in the inverse, a weight of zero (or none
            beside its bias), or no statistics. On devices other than the CPU the inverse returns NaN for such a
            channel, and the error comes with a later region, or with :func:`recollect.frames.settle`.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> norm, x = inn.BatchNorm1d(3), torch.randn(8, 3)
        >>> y, mean, scale = norm.function(x)
        >>> torch.allclose(norm.inverse(y, mean, scale), x, atol=1e-5)
        True
        >>> norm.eval().check(x)
        True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self._counted: _Read | None = None  # the number of batches

    @property
    def num_outputs(self) -> int:
        """One: the statistics are hidden."""
        return 1

    @property
    def _by_batch(self) -> bool:
        return self.training or self.running_mean is None

    def function(self, x: Tensor) -> Any:
        """Return the normalised values; by the batch's statistics also those, [num_features] each."""
        self._check(x)
        if not self._by_batch:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if x.numel() == x.size(1):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        update = self.training and self.track_running_stats
        factor = self._factor() if update else 0.0
        if x.numel() == 0:  # which native_batch_norm refuses
            y = F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
            return y, x.new_zeros(self.num_features), x.new_ones(self.num_features)
        y, mean, scale = torch.native_batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean if update else None,
            self.running_var if update else None,
            True,
            factor,
            self.eps,
        )
        return y, mean.detach(), scale.detach()

    def _check(self, x: Tensor) -> None:
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        # native_batch_norm trusts its caller: it would read and write beyond the parameters and statistics.
        if x.size(1) != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: an input has {self.num_features} channels in dimension 1 (got shape "
                f"{list(x.shape)})"
            )

    def _factor(self) -> float:
        """Count the batch, and return its weight in the running statistics."""
        if self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        known = self._counted is not None and self._counted.holds(self.num_batches_tracked)
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        if in_backward():  # where the statistics are copies, and nothing else depends on them
            return 0.0
        if torch.compiler.is_compiling():
            return 1.0 / float(self.num_batches_tracked)
        # The number is read once, and from then on counted here too.
        number = self._counted.value + 1 if known and self._counted is not None else int(self.num_batches_tracked)
        self._counted = _Read(self.num_batches_tracked, number)
        return 1.0 / number

    def inverse(self, y: Tensor, mean: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Return x for normalised values, by the given statistics or by the running ones."""
        self._check(y)
        mean, scale = self._statistics(mean, scale)
        if self.weight is not None:
            limits = torch.finfo(self.weight.dtype)
            lost = self.weight.abs() <= (limits.eps * self.bias.abs()).clamp_min(limits.tiny)
            if not forms_of(lost.device).reads_at_once:
                # To ask would wait for the device: what is lost becomes no number, and so do gradients.
                scale = torch.where(lost, torch.nan, scale)
                if not in_backward() and not is_recorded() and not is_fake(lost):
                    name = type(self).__name__
                    later([lost.int()], lambda numbers: _raise_for(name, numbers[0]))
            elif lost.any():
                _raise_for(type(self).__name__, lost.tolist())
            y, scale = y - self._along(self.bias, y), scale * self.weight
        return y / self._along(scale, y) + self._along(mean, y)

    def function_and_log_det(self, x: Tensor) -> tuple[Any, ...]:
        """Return what :meth:`function` does, and last the log-determinant."""
        outputs = self.function(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return (*outputs, self._log_det(x, *outputs[1:]))

    def inverse_and_log_det(self, y: Tensor, mean: Tensor | None = None, scale: Tensor | None = None) -> Any:
        """Return what :meth:`inverse` does, and last the log-determinant of the inverse."""
        return self.inverse(y, mean, scale), -self._log_det(y, mean, scale)

    def _log_det(self, x: Tensor, mean: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        _, scale = self._statistics(mean, scale)
        slope = scale if self.weight is None else scale * self.weight
        log_slope = slope.to(wide(slope.dtype)).abs().log()
        return channels_log_det(log_slope, math.prod(x.shape[2:]), x.shape[0])

    def _statistics(self, mean: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and 1 / sqrt(variance + eps)."""
        if mean is not None and scale is not None:
            return mean, scale
        if self.running_mean is None or self.running_var is None:
            raise ValueError(
                f"{type(self).__name__} has no running statistics (track_running_stats=False): its inverse needs the "
                "batch's, which function(x) returns beside the output"
            )
        return self.running_mean, (self.running_var + self.eps).rsqrt()

    @staticmethod
    def _along(values: Tensor, x: Tensor) -> Tensor:
        return values.view(1, -1, *(1,) * (x.dim() - 2))


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = _BatchNorm.__doc__


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = _BatchNorm.__doc__


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = _BatchNorm.__doc__


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
        self._settled: _Read | None = None  # the flag, when it was found to be set

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
        if not self.training or self._is_initialized():
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
        self._settled = _Read(self.initialized, True)

    def _is_initialized(self) -> bool:
        if self._settled is None or not self._settled.holds(self.initialized):
            if not self.initialized:
                return False
            self._settled = _Read(self.initialized, True)
        return True

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
