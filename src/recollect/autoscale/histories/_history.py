"""Historical embeddings of one layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect._arguments import as_count
from recollect._transfer import sent
from recollect.autoscale._stamp import GraphStamp
from recollect.autoscale.histories._codec import codec_for
from recollect.autoscale.histories._file_table import FileTable
from recollect.autoscale.histories._memory import memory_table, no_table
from recollect.autoscale.histories._ranks import RankPull, RankTable
from recollect.autoscale.histories._selection import (
    Selection,
    check_values,
    length,
    select_all,
    select_batch,
    select_rows,
)
from recollect.autoscale.histories._table import STAMP, Table
from recollect.autoscale.histories._table_module import TableModule
from recollect.distributed import Shares
from recollect.frames import in_backward

__all__ = ["History", "history_bytes"]


def history_bytes(num_embeddings: int, embedding_dim: int, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes that a history will take, without allocating them.

    Each row has its channels, 4 bytes for the number of its last push and, in int8, 4 for its scale. A file has up to
    8,192 bytes more: a header, and a gap to the next page.

    Args:
        num_embeddings: rows, one per node.
        embedding_dim: channels.
        dtype: as in :class:`History`.

    Raises:
        ValueError: a type in which no history is kept, or a number that is no integer or below 1.

    Example:
        >>> import torch
        >>> from recollect.autoscale import history_bytes
        >>> history_bytes(1_000, 64), history_bytes(1_000, 64, torch.int8)  # 64 * 4 + 4, and 64 + 4 + 4, bytes each
        (260000, 72000)
    """
    codec, rows = codec_for(dtype, as_count("embedding_dim", embedding_dim)), as_count("num_embeddings", num_embeddings)
    return rows * (codec.record_width * codec.record_dtype.itemsize + STAMP.itemsize)


