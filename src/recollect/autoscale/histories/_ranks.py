"""A table whose rows lie with several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from recollect._transfer import write
from recollect.autoscale._stamp import GraphStamp
from recollect.autoscale.histories._selection import Selection, Slices, length, numbers_of
from recollect.autoscale.histories._table import Table
from recollect.distributed import Coming, Shares

__all__ = ["RankPull", "RankTable"]


class RankTable(Table):
    """The rows of this rank, in a table of their own; those of others are asked for.

    A push is local: it writes rows that this rank owns. To read rows by number is a step that all ranks take together,
    each for its own numbers. What others get are the rows as they are when the rank that owns them takes the same step.

    Args:
        own: the rows of this rank.
        shares: which those are.
    """

    def __init__(self, own: Table, shares: Shares) -> None:
        super().__init__(own.codec, own.records, own.stamps, own.clock)
        self.own = own
        self.shares = shares
        self._number = shares.next_table()
        self._graph: GraphStamp | None = None

    @property
    def graph(self) -> GraphStamp | None:
        """Whose nodes the rows are."""
        return self._graph

    @graph.setter
    def graph(self, graph: GraphStamp | None) -> None:
        if graph is not None and graph != self._graph:
            self.shares.agree("the graph of the mini-batches", (graph.num_nodes, graph.edges))
        self._graph = graph

    @property
    def everything(self) -> Slices:
        """The rows of this rank."""
        return (self.shares.nodes,)

    def write(self, x: Tensor, where: Selection) -> None:
        """See :class:`Table`."""
        self.own.write(x, self._local(where))

    def read(self, where: Selection, out: Tensor) -> None:
        """See :class:`Table`. By ranges of this rank's own rows it is local, and else a step of all ranks."""
        if not isinstance(where, Tensor) and self._is_own(where):
            self.own.read(self._local(where), out)
            return
        self.decode(self.begin(numbers_of(where), "rows pulled by number")(), out)

    def decode(self, records: Tensor, out: Tensor) -> None:
        """Write records that came as floats into ``out`` [rows, channels]."""
        if self.codec.decodes_to(out.dtype):
            write(out, records)
        else:
            self.codec.decode(records, out)

    def read_own(self, where: Selection, out: Tensor) -> None:
        """See :class:`Table`."""
        self.own.read(self._local(where), out)

    def begin(self, where: Tensor, what: str, values: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Coming:
        """Begin to read rows by number; the result waits for their records. All ranks call this together.

        Args:
            where: numbers [rows] int64, on the CPU.
            what: the rows are, for the error where ranks differ.
            values: that all ranks are told beside them.

        Raises:
            SharesError: ranks differ, or one has ended; here, or where the result is waited for.
        """
        return self.shares.route(where, what).begin(self.records_of, f"{what}, history {self._number}", values)

    def ages(self, where: Selection) -> Tensor:
        """See :class:`Table`; of this rank's own rows."""
        return self.own.ages(self._local(where))

    def state(self) -> dict[str, Tensor]:
        """See :class:`Table`; of this rank's own rows."""
        return self.own.state()

    def load(self, state: Mapping[str, Tensor]) -> str | None:
        """See :class:`Table`; of this rank's own rows."""
        self._graph = None
        return self.own.load(state)

    def reset(self) -> None:
        """See :class:`Table`."""
        self._graph = None
        self.own.reset()

    def extended(self, rows: int) -> Table:
        """Refuse it."""
        raise NotImplementedError(
            "a history over ranks has the nodes of its Shares: make a model with other Shares, and fill its histories"
        )

    def records_of(self, rows: Tensor) -> Tensor:
        """Return records of this rank's own rows [rows], numbered from its first one."""
        self.own.mend()
        records = torch.empty(rows.numel(), self.codec.record_width, dtype=self.codec.record_dtype)
        self.records.read(rows, records)
        return records

    def _is_own(self, where: Slices) -> bool:
        start, stop = self.shares.nodes
        return all(start <= low and high <= stop for low, high in where)

    def _local(self, where: Selection) -> Selection:
        """Return a selection as rows of the own table.

        Raises:
            IndexError: rows of another rank.
        """
        start, stop = self.shares.nodes
        if isinstance(where, Tensor):
            inside = not where.numel() or bool(((where >= start) & (where < stop)).all())
        else:
            inside = self._is_own(where)
        if not inside:
            raise IndexError(
                f"rank {self.shares.rank} owns the rows from {start} to {stop - 1}, and of {length(where)} rows that "
                "were named some are others': a rank pushes what it owns, and knows the age of that alone"
            )
        if isinstance(where, Tensor):
            return where - start
        return tuple((low - start, high - start) for low, high in where)


class RankPull:
    """Rows of a history over ranks that were asked for by number; called once, it waits for them, and returns them.

    In backward they are had once more without the other ranks, whose rows may have been pushed again in the same step:
    kept until then are rows of other ranks, in the form in which they came. This rank's own are read again.

    Args:
        table: of the rows.
        coming: brings them.
        decoded: from records to rows.

    Attributes:
        since: pushes to the history before they were asked for.
    """

    def __init__(self, table: RankTable, coming: Coming, decoded: Callable[[Tensor], Tensor]) -> None:
        self._table, self._coming, self._decoded = table, coming, decoded
        self.since = table.clock.pushes

    def __call__(self) -> Tensor:
        """Return the rows [rows, channels].

        Raises:
            SharesError: ranks differ, or one has ended.
        """
        return self._decoded(self._coming())

    @property
    def own(self) -> Tensor:
        """Which of the rows are this rank's own, by their numbers [k] int64."""
        return self._coming.route.own + self._table.shares.nodes[0]

    def again(self) -> Tensor:
        """Return the rows [rows, channels] once more, if this rank's own are still what they were."""
        return self._decoded(self._coming.again(self._table.records_of(self._coming.route.own)))
