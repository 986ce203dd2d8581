"""What models do with an adjacency: a sparse CSR tensor whose row i lists the edges j -> i."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect.messages import (
    Made,
    check_csr,
    described,
    make_adj_t,
    rows_of,
    sparse_csr,
    take_made,
    values_of,
    with_weights,
)

__all__ = [
    "add_self_loops",
    "adjacency_of",
    "as_csr",
    "check_square",
    "edge_index_of",
    "first_rows",
    "is_edge_index",
    "normalize",
]


def check_square(adj_t: Tensor) -> None:
    """Refuse what is not the adjacency of one set of nodes in sparse CSR form."""
    check_csr(adj_t)
    if adj_t.dim() != 2 or adj_t.size(0) != adj_t.size(1):
        raise ValueError(f"adj_t has shape {tuple(adj_t.shape)}, but must be [N, N]")


def is_edge_index(value: Any) -> bool:
    """Return whether a value is an ``EdgeIndex`` of torch_geometric, which need not be installed."""
    geometric = sys.modules.get("torch_geometric")
    return geometric is not None and isinstance(value, geometric.EdgeIndex)


def as_csr(adj_t: Any, edge_weight: Tensor | None = None) -> Tensor:
    """Return an adjacency as a sparse CSR tensor [targets, sources].

    Args:
        adj_t: a sparse CSR tensor, or a ``torch_geometric.EdgeIndex`` sorted by column (rows are sources, columns are
            targets).
        edge_weight: of the edges of an ``EdgeIndex`` [num_edges]; default: ones.

    Raises:
        TypeError: it is neither.
        ValueError: weights beside a sparse tensor, which has its own; or an ``EdgeIndex`` in another order, or without
            its size.
    """
    if isinstance(adj_t, Tensor) and adj_t.layout == torch.sparse_csr:
        if edge_weight is not None:
            raise ValueError("edge_weight goes with an EdgeIndex; the weights of a sparse adj_t are its values")
        return adj_t
    if not is_edge_index(adj_t):
        raise TypeError(
            f"adj_t is {described(adj_t)}, but must be a torch.sparse_csr tensor [targets, sources] or a "
            "torch_geometric.EdgeIndex; to_adj_t(data).adj_t is one"
        )
    num_src, num_dst = adj_t.sparse_size()
    if num_src is None or num_dst is None or not adj_t.is_sorted_by_col:
        raise ValueError(
            f"this EdgeIndex has sparse_size {(num_src, num_dst)} and sort_order {adj_t.sort_order!r}; it must know "
            "its size, and be sorted by column (target) as its edges' attributes are: "
            "EdgeIndex(edge_index, sparse_size=(sources, targets)).sort_by('col')"
        )
    source, target = adj_t.as_tensor().long()
    rowptr = torch._convert_indices_from_coo_to_csr(target.contiguous(), num_dst)
    value = torch.ones(source.numel(), device=source.device) if edge_weight is None else edge_weight
    return sparse_csr(rowptr, source, value, (num_dst, num_src))


def adjacency_of(data: Any) -> Tensor:
    """Return the adjacency of a graph or mini-batch, in whichever of the two forms it has one; see :func:`as_csr`."""
    return as_csr(data.adj_t) if "adj_t" in data else as_csr(data.edge_index, data.get("edge_weight"))


def first_rows(adj_t: Tensor, num_rows: int) -> Tensor:
    """Return the rows of the first targets: the others, of a square mini-batch's halo, have no edges."""
    if adj_t.size(0) == num_rows:
        return adj_t
    rowptr = adj_t.crow_indices()[: num_rows + 1]
    edges = int(rowptr[-1])
    return sparse_csr(rowptr, adj_t.col_indices()[:edges], values_of(adj_t)[:edges], (num_rows, adj_t.size(1)))