class History(TableModule):
    """A table with the last known embedding of every node, in one layer.

    Nodes in a mini-batch push what was computed for them; later batches, in whose halo they are, pull it ("historical
    embeddings", arXiv 2106.05609, section 2). No gradient passes through a history.

    The table stays where it was made, in host memory (pinned if there is CUDA), on a device, or in a file. Moving the
    module moves what :meth:`pull` returns: its device, and its type, which is float32 at first (float64 for float64).

    A file is made if there is none, and otherwise opened with the rows and ages that it has, also after the process
    that wrote it was killed. (A power failure is another matter: call :meth:`flush` before what must survive one.) One
    history at a time has it open. Its rows are never part of the resident memory of the process, apart from 12 MiB
    during a pull: the operating system's page cache holds what is used often, as far as there is memory to spare.

    Pushes are side effects of a forward pass: in a rebuild (:func:`recollect.in_backward`) they do nothing. In dry mode
    they are done, since a frame's first call is its forward pass.

    Args:
        num_embeddings: rows, one per node.
        embedding_dim: channels.
        device: of the table; ``None`` is host memory.
        dtype: of the table: float32, float16, bfloat16, float64, or int8 with one float32 scale per row, which is
            the row's largest magnitude / 127.
        path: of the file, if the table shall lie in one; folders on the way are made.
        save_histories: whether ``state_dict`` holds the table and its ages. Loading takes them if they are there. A
            history in a file refuses it, as the file is what is kept.
        keep: ``False``: there is no table, and nothing is allocated. Pushes then do nothing, and pulls are refused.
        process_group: rows lie with several ranks: a :class:`~recollect.distributed.Shares`, or a process group of
            torch.distributed, to whose ranks as many rows each belong. A push is of rows that this rank owns, ages and
            ``state_dict`` are of those, and :meth:`pull` is a step that all ranks take together, each for rows of its
            own choice. What is pulled are rows as they are when their rank takes that step. Tables are in host memory,
            or each in a file of its own.

    Attributes:
        table: what holds the rows.

    Shapes:
        - x: [rows, embedding_dim]; n_id: [rows] int64 or int32; offset and count: [parts] integers.

    Raises:
        ValueError: fewer than one row or channel, another dtype, a device or ``save_histories`` with a path, or a path
            or ``save_histories`` with ``keep=False``.
        HistoryFileError: the file is no history, has other rows, was cut, is in use, or there is no room for it.

    Example:
        >>> import torch
        >>> from recollect.autoscale import History
        >>> history = History(num_embeddings=6, embedding_dim=2)
        >>> history.push(torch.ones(3, 2), offset=torch.tensor([0, 4]), count=torch.tensor([1, 2]))
        >>> history.pull(torch.tensor([5, 1]))
        tensor([[1., 1.],
                [0., 0.]])
        >>> history.push(torch.ones(1, 2), n_id=torch.tensor([3]))
        >>> history.age()
        tensor([1, 2, 2, 0, 1, 1])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        path: str | os.PathLike[str] | None = None,
        *,
        save_histories: bool = False,
        keep: bool = True,
        process_group: Any | None = None,
    ) -> None:
        num_embeddings = as_count("num_embeddings", num_embeddings)
        embedding_dim = as_count("embedding_dim", embedding_dim)
        codec = codec_for(dtype, embedding_dim)
        if path is not None and (device is not None or save_histories):
            found = f"device={device!r}" if device is not None else "save_histories=True"
            raise ValueError(
                f"a history with a path lies in its file, which is also what is kept of it (got {found}); leave it out"
            )
        if not keep and (path is not None or save_histories):
            found = f"path={str(path)!r}" if path is not None else "save_histories=True"
            raise ValueError(f"a history with keep=False has nothing to be kept (got {found}); leave one of them out")
        shares = None if process_group is None else _shares_of(process_group, num_embeddings)
        if shares is not None:
            if not keep or torch.device(device or "cpu").type != "cpu":
                found = "keep=False" if not keep else f"device={device!r}"
                raise ValueError(f"a history over ranks is kept, in host memory or files (got {found}): leave it out")
            shares.agree("a history", (num_embeddings, embedding_dim, str(dtype), path is None))
        rows = num_embeddings if shares is None else shares.nodes[1] - shares.nodes[0]
        table: Table
        if not keep:
            table = no_table(codec, num_embeddings)
        elif path is None:
            table = memory_table(codec, rows, torch.device("cpu" if device is None else device))
        elif shares is None:
            table = FileTable(Path(path), rows, embedding_dim, dtype, codec)
        else:  # a file of another number of ranks is told to all
            make = partial(FileTable, Path(path), rows, embedding_dim, dtype, codec)
            table = shares.together("a history's file", make)
        if shares is not None:
            table = RankTable(table, shares)
        super().__init__(table, torch.float64 if dtype == torch.float64 else torch.float32, save_histories)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.dtype = dtype

    @torch.no_grad()
    def push(
        self,
        x: Tensor,
        n_id: Tensor | None = None,
        offset: Tensor | Sequence[int] | None = None,
        count: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Write rows.

        With ``offset`` and ``count`` the first rows of ``x`` go to the ranges ``offset[k] : offset[k] + count[k]``, as
        copies in one piece; ``n_id``, if given too, must begin with these rows. With ``n_id`` alone, ``x`` goes to
        these rows; with none of them, to all rows.

        Raises:
            TypeError: ``x`` is no float tensor, or ``n_id`` holds no integers.
            ValueError: sizes that disagree, parts that overlap, rows named twice, or ``n_id`` not in the parts' order.
            IndexError: rows that the history does not have. Nothing is written after any of these.
        """
        if in_backward():
            return
        where = select_batch(n_id, offset, count, self.num_embeddings)
        self.write(check_values(x, length(where), self.embedding_dim, exact=offset is None), where)

    @torch.no_grad()
    def write(self, x: Tensor, where: Selection) -> None:
        """Do what :meth:`push` does, for rows that were selected already, as those of a mini-batch are."""
        if in_backward():
            return
        x = check_values(x, length(where), self.embedding_dim, exact=False)
        self.settle()
        self.table.write(x, where)

    @torch.no_grad()
    def pull(self, n_id: Tensor | None = None) -> Tensor:
        """Return a copy of the rows ``n_id`` (all rows without it), [rows, embedding_dim].

        Rows that were never pushed are 0. See :attr:`out_dtype` and :attr:`out_device`.

        Raises:
            TypeError: ``n_id`` holds no integers.
            ValueError: ``n_id`` is not 1-D.
            IndexError: rows that the history does not have.
            RuntimeError: it was made with ``keep=False``.
        """
        where = select_all(self.num_embeddings) if n_id is None else select_rows(n_id, self.num_embeddings)
        self.settle()
        out = self._result.new_empty(length(where), self.embedding_dim)
        self.table.read(where, out)
        return out

    @torch.no_grad()
    def pull_own(self, where: Tensor) -> Tensor:
        """Return rows by number [rows] int64 that this rank owns, if it is one of several; no other takes part."""
        self.settle()
        out = self._result.new_empty(where.numel(), self.embedding_dim)
        self.table.read_own(where, out)
        return out

    @torch.no_grad()
    def begin_pull(self, rows: Tensor, what: str = "halo rows of a mini-batch") -> Callable[[], Tensor]:
        """Begin to pull rows by number [rows] int64 on the CPU, checked already; the result waits for them.

        Of a history over ranks they are on their way until then; others are read at once when they are asked for.

        Args:
            rows: their numbers.
            what: they are, for the error where ranks differ.
        """
        if not isinstance(self.table, RankTable):
            return lambda: self.pull(rows)
        return RankPull(self.table, self.table.begin(rows, what), self.decoded)

    def decoded(self, records: Tensor) -> Tensor:
        """Return the rows [rows, embedding_dim] of records that came from ranks."""
        assert isinstance(self.table, RankTable)
        out = self._result.new_empty(records.size(0), self.embedding_dim)
        self.table.decode(records, out)
        return out

    @property
    def emb(self) -> Tensor:
        """The whole table as floats [num_embeddings, embedding_dim], to be read.

        It is the table itself where that holds floats (of a file, its memory map), and a copy of an int8 table.

        Raises:
            RuntimeError: it was made with ``keep=False``.
        """
        if not self.dtype.is_floating_point:
            return self.pull()
        self.settle()
        return self.table.state()["table"]

    @property
    def shares(self) -> Shares | None:
        """Which rank owns which rows; ``None``: all are here."""
        return self.table.shares if isinstance(self.table, RankTable) else None

    @property
    def own_nodes(self) -> Tensor:
        """Numbers of the rows that are here [rows] int64, on the CPU: all, or over ranks those of this one."""
        start, stop = (0, self.num_embeddings) if self.shares is None else self.shares.nodes
        return torch.arange(start, stop, device="cpu")

    @property
    def graph(self) -> GraphStamp | None:
        """The graph whose nodes the rows are, as far as mini-batches of a loader have told."""
        return self.table.graph

    @graph.setter
    def graph(self, graph: GraphStamp | None) -> None:
        self.table.graph = graph

    def extend(self, num_embeddings: int) -> None:
        """Append rows, which are 0, as never pushed; the others keep what they have.

        A history in a file gets a new file in the place of the old one, in one step: there must be room for both.

        Args:
            num_embeddings: rows from now on.

        Raises:
            ValueError: fewer than there are.
            HistoryFileError: there is no room for the new file.
        """
        num_embeddings = as_count("num_embeddings", num_embeddings, least=self.num_embeddings)
        self.settle()
        if num_embeddings > self.num_embeddings:
            self.table = self.table.extended(num_embeddings)
            self.num_embeddings = num_embeddings

    def age(self, n_id: Tensor | None = None) -> Tensor:
        """Return the pushes to this history since the rows ``n_id`` (all without it) were pushed last, [rows] int64.

        A row that was never pushed is as old as the history; see :meth:`never_pushed`.

        Raises:
            TypeError, ValueError, IndexError, RuntimeError: as for :meth:`pull`.
        """
        where = self.table.everything if n_id is None else select_rows(n_id, self.num_embeddings)
        self.settle()
        return sent(self.table.ages(where), self.out_device)

    def never_pushed(self) -> int:
        """Return the number of rows that are still 0, because none was pushed there since it was made or reset.

        Raises:
            RuntimeError: as for :meth:`pull`.
        """
        self.settle()
        ages = self.table.ages(self.table.everything)  # in host memory: no device is waited for
        return int((ages == self.table.clock.pushes).sum())

    def reset_parameters(self) -> None:
        """Set all rows to 0, never pushed."""
        self.settle()
        self.table.reset()

    def flush(self) -> None:
        """Wait until all that was pushed is in the file, and the file on the disk. Without a file: only the first."""
        self.settle()
        table = self.table.own if isinstance(self.table, RankTable) else self.table
        if isinstance(table, FileTable):
            table.flush()

    def extra_repr(self) -> str:
        """Return size, type and place."""
        table = self.table.own if isinstance(self.table, RankTable) else self.table
        place = f"path={str(table.path)!r}" if isinstance(table, FileTable) else table.records.device
        ranks = f", ranks={self.table.shares.world_size}" if isinstance(self.table, RankTable) else ""
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}, {place}{ranks}"


def _shares_of(process_group: Any, rows: int) -> Shares:
    if not isinstance(process_group, Shares):
        world_size = torch.distributed.get_world_size(process_group)
        return Shares(torch.arange(world_size + 1) * rows // world_size, process_group=process_group)
    if process_group.num_nodes != rows:
        raise ValueError(f"the Shares are of {process_group.num_nodes} nodes, and the history has {rows} rows")
    return process_group
