"""What tells one permuted graph from another, for histories whose rows are one graph's nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["BatchSize", "GraphStamp", "belongs", "check_graph", "take_graph"]

_PIECE = 1 << 22
"""Edges that are looked at in one go."""


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
        edges = 0
        for start in range(0, col.numel(), _PIECE):
            number = torch.arange(start, min(start + _PIECE, col.numel()), device=col.device)
            row = torch.searchsorted(crow, number.to(crow.dtype), right=True) - 1
            edges += _digest(row * adj_t.size(1) + col[start : start + _PIECE])
        order = None
        if node_order is not None:
            number = torch.arange(node_order.numel(), device=node_order.device)
            order = _wrapped(_digest(number * node_order.numel() + node_order))
        return cls(adj_t.size(0), _wrapped(edges), order)

    def is_of(self, other: GraphStamp) -> bool:
        """Return whether both can be of one graph in one order, as far as both are known."""
        same = (self.num_nodes, self.edges) == (other.num_nodes, other.edges)
        return same and (None in (self.order, other.order) or self.order == other.order)


def _digest(values: Tensor) -> int:
    """Mix the bits of each value, and sum up: the order of values does not count."""
    mixed = values.to(torch.int64) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 31)) * -4658895280553007687
    return int((mixed ^ (mixed >> 29)).sum())


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
