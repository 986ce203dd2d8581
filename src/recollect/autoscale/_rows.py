"""What a history needs of the place that its rows lie in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from recollect.autoscale._selection import Selection

__all__ = ["STAMP", "Clock", "Rows"]

STAMP = torch.int32
"""Type of the number of the push in which a row was written last; 0: never."""


class Rows(Protocol):
    """Equal rows of one type."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        ...

    @property
    def device(self) -> torch.device:
        """On which rows are read and written."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and entries of a row."""
        ...

    def write(self, values: Tensor, where: Selection) -> None:
        """Copy ``values`` [rows, width] to the selected rows, converting type and device."""
        ...

    def read(self, where: Selection, out: Tensor) -> None:
        """Copy the selected rows into ``out`` [rows, width], contiguous and of this type and device."""
        ...

    def whole(self) -> Tensor:
        """Return all of them, not copied."""
        ...

    def zero_(self) -> None:
        """Set all to 0."""
        ...


class Clock(Protocol):
    """Counts the pushes."""

    @property
    def pushes(self) -> int:
        """So far."""
        ...

    def push(self) -> AbstractContextManager[int]:
        """Count one more; in the body its rows are written. Gives its number."""
        ...

    def reset(self, pushes: int = 0) -> None:
        """Count from here."""
        ...
