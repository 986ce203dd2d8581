"""What a coupling does to a group, and its solution for the old group in a rebuild."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from recollect.frames._errors import InPlaceError, describe
from recollect.frames._lattice import Lattice
from recollect.frames._watch import version_of

__all__ = ["Add", "NewGroup", "Transform", "Transformed"]


class Transform(Protocol):
    """How a coupling changes a group by what its block returns: X' = T(X, f(z)).

    Example:
        >>> import torch
        >>> from recollect.frames import couple_by, uncouple_by
        >>> class Scale:  # X' = X * exp(f(z)), with its log-determinant
        ...     factor, saves = 1, True
        ...     def __call__(self, group, output):
        ...         return group * output.exp(), output.flatten(1).sum(1)
        ...     def inverse(self, group, output):
        ...         return group * (-output).exp(), -output.flatten(1).sum(1)
        >>> blocks, x = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], torch.randn(5, 4)
        >>> y, extras = couple_by(Scale(), blocks, x, [(), ()])
        >>> torch.allclose(uncouple_by(Scale(), blocks, y, [(), ()])[0], x, atol=1e-5)
        True
        >>> [len(extra) for extra in extras]
        [1, 1]
    """

    factor: int
    """How many times its input's size the block's output has, along the dimension of the groups."""
    saves: bool
    """Whether autograd saves anything in :meth:`__call__`."""

    def __call__(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the new group, and whatever else the coupling shall return (a log-determinant)."""

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the old group for the new, and whatever else the inverse shall return."""


class Add:
    """X' = X + f(z): the coupling of reversible residual networks.

    Example:
        >>> import torch
        >>> from recollect.frames import Add
        >>> (total,) = Add()(torch.tensor([1.0]), torch.tensor([0.5]))
        >>> total, Add().inverse(total, torch.tensor([0.5]))
        (tensor([1.5000]), (tensor([1.]),))
    """

    factor = 1
    saves = False

    def __call__(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the sum."""
        return (group + output,)

    def inverse(self, group: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        """Return the difference."""
        return (group - output,)


class Transformed:
    """A block and the transform that its output steers, run in one region: the transform may save tensors too.

    Attributes:
        owner: the block, which messages name.
        runs_owner_alone: whether nothing but the block can depend on anything from outside.
        seen: is given the block's output in a forward pass.
    """

    __slots__ = ("_dim", "_transform", "owner", "runs_owner_alone", "seen")

    def __init__(self, block: Callable[..., Any], transform: Transform, dim: int) -> None:
        self.owner = block
        self.runs_owner_alone = isinstance(transform, (Add, Lattice))
        self.seen: Callable[[Tensor], None] | None = None
        self._transform = transform
        self._dim = dim

    @property
    def name(self) -> str:
        """The block's name, for messages."""
        return describe(self.owner)

    def __call__(self, z: Tensor, group: Tensor | NewGroup, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the new group and what else the transform returns; in a rebuild, find the old group on the way."""
        version = 0 if torch.compiler.is_compiling() else version_of(z)  # which torch.compile cannot see
        shape = list(z.shape)  # a block that releases its input leaves it without one
        output = self.owner(z, *args, **kwargs)
        value = group.value if isinstance(group, NewGroup) else group
        shape[self._dim] = value.size(self._dim) * self._transform.factor
        self._check(z, shape, version, output)
        if isinstance(group, NewGroup):
            group = group.solve(self._transform, output)
            if not self._transform.saves:
                return ()
        elif self.seen is not None:
            self.seen(output.detach())
        return self._transform(group, output)

    def invert(self, z: Tensor, group: NewGroup, *args: Any, **kwargs: Any) -> None:
        """Find the old group, and no more."""
        group.solve(self._transform, self.owner(z, *args, **kwargs))

    def evaluate(self, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output alone."""
        output: Tensor = self.owner(z, *args, **kwargs)
        return output.detach()

    def _check(self, z: Tensor, shape: list[int], version: int, output: Any) -> None:
        """Raise unless the block left its input alone and returned a tensor of the right shape."""
        factor = self._transform.factor
        if not isinstance(output, Tensor) or list(output.shape) != shape:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            if list(z.shape) == shape:
                allowed = f"its input's shape {shape}, got {found}"
                if (
                    isinstance(output, Tensor)
                    and output.dim() == z.dim()
                    and output.size(self._dim) != z.size(self._dim)
                ):
                    allowed += "; give it as many output as input channels"
            else:
                times = "" if factor == 1 else f", {factor} times the size in dimension {self._dim} of what it changes"
                allowed = f"shape {shape}{times}, got {found}"
            raise ValueError(f"{self.name}: a block of a coupling must return a tensor of {allowed}")
        if not torch.compiler.is_compiling() and version_of(z) != version:
            raise InPlaceError(
                f"{self.name}: the block changed its own input in place, which is also another group's output; "
                "use the out-of-place form of its first operation (ReLU(inplace=False), x = x + 1)"
            )


class NewGroup:
    """X'_i in place of X_i among the arguments of a rebuild.

    Args:
        value: X'_i.
        dtype: X_i's.
        requires_grad: X_i's.

    Attributes:
        old: X_i, when it was found.
        returned: what the block returned then.
    """

    __slots__ = ("_dtype", "_requires_grad", "old", "returned", "value")

    def __init__(self, value: Tensor, dtype: torch.dtype, requires_grad: bool) -> None:
        self.value = value
        self._dtype = dtype
        self._requires_grad = requires_grad
        self.old: Tensor | None = None
        self.returned: Tensor | None = None

    def solve(self, transform: Transform, output: Tensor) -> Tensor:
        """Return X_i for the block's output, and note both."""
        with torch.no_grad():
            self.returned = output.detach()
            old = transform.inverse(self.value, self.returned)[0]
            self.old = old if old.dtype is self._dtype else old.to(self._dtype)
        return self.old.detach().requires_grad_(self._requires_grad)
