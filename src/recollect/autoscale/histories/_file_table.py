"""A history's rows in a file, which outlives the process and may be larger than memory."""

from __future__ import annotations

import mmap
import os
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from recollect.autoscale._stamp import GraphStamp
from recollect.autoscale.histories._codec import Codec
from recollect.autoscale.histories._file import FileRows
from recollect.autoscale.histories._file_layout import (
    HEADER_BYTES,
    FileLayout,
    FileState,
    HistoryFileError,
    close_file,
    open_file,
    read_graph,
    read_state,
    write_graph,
    write_state,
)
from recollect.autoscale.histories._selection import Selection, numbers_of
from recollect.autoscale.histories._table import STAMP, Table, UnderWay

__all__ = ["FileTable"]


class _FileClock:
    """The number of pushes, in the header; with a mark while rows are being written."""

    def __init__(self, descriptor: int, state: FileState) -> None:
        self._descriptor = descriptor
        self.state = state

    @property
    def pushes(self) -> int:
        return self.state.pushes

    @property
    def base(self) -> int:
        return self.state.base

    def note(self, pushes: int, base: int, under_way: UnderWay = UnderWay.NOTHING) -> None:
        state = FileState(pushes, under_way, base)
        write_state(self._descriptor, state)
        self.state = state

    def reset(self, pushes: int = 0) -> None:
        self.note(pushes, 0)


@dataclass(frozen=True)
class _Push:
    """A push under way: what finishes it, or takes it back, where it fails."""

    number: int
    records: Tensor
    where: Selection
    stamps: Tensor  # of these rows, from before


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
        self.layout = layout = FileLayout(num_embeddings, embedding_dim, dtype)
        descriptor = open_file(path, layout)
        weakref.finalize(self, close_file, descriptor, os.getpid())
        self._descriptor = descriptor
        self._push: _Push | None = None
        self._graph = read_graph(descriptor, num_embeddings)
        mapped = mmap.mmap(descriptor, layout.file_bytes)
        mapped.madvise(mmap.MADV_RANDOM)  # what lies beside a row of the halo is most often not wanted
        shape = num_embeddings, codec.record_width
        self._file_records = FileRows(descriptor, mapped, layout.records_at, shape, codec.record_dtype)
        stamps = FileRows(descriptor, mapped, HEADER_BYTES, (num_embeddings, 1), STAMP)
        self._file_clock = clock = _FileClock(descriptor, read_state(path, descriptor))
        super().__init__(codec, self._file_records, stamps, clock)
        if clock.state.under_way == UnderWay.REBASE:
            self._forget_ages()
        self._check_stamps()
        if clock.state.under_way == UnderWay.PUSH:
            self._forget_last_push()
        if clock.state.under_way:
            clock.note(clock.pushes, clock.base)

    def put(self, records: Tensor, where: Selection, number: int) -> None:
        """See :class:`Table`."""
        before = torch.empty(records.size(0), 1, dtype=STAMP, device="cpu")
        self.stamps.read(where, before)
        self.clock.note(number, self.clock.base, UnderWay.PUSH)
        self._push = _Push(number, records, where, before)
        try:
            # Stamps first: what was being written when the process died is known by its number.
            self.stamps.write(self.stamp(number).expand(records.size(0), 1), where)
            self.records.write(records, where)
            self.clock.note(number, self.clock.base)
        except Exception as error:
            try:
                self.mend()
            except OSError as other:
                error.add_note(
                    f"{self.path}: the rows of this push are made good when the file can be written ({other})"
                )
            raise
        self._push = None

    def mend(self) -> None:
        """Give the rows that a push did not write, because it failed or was interrupted, their stamps again.

        The row that it left half written, if any, starts again at 0, as never pushed. A push that wrote nothing does
        not count.
        """
        push = self._push
        if push is None:
            if self._file_clock.state.under_way == UnderWay.PUSH:  # not a push, but a reset or a load
                self._forget_last_push()
                self.clock.note(self.clock.pushes, self.clock.base)
            return
        held = self.holding(push.records, push.where)
        stamps = torch.where(held.unsqueeze(1), self.stamp(push.number), push.stamps)
        torn = self._file_records.torn
        if torn is not None:
            stamps[numbers_of(push.where) == torn] = 0
            self.records.write(torch.zeros(1, self.records.shape[1], device="cpu"), ((torn, torn + 1),))
        self.stamps.write(stamps, push.where)
        self.clock.note(push.number if torn is not None or bool(held.any()) else push.number - 1, self.clock.base)
        self._file_records.torn = self._push = None

    @property
    def graph(self) -> GraphStamp | None:
        """See :class:`Table`; it stands in the header."""
        return self._graph

    @graph.setter
    def graph(self, graph: GraphStamp | None) -> None:
        if graph != self._graph:
            write_graph(self._descriptor, graph)
            self._graph = graph

    def extended(self, rows: int) -> Table:
        """See :class:`Table`; the new file takes the old one's name when it is complete."""
        self.mend()
        layout, beside = self.layout, self.path.with_name(f"{self.path.name}.extended")
        beside.unlink(missing_ok=True)  # of a process that ended meanwhile: whoever has this file open, owns that too
        other = FileTable(beside, rows, layout.embedding_dim, layout.dtype, self.codec)
        try:
            self.copy_to(other)
            other.flush()
            os.replace(beside, self.path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        other.path = self.path
        return other

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        self.mend()
        os.fsync(self._descriptor)

    def _check_stamps(self) -> None:
        """Raise a HistoryFileError if a row has the number of a push that is yet to come."""
        for piece in self.pieces():
            latest = int(self.numbers(piece).max()) + self.clock.base
            if latest > max(self.clock.pushes, self.clock.base):
                raise HistoryFileError(
                    f"{self.path}: the {self.clock.pushes} pushes that the header counts are expected in the stamps of "
                    f"the rows (got a row of push {latest}): the file was written by something else; delete it"
                )

    def _forget_last_push(self) -> None:
        """Set to 0 the rows that were being written when the process ended: each may be half old and half new."""
        forgotten, self._file_records.torn = 0, None
        for ((start, stop),) in self.pieces():
            torn = (self.numbers(((start, stop),)) == self.clock.pushes - self.clock.base).nonzero().squeeze(1) + start
            self.records.write(torch.zeros(torn.numel(), self.records.shape[1], device="cpu"), torn)
            self.stamps.write(torch.zeros(torn.numel(), 1, device="cpu"), torn)
            forgotten += torn.numel()
        if forgotten:
            self._warn(f"in the middle of a push; the {forgotten} rows of that push start again at 0, as never pushed")

    def _forget_ages(self) -> None:
        """Let all rows count as the oldest: some stamps are above the old base, and some above the new one."""
        self.restamp(torch.ones_like)
        self._warn("while it renumbered the ages; all rows count as pushed long ago")

    def _warn(self, when: str) -> None:
        warnings.warn(f"{self.path}: the process that wrote it ended {when}", stacklevel=5)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the history in {self.path} cannot be copied or pickled: two histories would write the same rows. Save "
            "the model's state_dict() instead, and keep the file beside it"
        )
