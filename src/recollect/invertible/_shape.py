"""Modules that move values and do not change them; their outputs are views where torch's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from recollect._arguments import check_count
from recollect.invertible._module import Module, pack, zero_log_det

__all__ = ["ConstantPad", "Flatten", "Permute", "PixelShuffle", "PixelUnshuffle", "Unflatten"]


class _Moves(Module):
    """A bijection with determinant one, as long as the batch, dimension 0, stays what it is."""

    def _moves_batch(self) -> bool:
        return False

    @property
    def reversible(self) -> bool:
        """Always."""
        return True

    def function_and_log_det(self, *args: Any) -> tuple[Any, ...]:
        """Return the outputs and zeros of shape [batch]."""
        self._check_batch()
        return (*pack(self.function(*args)), zero_log_det(args[0]))

    def inverse_and_log_det(self, *args: Any) -> tuple[Any, ...]:
        """Return the inputs and zeros of shape [batch]."""
        self._check_batch()
        return (*pack(self.inverse(*args)), zero_log_det(args[0]))

    def _check_batch(self) -> None:
        if self._moves_batch():
            raise NotImplementedError(f"{self} moves the batch, and has no log-determinant for each element")


class Flatten(_Moves):
    """Join neighbouring dimensions, as :class:`torch.nn.Flatten`.

    :meth:`function` hides the sizes of the joined dimensions, from which the inverse restores them.

    Args:
        start_dim: the first.
        end_dim: the last.
        dims: their sizes, so that the inverse can do without hidden ones; then the module is reversible.
        **options: of :class:`Module`.

    Raises:
        ValueError: the inverse knows no sizes.
    """

    def __init__(
        self, start_dim: int = 1, end_dim: int = -1, dims: Sequence[int] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.start_dim = start_dim
        self.end_dim = end_dim
        self.dims = None if dims is None else tuple(dims)

    @property
    def reversible(self) -> bool:
        """Whether ``dims`` are given."""
        return self.dims is not None

    @property
    def num_outputs(self) -> int:
        """One: the sizes are hidden."""
        return 1

    @property
    def num_inputs(self) -> int:
        """One."""
        return 1

    def _moves_batch(self) -> bool:
        return self.start_dim == 0

    def function(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return x with the dimensions joined, and their sizes."""
        number = max(x.dim(), 1)
        dims = tuple(x.shape[self.start_dim % number : self.end_dim % number + 1])
        if self.dims is not None and dims != self.dims:
            raise ValueError(f"Flatten(dims={self.dims}) joins dimensions of those sizes (got {dims})")
        return x.flatten(self.start_dim, self.end_dim), dims

    def inverse(self, y: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
        """Return y with the dimension split into the sizes that were hidden, or into ``dims``."""
        dims = self.dims if dims is None else dims
        if dims is None:
            raise ValueError("Flatten: the inverse alone does not know the sizes; give Flatten(dims=(...))")
        start = self.start_dim % (y.dim() - 1 + len(dims))
        return y.reshape(*y.shape[:start], *dims, *y.shape[start + 1 :])

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}, dims={self.dims}, {super().extra_repr()}"


