"""Modules that move values and do not change them; their outputs are views where torch's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from recollect._arguments import pack, unpack
from recollect.invertible._algebra import zero_log_det
from recollect.invertible._module import Module

__all__ = ["ConstantPad", "Flatten", "Identity", "Moves", "Permute", "Unflatten"]


class Moves(Module):
    """A bijection with determinant one, as long as the batch, dimension 0, stays what it is."""

    _moves = True

    def _moves_batch(self, x: Tensor) -> bool:
        """Whether dimension 0 of an argument of :meth:`function` does not stay what it is."""
        raise NotImplementedError

    @property
    def reversible(self) -> bool:
        """Always."""
        return True

    def function_and_log_det(self, x: Tensor) -> tuple[Any, ...]:
        """Return the outputs and zeros of shape [batch]."""
        return (*pack(self.function(x)), self._log_det(x))

    def inverse_and_log_det(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Return the input and zeros of shape [batch]."""
        x: Tensor = self.inverse(*args)
        return x, self._log_det(x)

    def _log_det(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or self._moves_batch(x):
            raise NotImplementedError(
                f"{self} moves the batch, dimension 0 of an input of shape {list(x.shape)}: there is no "
                "log-determinant for each of its elements"
            )
        return zero_log_det(x)


class Flatten(Moves):
    """Join neighbouring dimensions, as :class:`torch.nn.Flatten`.

    :meth:`function` hides the sizes of the joined dimensions, from which the inverse restores them.

    Args:
        start_dim: the first.
        end_dim: the last.
        dims: their sizes, so that the inverse can do without hidden ones; then the module is reversible.
        **options: of :class:`Module`.

    Shapes:
        - x: any; output: as torch's; log-determinant: zeros [batch], unless the batch is joined too.

    Raises:
        ValueError: the inverse knows no sizes; an input has others than ``dims``.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> inn.Flatten()(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 12])
        >>> inn.Flatten(dims=(3, 4)).inverse(torch.zeros(2, 12)).shape
        torch.Size([2, 3, 4])
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

    def _moves_batch(self, x: Tensor) -> bool:
        return self.start_dim % x.dim() == 0 and self.end_dim % x.dim() != 0

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
        start = self.start_dim % max(y.dim() - 1 + len(dims), 1)
        return y.reshape((*y.shape[:start], *dims, *y.shape[start + 1 :]))

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}, dims={self.dims}, {super().extra_repr()}"


class Unflatten(Moves):
    """Split a dimension into several, as :class:`torch.nn.Unflatten`.

    Args:
        dim: the dimension.
        sizes: what it is split into; one of them may be -1.
        **options: of :class:`Module`.

    Shapes:
        - x: any; output: as torch's; log-determinant: zeros [batch], unless the batch is split.

    Raises:
        ValueError: the inverse gets other sizes.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> inn.Unflatten(1, (3, -1))(torch.zeros(2, 12)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, dim: int, sizes: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.dim = dim
        self.sizes = tuple(sizes)

    def _moves_batch(self, x: Tensor) -> bool:
        return self.dim % x.dim() == 0

    def function(self, x: Tensor) -> Tensor:
        """Return x with the dimension split."""
        y: Tensor = x.unflatten(self.dim, self.sizes)  # type: ignore[no-untyped-call]
        return y

    def inverse(self, y: Tensor) -> Tensor:
        """Return y with the dimensions joined."""
        start = self.dim % max(y.dim() + 1 - len(self.sizes), 1)
        found = tuple(y.shape[start : start + len(self.sizes)])
        if len(found) != len(self.sizes) or any(s not in (-1, f) for s, f in zip(self.sizes, found, strict=True)):
            raise ValueError(
                f"Unflatten: the inverse joins sizes {self.sizes} from dimension {self.dim} (got shape {list(y.shape)})"
            )
        return y.flatten(start, start + len(self.sizes) - 1)

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return f"dim={self.dim}, sizes={self.sizes}, {super().extra_repr()}"


class Permute(Moves):
    """Permute dimensions, as :func:`torch.permute`.

    Args:
        *dims: the new order of all dimensions, or one sequence of them. There is a log-determinant where the batch,
            dimension 0, stays in its place.
        **options: of :class:`Module`.

    Shapes:
        - x: as many dimensions as are named; output: the same in the new order; log-determinant: zeros [batch].

    Raises:
        ValueError: not a permutation.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> inn.Permute(0, 2, 1)(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 4, 3])
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

    def _moves_batch(self, x: Tensor) -> bool:
        return self.dims.index(0) != 0

    def extra_repr(self) -> str:
        """Return the settings and the flags."""
        return f"{self.dims}, {super().extra_repr()}"


class Identity(Module):
    """Return the arguments as they are.

    Args:
        *args: taken and not used, as by :class:`torch.nn.Identity`.
        **kwargs: the same.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> x = torch.ones(2, 3)
        >>> inn.Identity()(x) is x, inn.Identity().inverse(x) is x
        (True, True)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @property
    def reversible(self) -> bool:
        """Always."""
        return True

    def function(self, *args: Any) -> Any:
        """Return the arguments."""
        return unpack(args)

    def inverse(self, *args: Any) -> Any:
        """Return the arguments."""
        return unpack(args)

    def function_and_log_det(self, x: Tensor, *args: Any) -> tuple[Any, ...]:
        """Return the arguments and zeros."""
        return (*pack(self.function(x, *args)), zero_log_det(x))


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
