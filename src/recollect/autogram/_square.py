"""A sum of products J Jᵀ, of which only the upper blocks are computed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SquareSum", "wide"]

# Below so many rows, two halves of a product are slower than the whole (measured on CPU: 64 rows, 4,096 columns).
_LEAF = 64


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """Return what sums of values of these types are kept in: at least float32."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


class SquareSum:
    """The Gramian that is being summed up.

    Args:
        num_rows: m.
        dtype: what it is summed in.
        device: where.
    """

    __slots__ = ("_upper",)

    def __init__(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._upper = torch.zeros(num_rows, num_rows, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """What is summed in."""
        return self._upper.dtype

    @property
    def device(self) -> torch.device:
        """Where it is summed."""
        return self._upper.device

    def new_rows(self, columns: int) -> Tensor:
        """Return zeros [m, columns], to be filled and added."""
        return self._upper.new_zeros(self._upper.shape[0], columns)

    def add_product(self, rows: Tensor) -> None:
        """Add J Jᵀ of J [m, n]."""
        _add_upper(self._upper, rows.to(self.dtype))

    def add_block(self, block: Tensor, rows: slice, columns: slice) -> None:
        """Add a block of the Gramian; of those below the diagonal nothing is read."""
        self._upper[rows, columns] += block

    def total(self) -> Tensor:
        """Return the sum [m, m], symmetric."""
        return self._upper.triu() + self._upper.triu(1).mT


def _add_upper(upper: Tensor, rows: Tensor) -> None:
    m = rows.shape[0]
    if m <= _LEAF:
        upper.addmm_(rows, rows.mT)
        return
    half = m // 2
    upper[:half, half:].addmm_(rows[:half], rows[half:].mT)
    _add_upper(upper[:half, :half], rows[:half])
    _add_upper(upper[half:, half:], rows[half:])