class Unflatten(_Moves):
    """Split a dimension into several, as :class:`torch.nn.Unflatten`.

    Args:
        dim: the dimension.
        sizes: what it is split into; one of them may be -1.
        **options: of :class:`Module`.
    """

    def __init__(self, dim: int, sizes: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.dim = dim
        self.sizes = tuple(sizes)

    def _moves_batch(self) -> bool:
        return self.dim == 0

    def function(self, x: Tensor) -> Tensor:
        """Return x with the dimension split."""
        y: Tensor = x.unflatten(self.dim, self.sizes)  # type: ignore[no-untyped-call]
        return y

    def inverse(self, y: Tensor) -> Tensor:
        """Return y with the dimensions joined."""
        start = self.dim % (y.dim() + 1 - len(self.sizes))
        return y.flatten(start, start + len(self.sizes) - 1)

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return f"dim={self.dim}, sizes={self.sizes}, {super().extra_repr()}"


class Permute(_Moves):
    """Permute dimensions, as :func:`torch.permute`.

    Args:
        *dims: the new order of all dimensions, or one sequence of them. There is a log-determinant where the batch,
            dimension 0, stays in its place.
        **options: of :class:`Module`.

    Raises:
        ValueError: not a permutation.
    """

    def __init__(self, *dims: Any, **options: Any) -> None:
        super().__init__(**options)
        given = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], Sequence) else dims
        number = len(given)
        if any(not -number <= dim < number for dim in given) or len({dim % number for dim in given}) != number:
            raise ValueError(f"Permute: each of the dimensions 0..{number - 1} must be named once (got {given})")
        self.dims = tuple(dim % number for dim in given)

    def function(self, x: Tensor) -> Tensor:
        """Return x with its dimensions in the new order."""
        return x.permute(self.dims)

    def inverse(self, y: Tensor) -> Tensor:
        """Return y with its dimensions in the old order."""
        return y.permute([self.dims.index(dim) for dim in range(len(self.dims))])

    def _moves_batch(self) -> bool:
        return self.dims[:1] != (0,)

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return f"{self.dims}, {super().extra_repr()}"


class ConstantPad(Module):
    """Pad with a constant, as :func:`torch.nn.functional.pad`; the inverse crops. There is no log-determinant.

    Args:
        padding: how many values before and after, for the last dimension, then for the one before it, ...
        value: the constant.
        **options: of :class:`Module`.

    Raises:
        ValueError: an odd number of values, or negative ones, which would crop.
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


# By reshaping, as the gradient of torch's pixel_shuffle fails for an empty batch (seen in 2.13).


def _to_space(x: Tensor, factor: int) -> Tensor:
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
    *batch, channels, height, width = x.shape
    if height % factor or width % factor:
        raise ValueError(
            f"moving space into channels by {factor} needs a height and width that it divides (got shape "
            f"{list(x.shape)})"
        )
    height, width = height // factor, width // factor
    blocks = x.reshape(*batch, channels, height, factor, width, factor)
    return blocks.movedim((-3, -1), (-4, -3)).reshape(*batch, channels * factor**2, height, width)


class PixelShuffle(_Moves):
    """Move channels into space, as :class:`torch.nn.PixelShuffle`: [B, C r², H, W] to [B, C, H r, W r].

    Args:
        upscale_factor: r.
        **options: of :class:`Module`.
    """

    def __init__(self, upscale_factor: int, **options: Any) -> None:
        super().__init__(**options)
        check_count("upscale_factor", upscale_factor)
        self.upscale_factor = upscale_factor

    def function(self, x: Tensor) -> Tensor:
        """Return x with channels in space."""
        return _to_space(x, self.upscale_factor)

    def inverse(self, y: Tensor) -> Tensor:
        """Return y with space in channels."""
        return _to_channels(y, self.upscale_factor)

    def extra_repr(self) -> str:
        """Return the factor and the flags."""
        return f"upscale_factor={self.upscale_factor}, {super().extra_repr()}"


class PixelUnshuffle(_Moves):
    """Move space into channels, as :class:`torch.nn.PixelUnshuffle`: [B, C, H r, W r] to [B, C r², H, W].

    Args:
        downscale_factor: r.
        **options: of :class:`Module`.
    """

    def __init__(self, downscale_factor: int, **options: Any) -> None:
        super().__init__(**options)
        check_count("downscale_factor", downscale_factor)
        self.downscale_factor = downscale_factor

    def function(self, x: Tensor) -> Tensor:
        """Return x with space in channels."""
        return _to_channels(x, self.downscale_factor)

    def inverse(self, y: Tensor) -> Tensor:
        """Return y with channels in space."""
        return _to_space(y, self.downscale_factor)

    def extra_repr(self) -> str:
        """Return the factor and the flags."""
        return f"downscale_factor={self.downscale_factor}, {super().extra_repr()}"
