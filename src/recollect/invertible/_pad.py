"""Padding, which the inverse crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from recollect.invertible._module import Module

__all__ = ["ConstantPad"]


class ConstantPad(Module):
    """Pad with a constant, as :func:`torch.nn.functional.pad`; the inverse crops. There is no log-determinant.

    Args:
        padding: how many values before and after, for the last dimension, then for the one before it, ...
        value: the constant.
        **options: of :class:`Module`.

    Shapes:
        - x: at least as many dimensions as are padded; output: as torch's.

    Raises:
        ValueError: an odd number of values, or negative ones, which would crop.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> inn.ConstantPad((1, 2))(torch.ones(1, 2))
        tensor([[0., 1., 1., 0., 0.]])
    """

    def __init__(self, padding: Sequence[int], value: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.padding = tuple(padding) if isinstance(padding, Sequence) else (padding,)
        self.value = value
        if len(self.padding) % 2 or any(number < 0 for number in self.padding):
            raise ValueError(
                f"ConstantPad: padding is two numbers, 0 or more, for each dimension from the last (got {padding})"
            )

    def function(self, x: Tensor) -> Tensor:
        """Return x with the constant around it."""
        return F.pad(x, self.padding, value=self.value)

    def inverse(self, y: Tensor) -> Tensor:
        """Return y without what is around it."""
        return F.pad(y, [-number for number in self.padding])

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return f"padding={self.padding}, value={self.value}, {super().extra_repr()}"
