"""Cutting mini-batches out of a graph by marking nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["OneHop", "Span", "Subgraph"]


class Span(NamedTuple):
    """Consecutive nodes, and the consecutive edges into them."""

    first_node: int
    last_node: int
    first_edge: int
    last_edge: int


class Subgraph(NamedTuple):
    """The edges into some nodes, in these nodes' own numbers.

    Attributes:
        n_id: [B + halo] int64: the nodes of the spans in their order, then all other sources, ascending.
        rowptr: [B + 1] int64.
        col: [E'] int64: positions in ``n_id``.
        batch_size: B.
    """

    n_id: Tensor
    rowptr: Tensor
    col: Tensor
    batch_size: int


class OneHop:
    """Numbers the nodes of mini-batches anew with a table of all nodes that it keeps from one to the next.

    What it does for a mini-batch depends on the mini-batch's edges alone: the table is written where these edges
    lead, and wiped there again.

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

    def __call__(self, spans: Sequence[Span]) -> Subgraph:
        """Cut out the edges into the nodes of ``spans``, which do not overlap."""
        rowptr = self._local_rowptr(spans)
        source = torch.cat([self._col[span.first_edge : span.last_edge] for span in spans])
        device = source.device
        inside = torch.cat([torch.arange(span.first_node, span.last_node, device=device) for span in spans])
        table = self._take_table()
        halo, col = _number(table, spans, source, inside.numel())
        self._tables.append(table)  # not after an error: it might not be clean
        return Subgraph(torch.cat([inside, halo]), rowptr, col, inside.numel())

    def _local_rowptr(self, spans: Sequence[Span]) -> Tensor:
        pieces, edges = [self._rowptr.new_zeros(1)], 0
        for span in spans:
            pieces.append(self._rowptr[span.first_node + 1 : span.last_node + 1] + (edges - span.first_edge))
            edges += span.last_edge - span.first_edge
        return torch.cat(pieces)

    def _take_table(self) -> Tensor:
        try:
            return self._tables.pop()
        except IndexError:  # the first mini-batch, or another thread has it
            return torch.full((self._rowptr.numel() - 1,), -1, dtype=torch.int32, device=self._col.device)


def _number(table: Tensor, spans: Sequence[Span], source: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """The nodes outside ``spans``, ascending, and the new number of each source. ``table`` is -1 before and after."""
    number = torch.arange(batch_size, dtype=table.dtype, device=table.device)
    row = 0
    for span in spans:
        rows = span.last_node - span.first_node
        table[span.first_node : span.last_node] = number[row : row + rows]
        row += rows
    halo = _distinct(table, source[table.index_select(0, source) < 0])
    table.scatter_(0, halo, torch.arange(batch_size, batch_size + halo.numel(), dtype=table.dtype, device=table.device))
    col = table.index_select(0, source).to(torch.int64)
    table.scatter_(0, halo, -1)
    for span in spans:
        table[span.first_node : span.last_node] = -1
    return halo, col


def _distinct(table: Tensor, nodes: Tensor) -> Tensor:
    """Each of ``nodes`` once, ascending: of equal ones, that one stays whose mark was not overwritten."""
    mark = torch.arange(nodes.numel(), dtype=table.dtype, device=table.device)
    table.scatter_(0, nodes, mark)
    return nodes[table.index_select(0, nodes) == mark].sort().values
