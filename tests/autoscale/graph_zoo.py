"""Graphs that are hazards, each tiny, and the slow and obvious way to do what the library does fast."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data


def graph(num_nodes: int, edges: list[tuple[int, int]], seed: int = 0) -> Data:
    """Edges are (source, target). Features, labels, mask, weights and edge attributes are there and distinct."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.tensor(edges, dtype=torch.int64).reshape(-1, 2).t().contiguous()
    return Data(
        x=torch.randn(num_nodes, 3, dtype=torch.float64, generator=generator),
        y=torch.arange(num_nodes) * 10,
        train_mask=torch.rand(num_nodes, generator=generator) < 0.5,
        edge_index=edge_index,
        edge_weight=torch.rand(len(edges), dtype=torch.float64, generator=generator) + 0.1,
        edge_attr=torch.randn(len(edges), 2, dtype=torch.float64, generator=generator),
        name="zoo",
    )


def ring() -> Data:
    """Undirected."""
    return graph(8, [(i, (i + d) % 8) for i in range(8) for d in (1, 7)])


def directed() -> Data:
    """Most edges go one way only, and the last node has no edge in, the first none out."""
    return graph(9, [(i, j) for i in range(1, 9) for j in range(8) if (3 * i + 5 * j) % 4 == 0 and i != j])


def with_self_loops() -> Data:
    """A loop at every other node."""
    return graph(7, [(i, (2 * i + 1) % 7) for i in range(7)] + [(i, i) for i in range(0, 7, 2)])


def with_isolated_nodes() -> Data:
    """Only three of ten nodes have edges."""
    return graph(10, [(2, 5), (5, 2), (5, 9), (9, 5)])


def without_edges() -> Data:
    """Six isolated nodes."""
    return graph(6, [])


def with_double_edges() -> Data:
    """Two edges join the same nodes with different weights."""
    return graph(5, [(0, 1), (1, 2), (0, 1), (4, 3), (3, 0), (0, 1)])


def dense() -> Data:
    """Every node's halo is the rest of the graph."""
    return graph(6, [(i, j) for i in range(6) for j in range(6)])


def scattered() -> Data:
    """Random, with nodes of all degrees; 40 nodes and 40 edges would be equal in number: 41 edges."""
    generator = torch.Generator().manual_seed(3)
    return graph(40, torch.randint(40, (41, 2), generator=generator).tolist())


ZOO: list[Callable[[], Data]] = [
    ring, directed, with_self_loops, with_isolated_nodes, without_edges, with_double_edges, dense, scattered,
]  # fmt: skip
every_graph = pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)


def edges_of(data: Data) -> list[tuple[int, int, float, tuple[float, ...]]]:
    """(source, target, weight, attributes) of each edge of data with ``edge_index``, sorted."""
    rows = zip(data.edge_index.t().tolist(), data.edge_weight.tolist(), data.edge_attr.tolist(), strict=True)
    return sorted((source, target, weight, tuple(attr)) for (source, target), weight, attr in rows)


def edges_of_adj_t(adj_t: Tensor, edge_attr: Tensor) -> list[tuple[int, int, float, tuple[float, ...]]]:
    """The same of data with ``adj_t``, by walking over its rows."""
    rowptr, col, value = adj_t.crow_indices().tolist(), adj_t.col_indices().tolist(), adj_t.values().tolist()
    attr = edge_attr.tolist()
    return sorted(
        (col[k], row, value[k], tuple(attr[k]))
        for row in range(len(rowptr) - 1)
        for k in range(rowptr[row], rowptr[row + 1])
    )


def ptr_of(*counts: int) -> Tensor:
    """Where parts of these sizes begin and end."""
    return torch.tensor([0, *counts]).cumsum(0)
