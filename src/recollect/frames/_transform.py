"""What a coupling does to a group, and its solution for the old group in a rebuild."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from recollect.frames._describe import describe
from recollect.frames._errors import InPlaceError
from recollect.frames._modules import version_of

__all__ = ["Add", "NewGroup", "Transform", "Transformed"]


class Transform(Protocol):
    """How a coupling changes a group by what its block returns: X' = T(X, f(z))."""

    factor: int
    """How many times its input's size the block's output has, along the dimension of the groups."""
    saves: bool
    """Whether autograd saves anything in :meth:`__call__`."""

    def __call__(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the new group, and whatever else the coupling shall return (a log-determinant)."""

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the old group for the new, and whatever else the inverse shall return."""


class Add:
    """X' = X + f(z): the coupling of reversible residual networks."""

    factor = 1
    saves = False

    def __call__(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the sum."""
        return (group + output,)

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the difference."""
        return (group - output,)


class Transformed:
    """A block and the transform that its output steers, run in one region: the transform may save tensors too."""

    __slots__ = ("__self__", "_dim", "_size", "_transform")

    def __init__(self, block: Callable[..., Any], transform: Transform, dim: int, size: int) -> None:
        self.__self__ = block
        self._size = size  # of the block's own group along ``dim``
        self._transform = transform
        self._dim = dim

    def __call__(self, z: Tensor, group: Tensor | NewGroup, *args: Any) -> tuple[Tensor, ...]:
        """Return the new group and what else the transform returns; in a rebuild, find the old group on the way."""
        version = 0 if torch.compiler.is_compiling() else version_of(z)  # which torch.compile cannot see
        shape = z.shape  # a block that releases its input leaves it without one
        output = self.__self__(z, *args)
        self._check(z, shape, version, output)
        if isinstance(group, NewGroup):
            group = group.solve(self._transform, output)
            if not self._transform.saves:
                return ()
        return self._transform(group, output)

    def invert(self, z: Tensor, group: NewGroup, *args: Any) -> None:
        """Find the old group, and no more."""
        group.solve(self._transform, self.__self__(z, *args))

    def _check(self, z: Tensor, given: torch.Size, version: int, output: Any) -> None:
        """Raise unless the block left its input alone and returned a tensor of the right shape."""
        factor, shape = self._transform.factor, list(given)
        uneven, shape[self._dim] = shape[self._dim] != self._size, factor * self._size
        if not isinstance(output, Tensor) or list(output.shape) != shape:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            if uneven:
                allowed = f"shape {shape}, {factor} times the size {self._size} of its own group, got {found}"
            elif factor == 1:
                allowed = f"its input's shape {shape}, got {found}"
                if (
                    isinstance(output, Tensor)
                    and output.dim() == z.dim()
                    and output.size(self._dim) != z.size(self._dim)
                ):
                    allowed += "; give it as many output as input channels"
            else:
                allowed = f"shape {shape}, {factor} times its input's size in dimension {self._dim}, got {found}"
            raise ValueError(f"{describe(self)}: a block of a coupling must return a tensor of {allowed}")
        if not torch.compiler.is_compiling() and version_of(z) != version:
            raise InPlaceError(
                f"{describe(self)}: the block changed its own input in place, which is also another group's output; "
                "use the out-of-place form of its first operation (ReLU(inplace=False), x = x + 1)"
            )


class NewGroup:
    """X'_i in place of X_i among the arguments of a rebuild.

    Args:
        value: X'_i.
        dtype: X_i's.
        requires_grad: X_i's.
    """

    __slots__ = ("_dtype", "_requires_grad", "_value", "old")

    def __init__(self, value: Tensor, dtype: torch.dtype, requires_grad: bool) -> None:
        self._value = value
        self._dtype = dtype
        self._requires_grad = requires_grad
        self.old: Tensor | None = None

    def solve(self, transform: Transform, output: Tensor) -> Tensor:
        """Return X_i for the block's output, and note it."""
        with torch.no_grad():
            self.old = transform.inverse(self._value, output.detach())[0].to(self._dtype)
        return self.old.detach().requires_grad_(self._requires_grad)
