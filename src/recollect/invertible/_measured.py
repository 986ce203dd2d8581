"""What every invertible module knows of its own accuracy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recollect._arguments import check_count
from recollect.frames import DRIFT_THRESHOLD, DriftGauge

__all__ = ["Measured"]


class Measured(nn.Module):
    """A module whose reconstruction error is measured, and can be bounded.

    Args:
        *args: of the next class, for modules that extend one of torch's.
        anchor_every: in a chain of invertible modules, keep every s-th activation, which bounds the numerical drift of
            the reconstruction; ``None`` keeps none.
        drift_threshold: relative error of the reconstructed input above which a
            :class:`~recollect.frames.DriftWarning` is given.
        **kwargs: of the next class.

    Raises:
        ValueError: ``anchor_every`` is below 1.
    """

    def __init__(
        self,
        *args: Any,
        anchor_every: int | None = None,
        drift_threshold: float = DRIFT_THRESHOLD,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_count("anchor_every", anchor_every)
        self.anchor_every = anchor_every
        self._gauge = DriftGauge(type(self).__name__, drift_threshold)

    @property
    def last_drift(self) -> float | None:
        """Relative error of the input that the last backward reconstructed, on a random sample of its elements.

        Measured where a chain begins and at its anchors; ``None`` anywhere else and before the first backward.
        """
        return self._gauge.last

    @property
    def drift_threshold(self) -> float:
        """Relative reconstruction error above which a :class:`~recollect.frames.DriftWarning` is given."""
        return self._gauge.threshold

    @drift_threshold.setter
    def drift_threshold(self, value: float) -> None:
        self._gauge.threshold = value

    def _forget_drift(self) -> None:
        """Begin a training step; an evaluation in between leaves the last measurement to be read."""
        if torch.is_grad_enabled():
            self._gauge.last = None
