"""A whole graph's tables over ranks: each has the rows of its own nodes, and all take every operation together.

A part's halo is read from the ranks that own it, and what is added to the halo's gradients goes back to them. The k-th
part of one rank is computed beside the k-th of every other, so that ranks have as many parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autoscale.histories import PlainRows, Where
from recollect.distributed import Ranks, Shares, SharesError
from recollect.outofcore._tables import Changes, Rows, Shape, Tables

__all__ = ["RankTables", "check_shares", "summed"]


class RankTables(Tables):
    """Tables with the rows of this rank's nodes, which are named by their numbers in the whole graph.

    Those of bits, which every rank draws alike, have a row for each node of the graph.

    Args:
        shapes: of the tables, by name.
        shares: who owns which nodes.
    """

    def __init__(self, shapes: Mapping[str, Shape], shares: Shares) -> None:
        first, stop = shares.nodes
        bits = {name: shape for name, shape in shapes.items() if not shape[1].is_floating_point}
        super().__init__(stop - first, {name: shape for name, shape in shapes.items() if name not in bits}, None)
        self._shares = shares
        self._bits = {name: PlainRows(shares.num_nodes, *shape) for name, shape in bits.items()}

    def __getitem__(self, name: str) -> PlainRows:
        return self._bits[name] if name in self._bits else _OwnRows(self._tables[name], self._shares.nodes[0])

    def read(self, name: str, where: tuple[int, int], halo: Tensor) -> Tensor:
        """Return own rows in a row, and behind them others by number; a step of all ranks."""
        table, shares, own = self._tables[name], self._shares, where[1] - where[0]
        came = shares.route(halo).begin(table.read, shares.count, shares.step(), shares.group)
        rows = table.empty(own + halo.numel())
        table.read(_local(where, shares.nodes[0]), rows[:own])
        rows[own:] = came()
        return rows

    def apply(self, changes: Changes, journaled: bool) -> None:
        """Do what an operation does; a step of all ranks where it adds to halos."""
        shares = self._shares
        self._write(changes.rows)
        for each in changes.added:
            if not isinstance(each.where, Tensor):
                self._add(each.table, each.source, _local(each.where, shares.nodes[0]), each.values)
                continue
            found = shares.route(each.where).give_back(each.values, shares.count, shares.step(), shares.group)
            for rows, values in found:
                self._add(each.table, each.source, rows, values)
        for name, (start, stop) in changes.cleared:
            self[name].write((start, stop), self[name].empty(stop - start).zero_())

    def _add(self, name: str, source: str, where: Where, values: Tensor) -> None:
        if source != name:
            raise NotImplementedError("over ranks there are no spare tables")
        self._tables[name].add(where, values)

    def _write(self, rows: list[Rows]) -> None:
        for name, where, values in rows:
            self[name].write(where, values)


class _OwnRows(PlainRows):
    """Rows of a rank, by the numbers that its nodes have in the whole graph."""

    def __init__(self, rows: PlainRows, first: int) -> None:
        self._plain, self._first = rows, first

    def empty(self, rows: int) -> Tensor:
        """See :class:`PlainRows`."""
        return self._plain.empty(rows)

    def read(self, where: Where, out: Tensor | None = None) -> Tensor:
        """See :class:`PlainRows`."""
        return self._plain.read(_local(where, self._first), out)

    def write(self, where: Where, values: Tensor) -> None:
        """See :class:`PlainRows`."""
        self._plain.write(_local(where, self._first), values)

    def add(self, where: Where, values: Tensor) -> None:
        """See :class:`PlainRows`."""
        self._plain.add(_local(where, self._first), values)

    def zero_(self) -> None:
        """See :class:`PlainRows`."""
        self._plain.zero_()


def _local(where: Where, first: int) -> Where:
    return where - first if isinstance(where, Tensor) else (where[0] - first, where[1] - first)


def check_shares(shares: Shares, ptr: Tensor, data: Any, store: object) -> None:
    """Check that parts are those of the shares, and that ranks have as many of them, and some nodes in each.

    Raises:
        SharesError: they are not; on every rank.
        ValueError: there is a store, or no node for training.
    """
    if store is not None:
        raise ValueError("over ranks tables lie in host memory: leave store out")
    if not bool(data.train_mask.any()):
        raise ValueError("no node is for training: data.train_mask has none")
    if not torch.equal(shares.ptr, ptr):
        raise SharesError("ptr is another than that of the shares: give both the same")
    counts = shares.bounds.diff().tolist()
    if len(set(counts)) > 1:
        raise SharesError(
            f"ranks own {counts} parts, and a step over the whole graph takes as many on each: take a number of parts "
            f"that {shares.world_size} divides, and Shares(ptr, weights=torch.ones(len(ptr) - 1))"
        )
    if not bool(ptr.diff().all()):
        raise SharesError("a part has no nodes: leave it out of ptr")


def summed(
    shares: Shares, loss: Tensor, parameters: list[nn.Parameter], gradients: Mapping[nn.Parameter, Tensor]
) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
    """Return the loss and the gradients of all ranks."""
    ranks = Ranks(shares.group, "these Shares")
    own = {number: gradients[p] for number, p in enumerate(parameters) if p in gradients}
    numbers = sorted(set().union(*ranks.gather(tuple(own))))
    totals: Iterator[tuple[int, Tensor]] = ranks.add_up_all(own, numbers, parameters)
    return ranks.add_up(loss.detach().double()).to(parameters[0].dtype), {
        parameters[number]: total for number, total in totals
    }
