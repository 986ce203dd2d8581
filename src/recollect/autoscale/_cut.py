"""From the numbers of some parts to a mini-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from recollect.autoscale._adj_t import rows_of, sparse_csr, to_adj_t
from recollect.autoscale._kinds import Kind, kinds_of
from recollect.autoscale._ranges import Ranges
from recollect.autoscale._require import require
from recollect.autoscale._sub_data import SubData
from recollect.autoscale._subgraph import OneHop

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Adjacency", "Cut", "checked_ptr"]

Adjacency = Literal["csr", "edge_index"]


class Cut:
    """Cuts mini-batches out of a permuted graph; a loader's workers get a copy of it.

    Args:
        data: A graph in the order of the parts.
        ptr: [num_parts + 1] int64.
        bipartite: ``adj_t`` has no rows for the halo.
        adjacency: The form of the edges.
        kinds: What each tensor belongs to, where names and sizes do not say.
    """

    def __init__(
        self, data: Data, ptr: Tensor, bipartite: bool, adjacency: Adjacency, kinds: Mapping[str, Kind] | None
    ) -> None:
        if adjacency not in get_args(Adjacency):
            raise ValueError(f"adjacency is {adjacency!r}, but must be one of {', '.join(get_args(Adjacency))}")
        if "node_order" not in data:
            raise ValueError(
                "data is not in the order of the parts: call permute(data, perm) first; if its nodes are in that "
                "order already, say so with data.node_order = torch.arange(data.num_nodes)"
            )
        self.data = to_adj_t(data, kinds)
        self.ptr = checked_ptr(ptr, int(data.num_nodes))
        self.bipartite = bipartite
        self.adjacency = adjacency
        left = {key: kind for key, kind in (kinds or {}).items() if key in self.data}
        _, _, self._kinds = kinds_of(self.data, left)
        if adjacency == "edge_index" and "edge_weight" in self.data:
            raise ValueError("data has edge_weight beside adj_t, whose values are weights already: delete one of them")
        rowptr, col = self.data.adj_t.crow_indices().long(), self.data.adj_t.col_indices().long()
        self._one_hop = OneHop(rowptr, col)
        self._edge_ptr = rowptr[self.ptr.to(rowptr.device)].cpu()

    def __call__(self, parts: Sequence[int]) -> SubData:
        """The mini-batch of these parts, in this order; each may be there once."""
        if len(set(parts)) < len(parts):
            raise ValueError(f"a mini-batch may have each part once, but its sampler chose {list(parts)}")
        chosen = torch.tensor(parts, dtype=torch.int64)
        chosen = chosen[self.ptr[chosen] < self.ptr[chosen + 1]]
        offset, end = self.ptr[chosen], self.ptr[chosen + 1]
        device = self.data.adj_t.device
        nodes = Ranges(offset, end, device)
        edges = Ranges(self._edge_ptr[chosen], self._edge_ptr[chosen + 1], device)
        n_id, rowptr, col = self._one_hop(nodes, edges)
        num_rows = nodes.total
        if not self.bipartite:
            num_rows = n_id.numel()
            rowptr = torch.cat([rowptr, rowptr[-1:].expand(num_rows - nodes.total)])
        adj_t = sparse_csr(rowptr, col, edges.take(self.data.adj_t.values()), (num_rows, n_id.numel()))
        return SubData(self._sub_graph(n_id, edges, adj_t), nodes.total, n_id, offset, end - offset)

    def _sub_graph(self, n_id: Tensor, edges: Ranges, adj_t: Tensor) -> Data:
        data = self.data.__class__()
        for key, value in self.data.to_dict().items():
            kind = self._kinds.get(key, "graph")
            if kind == "node":
                value = value.index_select(0, n_id)
            elif kind == "edge":
                value = edges.take(value)
            elif key == "num_nodes":
                value = n_id.numel()
            if key not in ("adj_t", "node_order"):
                data[key] = value
        if self.adjacency == "csr":
            data.adj_t = adj_t
        else:
            data.edge_index, data.edge_weight = _edge_index(adj_t), adj_t.values()
        return data


def checked_ptr(ptr: Tensor, num_nodes: int) -> Tensor:
    """``ptr`` on the CPU, if it divides so many nodes."""
    if not isinstance(ptr, Tensor) or ptr.dtype != torch.int64 or ptr.dim() != 1 or ptr.numel() < 2:
        found = f"of {ptr.dtype} and shape {tuple(ptr.shape)}" if isinstance(ptr, Tensor) else f"a {type(ptr).__name__}"
        raise ValueError(f"ptr is {found}, but must be an int64 tensor [num_parts + 1]")
    ptr = ptr.cpu()
    if int(ptr[0]) != 0 or int(ptr[-1]) != num_nodes:
        raise ValueError(
            f"ptr runs from {int(ptr[0])} to {int(ptr[-1])}, but must run from 0 to {num_nodes}, the nodes of data"
        )
    if bool((ptr.diff() < 0).any()):
        raise ValueError(f"ptr descends after part {int((ptr.diff() < 0).nonzero()[0])}, but must ascend")
    return ptr


def _edge_index(adj_t: Tensor) -> Tensor:
    edge_index = require("torch_geometric", 'adjacency="edge_index"').EdgeIndex
    num_rows, num_columns = adj_t.shape
    edges = torch.stack([adj_t.col_indices(), rows_of(adj_t)])
    result: Tensor = edge_index(edges, sparse_size=(num_columns, num_rows), sort_order="col")
    return result
