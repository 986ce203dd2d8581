"""Cutting mini-batches out of a graph by marking nodes."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["OneHop", "Ranges", "Subgraph", "number_nodes"]

_FEW, _LONG = 32, 512  # ranges; rows of the mean range


class Ranges:
    """The rows from ``start[k]`` to ``stop[k]``, for one ``k`` after the other.

    Few or long ranges are taken as slices, of which nothing is looked up; many short ones by the numbers of their rows,
    so that no step is made for each.

    Args:
        start: [K] int64 on the CPU.
        stop: [K] int64 on the CPU, nowhere below ``start``.
        device: Of the tensors that rows are taken of.
    """

    def __init__(self, start: Tensor, stop: Tensor, device: torch.device) -> None:
        self._start, self._stop = start, stop
        self._device = device
        self.total = int((stop - start).sum())
        self._sliced = start.numel() <= _FEW or self.total >= _LONG * start.numel()

    def take(self, value: Tensor) -> Tensor:
        """The rows of ``value``."""
        if not self.total:
            return value[:0]
        if self._sliced:
            return torch.cat([value[start:stop] for start, stop in self._pairs])
        return value.index_select(0, self.positions)

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self._start.tolist(), self._stop.tolist(), strict=True))

    @cached_property
    def positions(self) -> Tensor:
        """The numbers of the rows, [total] int64."""
        if not self.total:
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        if self._sliced:
            return torch.cat([torch.arange(start, stop, device=self._device) for start, stop in self._pairs])
        return self._sums_of_steps()

    def _sums_of_steps(self) -> Tensor:
        """Steps of one, but for the jumps from one range to the next."""
        nonempty = self._stop > self._start
        start, stop = self._start[nonempty], self._stop[nonempty]
        count = stop - start
        jumps = start.clone()
        jumps[1:] -= stop[:-1] - 1
        steps = torch.ones(self.total, dtype=torch.int64, device=self._device)
        steps[(count.cumsum(0) - count).to(self._device)] = jumps.to(self._device)
        return steps.cumsum_(0)


_TABLE = torch.int32  # numbers within one mini-batch
_MANY = 4


class Subgraph(NamedTuple):
    """The edges into some nodes, in these nodes' own numbers.

    Attributes:
        n_id: [B + halo] int64: the nodes in the order asked for, then all other sources, ascending.
        rowptr: [B + 1] int64.
        col: [E'] int64: positions in ``n_id``.
    """

    n_id: Tensor
    rowptr: Tensor
    col: Tensor


class OneHop:
    """Numbers the nodes of mini-batches anew with a table of all nodes that it keeps from one to the next.

    What it does for a mini-batch depends on the mini-batch's edges alone: the table is written where these edges
    lead, and wiped there again. There is a table for each process, and for each thread that is here at the same time.

    Args:
        rowptr: [N + 1] int64, of the whole graph's transposed adjacency.
        col: [E] int64, the source of each edge.
    """

    def __init__(self, rowptr: Tensor, col: Tensor) -> None:
        self._rowptr = rowptr
        self._col = col
        self._tables: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": []}

    def __call__(self, nodes: Ranges, edges: Ranges) -> Subgraph:
        """Cut out ``edges``, which are all edges into ``nodes``. No node may be there twice."""
        inside = nodes.positions
        rowptr = self._rowptr.new_zeros(inside.numel() + 1)
        torch.cumsum(self._rowptr[inside + 1] - self._rowptr[inside], 0, out=rowptr[1:])
        table = self._take_table()
        halo, col = _number(table, inside, edges.take(self._col))
        self._tables.append(table)  # not after an error: it might not be clean
        return Subgraph(torch.cat([inside, halo]), rowptr, col)

    def _take_table(self) -> Tensor:
        try:
            return self._tables.pop()
        except IndexError:  # the first mini-batch here, or another thread has it
            return torch.full((self._rowptr.numel() - 1,), -1, dtype=_TABLE, device=self._col.device)


def _number(table: Tensor, inside: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """The sources that are not ``inside``, ascending, and the new number of each. ``table`` is -1 before and after."""
    table.scatter_(0, inside, _up_to(inside.numel(), table))
    outside = source.masked_select(table.index_select(0, source) < 0)
    halo = _distinct(table, outside)
    table.scatter_(0, halo, _up_to(halo.numel(), table) + inside.numel())
    col = table.index_select(0, source).to(torch.int64)
    table.scatter_(0, torch.cat([inside, halo]), -1)
    return halo, col


def number_nodes(inside: Tensor, source: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Return the sources that are not ``inside``, ascending, and the position of each source in both together."""
    table = torch.full((num_nodes,), -1, dtype=_TABLE, device=source.device)
    return _number(table, inside, source)


def _distinct(table: Tensor, nodes: Tensor) -> Tensor:
    """Each of ``nodes`` once, ascending."""
    if nodes.numel() * _MANY > table.numel():  # then there are many equal ones, and marks are cheaper than sorting
        mark = _up_to(nodes.numel(), table)
        table.scatter_(0, nodes, mark)
        nodes = nodes.masked_select(table.index_select(0, nodes) == mark)  # whose mark was not overwritten
    if table.numel() <= torch.iinfo(torch.int32).max:
        nodes = nodes.to(torch.int32)  # half the work of sorting
    found: Tensor = torch.unique_consecutive(nodes.sort().values)
    return found.to(torch.int64)


def _up_to(count: int, table: Tensor) -> Tensor:
    return torch.arange(count, dtype=table.dtype, device=table.device)
