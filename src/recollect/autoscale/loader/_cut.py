"""From the numbers of some parts to a mini-batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from recollect.autoscale._require import require
from recollect.autoscale._stamp import BatchSize, GraphStamp
from recollect.autoscale.loader._attributes import Path, found_at, put, spelled
from recollect.autoscale.loader._local import Entries
from recollect.autoscale.loader._order import without_bounds
from recollect.autoscale.loader._outward import OUTWARD, OutwardCut
from recollect.autoscale.loader._own import OwnGraph
from recollect.autoscale.loader._roles import Roles, roles_of
from recollect.autoscale.loader._storage import graph_copy
from recollect.autoscale.loader._sub_data import SubData
from recollect.autoscale.loader._subgraph import OneHop, Ranges
from recollect.messages import rows_of, sparse_csr

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Adjacency", "Cut", "check_permuted", "checked_ptr"]

Adjacency = Literal["csr", "edge_index"]


class Cut:
    """Cuts mini-batches out of a permuted graph; a loader's workers get a copy of it.

    Args:
        data: A graph in the order of the parts, with ``adj_t``.
        ptr: [num_parts + 1] int64 on the CPU.
        bipartite: ``adj_t`` has no rows for the halo.
        adjacency: The form of the edges.
        kinds: What each tensor belongs to, where names do not say.
        outward: Which edges to the out-neighbours come with a mini-batch, see `Outward`.
        own: What ``data`` and ``ptr`` are a part of; None: they are a whole graph's.
    """

    def __init__(
        self,
        data: Data,
        ptr: Tensor,
        bipartite: bool,
        adjacency: Adjacency,
        kinds: Mapping[str, str] | None,
        outward: bool | str = False,
        own: OwnGraph | None = None,
    ) -> None:
        if outward not in OUTWARD:
            raise ValueError(f"outward is {outward!r}, but must be one of {', '.join(map(repr, OUTWARD))}")
        if adjacency not in get_args(Adjacency):
            raise ValueError(f"adjacency is {adjacency!r}, but must be one of {', '.join(get_args(Adjacency))}")
        if adjacency == "edge_index" and "edge_weight" in data:
            raise ValueError("data has edge_weight beside adj_t, whose values are weights already: delete one of them")
        kinds = {name: kind for name, kind in (kinds or {}).items() if name.partition(".")[0] in data}
        roles = roles_of(data, kinds)
        self._rest = graph_copy(data)
        without_bounds(self._rest, roles, kinds)
        for name in ("adj_t", "node_order"):
            if name in self._rest:
                del self._rest[name]
        self._nodes = {path: role.dim or 0 for path, role in roles.of_kind("node").items() if path != ("node_order",)}
        self._edges = {path: role.dim or 0 for path, role in roles.of_kind("edge").items()}
        self._entries = _entries(data, roles, ptr)
        self._companions = roles.of_kind("edge", of_edges=False)
        rowptr, col, self._value = (
            data.adj_t.crow_indices().long(),
            data.adj_t.col_indices().long(),
            data.adj_t.values(),
        )
        self._one_hop = OneHop(rowptr, col)
        self._own = None if own is None else (own.parts, own.nodes)
        self.graph = GraphStamp.of(data.adj_t, data.node_order) if own is None else own.graph
        form = OUTWARD[outward]
        if own is not None and form is not None and (form != "cut" or not own.outward):
            raise ValueError(
                f"outward={outward!r}: an own_graph of a rank has the edges to nodes outside with own_graph(..., "
                "outward=True), and those from nodes that are further away never"
            )
        self._outward = form and OutwardCut(rowptr, col, self._value, *self._by_name(data), form)
        self._ptr = ptr
        self._edge_ptr = rowptr[ptr.to(rowptr.device)].cpu()
        self._bipartite = bipartite
        self._adjacency = adjacency

    def __call__(self, parts: Sequence[int]) -> SubData:
        """The mini-batch of these parts, in this order; each may be there once."""
        if len(set(parts)) < len(parts):
            raise ValueError(f"a mini-batch may have each part once, but its sampler chose {list(parts)}")
        chosen = torch.tensor(parts, dtype=torch.int64, device="cpu")
        chosen = chosen[self._ptr[chosen] < self._ptr[chosen + 1]]
        offset, end = self._ptr[chosen], self._ptr[chosen + 1]
        count = end - offset
        nodes = Ranges(offset, end, self._value.device)
        edges = Ranges(self._edge_ptr[chosen], self._edge_ptr[chosen + 1], self._value.device)
        n_id, rowptr, col = self._one_hop(nodes, edges)
        num_rows = nodes.total
        if not self._bipartite:
            num_rows = n_id.numel()
            rowptr = torch.cat([rowptr, rowptr[-1:].expand(num_rows - nodes.total)])
        adj_t = sparse_csr(rowptr, col, edges.take(self._value), (num_rows, n_id.numel()))
        if self._own is not None:
            if any(part not in self._own[0] for part in parts):
                raise ValueError(f"this rank's graph has the parts {self._own[0]} (its sampler chose {list(parts)})")
            offset = self._own[1][offset.to(n_id.device)].cpu()
        data = self._attributes(n_id, edges)
        self._put_entries(data, chosen, offset, count)
        if self._adjacency == "csr":
            data.adj_t = adj_t
        else:
            data.edge_index, data.edge_weight = _edge_index(adj_t), adj_t.values()
        if self._outward:
            data.outward = self._outward(n_id[: nodes.total])
        if self._own is not None:
            n_id = self._own[1][n_id]
            if self._outward:
                data.outward = data.outward._replace(n_id=self._own[1][data.outward.n_id])
        return SubData(data, BatchSize(nodes.total, self.graph), n_id, offset, count)

    def _by_name(self, data: Data) -> tuple[dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
        """The tensors that belong to nodes and to edges row by row, by name, and the names of all others."""
        nodes, edges = (
            {str(path[0]): found_at(data, path) for path, dim in found.items() if len(path) == 1 and dim == 0}
            for found in (self._nodes, self._edges)
        )
        others = tuple(name for name in data.to_dict() if name not in nodes and name not in edges and name != "adj_t")
        return nodes, edges, others

    def _attributes(self, n_id: Tensor, edges: Ranges) -> Data:
        """All but the edges, for these nodes."""
        rest = self._rest
        data = copy.copy(rest)
        put(data, {path: found_at(rest, path).index_select(dim, n_id) for path, dim in self._nodes.items()})
        put(data, {path: _take(edges, found_at(rest, path), dim) for path, dim in self._edges.items()})
        if "num_nodes" in rest:
            data.num_nodes = n_id.numel()
        return data

    def _put_entries(self, data: Data, parts: Tensor, offset: Tensor, count: Tensor) -> None:
        """Tensors of nodes, and what goes with their entries: those within the parts."""
        found = {path: entries(parts, offset, count) for path, entries in self._entries.items()}
        put(data, {path: nodes for path, (nodes, _) in found.items()})
        for path, role in self._companions.items():
            if role.of is not None:
                _, kept = found[role.of]
                put(data, {path: found_at(self._rest, path).index_select(role.dim or 0, kept)})


def _take(edges: Ranges, value: Tensor, dim: int) -> Tensor:
    return edges.take(value) if dim == 0 else edges.take(value.movedim(dim, 0)).movedim(0, dim)


def _entries(data: Data, roles: Roles, ptr: Tensor) -> dict[Path, Entries]:
    """What cuts each tensor of nodes."""
    found = {}
    for path, role in roles.of_kind("index").items():
        if role.dim is None:
            nodes = found_at(data, path)
            raise ValueError(
                f"data.{spelled(path)} has shape {tuple(nodes.shape)} and holds nodes by number, but nothing says "
                "along which dimension its entries lie, of which a mini-batch gets those within its parts: give it a "
                "name with index in it (its last dimension), a __cat_dim__ in a class of yours, or at least one "
                f"dimension; or leave it as it is with kinds={{{spelled(path)!r}: 'graph'}}"
            )
        found[path] = Entries(found_at(data, path), role.dim, ptr)
    return found


def check_permuted(data: Data) -> None:
    """Refuse a graph of which nobody has said that its nodes are in the order of the parts."""
    if "node_order" not in data:
        raise ValueError(
            "data is not in the order of the parts: call permute(data, perm) first; if its nodes are in that order "
            "already, say so with data.node_order = torch.arange(data.num_nodes)"
        )


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
