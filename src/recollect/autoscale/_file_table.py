"""A history's rows in a file, which outlives the process and may be larger than memory."""

from __future__ import annotations

import mmap
import os
import struct
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from recollect.autoscale._codec import Codec
from recollect.autoscale._file import HEADER_BYTES, FileLayout, close_file, open_file
from recollect.autoscale._file_rows import FileRows
from recollect.autoscale._rows import STAMP
from recollect.autoscale._table import Table

__all__ = ["FileTable"]

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
