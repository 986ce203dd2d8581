"""Convolutions whose kernel sees every patch of the input once, and moves between channels and space."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.invertible._linear import MatrixModule, Parametrization
from recollect.invertible._shape import Moves

__all__ = ["Conv1d", "Conv2d", "Conv3d", "PixelShuffle", "PixelUnshuffle"]

_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)
_SPREAD = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _Conv(MatrixModule):
    """What the three share; see :class:`Conv2d`."""

    dims: ClassVar[int]
    groups: int
    stride: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] | None = None,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        parametrization: Parametrization = "orthogonal",
        scaled: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        kernel = self._each("kernel_size", kernel_size)
        steps = kernel if stride is None else self._each("stride", stride)
        if min(kernel) < 1 or steps != kernel:
            raise self._refusal(
                f"kernel_size={list(kernel)}, stride={list(steps)}",
                "stride must equal kernel_size, at least 1, so that every input is seen once; leave stride out",
            )
        if padding != "valid" and (isinstance(padding, str) or any(self._each("padding", padding))):
            raise self._refusal(f"padding={padding!r}", "padding must be 0; use ConstantPad before it")
        if any(step != 1 for step in self._each("dilation", dilation)):
            raise self._refusal(f"dilation={dilation!r}", "dilation must be 1")
        if padding_mode != "zeros":
            raise self._refusal(f"padding_mode={padding_mode!r}", 'without padding it must be "zeros"')
        if groups < 1 or in_channels < 1 or in_channels % groups or out_channels % groups:
            raise self._refusal(
                f"in_channels={in_channels}, out_channels={out_channels}, groups={groups}",
                "both must be positive and divisible by groups",
            )
        size = math.prod(kernel)
        if out_channels < in_channels * size:
            raise self._refusal(
                f"out_channels={out_channels} for {in_channels} channels x {size} positions of a patch",
                f"out_channels must be {in_channels * size}, or more (then it is injective only)",
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            steps,
            0,
            1,
            groups,
            bias,
            padding_mode,
            matrices=(groups, out_channels // groups, in_channels // groups * size),
            parametrization=parametrization,
            scaled=scaled,
            device=device,
            dtype=dtype,
            **options,
        )

    @classmethod
    def _each(cls, name: str, value: int | tuple[int, ...]) -> tuple[int, ...]:
        """Return one number for each dimension."""
        numbers = tuple(value) if isinstance(value, Iterable) else (operator.index(value),) * cls.dims
        if len(numbers) != cls.dims:
            raise ValueError(f"{cls.__name__}: {name} must be one number or {cls.dims} (got {value!r})")
        return numbers

    @classmethod
    def _refusal(cls, found: str, allowed: str) -> ValueError:
        return ValueError(f"{cls.__name__} is not invertible with {found}: {allowed}")

    def function(self, x: Tensor) -> Tensor:
        """Return the convolution of x, whose sizes the kernel's must divide."""
        sizes = x.shape[-self.dims :]
        if x.dim() not in (self.dims + 1, self.dims + 2) or any(
            size % step for size, step in zip(sizes, self.stride, strict=True)
        ):
            raise ValueError(
                f"{type(self).__name__} takes [batch, channels, *sizes], or without batch, with {self.dims} size(s) "
                f"divisible by the kernel's, {list(self.stride)} (got shape {list(x.shape)}): what the kernel does not "
                "see has no inverse"
            )
        y: Tensor = _CONVOLVE[self.dims - 1](x, self.weight, self.bias, self.stride, 0, 1, self.groups)
        return y

    def _apply_dual(self, y: Tensor, dual: Tensor) -> Tensor:
        x: Tensor = _SPREAD[self.dims - 1](y, dual, None, self.stride, 0, 0, self.groups)
        return x

    def _spread(self, bias: Tensor) -> Tensor:
        return bias.view(-1, *(1,) * self.dims)

    def _positions(self, y: Tensor) -> int:
        if y.dim() != self.dims + 2:
            raise ValueError(
                f"the log-determinant of a {type(self).__name__} needs a batch dimension: [batch, channels, *sizes] "
                f"(got {list(y.shape)})"
            )
        return math.prod(y.shape[2:])


class Conv1d(_Conv, nn.Conv1d):
    """:class:`Conv2d` for [batch, channels, length].

    Example:
        >>> import torch
        >>> from recollect.invertible import Conv1d
        >>> Conv1d(2, 8, 4).check(torch.randn(5, 2, 12))
        True
    """

    dims = 1


class Conv2d(_Conv, nn.Conv2d):
    r"""The convolution whose kernel sees every patch of the input once; its inverse is a transposed convolution.

    With ``stride == kernel_size`` a convolution applies one matrix per group to each patch, which has
    in_channels / groups * prod(kernel_size) numbers. Square matrices make it invertible: a 1x1 convolution (Glow,
    Kingma & Dhariwal 2018, arXiv 1807.03039, section 3.2), or a learned space-to-depth. With more rows than columns it
    is injective, and the inverse a pseudo-inverse. The matrices, their parametrisations, inverses and determinants
    are those of :class:`Linear`, which says what ``parametrization`` and ``scaled`` mean.

    On CUDA, cuDNN convolves float32 in TF32, with three decimal digits, unless ``torch.backends.cudnn.allow_tf32`` is
    ``False``: the inverse is no better than that.

    Args:
        in_channels: channels of x, divisible by ``groups``.
        out_channels: channels of y, divisible by ``groups``, at least in_channels * prod(kernel_size).
        kernel_size: one number, or one for each dimension.
        stride: ``None`` for ``kernel_size``, which is all that it can be.
        padding: 0.
        dilation: 1.
        groups: the number of groups of channels, each with its own matrix.
        bias: whether there is a b.
        padding_mode: ``"zeros"``.
        parametrization: ``"orthogonal"``, ``"lu"`` (square only) or ``None``.
        scaled: whether orthogonal weights have scales.
        device: of the parameters.
        dtype: of the parameters.
        **options: ``anchor_every`` and ``drift_threshold``; see :class:`Module`.

    Shapes:
        - x: [batch, in_channels, height, width], sizes divisible by the kernel's; or without batch.
        - y: [batch, out_channels, height / kernel_size[0], width / kernel_size[1]].
        - log-determinant: [batch]: positions of y times the sum of log\|det W\| over groups. Square matrices only.

    Raises:
        ValueError: settings or, when it runs, sizes with which it has no inverse; the message says what is allowed.

    Example:
        >>> import torch
        >>> from recollect.invertible import Conv2d
        >>> conv = Conv2d(3, 12, kernel_size=2)
        >>> y = conv(torch.randn(5, 3, 8, 6))
        >>> y.shape, conv.inverse(y).shape
        (torch.Size([5, 12, 4, 3]), torch.Size([5, 3, 8, 6]))
    """

    dims = 2


class Conv3d(_Conv, nn.Conv3d):
    """:class:`Conv2d` for [batch, channels, depth, height, width].

    Example:
        >>> import torch
        >>> from recollect.invertible import Conv3d
        >>> Conv3d(4, 4, 1, parametrization="lu").check(torch.randn(2, 4, 3, 3, 3))
        True
    """

    dims = 3


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
