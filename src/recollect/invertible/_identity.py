"""The module that does nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recollect._arguments import pack, unpack
from recollect.invertible._log_det import zero_log_det
from recollect.invertible._module import Module

__all__ = ["Identity"]


class Identity(Module):
    """Return the arguments as they are.

    Args:
        *args: taken and not used, as by :class:`torch.nn.Identity`.
        **kwargs: the same.
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
