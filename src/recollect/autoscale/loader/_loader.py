"""Mini-batches of parts with their 1-hop halo."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from recollect._arguments import as_count
from recollect.autoscale.loader._cut import Adjacency, Cut, check_permuted, checked_ptr
from recollect.autoscale.loader._order import to_adj_t
from recollect.autoscale.loader._outward import OutwardEdges
from recollect.autoscale.loader._roles import Kind, check_data

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["EvalSubgraphLoader", "SubgraphLoader"]

_logger = logging.getLogger(__name__)
_PARTS = ", the number of parts in a mini-batch"


class SubgraphLoader(DataLoader[int]):
    """Yields mini-batches of parts of a permuted graph with their 1-hop halo, as `SubData`.

    Mini-batches are cut when they are asked for, and none are kept. Their order follows ``shuffle``, ``sampler`` and
    ``generator`` as in any ``DataLoader``; the content of a mini-batch depends on its parts alone. Parts without nodes
    are left out. The columns in a row of ``adj_t`` do not ascend: their order is that of the whole graph.

    Args:
        data: A graph that `permute` has brought into the order of the parts, with ``adj_t`` or ``edge_index``. Edges,
            weights and edge-level tensors are those of `to_adj_t`. Mini-batches are cut on the device that it lies on.
        ptr: [num_parts + 1] int64: part ``p`` holds the nodes from ``ptr[p]`` to ``ptr[p + 1]``.
        batch_size: Parts in a mini-batch, at least 1.
        bipartite: ``adj_t`` is [B, B + halo], else [B + halo, B + halo] with empty rows for the halo.
        log: Log the time that the preparation took, at level INFO.
        adjacency: ``"csr"``: ``data.adj_t`` is a ``torch.sparse_csr`` tensor. ``"edge_index"``: ``data.edge_index``
            is a ``torch_geometric.EdgeIndex`` [2, E'] of sources and targets, sorted by target, and
            ``data.edge_weight`` [E'] the weights.
        kinds: What each tensor belongs to, where names and sizes do not say; see `permute`.
        outward: Also bring the edges to nodes outside of the mini-batch, as ``data.outward`` (`Outward`), for
            ``ScalableGNN(compensate=True)``. ``True`` or ``"cut"``: those from the mini-batch. ``"complete"``: all
            edges into these nodes, whose sources may be two steps away.
        **kwargs: Arguments of ``torch.utils.data.DataLoader``, such as ``shuffle`` and ``num_workers``. A sampler
            chooses parts by their numbers.

    Attributes:
        data: The graph with ``adj_t``.
        ptr: [num_parts + 1] int64 on the CPU.
        bipartite: As given.

    Raises:
        TypeError: ``data`` is no graph, or rows of nodes or edges are not in a dense tensor.
        ValueError: ``data`` was not permuted, ``ptr`` does not cover its nodes, a tensor has the wrong size, or another
            argument is out of its range.
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
        outward: bool | OutwardEdges = False,
        **kwargs: Any,
    ) -> None:
        start = time.perf_counter()
        check_data(data)
        batch_size = as_count("batch_size", batch_size, _PARTS)
        if "collate_fn" in kwargs:
            raise ValueError("a loader of mini-batches has a collate_fn of its own: leave it out")
        check_permuted(data)
        self.data, self.ptr, self.bipartite = to_adj_t(data, kinds), checked_ptr(ptr, int(data.num_nodes)), bipartite
        cut = Cut(self.data, self.ptr, bipartite, adjacency, kinds, outward)
        parts: Any = range(self.ptr.numel() - 1)
        if kwargs.get("sampler") is None and kwargs.get("batch_sampler") is None:
            parts = (self.ptr.diff() > 0).nonzero().squeeze(1).tolist()
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
        check_data(data)
        batch_size = as_count("batch_size", batch_size, _PARTS)
        ptr = checked_ptr(ptr, int(data.num_nodes))
        joined = torch.cat([ptr[:-1:batch_size], ptr[-1:]])
        super().__init__(data, joined, batch_size=1, bipartite=bipartite, log=log, **kwargs)
