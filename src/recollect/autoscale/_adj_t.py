"""The transposed adjacency, the one form in which the graph is cut, permuted and partitioned."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recollect.autoscale._checks import check_nodes
from recollect.autoscale._kinds import Kind, kinds_of

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["make_adj_t", "rows_of", "sparse_csr", "to_adj_t"]


def sparse_csr(rowptr: Tensor, col: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    """A sparse CSR tensor without a check of its parts, which are known to fit."""
    _hear_of_state()
    return torch.sparse_csr_tensor(rowptr, col, value, size, check_invariants=False)


@functools.cache
def _hear_of_state() -> None:
    """Make a first sparse CSR tensor: torch tells each process once that they are in beta state, and unchecked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")  # torch 2.11
        nothing = torch.zeros(0, dtype=torch.int64)
        torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int64), nothing, nothing, (0, 0), check_invariants=False)


def rows_of(adj_t: Tensor) -> Tensor:
    """The row of each entry of a sparse CSR tensor, [E] int64: the number of rows that end before it."""
    end = adj_t.crow_indices()[1:]
    ends = torch.zeros(adj_t.col_indices().numel() + 1, dtype=torch.int64, device=end.device)
    ends.index_add_(0, end, torch.ones_like(end, dtype=torch.int64))
    return ends[:-1].cumsum_(0)


def make_adj_t(source: Tensor, target: Tensor, value: Tensor | None, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Sort edges by target, then source; equal edges stay apart, in their order.

    Returns:
        ``adj_t`` [num_nodes, num_nodes] with the values, or ones, and ``order`` [E]: entry ``k`` of ``adj_t`` is
        edge ``order[k]``.
    """
    order = torch.argsort(target * num_nodes + source, stable=True)
    rowptr = source.new_zeros(num_nodes + 1)
    torch.cumsum(torch.bincount(target, minlength=num_nodes), 0, out=rowptr[1:])
    value = torch.ones(order.numel(), device=order.device) if value is None else value[order]
    return sparse_csr(rowptr, source[order], value, (num_nodes, num_nodes)), order


def to_adj_t(data: Data, kinds: Mapping[str, Kind] | None = None) -> Data:
    """Put ``adj_t`` in the place of ``edge_index``.

    ``adj_t[i, j]`` is the edge from node ``j`` to node ``i``: rows are targets, sorted by source. Its values are
    ``edge_weight``, which it replaces, or ones. All other edge-level tensors follow the edges into their new order.
    Self-loops and repeated edges stay.

    Args:
        data: With ``edge_index`` [2, E] (row 0: sources, row 1: targets), int64 or int32, a tensor or an
            ``EdgeIndex``; or with ``adj_t``, which is then kept as it is.
        kinds: What each tensor belongs to, where names and sizes do not say; see `permute`.

    Returns:
        A shallow copy of ``data`` with ``adj_t``, a ``torch.sparse_csr`` tensor [N, N].

    Raises:
        TypeError: ``data`` is no graph, or its ``edge_index`` holds no integers.
        ValueError: ``data`` has no edges, both forms of them, a tensor of the wrong size, or one of which it is
            unclear whether it belongs to nodes or to edges.
    """
    num_nodes, _, found = kinds_of(data, kinds)
    result = copy.copy(data)
    if "adj_t" in data:
        return result
    check_nodes("edge_index", data.edge_index, num_nodes)
    source, target = data.edge_index.as_subclass(Tensor).long()  # of int32, target * N + source would overflow
    weight: Tensor | None = data.edge_weight if "edge_weight" in data else None
    if weight is not None and weight.dim() != 1:
        raise ValueError(
            f"data.edge_weight has shape {tuple(weight.shape)}, but must be [E]: a number for each edge; features of "
            "edges are edge_attr"
        )
    result.adj_t, order = make_adj_t(source, target, weight, num_nodes)
    del result.edge_index
    for key, kind in found.items():
        if key == "edge_weight":
            del result.edge_weight
        elif kind == "edge":
            result[key] = data[key][order]
    return result
