"""What modules that only move values have in common."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recollect._arguments import pack
from recollect.invertible._log_det import zero_log_det
from recollect.invertible._module import Module

__all__ = ["Moves"]


class Moves(Module):
    """A bijection with determinant one, as long as the batch, dimension 0, stays what it is."""

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
