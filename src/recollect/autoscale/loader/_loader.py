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
from recollect.autoscale.loader._checks import check_data
from recollect.autoscale.loader._cut import Adjacency, Cut, check_permuted, checked_ptr
from recollect.autoscale.loader._links import LinkCut, Links
from recollect.autoscale.loader._order import to_adj_t
from recollect.autoscale.loader._outward import OutwardEdges
from recollect.autoscale.loader._own import OwnGraph

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

    Nodes by number are those of the mini-batch: of a tensor whose entries are nodes, such as ``edge_label_index`` or
    ``face``, a mini-batch has the entries (columns) that lie within its parts, as rows of its tensors, and what goes
    with these. All others, also those with a node in the halo, whose row a network does not return, are dropped: give
    ``links`` where every pair counts.

    Args:
        data: A graph that `permute` has brought into the order of the parts, with ``adj_t`` or ``edge_index``. Edges,
            weights and edge-level tensors are those of `to_adj_t`. Mini-batches are cut on the device that it lies on.
            Or a rank's `own_graph`, whose samplers choose among its parts.
        ptr: [num_parts + 1] int64: part ``p`` holds the nodes from ``ptr[p]`` to ``ptr[p + 1]``.
        batch_size: Parts in a mini-batch, at least 1.
        bipartite: ``adj_t`` is [B, B + halo], else [B + halo, B + halo] with empty rows for the halo.
        log: Log the time that the preparation took, at level INFO.
        adjacency: ``"csr"``: ``data.adj_t`` is a ``torch.sparse_csr`` tensor. ``"edge_index"``: ``data.edge_index``
            is a ``torch_geometric.EdgeIndex`` [2, E'] of sources and targets, sorted by target, and
            ``data.edge_weight`` [E'] the weights.
        kinds: What each tensor belongs to, where names do not say; see `permute`.
        links: [2, K] int64 or int32: pairs of nodes to be predicted, in the numbers of ``data``, such as
            ``data.edge_label_index``. Mini-batches are then made of units: a part with the pairs within it, or two
            parts with the pairs between them. ``batch_size``, ``shuffle`` and samplers choose units (``loader.units``)
            instead of parts; a mini-batch has the parts of its units, each once, and ``data.edge_label_index`` [2, k],
            the pairs of its units as rows of the mini-batch. So one epoch hands out each pair once. Parts without pairs
            are left out.
        link_labels: [K, ...]: labels of the pairs, which mini-batches have as ``data.edge_label``. Default: where
            ``links`` is ``data.edge_label_index``, ``data.edge_label`` and all that goes with it by name; a
            ``data.edge_label`` [K] without ``edge_label_index``; or no labels.
        outward: Also bring the edges to nodes outside of the mini-batch, as ``data.outward`` (`Outward`), for
            ``ScalableGNN(compensate=True)``. ``True`` or ``"cut"``: those from the mini-batch. ``"induced"``: those
            from the mini-batch and all its neighbours, for ``combine=``. ``"complete"``: all edges into these nodes,
            whose sources may be two steps away.
        **kwargs: Arguments of ``torch.utils.data.DataLoader``, such as ``shuffle`` and ``num_workers``. A sampler
            chooses parts by their numbers.

    Attributes:
        data: The graph with ``adj_t``.
        ptr: [num_parts + 1] int64 on the CPU.
        bipartite: As given.
        units: With ``links``, the parts of each unit, one or two; else None.
        graph: The stamp that its mini-batches have, by which histories know their graph.

    Raises:
        TypeError: ``data`` is no graph, rows of nodes or edges are not in a dense tensor, or ``links`` are no numbers.
        ValueError: ``data`` was not permuted, ``ptr`` does not cover its nodes, a tensor has the wrong size, or another
            argument is out of its range.

    Example:
        >>> from recollect.autoscale import SubgraphLoader, get_data, partition, permute
        >>> data = get_data(None, "karate").data
        >>> perm, ptr = partition(data.adj_t, 4, "contiguous", log=False)
        >>> loader = SubgraphLoader(permute(data, perm, log=False), ptr, batch_size=2, log=False)
        >>> len(loader), sum(batch.batch_size for batch in loader)  # each node is once in a mini-batch
        (2, 34)
        >>> sum(batch.data.adj_t.values().numel() for batch in loader)  # and so is each edge
        156
    """

    def __init__(
        self,
        data: Data | OwnGraph,
        ptr: Tensor,
        batch_size: int = 1,
        bipartite: bool = True,
        log: bool = True,
        *,
        adjacency: Adjacency = "csr",
        kinds: Mapping[str, str] | None = None,
        links: Tensor | None = None,
        link_labels: Tensor | None = None,
        outward: bool | OutwardEdges = False,
        **kwargs: Any,
    ) -> None:
        start = time.perf_counter()
        own = data if isinstance(data, OwnGraph) else None
        if isinstance(data, OwnGraph):
            data, kinds = data.data, data.kinds | dict(kinds or {})
        check_data(data)
        batch_size = as_count("batch_size", batch_size, _PARTS)
        if "collate_fn" in kwargs:
            raise ValueError("a loader of mini-batches has a collate_fn of its own: leave it out")
        check_permuted(data)
        self.data = to_adj_t(data, kinds)
        num_nodes = self.data.adj_t.size(0) if own is None else own.graph.num_nodes
        self.ptr, self.bipartite = checked_ptr(ptr, num_nodes), bipartite
        self.units: list[tuple[int, ...]] | None = None
        kinds = {name: kind for name, kind in (kinds or {}).items() if name.partition(".")[0] in self.data}
        cut: Any
        parts: Any
        if links is not None and own is not None:
            raise ValueError("links may lie between parts of two ranks: give the loader the whole graph")
        if links is not None:
            sorted_links, rest = Links.of(self.data, links, link_labels, self.ptr, kinds)
            cut = LinkCut(Cut(rest, self.ptr, bipartite, adjacency, kinds, outward), sorted_links)
            self.units = sorted_links.units
            parts = range(len(self.units))
        elif link_labels is not None:
            raise ValueError("link_labels go with links: give links=edge_label_index, [2, K], too")
        else:
            cut = Cut(self.data, self.ptr if own is None else own.ptr, bipartite, adjacency, kinds, outward, own)
            parts = range(self.ptr.numel() - 1)
            if kwargs.get("sampler") is None and kwargs.get("batch_sampler") is None:
                parts = (self.ptr.diff() > 0).nonzero().squeeze(1).tolist()
                parts = parts if own is None else [part for part in parts if part in own.parts]
        self.graph = cut.graph
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

    Example:
        >>> import torch
        >>> from recollect.autoscale import EvalSubgraphLoader, get_data, partition, permute
        >>> data = get_data(None, "karate").data
        >>> perm, ptr = partition(data.adj_t, 4, "contiguous", log=False)
        >>> loader = EvalSubgraphLoader(permute(data, perm, log=False), ptr, batch_size=3, log=False)
        >>> torch.cat([batch.n_id[: batch.batch_size] for batch in loader]).tolist() == list(range(34))
        True
    """

    def __init__(
        self, data: Data, ptr: Tensor, batch_size: int = 1, bipartite: bool = True, log: bool = True, **kwargs: Any
    ) -> None:
        for name in ("sampler", "batch_sampler", "drop_last", "shuffle"):
            if kwargs.pop(name, None):
                raise ValueError(f"EvalSubgraphLoader yields every node once, in order: it takes no {name}")
        if kwargs.get("links") is not None or kwargs.get("link_labels") is not None:
            raise ValueError(
                "EvalSubgraphLoader yields every node once, and links lie between parts: evaluate the nodes first, "
                "then out[links], or take a SubgraphLoader"
            )
        check_data(data)
        batch_size = as_count("batch_size", batch_size, _PARTS)
        ptr = checked_ptr(ptr, int(data.num_nodes))
        joined = torch.cat([ptr[:-1:batch_size], ptr[-1:]])
        super().__init__(data, joined, batch_size=1, bipartite=bipartite, log=log, **kwargs)
