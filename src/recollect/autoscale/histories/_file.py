"""Equal rows within a file."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from recollect.autoscale.histories._selection import Selection

__all__ = ["FileRows"]

_REGION_BYTES = 2 << 20
"""What one touched byte may make resident: the kernel maps a whole folio of its page cache at a fault."""

_RESIDENT_BYTES = 12 << 20
"""What a gather may leave mapped at a time."""

_COPY_BYTES = 8 << 20
"""What is converted to the file's type at a time."""

_CUT = "the history's file ends {} bytes before its last row: it was cut while in use"


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor; they live as long as the tensor does."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _write(descriptor: int, tensor: Tensor, position: int) -> tuple[int, OSError | None]:
    """Write all bytes, in as many calls as it takes; return how many were written, and what went wrong then."""
    left = _memory(tensor) if tensor.nbytes else memoryview(b"")
    done = 0
    try:
        while done < tensor.nbytes:
            written = os.pwrite(descriptor, left[done:], position + done)
            if not written:
                return done, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += written
    except OSError as error:
        return done, error
    return done, None


def _read(descriptor: int, tensor: Tensor, position: int) -> None:
    """Fill a contiguous tensor."""
    left = _memory(tensor) if tensor.nbytes else memoryview(b"")
    while left:
        done = os.preadv(descriptor, [left], position)
        if not done:
            raise OSError(_CUT.format(len(left)))
        left, position = left[done:], position + done


class FileRows:
    """Equal rows within a file.

    Ranges of rows go through the file handle, so that they never are part of this process's resident memory. Rows by
    number go through a memory map, as one call per row would be slow; its pages are given back (``MADV_DONTNEED``)
    after every 12 MiB that were touched. Both see the same page cache of the operating system, which keeps what is
    used often as long as there is memory to spare, and survives this process. That the file is as long as it was is
    looked at first: to touch a page behind its end would kill the process, and to write there would make rows of zeros.

    Args:
        descriptor: of the file, open for reading and writing.
        mapped: the whole file.
        position: of row 0, in bytes.
        shape: rows and entries per row.
        dtype: of the entries.

    Attributes:
        torn: the row that a failed write left half old and half new, if any; whoever writes it whole sets ``None``.
    """

    device = torch.device("cpu")

    def __init__(
        self, descriptor: int, mapped: mmap.mmap, position: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self._descriptor = descriptor
        self._mapped = mapped
        self._position = position
        self.shape = shape
        self.dtype = dtype
        with torch.inference_mode(False):
            flat = torch.frombuffer(mapped, dtype=dtype, count=shape[0] * shape[1], offset=position)
            self._view = flat.view(shape)
        self._row_bytes = shape[1] * dtype.itemsize
        self.torn: int | None = None

    def write(self, values: Tensor, where: Selection) -> None:
        """See ``Rows``."""
        if isinstance(where, Tensor):
            order = where.argsort()
            values = values.to("cpu", self.dtype)
            for first, last in self._bounded(where[order]):
                chosen = order[first:last]
                self._check_length()
                self._view.index_copy_(0, where[chosen], values[chosen])
                self._give_back()
            return
        self._check_length()
        step = max(1, _COPY_BYTES // self._row_bytes)
        done = 0
        for start, stop in where:
            for row in range(start, stop, step):
                piece = values[done : done + min(step, stop - row)]
                self._write_rows(piece.to("cpu", self.dtype).contiguous(), row)
                done += piece.size(0)

    def read(self, where: Selection, out: Tensor) -> None:
        """See ``Rows``."""
        if isinstance(where, Tensor):
            self._gather(where, out)
            return
        self._check_length()
        done = 0
        for start, stop in where:
            _read(self._descriptor, out[done : done + stop - start], self._at(start))
            done += stop - start

    def whole(self) -> Tensor:
        """Return the map; reading it makes it resident."""
        self._check_length()
        return self._view

    def zero_(self) -> None:
        """Write zeros."""
        self._check_length()
        rows, width = self.shape
        zeros = torch.zeros(min(rows, max(1, _COPY_BYTES // self._row_bytes)), width, dtype=self.dtype, device="cpu")
        for row in range(0, rows, zeros.size(0)):
            self._write_rows(zeros[: rows - row], row)

    def _write_rows(self, values: Tensor, row: int) -> None:
        done, error = _write(self._descriptor, values, self._at(row))
        if error is not None:
            if done % self._row_bytes:
                self.torn = row + done // self._row_bytes
            raise error

    def _gather(self, where: Tensor, out: Tensor) -> None:
        if bool((where[1:] >= where[:-1]).all()):
            for first, last in self._bounded(where):
                self._check_length()
                torch.index_select(self._view, 0, where[first:last], out=out[first:last])
                self._give_back()
            return
        order = where.argsort()
        for first, last in self._bounded(where[order]):
            chosen = order[first:last]
            self._check_length()
            out.index_copy_(0, chosen, self._view.index_select(0, where[chosen]))
            self._give_back()

    def _bounded(self, rows: Tensor) -> Iterator[tuple[int, int]]:
        """Cut sorted row numbers into pieces that touch few enough regions of the file each."""
        if rows.numel() == 0:
            return pairwise([])
        regions = (self._position + rows * self._row_bytes) // _REGION_BYTES
        rank = torch.cat([regions.new_zeros(1), (regions.diff() != 0).cumsum(0)])
        piece = rank // max(1, _RESIDENT_BYTES // (_REGION_BYTES + self._row_bytes))
        cuts = [0, *(piece.diff().nonzero().squeeze(1) + 1).tolist(), rows.numel()]
        return pairwise(cuts)

    def _give_back(self) -> None:
        self._mapped.madvise(mmap.MADV_DONTNEED)

    def _check_length(self) -> None:
        missing = len(self._mapped) - os.fstat(self._descriptor).st_size
        if missing > 0:
            raise OSError(_CUT.format(missing))

    def _at(self, row: int) -> int:
        return self._position + row * self._row_bytes
