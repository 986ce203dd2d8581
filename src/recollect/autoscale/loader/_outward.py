"""The edges from a mini-batch to nodes outside of it, which carry gradients back into the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recollect.autoscale.loader._subgraph import number_nodes
from recollect.messages import row_pointers, rows_of, sparse_csr

__all__ = ["OUTWARD", "Outward", "OutwardCut", "OutwardEdges"]

OutwardEdges = Literal["cut", "complete"]
OUTWARD: dict[bool | str, OutwardEdges | None] = {False: None, True: "cut", "cut": "cut", "complete": "complete"}
"""What a loader's ``outward`` may be, and what it stands for."""


class Outward(NamedTuple):
    """The out-neighbours of a mini-batch of B nodes outside of it, as targets of a layer.

    Attributes:
        n_id: [T + B + S] int64: the T out-neighbours, ascending; the batch's nodes, in its order; and, if ``complete``,
            the other nodes that the out-neighbours have edges from, ascending.
        num_targets: T.
        rowptr: if ``complete`` [T + 1] int64, where the edges of each out-neighbour begin; otherwise [B + 1], where
            those of each node of the batch begin.
        col: [E'] int64: the other end: if ``complete``, a position in ``n_id``; otherwise one of the T.
        value: [E'] their weights.
        nodes: the graph's node-level tensors by name, [T + B + S, ...].
        edges: the graph's edge-level tensors by name, [E', ...].
        others: names of the graph's tensors that belong to neither.
        complete: whether these are all edges into the out-neighbours, or only those from the batch.
        weights: [2] float64: the sum of the weights of the edges into the batch, and that of their squares.
    """

    n_id: Tensor
    num_targets: int
    rowptr: Tensor
    col: Tensor
    value: Tensor
    nodes: dict[str, Tensor]
    edges: dict[str, Tensor]
    others: tuple[str, ...]
    complete: bool
    weights: Tensor

    def by_target(self) -> Outward:
        """Return the same with edges as if ``complete``: those of each out-neighbour together."""
        if self.complete:
            return self
        targets = self.num_targets
        source = rows_of(sparse_csr(self.rowptr, self.col, self.value, (self.rowptr.numel() - 1, targets)))
        order = self.col.argsort(stable=True)
        rowptr = row_pointers(self.col, targets, torch.int64)
        edges = {name: value[order] for name, value in self.edges.items()}
        return self._replace(rowptr=rowptr, col=source[order] + targets, value=self.value[order], edges=edges)

    def adj_t(self) -> Tensor:
        """Return the edges, once they are by target, as sparse CSR adjacency [T, T + B + S]."""
        return sparse_csr(self.rowptr, self.col, self.value, (self.num_targets, self.n_id.numel()))

    def adj(self) -> Tensor:
        """Return the edges, unless they are by target, from the batch as sparse CSR matrix [B, T]."""
        return sparse_csr(self.rowptr, self.col, self.value, (self.rowptr.numel() - 1, self.num_targets))


class OutwardCut:
    """Cuts the outward edges of mini-batches.

    Args:
        rowptr: [N + 1] int64, of the whole graph's transposed adjacency.
        col: [E] int64, the source of each edge.
        value: [E] its weight.
        nodes: the graph's node-level tensors by name, [N, ...].
        edges: its edge-level tensors by name, [E, ...].
        others: names of its tensors that belong to neither.
        form: ``"cut"``: the edges from the batch. ``"complete"``: all edges into its out-neighbours.
    """

    def __init__(
        self,
        rowptr: Tensor,
        col: Tensor,
        value: Tensor,
        nodes: Mapping[str, Tensor],
        edges: Mapping[str, Tensor],
        others: tuple[str, ...],
        form: OutwardEdges,
    ) -> None:
        self._rowptr, self._col, self._value = rowptr, col, value
        self._nodes, self._edges, self._others = nodes, edges, others
        self._complete = form == "complete"
        # By source: entry k is edge self._order[k], into self._target[k].
        self._order = col.argsort(stable=True)
        self._begin = row_pointers(col, rowptr.numel() - 1, rowptr.dtype)
        self._target = rows_of(sparse_csr(rowptr, col, value, (rowptr.numel() - 1,) * 2))[self._order]

    def __call__(self, batch: Tensor) -> Outward:
        """Return the outward edges of the nodes ``batch`` [B]."""
        num_nodes = self._rowptr.numel() - 1
        counts = self._begin[batch + 1] - self._begin[batch]
        leaving = _spread(self._begin[batch], counts)
        targets, place = number_nodes(batch, self._target[leaving], num_nodes)
        into = self._value[_spread(self._rowptr[batch], self._rowptr[batch + 1] - self._rowptr[batch])].double()
        if self._complete:
            counts = self._rowptr[targets + 1] - self._rowptr[targets]
            edges = _spread(self._rowptr[targets], counts)
            inside = torch.cat([targets, batch])
            rest, col = number_nodes(inside, self._col[edges], num_nodes)
            n_id, rowptr = torch.cat([inside, rest]), _ends(counts)
        else:
            crossing = place >= batch.numel()
            rowptr = _ends(crossing)[_ends(counts)]
            edges, col = self._order[leaving[crossing]], place[crossing] - batch.numel()
            n_id = torch.cat([targets, batch])
        return Outward(
            n_id,
            targets.numel(),
            rowptr,
            col,
            self._value[edges],
            {name: value[n_id] for name, value in self._nodes.items()},
            {name: value[edges] for name, value in self._edges.items()},
            self._others,
            self._complete,
            torch.stack([into.sum(), into.square().sum()]),
        )


def _spread(start: Tensor, count: Tensor) -> Tensor:
    """Return the numbers from ``start[k]`` to ``start[k] + count[k]``, for one k after the other."""
    ends = count.cumsum(0)
    steps = torch.arange(int(ends[-1]) if ends.numel() else 0, device=start.device)
    return steps + torch.repeat_interleave(start - (ends - count), count, output_size=steps.numel())


def _ends(count: Tensor) -> Tensor:
    """Return where each of these many begin, and where the last ones end."""
    rowptr = torch.zeros(count.numel() + 1, dtype=torch.int64, device=count.device)
    torch.cumsum(count, 0, out=rowptr[1:])
    return rowptr
