"""What tells one permuted graph from another, for histories whose rows are one graph's nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from recollect._devices import forms_of

__all__ = ["BatchSize", "GraphStamp", "belongs", "check_graph", "take_graph"]


@dataclass(frozen=True)
class GraphStamp:
    """A graph's size, and fingerprints of 64 bits of its edges and of the order of its nodes.

    Attributes:
        num_nodes: N.
        edges: of all pairs (target, source), whatever their order and their weights.
        order: of ``data.node_order``; ``None``: not known.
    """

    num_nodes: int
    edges: int
    order: int | None = None

    @classmethod
    def of(cls, adj_t: Tensor, node_order: Tensor | None = None) -> GraphStamp:
        """Take the stamp of a graph in sparse CSR form [N, N]."""
        crow, col = adj_t.crow_indices(), adj_t.col_indices()
        edges, piece = 0, forms_of(col.device).piece
        # Rows in pieces of about so many edges, and at least one row.
        starts = torch.arange(0, col.numel(), piece, device=col.device, dtype=crow.dtype)
        begins = torch.searchsorted(crow, starts, right=True).sub_(1)
        bounds = [*torch.unique_consecutive(begins).tolist(), crow.numel() - 1]
        places = crow[bounds].tolist()
        for first, last, start, stop in zip(bounds, bounds[1:], places, places[1:], strict=False):
            row = torch.arange(first, last, device=col.device).mul_(adj_t.size(1))
            count = crow[first : last + 1].diff()
            edges += _digest(torch.repeat_interleave(row, count, output_size=stop - start).add_(col[start:stop]))
        order = None
        if node_order is not None:
            order = 0
            for start in range(0, node_order.numel(), piece):
                part = node_order[start : start + piece]
                number = torch.arange(start, start + part.numel(), device=part.device)
                order += _digest(number.mul_(node_order.numel()).add_(part))
            order = _wrapped(order)
        return cls(adj_t.size(0), _wrapped(edges), order)

    def numbers(self) -> Tensor:
        """Return what `from_numbers` makes the stamp of, [4] int64 on the CPU."""
        known = [self.edges, self.order or 0]
        found = [self.num_nodes, int(self.order is not None), *(n - 2**64 if n >= 2**63 else n for n in known)]
        return torch.tensor(found, dtype=torch.int64, device="cpu")

    @classmethod
    def from_numbers(cls, numbers: Tensor) -> GraphStamp | None:
        """Make a stamp of :meth:`numbers`; ``None``: these are none."""
        if numbers.dtype != torch.int64 or numbers.shape != (4,):
            return None
        num_nodes, ordered, edges, order = numbers.tolist()
        return cls(num_nodes, _wrapped(edges), _wrapped(order) if ordered else None)

    def is_of(self, other: GraphStamp) -> bool:
        """Return whether both can be of one graph in one order, as far as both are known."""
        same = (self.num_nodes, self.edges) == (other.num_nodes, other.edges)
        return same and (None in (self.order, other.order) or self.order == other.order)


def _digest(values: Tensor) -> int:
    """Mix the bits of each of these int64, in their place, and sum up: the order of values does not count."""
    values *= -7046029254386353131
    values ^= values >> 31
    values *= -4658895280553007687
    values ^= values >> 29
    return int(values.sum())


def _wrapped(number: int) -> int:
    return number & (2**64 - 1)


class _OfGraph(Protocol):
    graph: GraphStamp | None

    @property
    def num_embeddings(self) -> int: ...


def check_graph(histories: Iterable[_OfGraph], graph: GraphStamp | None) -> None:
    """Raise a ValueError if a graph is known to be another one than that of the histories."""
    for history in histories:
        if graph is not None and not belongs(history, graph):
            other = "another one with as many nodes, or the same in another order or with other edges"
            found = f"one of {graph.num_nodes} nodes" if graph.num_nodes != history.num_embeddings else other
            raise ValueError(
                f"the histories are of one graph of {history.num_embeddings} nodes, in one order, and what is given "
                f"is of another graph (got {found}): make a model for it with model.for_graph(num_nodes); or, to give "
                "the histories to it, empty each with history.reset_parameters()"
            )


def belongs(history: _OfGraph, graph: GraphStamp) -> bool:
    """Return whether a graph can be that of a history."""
    return graph.num_nodes == history.num_embeddings and (history.graph is None or history.graph.is_of(graph))


def take_graph(history: _OfGraph, graph: GraphStamp | None) -> None:
    """Let a history be of a graph, if it is of none that is known as well.

    Raises:
        ValueError: it is of another one.
    """
    check_graph([history], graph)
    if graph is not None and (history.graph is None or history.graph.order is None):
        history.graph = graph


class BatchSize(int):
    """The number of nodes of a mini-batch, which knows what graph they are of.

    Attributes:
        graph: that the loader cut the mini-batch out of.
    """

    graph: GraphStamp

    def __new__(cls, size: int, graph: GraphStamp) -> BatchSize:
        """Stamp a number."""
        self = super().__new__(cls, size)
        self.graph = graph
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchSize, (int(self), self.graph)