def edge_index_of(adj_t: Tensor) -> Tensor:
    """Return the edges as source and target [2, num_edges], in the adjacency's order.

    Args:
        adj_t: sparse CSR [targets, sources].

    Raises:
        TypeError: it is no sparse CSR tensor.

    Example:
        >>> import torch
        >>> from recollect.autoscale import edge_index_of
        >>> from recollect.messages import make_adj_t
        >>> adj_t, _ = make_adj_t(torch.tensor([2, 0, 1]), torch.tensor([0, 1, 2]), None, 3)
        >>> edge_index_of(adj_t)
        tensor([[2, 0, 1],
                [0, 1, 2]])
    """
    check_csr(adj_t)
    edge_index = torch.stack([adj_t.col_indices(), rows_of(adj_t)])
    if not forms_of(edge_index.device).reads_at_once:  # convolutions would wait to see that it fits the nodes
        nodes = max(adj_t.shape)
        take_made(edge_index, Made(nodes, nodes, [], [], []))
    return edge_index


def add_self_loops(adj_t: Tensor, fill_value: float = 1.0) -> Tensor:
    """Give every node that has none an edge to itself, as GAT wants it.

    Args:
        adj_t: sparse CSR adjacency of the whole graph [num_nodes, num_nodes]. Self-loops that are there keep their
            weight.
        fill_value: weight of the new edges.

    Returns:
        A sparse CSR adjacency; each row's columns ascend.

    Raises:
        TypeError: it is no sparse CSR tensor.
        ValueError: it is not square: add self-loops to the whole graph, before it is cut into mini-batches.

    Example:
        >>> import torch
        >>> from recollect.autoscale import add_self_loops
        >>> from recollect.messages import make_adj_t
        >>> adj_t, _ = make_adj_t(torch.tensor([1, 0]), torch.tensor([0, 0]), torch.tensor([2.0, 3.0]), 2)
        >>> add_self_loops(adj_t).to_dense()
        tensor([[3., 2.],
                [0., 1.]])
    """
    check_square(adj_t)
    row, col, value = rows_of(adj_t), adj_t.col_indices(), values_of(adj_t)
    missing = torch.ones(adj_t.size(0), dtype=torch.bool, device=row.device)
    missing[row[row == col]] = False
    new = missing.nonzero().view(-1)
    value = torch.cat([value, value.new_full((new.numel(),), fill_value)])
    return make_adj_t(torch.cat([col, new]), torch.cat([row, new]), value, adj_t.size(0))[0]


def normalize(adj_t: Tensor, self_loops: bool = True) -> Tensor:
    """Normalise an adjacency symmetrically, D^-1/2 (A + I) D^-1/2, as GCN, GCNII and APPNP want it.

    D holds the weighted in-degrees (Kipf & Welling, "Semi-Supervised Classification with Graph Convolutional Networks",
    arXiv 1609.02907). Call it once on the whole graph, before making a loader: a mini-batch does not know the degrees
    of its halo.

    Args:
        adj_t: sparse CSR adjacency of the whole graph [num_nodes, num_nodes].
        self_loops: add them first, see :func:`add_self_loops`.

    Returns:
        A sparse CSR adjacency. Edges of nodes without in-degree have weight 0.

    Raises:
        TypeError: it is no sparse CSR tensor.
        ValueError: it is not square.

    Example:
        >>> import torch
        >>> from recollect.autoscale import normalize
        >>> from recollect.messages import make_adj_t
        >>> adj_t, _ = make_adj_t(torch.tensor([1, 0]), torch.tensor([0, 1]), None, 2)
        >>> normalize(adj_t).to_dense()  # degrees of 2, with the self-loops
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    check_square(adj_t)
    if self_loops:
        adj_t = add_self_loops(adj_t)
    row, col, value = rows_of(adj_t), adj_t.col_indices(), values_of(adj_t)
    exact = value.to(torch.promote_types(value.dtype, torch.float32))  # a sum of ones ends at 2,048 in float16
    degree = exact.new_zeros(adj_t.size(0)).index_add_(0, row, exact)
    scale = degree.masked_fill(degree <= 0, torch.inf).rsqrt()  # of which there is a gradient, 0
    normalised = scale[row] * exact * scale[col]
    return with_weights(adj_t, normalised.to(value.dtype) if value.is_floating_point() else normalised)
