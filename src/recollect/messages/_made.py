"""What was made of the edges of a graph, as plain tensors: to be kept in a file, and not to be made again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect._storages import note_kept
from recollect.messages._adjacency import Edges, edges_of, know_edges, known_edges, row_pointers, sparse_csr
from recollect.messages._products import know_transpose, known_transpose

__all__ = ["Made", "adjacency_of_edges", "made_of", "take_made"]

Csr = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Made:
    """The adjacencies of some edges.

    Attributes:
        num_nodes: columns of each.
        num_targets: rows of each.
        kinds: by which convolutions know them.
        adjacencies: row pointers, columns and values of each.
        transposes: the same of the transpose of each, where there is one.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import GraphConv
        >>> from recollect.messages import convolve, made_of
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> _ = convolve(GraphConv(4, 4), torch.randn(3, 4), edge_index)
        >>> made = made_of(edge_index)
        >>> made.num_nodes, made.num_targets, made.number
        (3, 3, 1)
    """

    num_nodes: int
    num_targets: int
    kinds: list[Hashable]
    adjacencies: list[Csr]
    transposes: list[Csr | None]

    @property
    def number(self) -> int:
        """How many matrices there are."""
        return len(self.adjacencies) + sum(each is not None for each in self.transposes)


def adjacency_of_edges(edge_index: Tensor, values: Tensor, num_nodes: int, num_targets: int) -> Tensor:
    """Return the adjacency [num_targets, num_nodes] of edges that are sorted by target; kept as long as they live.

    Args:
        edge_index: sources and targets [2, E] int64.
        values: of each edge [E]; the same whenever the edges are.
        num_nodes: that sources are of.
        num_targets: that targets are of.

    Returns:
        Sparse CSR; the same tensor at each call with these edges.

    Example:
        >>> import torch
        >>> from recollect.messages import adjacency_of_edges
        >>> edge_index, values = torch.tensor([[2, 0, 1], [0, 0, 1]]), torch.tensor([5.0, 6.0, 7.0])
        >>> adjacency_of_edges(edge_index, values, num_nodes=3, num_targets=2).to_dense()
        tensor([[6., 0., 5.],
                [0., 7., 0.]])
    """

    def make() -> Tensor:
        rowptr = row_pointers(edge_index[1], num_targets, torch.int64)
        return sparse_csr(rowptr, edge_index[0], values, (num_targets, num_nodes))

    if not values.numel():
        return make()
    return edges_of(edge_index, num_nodes, num_targets).adj_t("whole", make, is_copy=False)


def made_of(edge_index: Tensor) -> Made | None:
    """Return what convolutions made of an ``edge_index``; ``None`` if nothing was, or what is no part of the graph.

    Args:
        edge_index: [2, E] int64, which :func:`convolve` was called with.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import GraphConv
        >>> from recollect.messages import convolve, made_of
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> made_of(edge_index) is None
        True
        >>> _ = convolve(GraphConv(4, 4), torch.randn(3, 4), edge_index)
        >>> rowptr, col, values = made_of(edge_index).adjacencies[0]
        >>> col.tolist()  # the source of each target's edge
        [2, 0, 1]
    """
    edges = known_edges(edge_index)
    if edges is None or not edges.inside or not edges.adjacencies:
        return None
    matrices = list(edges.adjacencies.values())
    transposes = [known_transpose(each) for each in matrices]
    return Made(
        edges.num_nodes,
        edges.num_targets,
        list(edges.adjacencies),
        [_parts(each) for each in matrices],
        [None if each is None else _parts(each) for each in transposes],
    )


def take_made(edge_index: Tensor, made: Made) -> None:
    """Let convolutions find what was made of the same edges.

    Args:
        edge_index: [2, E] int64: the same edges in the same order.
        made: of :func:`made_of`.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import GraphConv
        >>> from recollect.messages import convolve, made_of, take_made
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> _ = convolve(GraphConv(4, 4), torch.randn(3, 4), edge_index)
        >>> other = edge_index.clone()
        >>> take_made(other, made_of(edge_index))  # or what a file had of it
        >>> made_of(other).number
        1
    """
    edges = Edges(edge_index, made.num_nodes, made.num_targets, inside=True)
    size = made.num_targets, made.num_nodes
    for kind, own, other in zip(made.kinds, made.adjacencies, made.transposes, strict=True):
        matrix = edges.adjacencies[kind] = sparse_csr(*own, size)
        note_kept(matrix)
        if other is not None:
            know_transpose(matrix, sparse_csr(*other, (size[1], size[0])))
    know_edges(edge_index, edges)


def _parts(matrix: Tensor) -> Csr:
    return matrix.crow_indices(), matrix.col_indices(), matrix.values()
