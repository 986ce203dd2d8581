"""Mini-batches of parts with their 1-hop halo."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from recollect.autoscale._adj_t import sparse_csr, to_adj_t
from recollect.autoscale._kinds import Kind, kinds_of
from recollect.autoscale._sub_data import SubData
from recollect.autoscale._subgraph import OneHop, Span

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["EvalSubgraphLoader", "SubgraphLoader"]

_logger = logging.getLogger(__name__)
Adjacency = Literal["csr", "edge_index"]


class SubgraphLoader(DataLoader[int]):
    """Yields mini-batches of parts of a permuted graph, with their 1-hop halo.

    Mini-batches are cut when they are asked for, none are kept. Order follows ``shuffle``, ``sampler`` and
    ``generator`` as in any ``DataLoader``; the content of a mini-batch depends on its parts alone. Parts without
    nodes are left out.

    Args:
        data: A graph that `permute` has brought into the order of the parts, with ``adj_t`` or ``edge_index``.
            Edges, weights and edge-level tensors are those of `to_adj_t`. Mini-batches are cut where it lies.
        ptr: [num_parts + 1] int64: part ``p`` holds the nodes from ``ptr[p]`` to ``ptr[p + 1]``.
        batch_size: Parts in a mini-batch.
        bipartite: ``adj_t`` is [B, B + halo], else [B + halo, B + halo] with empty rows for the halo.
        log: Log the time that the preparation took, at level INFO.
        adjacency: ``"csr"``: ``data.adj_t`` is a ``torch.sparse_csr`` tensor. ``"edge_index"``: ``data.edge_index``
            is a ``torch_geometric.EdgeIndex`` [2, E'] of sources and targets, sorted by target, and
            ``data.edge_weight`` [E'] the weights.
        kinds: What each tensor belongs to, where names and sizes do not say; see `permute`.
        **kwargs: Arguments of ``torch.utils.data.DataLoader``, such as ``shuffle`` and ``num_workers``.

    Raises:
        ValueError: ``data`` was not permuted, ``ptr`` does not cover its nodes, or a tensor has the wrong size.
    """

    def __init__(
        self,
        data: Data,
        ptr: Tensor,
        batch_size: int = 1,
        bipartite: bool = True,
        log: bool = True,
        *,
        adjacency: Adjacency = "csr",
        kinds: Mapping[str, Kind] | None = None,
        **kwargs: Any,
    ) -> None:
        start = time.perf_counter()
        cut = _Cut(data, ptr, bipartite, adjacency, kinds)
        parts: Any = (cut.ptr.diff() > 0).nonzero().squeeze(1).tolist()
        if log:
            _logger.info("prepared mini-batches of %d parts in %.2f s", len(parts), time.perf_counter() - start)
        super().__init__(parts, batch_size=batch_size, collate_fn=cut, **kwargs)


class EvalSubgraphLoader(SubgraphLoader):
    """Yields every node once, in order: mini-batches of ``batch_size`` consecutive parts, as one part each.

    Args:
        data: As in `SubgraphLoader`.
        ptr: As in `SubgraphLoader`.
        batch_size: Parts in a mini-batch.
        bipartite: As in `SubgraphLoader`.
        log: As in `SubgraphLoader`.
        **kwargs: As in `SubgraphLoader`, but none that choose or order parts.
    """

    def __init__(
        self, data: Data, ptr: Tensor, batch_size: int = 1, bipartite: bool = True, log: bool = True, **kwargs: Any
    ) -> None:
        for name in ("sampler", "batch_sampler", "drop_last", "shuffle"):
            if kwargs.pop(name, None):
                raise ValueError(f"EvalSubgraphLoader yields every node once, in order: it takes no {name}")
        joined = torch.cat([ptr[:-1:batch_size], ptr[-1:]])
        super().__init__(data, joined, batch_size=1, bipartite=bipartite, log=log, **kwargs)


class _Cut:
    """From the numbers of some parts to a mini-batch; what the loader's workers get."""

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
        self.ptr = _checked_ptr(ptr, int(data.num_nodes))
        self.bipartite = bipartite
        self.adjacency = adjacency
        kinds = {key: kind for key, kind in (kinds or {}).items() if key in self.data}
        _, _, self.kinds = kinds_of(self.data, kinds)
        rowptr, col = self.data.adj_t.crow_indices().long(), self.data.adj_t.col_indices().long()
        self.one_hop = OneHop(rowptr, col)
        self.edge_ptr: list[int] = rowptr[self.ptr.to(rowptr.device)].tolist()

    def __call__(self, parts: Sequence[int]) -> SubData:
        chosen = torch.tensor(parts, dtype=torch.int64)
        offset, end = self.ptr[chosen], self.ptr[chosen + 1]
        edges = ((self.edge_ptr[part], self.edge_ptr[part + 1]) for part in parts)
        nodes = zip(offset.tolist(), end.tolist(), strict=True)
        spans = [Span(*node, *edge) for node, edge in zip(nodes, edges, strict=True)]
        return SubData(*self._subgraph(spans), offset, end - offset)

    def _subgraph(self, spans: Sequence[Span]) -> tuple[Data, int, Tensor]:
        n_id, rowptr, col, batch_size = self.one_hop(spans)
        num_rows = batch_size
        if not self.bipartite:
            num_rows = n_id.numel()
            rowptr = torch.cat([rowptr, rowptr[-1:].expand(num_rows - batch_size)])
        data = self.data.__class__()
        for key, value in self.data.to_dict().items():
            kind = self.kinds.get(key, "graph")
            if key == "adj_t":
                value = sparse_csr(rowptr, col, _rows(value.values(), spans), (num_rows, n_id.numel()))
            elif kind == "node":
                value = value.index_select(0, n_id)
            elif kind == "edge":
                value = _rows(value, spans)
            elif key == "num_nodes":
                value = n_id.numel()
            if key != "node_order":
                data[key] = value
        if self.adjacency == "edge_index":
            _use_edge_index(data)
        return data, batch_size, n_id


def _checked_ptr(ptr: Tensor, num_nodes: int) -> Tensor:
    if ptr.dtype != torch.int64 or ptr.dim() != 1 or ptr.numel() < 1:
        raise ValueError(f"ptr has dtype {ptr.dtype} and shape {tuple(ptr.shape)}, but must be int64 [num_parts + 1]")
    ptr = ptr.cpu()
    if int(ptr[0]) != 0 or int(ptr[-1]) != num_nodes or bool((ptr.diff() < 0).any()):
        raise ValueError(
            f"ptr runs from {int(ptr[0])} to {int(ptr[-1])}, but must ascend from 0 to the {num_nodes} nodes of data"
        )
    return ptr


def _rows(value: Tensor, spans: Sequence[Span]) -> Tensor:
    return torch.cat([value[span.first_edge : span.last_edge] for span in spans])


def _use_edge_index(data: Data) -> None:
    from torch_geometric import EdgeIndex

    adj_t = data.adj_t
    num_rows, num_columns = adj_t.shape
    rows = torch.arange(num_rows, device=adj_t.device)
    target = torch.repeat_interleave(rows, adj_t.crow_indices().diff(), output_size=adj_t.col_indices().numel())
    edges = torch.stack([adj_t.col_indices(), target])
    data.edge_index = EdgeIndex(edges, sparse_size=(num_columns, num_rows), sort_order="col")
    data.edge_weight = adj_t.values()
    del data.adj_t
