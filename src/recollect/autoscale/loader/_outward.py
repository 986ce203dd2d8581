"""The edges from a mini-batch to nodes outside of it, which carry gradients back into the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recollect.autoscale.loader._subgraph import number_nodes
from recollect.messages import row_pointers, rows_of, sparse_csr

__all__ = ["OUTWARD", "Outward", "OutwardCut", "OutwardEdges"]

OutwardEdges = Literal["cut", "induced", "complete"]
OUTWARD: dict[bool | str, OutwardEdges | None] = {
    False: None, True: "cut", "cut": "cut", "induced": "induced", "complete": "complete",
}  # fmt: skip
"""What a loader's ``outward`` may be, and what it stands for."""


class Outward(NamedTuple):
    """The out-neighbours of a mini-batch of B nodes outside of it, as targets of a layer.

    Attributes:
        n_id: [T + B + S] int64: the T out-neighbours, ascending; the batch's nodes, in its order; and, unless it is
            ``"cut"``, the other nodes that the out-neighbours have these edges from, ascending.
        num_targets: T.
        rowptr: if it is ``"cut"`` [B + 1] int64, where the edges of each node of the batch begin; otherwise [T + 1],
            where those of each out-neighbour begin.
        col: [E'] int64: the other end: if it is ``"cut"``, one of the T; otherwise a position in ``n_id``.
        value: [E'] their weights.
        nodes: the graph's node-level tensors by name, [T + B + S, ...].
        edges: the graph's edge-level tensors by name, [E', ...].
        others: names of the graph's tensors that belong to neither.
        form: which edges into the out-neighbours these are. ``"cut"``: those from the batch. ``"induced"``: those from
            the batch and all its neighbours. ``"complete"``: all.
        weights: [2] float64: the sum of the weights of the edges into the batch, and that of their squares.
        share: unless it is ``"cut"`` [2, T] float64: of each out-neighbour's in-edges in the graph the share that comes
            from the batch and all its neighbours, and of its out-edges the share that leads to the batch and its
            out-neighbours; 1 where there are none.
        near: if it is ``"cut"``, the rows of the batch that have such edges [R] int64; ``None`` if they are half of it
            or more.
    """

    n_id: Tensor
    num_targets: int
    rowptr: Tensor
    col: Tensor
    value: Tensor
    nodes: dict[str, Tensor]
    edges: dict[str, Tensor]
    others: tuple[str, ...]
    form: OutwardEdges
    weights: Tensor
    share: Tensor | None = None
    near: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether these are all edges into the out-neighbours."""
        return self.form == "complete"

    def from_batch(self, size: int) -> Outward:
        """Return the edges from the batch of so many nodes alone, by target."""
        if self.form == "cut":
            return self.by_target()
        known = self.num_targets + size
        kept = (self.col >= self.num_targets) & (self.col < known)
        return self._replace(
            n_id=self.n_id[:known],
            rowptr=_ends(kept)[self.rowptr],
            col=self.col[kept],
            value=self.value[kept],
            nodes={name: value[:known] for name, value in self.nodes.items()},
            edges={name: value[kept] for name, value in self.edges.items()},
        )

    def by_target(self) -> Outward:
        """Return the same with those edges together that lead to one out-neighbour."""
        if self.form != "cut":
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
        form: See `Outward`.
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
        self._form: OutwardEdges = form
        # By source: entry k is edge self._order[k], into self._target[k].
        self._order = col.argsort(stable=True)
        self._begin = row_pointers(col, rowptr.numel() - 1, rowptr.dtype)
        self._target = rows_of(sparse_csr(rowptr, col, value, (rowptr.numel() - 1,) * 2))[self._order]

    def __call__(self, batch: Tensor) -> Outward:
        """Return the outward edges of the nodes ``batch`` [B]."""
        num_nodes = self._rowptr.numel() - 1
        leaving, counts = self._leaving(batch)
        targets, place = number_nodes(batch, self._target[leaving], num_nodes)
        into = _spread(self._rowptr[batch], self._rowptr[batch + 1] - self._rowptr[batch])
        inside, share = torch.cat([targets, batch]), None
        near = None
        if self._form == "cut":
            crossing = place >= batch.numel()
            rowptr = _ends(crossing)[_ends(counts)]
            edges, col = self._order[leaving[crossing]], place[crossing] - batch.numel()
            n_id = inside
            rows = rowptr.diff().nonzero().squeeze(1)  # here, where the graph is: a device would have to be waited for
            near = rows if 2 * rows.numel() < batch.numel() else None
        else:
            edges, rowptr, share = self._into(targets, inside, into)
            rest, col = number_nodes(inside, self._col[edges], num_nodes)
            n_id = torch.cat([inside, rest])
        weights = self._value[into].double()
        return Outward(
            n_id,
            targets.numel(),
            rowptr,
            col,
            self._value[edges],
            {name: value[n_id] for name, value in self._nodes.items()},
            {name: value[edges] for name, value in self._edges.items()},
            self._others,
            self._form,
            torch.stack([weights.sum(), weights.square().sum()]),
            share,
            near,
        )

    def _leaving(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the edges out of some nodes, as entries by source, and how many each has."""
        counts = self._begin[nodes + 1] - self._begin[nodes]
        return _spread(self._begin[nodes], counts), counts

    def _into(self, targets: Tensor, inside: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the edges into the targets, where each one's begin, and `Outward.share`."""
        near = torch.zeros(self._rowptr.numel() - 1, dtype=torch.bool, device=targets.device)
        near[inside] = True
        leaving, out_counts = self._leaving(targets)
        to_near = near[self._target[leaving]]
        near[self._col[into]] = True
        counts = self._rowptr[targets + 1] - self._rowptr[targets]
        edges = _spread(self._rowptr[targets], counts)
        from_near = near[self._col[edges]]
        shares = []
        for kept, total in ((from_near, counts), (to_near, out_counts)):
            ends = _ends(kept)[_ends(total)]
            shares.append(torch.where(total > 0, ends.diff().double() / total, 1.0))  # where there are none, all
        if self._form == "induced":
            return edges[from_near], _ends(from_near)[_ends(counts)], torch.stack(shares)
        return edges, _ends(counts), torch.stack(shares)


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
