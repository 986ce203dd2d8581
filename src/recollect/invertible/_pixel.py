"""Moves between channels and space."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from recollect.invertible._moves import Moves

__all__ = ["PixelShuffle", "PixelUnshuffle"]

# By reshaping, as the gradient of torch's pixel_shuffle fails for an empty batch (seen in 2.13).


def _checked(name: str, factor: int) -> int:
    if operator.index(factor) < 1:
        raise ValueError(f"{name} must be at least 1 (got {factor})")
    return operator.index(factor)


def _check_image(x: Tensor) -> None:
    if x.dim() < 3:
        raise ValueError(f"an image has dimensions [..., channels, height, width] (got shape {list(x.shape)})")


def _to_space(x: Tensor, factor: int) -> Tensor:
    _check_image(x)
    *batch, channels, height, width = x.shape
    if channels % factor**2:
        raise ValueError(
            f"moving channels into space by {factor} needs a number of channels that {factor**2} divides (got shape "
            f"{list(x.shape)})"
        )
    channels //= factor**2
    blocks = x.reshape(*batch, channels, factor, factor, height, width)
    return blocks.movedim((-4, -3), (-3, -1)).reshape(*batch, channels, height * factor, width * factor)


def _to_channels(x: Tensor, factor: int) -> Tensor:
    _check_image(x)
    *batch, channels, height, width = x.shape
    if height % factor or width % factor:
        raise ValueError(
            f"moving space into channels by {factor} needs a height and width that it divides (got shape "
            f"{list(x.shape)})"
        )
    height, width = height // factor, width // factor
    blocks = x.reshape(*batch, channels, height, factor, width, factor)
    return blocks.movedim((-3, -1), (-4, -3)).reshape(*batch, channels * factor**2, height, width)


class _Pixels(Moves):
    def _moves_batch(self, x: Tensor) -> bool:
        return x.dim() < 4  # an image alone


class PixelShuffle(_Pixels):
    """Move channels into space, as :class:`torch.nn.PixelShuffle`: [B, C r², H, W] to [B, C, H r, W r].

    Args:
        upscale_factor: r.
        **options: of :class:`Module`.

    Shapes:
        - x: [batch, channels, height, width], as above; log-determinant: zeros [batch]. Without a batch, or with
          several dimensions of it, as torch's.

    Raises:
        ValueError: a factor below 1; an input without channels that r² divides.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> inn.PixelShuffle(2)(torch.zeros(1, 4, 2, 3)).shape
        torch.Size([1, 1, 4, 6])
    """

    def __init__(self, upscale_factor: int, **options: Any) -> None:
        super().__init__(**options)
        self.upscale_factor = _checked("upscale_factor", upscale_factor)

    def function(self, x: Tensor) -> Tensor:
        """Return x with channels in space."""
        return _to_space(x, self.upscale_factor)

    def inverse(self, y: Tensor) -> Tensor:
        """Return y with space in channels."""
        return _to_channels(y, self.upscale_factor)

    def extra_repr(self) -> str:
        """Return the factor and the flags."""
        return f"upscale_factor={self.upscale_factor}, {super().extra_repr()}"


class PixelUnshuffle(_Pixels):
    """Move space into channels, as :class:`torch.nn.PixelUnshuffle`: [B, C, H r, W r] to [B, C r², H, W].

    Args:
        downscale_factor: r.
        **options: of :class:`Module`.

    Shapes:
        - x: [batch, channels, height, width], as above; log-determinant: zeros [batch]. Without a batch, or with
          several dimensions of it, as torch's.

    Raises:
        ValueError: a factor below 1; an input without height and width that r divides.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> inn.PixelUnshuffle(2)(torch.zeros(1, 1, 4, 6)).shape
        torch.Size([1, 4, 2, 3])
    """

    def __init__(self, downscale_factor: int, **options: Any) -> None:
        super().__init__(**options)
        self.downscale_factor = _checked("downscale_factor", downscale_factor)

    def function(self, x: Tensor) -> Tensor:
        """Return x with space in channels."""
        return _to_channels(x, self.downscale_factor)

    def inverse(self, y: Tensor) -> Tensor:
        """Return y with channels in space."""
        return _to_space(y, self.downscale_factor)

    def extra_repr(self) -> str:
        """Return the factor and the flags."""
        return f"downscale_factor={self.downscale_factor}, {super().extra_repr()}"
