"""What every invertible module knows of its own accuracy, and of its stream's precision."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recollect._arguments import Certify, check_certify, check_count
from recollect.frames import DRIFT_THRESHOLD, Certificate, DriftGauge

__all__ = ["Measured", "under_autocast"]


def under_autocast(x: Tensor) -> bool:
    """Return whether operations on x run under autocast."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class Measured(nn.Module):
    """A module whose reconstruction error is measured, and can be bounded.

    Args:
        *args: of the next class, for modules that extend one of torch's.
        anchor_every: in a chain of invertible modules, keep every s-th activation, which bounds the numerical drift of
            the reconstruction; ``None`` keeps none.
        drift_threshold: relative error of the reconstructed input above which a
            :class:`~recollect.frames.DriftWarning` is given.
        certify: whether what backward rebuilds is compared with the forward: ``True`` allows for rounding, ``"exact"``
            takes equal bits alone, ``False`` compares nothing.
        **kwargs: of the next class.

    Raises:
        TypeError: a subclass defines ``forward`` alone, which would run plain.
        ValueError: ``anchor_every`` is below 1; ``certify`` is none of the three.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> layer = inn.AdditiveCoupling(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> isinstance(layer, inn.Measured), layer.last_drift
        (True, None)
        >>> layer(torch.randn(5, 4, requires_grad=True) * 1).sum().backward()
        >>> layer.last_drift < layer.drift_threshold
        True
    """

    # What subclasses of the class that says so write: what its forward runs, and the inverse.
    _written: ClassVar[tuple[str, str] | None] = None

    def __init__(
        self,
        *args: Any,
        anchor_every: int | None = None,
        drift_threshold: float = DRIFT_THRESHOLD,
        certify: Certify = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._certify: Certify = check_certify(certify)
        self._certificate = Certificate()
        check_count("anchor_every", anchor_every)
        if self._written is not None and self._lacks(self._written[0]) and not self._lacks("forward"):
            raise TypeError(
                f"{type(self).__name__} defines forward and no {self._written[0]}: it would run plain, and keep "
                f"everything. Rename forward to {self._written[0]}, and write {self._written[1]} too"
            )
        self.anchor_every = anchor_every
        self._gauge = DriftGauge(type(self).__name__, drift_threshold)

    @property
    def last_drift(self) -> float | None:
        """How far the input that the last backward reconstructed is from the forward's, as a relative error.

        That is the norm of the difference over the norm of the input, on a small random sample of its elements that
        was kept for this. Along a chain errors add up from its end to its beginning, so it is the chain's first module
        that measures, and with ``anchor_every`` those at the anchors; of all others, and before a backward, it is
        ``None``.
        """
        return self._gauge.last

    @staticmethod
    def largest_drift(modules: Iterable[Measured]) -> float | None:
        """Return the largest ``last_drift`` of some modules; NaN if one is, ``None`` if none measured any."""
        drifts = [module.last_drift for module in modules if module.last_drift is not None]
        return max(drifts, default=None, key=lambda drift: math.inf if math.isnan(drift) else drift)

    @property
    def drift_threshold(self) -> float:
        """Relative reconstruction error above which a :class:`~recollect.frames.DriftWarning` is given."""
        return self._gauge.threshold

    @drift_threshold.setter
    def drift_threshold(self, value: float) -> None:
        self._gauge.threshold = value

    @property
    def certify(self) -> Certify:
        """Whether, and how strictly, what backward rebuilds is compared with the forward."""
        return self._certify

    @certify.setter
    def certify(self, value: Certify) -> None:
        self._certify = check_certify(value)

    @property
    def certificate(self) -> Certificate:
        """Figures of what was compared since the last forward of a training step."""
        return self._certificate

    def _widened(self, x: Tensor) -> Tensor:
        """Return x, under autocast in at least float32: a stream that is rounded to less does not come back.

        The type is that of the parameters where theirs is wider. Without autocast x stays what it is.
        """
        if x.dtype not in (torch.float16, torch.bfloat16) or not under_autocast(x):
            return x
        wide = torch.float32
        for parameter in self.parameters():
            if parameter.is_floating_point():
                wide = torch.promote_types(wide, parameter.dtype)
        return x.to(wide)

    def _lacks(self, name: str) -> bool:
        """Whether a method is still that of the class whose subclasses write it, and the module has none of its own."""
        base = next(kind for kind in type(self).__mro__ if "_written" in vars(kind))
        return name not in vars(self) and getattr(type(self), name) is getattr(base, name)

    def _check_inverse(self, remedy: str) -> None:
        """Refuse, before anything runs, what backward could not invert."""
        if self._written is None or not torch.is_grad_enabled():
            return
        function, inverse = self._written
        if self._lacks(inverse) and not self._lacks(function):
            raise NotImplementedError(
                f"{type(self).__name__} must define {inverse}, which its backward needs; without one, {remedy}"
            )

    def _forget_drift(self) -> None:
        """Begin a training step; an evaluation in between leaves the last measurement to be read."""
        if torch.is_grad_enabled():
            self._gauge.last = None
            self._certificate.reset()
