"""A sum of products J Jᵀ, of which only the lower blocks are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect.autogram._products import is_by_onednn, product

__all__ = ["Space", "SquareSum", "on_one_another", "padded_rows", "padded_zeros", "wide"]

# Rows of so many elements are long, and so many of them few: they are multiplied in parts.
_LONG, _FEW = 2**14, 128
# Rows of no more elements are short: to call for narrow blocks takes longer than what these leave out.
_SHORT = 2**8


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """Return what sums of values of these types are kept in: at least float32."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def on_one_another(columns: int) -> bool:
    """Whether rows of so many elements fall on one another in the cache: where their distance is a multiple of a page.

    (Measured: squares take 15 to 35 % longer then.)
    """
    return columns % 1024 == 0


def padded_zeros(num_rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros [num_rows, columns], whose rows do not fall on one another."""
    return torch.zeros(num_rows, _stride(columns), dtype=dtype, device=device)[:, :columns]


def padded_rows(num_rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the same to be written, with anything in it."""
    return torch.empty(num_rows, _stride(columns), dtype=dtype, device=device)[:, :columns]


def _stride(columns: int) -> int:
    return columns + 16 if on_one_another(columns) else columns


class Space:
    """Memory for rows that are written, used, and written over.

    Memory that is new takes about as long to get, page by page, as it takes to fill.

    Args:
        num_rows: m.
        dtype: of the rows.
        device: where.
    """

    __slots__ = ("_memory", "_num_rows")

    def __init__(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._num_rows = num_rows
        self._memory = torch.empty(0, dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self._memory.dtype

    def __call__(self, columns: int) -> Tensor:
        """Return [m, columns], contiguous, to be written: the same memory at each call."""
        size = self._num_rows * columns
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(0)  # gives the old memory back before it takes the new
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(self._num_rows, columns)


class SquareSum:
    """The Gramian that is being summed up.

    Args:
        num_rows: m.
        dtype: what it is summed in.
        device: where.

    Attributes:
        space: for rows on their way.
    """

    __slots__ = ("_lower", "space")

    def __init__(self, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._lower = torch.zeros(num_rows, num_rows, dtype=dtype, device=device)
        self.space = Space(num_rows, dtype, device)

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
        return padded_zeros(self._lower.shape[0], columns, self.dtype, self.device)

    def add_product(self, rows: Tensor) -> None:
        """Add J Jᵀ of J [m, n]."""
        rows = rows.to(self.dtype)
        m, n = rows.shape
        width = forms_of(self.device).columns
        if is_by_onednn(rows, rows[:width]):
            width *= 1 + (m > 4 * width)
            for start in range(0, m, width):
                self._lower[start:, start : start + width] += product(rows[start:], rows[start : start + width])
            return
        if n <= _SHORT:
            width = forms_of(self.device).short_columns
        if m <= width:
            width //= 2
        parts = forms_of(self.device).thin_parts if n >= _LONG and m <= _FEW else 1
        done = n // parts * parts if parts > 1 else 0
        split = torch.unflatten(rows[:, :done], 1, (parts, done // parts)).transpose(0, 1)  # [parts, m, n / parts]
        for start in range(0, m, width):
            block = self._lower[start:, start : start + width]
            if done:
                block += (split[:, start:] @ split[:, start : start + width].mT).sum(0)
            if done < n:
                block.addmm_(rows[start:, done:], rows[start : start + width, done:].mT)

    def add_products(self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
        """Add (a bᵀ) ∘ (c dᵀ) of left = (a, b) [m, p] and right = (c, d) [m, q], of which the lower half counts."""
        m = len(left[0])
        width = forms_of(self.device).paired_columns
        spaces = self.space(2 * width).view(2, -1)
        for start in range(0, m, width):
            block = self._lower[start:, start : start + width]
            products = []
            for (first, second), space in zip((left, right), spaces, strict=True):
                below, across = first[start:], second[start : start + width]
                if is_by_onednn(below, across):
                    products.append(product(below, across))
                else:
                    products.append(torch.mm(below, across.mT, out=space[: block.numel()].view(block.shape)))
            block.addcmul_(*products)

    def add_block(self, block: Tensor, rows: slice, columns: slice) -> None:
        """Add a block of the Gramian; of what is above the diagonal nothing is read."""
        self._lower[rows, columns] += block

    def total(self) -> Tensor:
        """Return the sum [m, m], symmetric; it is the memory that is summed in."""
        width = forms_of(self.device).mirrored_rows
        for start in range(0, len(self._lower), width):
            stop = start + width
            corner = self._lower[start:stop, start:stop]
            corner.copy_(corner.tril() + corner.tril(-1).mT)
            self._lower[start:stop, stop:] = self._lower[stop:, start:stop].mT
        return self._lower
