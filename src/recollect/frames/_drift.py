"""How far what a chain reconstructs is from what the forward pass saw."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect._devices import forms_of, widened
from recollect._torch import is_fake, is_traceable_wrapper_subclass
from recollect._transfer import sent
from recollect._verdicts import arrive, later
from recollect.frames._errors import DriftWarning, describe

__all__ = ["DRIFT_THRESHOLD", "DriftGauge", "DriftProbe"]

DRIFT_THRESHOLD = 1e-3
"""Relative error of the reconstructed input above which gradients are suspect.

Normalised couplings in float32 mostly stay below 1e-4 for hundreds of layers; 1e-3 is about the precision of float16.
The error of a gradient may be larger than that of the input, where a block amplifies rounding.
"""

_SAMPLES = 256


class DriftGauge:
    """The last drift that was measured, and when to warn of it.

    Args:
        owner: who is measured, for the warning: a name, or a function to be named.
        threshold: relative error above which a :class:`~recollect.frames.DriftWarning` is given.

    Example:
        >>> from recollect.frames import DriftGauge
        >>> gauge = DriftGauge("the encoder", threshold=1e-3)
        >>> for drift in (1e-6, 1e-5, 1e-7):
        ...     gauge.record(drift)
        >>> gauge.last
        1e-05
    """

    __slots__ = ("_last", "_late", "_round", "_warned", "owner", "threshold")

    def __init__(self, owner: str | Callable[..., Any], threshold: float = DRIFT_THRESHOLD) -> None:
        self.owner = owner
        self.threshold = threshold
        self._last: float | None = None
        self._late = 0  # how many measurements are on the way, of those since ``last`` was set
        self._round = 0
        self._warned = 0.0  # the drift of the last warning: a training run need not read of the same one at every step

    @property
    def last(self) -> float | None:
        """The largest measurement since this was set to ``None``; to read it waits for those that are on the way."""
        if self._late:
            arrive()
            self._late = 0
        return self._last

    @last.setter
    def last(self, value: float | None) -> None:
        self._last, self._late = value, 0
        self._round += 1

    def record(self, drift: float) -> None:
        """Store a measurement, if it is the largest since ``last`` was reset; warn if it is above the threshold.

        Another warning follows when it has become ten times worse.
        """
        self._keep(drift)
        self._warn(drift)

    def record_late(self, drift: Tensor) -> None:
        """Do the same when a measurement, 0-D, has come from its device; below 0 it is none."""
        self._late += 1
        of_round = self._round

        def come(numbers: list[list[float]]) -> None:
            ((value,),) = numbers
            if value < 0:
                return
            if of_round == self._round:
                self._keep(value)
            self._warn(value)

        later([drift], come)

    def _keep(self, drift: float) -> None:
        if self._last is None or not drift <= self._last:
            self._last = drift

    def _warn(self, drift: float) -> None:
        if not drift <= max(self.threshold, 10 * self._warned):
            self._warned = drift if math.isfinite(drift) else math.inf
            name = self.owner if isinstance(self.owner, str) else describe(self.owner)
            warnings.warn(
                f"{name}: the input that was reconstructed for backward differs from the forward's by a relative "
                f"error of {drift:.1e} (threshold {self.threshold:.1e}), so gradients are inexact. Remedies: keep "
                "every s-th activation (anchor_every=s), normalise inside the blocks, use float64, or checkpoint "
                "instead of inverting. A large error also comes from an inverse that is wrong, and from blocks that "
                "draw from other random numbers than torch's own: recollect.testing.check_invertible tells",
                DriftWarning,
                stacklevel=3,
            )


def parts_of(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the plain tensors that hold the values of tensors of all kinds; of those that have none, nothing."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            yield from parts_of(part for part in parts if isinstance(part, Tensor))
        elif tensor.device.type != "meta" and not is_fake(tensor):
            yield tensor


class DriftProbe:
    """A small random sample of the tensors that a chain starts from.

    Args:
        tensors: the tensors of which at most 256 elements each are kept.
        gauge: where the measurement goes.
    """

    __slots__ = ("_gauge", "_samples")

    def __init__(self, tensors: Sequence[Tensor], gauge: DriftGauge) -> None:
        self._gauge = gauge
        self._samples: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for tensor in parts_of(tensors):
                index = _sample(tensor.numel())
                if not tensor.is_cpu:
                    index = sent(index, tensor.device)
                self._samples.append((index, torch.take(tensor.detach(), index)))

    def measure(self, tensors: Sequence[Tensor]) -> None:
        """Record ``||x' - x|| / ||x||`` over the sample, for reconstructed tensors ``x'`` in the same order."""
        squares = []
        with torch.no_grad():
            for tensor, (index, value) in zip(parts_of(tensors), self._samples, strict=True):
                if value.is_floating_point() or value.is_complex():
                    squares.append((_square_of(torch.take(tensor.detach(), index) - value), _square_of(value)))
            if all(forms_of(square.device).reads_at_once for pair in squares for square in pair):
                error, norm = (sum(map(float, side)) for side in zip(*[(0.0, 0.0), *squares], strict=True))
                if norm > 0 or error > 0:
                    self._gauge.record(math.sqrt(error / norm) if norm > 0 else math.inf)
            else:
                self._gauge.record_late(_drift_of(squares))


def _drift_of(squares: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the relative error on its device, for squares of errors and of norms; -1 if all are zero."""
    device = next(error.device for error, _ in squares if not forms_of(error.device).reads_at_once)
    errors, norms = (torch.stack([square.to(device) for square in side]).sum() for side in zip(*squares, strict=True))
    return torch.where((norms == 0) & (errors == 0), -1.0, (errors / norms).sqrt())


def _square_of(tensor: Tensor) -> Tensor:
    """Return the sum of the squares in double precision, where the device has it."""
    if forms_of(tensor.device).double_sums and tensor.is_floating_point():
        norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
        return norm * norm
    wide = widened(tensor.abs() if tensor.is_complex() else tensor)
    return torch.dot(wide, wide)


def _drawn() -> Tensor:
    with torch.inference_mode(False):
        return torch.randint(2**62, (_SAMPLES,), generator=torch.Generator().manual_seed(0), device="cpu")


_positions = _drawn()


def _sample(size: int) -> Tensor:
    """Return random positions among ``size``: always the same, and without moving the training's random numbers."""
    return _positions[: min(size, _SAMPLES)].remainder(max(size, 1))
