"""Rows that are read and written as they are, without ages."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale.histories._codec import codec_for
from recollect.autoscale.histories._file import FileRows
from recollect.autoscale.histories._file_table import FileTable
from recollect.autoscale.histories._memory import MemoryRows, memory_table
from recollect.autoscale.histories._selection import Slices, length

__all__ = ["PlainRows", "Where"]

Where = tuple[int, int] | Tensor
"""Rows from one to before another, or by number [rows]."""


class PlainRows:
    """Rows without ages, of floats or of bytes: in memory, or in a file, that of floats in the form of a history's.

    Args:
        rows: how many.
        width: entries in a row.
        dtype: of the entries: floating point for activations and gradients, uint8 for bits.
        path: of its file; ``None``: in memory.

    Attributes:
        size: ``rows``, ``width`` and ``dtype``.

    Raises:
        HistoryFileError: the file is something else, has other rows, is in use, or there is no room for it.

    Example:
        >>> import torch
        >>> from recollect.autoscale.histories import PlainRows
        >>> rows = PlainRows(4, 2, torch.float32)
        >>> rows.write((1, 3), torch.ones(2, 2))
        >>> rows.read(torch.tensor([2, 0]))
        tensor([[1., 1.],
                [0., 0.]])
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, path: Path | None = None) -> None:
        self._dtype, self._width = dtype, width
        self.size = rows, width, dtype
        self._rows: Any
        if path is None:
            self._rows = (
                memory_table(codec_for(dtype, width), rows, torch.device("cpu")).records
                if (dtype.is_floating_point)
                else _Bits(torch.zeros(rows, width, dtype=dtype, device="cpu"))
            )
        elif dtype.is_floating_point:
            self._table = FileTable(path, rows, width, dtype, codec_for(dtype, width))
            self._rows = self._table.records
        else:
            self._rows = _mapped(path, rows, width, dtype)

    def empty(self, rows: int) -> Tensor:
        """Return room for some rows."""
        return torch.empty(rows, self._width, dtype=self._dtype, device="cpu")

    def read(self, where: Where, out: Tensor | None = None) -> Tensor:
        """Return a copy of some rows.

        Args:
            where: which.
            out: where the copy shall be, contiguous.
        """
        selection = _selection(where)
        out = self.empty(length(selection)) if out is None else out
        self._rows.read(selection, out)
        return out

    def write(self, where: Where, values: Tensor) -> None:
        """Write some rows."""
        self._rows.write(values, _selection(where))

    def add(self, where: Where, values: Tensor) -> None:
        """Add to some rows; to each once."""
        if isinstance(self._rows, MemoryRows) and not isinstance(where, Tensor):
            self._rows.tensor[where[0] : where[1]].add_(values)
        else:
            self.write(where, self.read(where).add_(values))

    def zero_(self) -> None:
        """Set all to 0."""
        self._rows.zero_()


class _Bits:
    """Rows of bytes in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def read(self, where: Slices | Tensor, out: Tensor) -> None:
        if isinstance(where, Tensor):
            torch.index_select(self._tensor, 0, where, out=out)
        else:
            out.copy_(self._tensor[where[0][0] : where[0][1]])

    def write(self, values: Tensor, where: Slices | Tensor) -> None:
        if isinstance(where, Tensor):
            self._tensor.index_copy_(0, where, values)
        else:
            self._tensor[where[0][0] : where[0][1]] = values

    def zero_(self) -> None:
        self._tensor.zero_()


def _mapped(path: Path, rows: int, width: int, dtype: torch.dtype) -> FileRows:
    """Open a file of plain rows, or make it."""
    nbytes = max(rows * width * dtype.itemsize, 1)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if os.fstat(descriptor).st_size != nbytes:
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, nbytes)
        mapped = mmap.mmap(descriptor, nbytes)
    except BaseException:
        os.close(descriptor)
        raise
    return FileRows(descriptor, mapped, 0, (rows, width), dtype)


def _selection(where: Where) -> Slices | Tensor:
    return where if isinstance(where, Tensor) else (where,)
