"""Cutting mini-batches out of a graph by marking nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect.autoscale._ranges import Ranges

__all__ = ["OneHop", "Subgraph"]

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
