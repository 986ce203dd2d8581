"""A history's rows in a file, which outlives the process and may be larger than memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from recollect.autoscale.histories._codec import Codec
from recollect.autoscale.histories._file_layout import HEADER_BYTES, FileLayout, close_file, open_file
from recollect.autoscale.histories._selection import Selection
from recollect.autoscale.histories._table import STAMP, Table

__all__ = ["FileRows", "FileTable"]

_REGION_BYTES = 2 << 20
"""What one touched byte may make resident: the kernel maps a whole folio of its page cache at a fault."""

_RESIDENT_BYTES = 12 << 20
"""What a gather may leave mapped at a time."""

_COPY_BYTES = 8 << 20
"""What is converted to the file's type at a time."""


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor; they live as long as the tensor does."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _write(descriptor: int, tensor: Tensor, position: int) -> None:
    """Write all bytes; one call may write fewer."""
    left = _memory(tensor) if tensor.nbytes else memoryview(b"")
    while left:
        done = os.pwrite(descriptor, left, position)
        left, position = left[done:], position + done


def _read(descriptor: int, tensor: Tensor, position: int) -> None:
    """Fill a contiguous tensor."""
    left = _memory(tensor) if tensor.nbytes else memoryview(b"")
    while left:
        done = os.preadv(descriptor, [left], position)
        if not done:
            raise OSError(f"the history's file ends {len(left)} bytes before its last row: it was cut while in use")
        left, position = left[done:], position + done


class FileRows:
    """Equal rows within a file.

    Ranges of rows go through the file handle, so that they never are part of this process's resident memory. Rows by
    number go through a memory map, as one call per row would be slow; its pages are given back (``MADV_DONTNEED``)
    after every 12 MiB that were touched. Both see the same page cache of the operating system, which keeps what is
    used often as long as there is memory to spare, and survives this process.

    Args:
        descriptor: of the file, open for reading and writing.
        mapped: the whole file.
        position: of row 0, in bytes.
        shape: rows and entries per row.
        dtype: of the entries.
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

    def write(self, values: Tensor, where: Selection) -> None:
        """See ``Rows``."""
        if isinstance(where, Tensor):
            order = where.argsort()
            values = values.to("cpu", self.dtype)
            for first, last in self._bounded(where[order]):
                chosen = order[first:last]
                self._view.index_copy_(0, where[chosen], values[chosen])
                self._give_back()
            return
        step = max(1, _COPY_BYTES // self._row_bytes)
        done = 0
        for start, stop in where:
            for row in range(start, stop, step):
                piece = values[done : done + min(step, stop - row)]
                _write(self._descriptor, piece.to("cpu", self.dtype).contiguous(), self._at(row))
                done += piece.size(0)

    def read(self, where: Selection, out: Tensor) -> None:
        """See ``Rows``."""
        if isinstance(where, Tensor):
            self._gather(where, out)
            return
        done = 0
        for start, stop in where:
            _read(self._descriptor, out[done : done + stop - start], self._at(start))
            done += stop - start

    def whole(self) -> Tensor:
        """Return the map; reading it makes it resident."""
        return self._view

    def zero_(self) -> None:
        """Write zeros."""
        rows, width = self.shape
        zeros = torch.zeros(min(rows, max(1, _COPY_BYTES // self._row_bytes)), width, dtype=self.dtype, device="cpu")
        for row in range(0, rows, zeros.size(0)):
            _write(self._descriptor, zeros[: rows - row], self._at(row))

    def _gather(self, where: Tensor, out: Tensor) -> None:
        if bool((where[1:] >= where[:-1]).all()):
            for first, last in self._bounded(where):
                torch.index_select(self._view, 0, where[first:last], out=out[first:last])
                self._give_back()
            return
        order = where.argsort()
        for first, last in self._bounded(where[order]):
            chosen = order[first:last]
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

    def _at(self, row: int) -> int:
        return self._position + row * self._row_bytes


_STATE = struct.Struct("<qq")  # pushes so far, and whether the last one is still under way
_STATE_AT = 64  # their place in the header


class _FileClock:
    """The number of pushes, in the header; with a mark while rows are being written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.pushes, self.interrupted = _STATE.unpack(os.pread(descriptor, _STATE.size, _STATE_AT))

    @contextmanager
    def push(self) -> Iterator[int]:
        self.pushes += 1
        self._note(under_way=1)
        yield self.pushes
        self._note(under_way=0)

    def reset(self, pushes: int = 0) -> None:
        self.pushes = pushes
        self._note(under_way=0)

    def _note(self, under_way: int) -> None:
        os.pwrite(self._descriptor, _STATE.pack(self.pushes, under_way), _STATE_AT)


class FileTable(Table):
    """A table in a file that is opened, or made if there is none.

    Args:
        path: of the file.
        num_embeddings: rows.
        embedding_dim: channels.
        dtype: of the history.
        codec: for this dtype.

    Raises:
        HistoryFileError: the file cannot serve.
    """

    def __init__(self, path: Path, num_embeddings: int, embedding_dim: int, dtype: torch.dtype, codec: Codec) -> None:
        self.path = path
        layout = FileLayout(num_embeddings, embedding_dim, dtype)
        descriptor = open_file(path, layout)
        weakref.finalize(self, close_file, descriptor, os.getpid())
        self._descriptor = descriptor
        mapped = mmap.mmap(descriptor, layout.file_bytes)
        mapped.madvise(mmap.MADV_RANDOM)  # what lies beside a row of the halo is most often not wanted
        shape = num_embeddings, codec.record_width
        records = FileRows(descriptor, mapped, layout.records_at, shape, codec.record_dtype)
        stamps = FileRows(descriptor, mapped, HEADER_BYTES, (num_embeddings, 1), STAMP)
        clock = _FileClock(descriptor)
        super().__init__(codec, records, stamps, clock)
        if clock.interrupted:
            self._forget_last_push(num_embeddings)
            clock.reset(clock.pushes)

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        os.fsync(self._descriptor)

    def _forget_last_push(self, num_embeddings: int) -> None:
        """Set to 0 the rows that were being written when the process ended: each may be half old and half new."""
        forgotten, piece = 0, 1 << 20
        for start in range(0, num_embeddings, piece):
            torn = (self.ages(((start, min(num_embeddings, start + piece)),)) == 0).nonzero().squeeze(1) + start
            self.records.write(torch.zeros(torn.numel(), self.records.shape[1], device="cpu"), torn)
            self.stamps.write(torch.zeros(torn.numel(), 1, device="cpu"), torn)
            forgotten += torn.numel()
        if forgotten:
            warnings.warn(
                f"{self.path}: the process that wrote it ended in the middle of a push; the {forgotten} rows of that "
                "push start again at 0, as never pushed",
                stacklevel=4,
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the history in {self.path} cannot be copied or pickled: two histories would write the same rows. Save "
            "the model's state_dict() instead, and keep the file beside it"
        )
