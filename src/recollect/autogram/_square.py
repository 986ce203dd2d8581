"""A sum of products J Jᵀ, of which only the lower blocks are computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["SquareSum", "apart", "of_device", "wide"]

# The blocks are columns of so many: narrower ones leave out more of the upper half, and keep the processor less busy.
# (Measured on CPU, 128 rows of 16,384: a whole product at 94 GFlop/s, columns of 32 at 80, of 16 at 68; with 256 rows,
# columns of 64 take 6 % less time than those of 32; with 32 rows, those of 16 take 7 % less.)
_WIDTH = {"cpu": 32, "cuda": 256}


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """Return what sums of values of these types are kept in: at least float32."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def of_device(numbers: Mapping[str, int], device: torch.device) -> int:
    """Return which of two numbers was tuned for a device: that of "cpu", or that of "cuda" for all others."""
    return numbers["cpu" if device.type == "cpu" else "cuda"]


def apart(columns: int) -> int:
    """Return how far from one another long rows of so many elements should begin.

    Rows whose distance is a multiple of the page fall on one another in the cache (measured: squares are 10 to 15 %
    slower).
    """
    return columns + 16 if columns >= 1024 else columns


class SquareSum:
    """The Gramian that is being summed up.

    Args:
        num_rows: m.
        dtype: what it is summed in.
        device: where.
    """

    __slots__ = ("_lower", "_space")

    def __init__(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._lower = torch.zeros(num_rows, num_rows, dtype=dtype, device=device)
        self._space = torch.empty(0, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """What is summed in."""
        return self._lower.dtype

    @property
    def device(self) -> torch.device:
        """Where it is summed."""
        return self._lower.device

    def new_rows(self, columns: int) -> Tensor:
        """Return zeros [m, columns], to be filled and added."""
        return self._lower.new_zeros(self._lower.shape[0], apart(columns))[:, :columns]

    def space(self, columns: int) -> Tensor:
        """Return [m, columns] to be written and added: the same memory each time, valid until the next call.

        Memory that is new takes about as long to get, page by page, as it takes to fill.
        """
        m, stride = self._lower.shape[0], apart(columns)
        if self._space.numel() < m * stride:
            self._space = self._space.new_empty(m * stride)
        return self._space[: m * stride].view(m, stride)[:, :columns]

    def add_product(self, rows: Tensor) -> None:
        """Add J Jᵀ of J [m, n]."""
        rows = rows.to(self.dtype)
        width = of_device(_WIDTH, self.device)
        if rows.shape[0] > 4 * width:
            width *= 2
        elif rows.shape[0] <= width:
            width //= 2
        for start in range(0, rows.shape[0], width):
            self._lower[start:, start : start + width].addmm_(rows[start:], rows[start : start + width].mT)

    def add_block(self, block: Tensor, rows: slice, columns: slice) -> None:
        """Add a block of the Gramian; of what is above the diagonal nothing is read."""
        self._lower[rows, columns] += block

    def total(self) -> Tensor:
        """Return the sum [m, m], symmetric."""
        return self._lower.tril() + self._lower.tril(-1).mT
