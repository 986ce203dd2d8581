"""Activations with a stable inverse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.invertible._algebra import values_log_det, wide
from recollect.invertible._module import Module

__all__ = ["SELU", "Asinh", "LeakyReLU"]


class _Elementwise(Module):
    """A monotone function of each value; subclasses define :meth:`function`, :meth:`inverse` and its slope."""

    def _log_slope(self, x: Tensor) -> Tensor:
        """Return the logarithm of the function's derivative at each value."""
        raise NotImplementedError

    @property
    def reversible(self) -> bool:
        """Always."""
        return True

    def function_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and log|det| of shape [batch]."""
        return self.function(x), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input and the inverse's log|det| of shape [batch]."""
        x: Tensor = self.inverse(y)
        return x, -self._log_det(x)

    def _log_det(self, x: Tensor) -> Tensor:
        return values_log_det(self._log_slope(x.to(wide(x.dtype))))


def _refuse_in_place(name: str, inplace: bool) -> None:
    if inplace:
        raise ValueError(f"{name}: inplace=True would change an input that others may hold; its memory is freed anyway")


class LeakyReLU(_Elementwise):
    """x where positive, else ``negative_slope * x``.

    Recovered inputs are right to 2e-7 of their value in float32, at any magnitude.

    Args:
        negative_slope: positive; 0.2 unless given, where :class:`torch.nn.LeakyReLU` takes 0.01. A rounding error of an
            output grows by its inverse in a recovered input: stacks are stable with slopes near one, and with torch's
            0.01 for a few layers only.
        inplace: refused; there for :class:`torch.nn.LeakyReLU`'s sake.
        **options: of :class:`Module`.

    Shapes:
        - x: any; output: the same; log-determinant: [batch].

    Raises:
        ValueError: ``negative_slope`` is not positive; ``inplace=True``.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> activation = inn.LeakyReLU(0.5)
        >>> activation.inverse(activation(torch.tensor([-4.0, 3.0])))
        tensor([-4.,  3.])
    """

    def __init__(self, negative_slope: float = 0.2, inplace: bool = False, **options: Any) -> None:
        super().__init__(**options)
        _refuse_in_place("LeakyReLU", inplace)
        if not 1e-30 < negative_slope < 1e30:
            raise ValueError(
                "LeakyReLU needs a positive negative_slope, between 1e-30 and 1e30, to be invertible (got "
                f"{negative_slope})"
            )
        self.negative_slope = negative_slope

    def function(self, x: Tensor) -> Tensor:
        """Return the activation."""
        return F.leaky_relu(x, self.negative_slope)

    def inverse(self, y: Tensor) -> Tensor:
        """Return x."""
        return F.leaky_relu(y, 1 / self.negative_slope)

    def _log_slope(self, x: Tensor) -> Tensor:
        return (~(x > 0)).to(x.dtype) * math.log(self.negative_slope)  # of two numbers, `where` makes a float32

    def extra_repr(self) -> str:
        """Return the slope and the flags."""
        return f"negative_slope={self.negative_slope}, {super().extra_repr()}"


class SELU(_Elementwise):
    """SELU (Klambauer et al. 2017, arXiv 1706.02515, equation 1) with a straight left tail.

    Where x < -tail the function goes on along its tangent at -tail instead of saturating: SELU itself maps everything
    below -17 to one float32 number. The slope is nowhere below 1.758 exp(-tail), and a rounding error of an output
    grows by no more than the inverse of that in a recovered input. Measured in float32, recovered inputs are right to
    4e-7 of their value for the default tail at any magnitude, and to 3e-6 for ``tail=5``.

    Args:
        tail: where the straight line begins, positive.
        inplace: refused; there for :class:`torch.nn.SELU`'s sake.
        **options: of :class:`Module`.

    Shapes:
        - x: any; output: the same; log-determinant: [batch].

    Raises:
        ValueError: ``tail`` is not positive; ``inplace=True``.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> activation, x = inn.SELU(), torch.tensor([-30.0, -1.0, 2.0])
        >>> torch.allclose(activation.inverse(activation(x)), x)
        True
    """

    _scale = 1.0507009873554805
    _alpha = 1.6732632423543772

    def __init__(self, tail: float = 2.0, inplace: bool = False, **options: Any) -> None:
        super().__init__(**options)
        _refuse_in_place("SELU", inplace)
        if not 0 < tail < 50:
            raise ValueError(f"SELU needs a positive tail, below 50, to be invertible (got {tail})")
        self.tail = tail

    @property
    def _slope(self) -> float:
        """Of the straight tail."""
        return self._scale * self._alpha * math.exp(-self.tail)

    def function(self, x: Tensor) -> Tensor:
        """Return the activation."""
        end = self._scale * self._alpha * math.expm1(-self.tail)
        return torch.where(x > -self.tail, F.selu(x), end + self._slope * (x + self.tail))

    def inverse(self, y: Tensor) -> Tensor:
        """Return x."""
        whole = self._scale * self._alpha
        end = whole * math.expm1(-self.tail)  # the value where the tail begins
        # One branch for each value, where they meet too: there a sum of clamped parts would add up their gradients, and
        # from torch 2.15 on a clamped value has none.
        curved = torch.log1p(torch.where((y > end) & (y <= 0), y, 0.0) / whole)
        straight = (y - end) / self._slope - self.tail
        return torch.where(y > 0, y / self._scale, torch.where(y > end, curved, straight))

    def _log_slope(self, x: Tensor) -> Tensor:
        left = math.log(self._scale * self._alpha) + torch.where(x > -self.tail, x, -self.tail)
        return torch.where(x > 0, math.log(self._scale), left)

    def extra_repr(self) -> str:
        """Return the tail and the flags."""
        return f"tail={self.tail}, {super().extra_repr()}"


class Asinh(_Elementwise):
    """asinh(x): the identity near zero, a logarithm far from it. Reversed it is sinh.

    The relative error of a recovered input is about |asinh(x)| roundings: below 1e-5 in float32 over all its range.
    Reversed, values beyond 89 overflow float32. It takes the options of :class:`Module`.

    Shapes:
        - x: any; output: the same; log-determinant: [batch].

    Example:
        >>> import torch, recollect.invertible as inn
        >>> activation, x = inn.Asinh(), torch.tensor([-30.0, 0.1, 2e6])
        >>> torch.allclose(activation.inverse(activation(x)), x)
        True
    """

    def function(self, x: Tensor) -> Tensor:
        """Return asinh(x)."""
        return torch.asinh(x)

    def inverse(self, y: Tensor) -> Tensor:
        """Return sinh(y)."""
        return torch.sinh(y)

    def _log_slope(self, x: Tensor) -> Tensor:
        return -torch.hypot(x, torch.ones_like(x)).log()
