"""Dividing a graph's nodes into parts."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from recollect._arguments import as_count
from recollect.autoscale._adjacency import as_csr, check_square
from recollect.autoscale.partitioning._cache import cached
from recollect.autoscale.partitioning._methods import kaminpar_clusters, metis_clusters
from recollect.messages import rows_of

__all__ = ["Method", "Partition", "PartitionQuality", "metis", "partition", "partition_quality"]

_logger = logging.getLogger(__name__)
Method = Literal["metis", "kaminpar", "random", "contiguous"]


class Partition(NamedTuple):
    """The nodes in the order of parts.

    Attributes:
        perm: [N] int64: ``perm[new]`` is the number that a node has in the graph that was divided.
        ptr: [num_parts + 1] int64: part ``p`` holds the nodes from ``ptr[p]`` to ``ptr[p + 1]`` in the new order.
    """

    perm: Tensor
    ptr: Tensor


class PartitionQuality(NamedTuple):
    """How well a graph is divided.

    Attributes:
        num_parts: Parts, with or without nodes.
        edge_cut: Edges of ``adj_t`` whose ends lie in different parts. An undirected edge, which is there in both
            directions, counts twice.
        num_edges: All edges.
        largest: Nodes in the largest part.
        balance: ``largest`` over the mean number of nodes in a part; 1 is best.
    """

    num_parts: int
    edge_cut: int
    num_edges: int
    largest: int
    balance: float

    @property
    def cut_share(self) -> float:
        """Share of the edges that are cut, 0 if there are none."""
        return self.edge_cut / max(self.num_edges, 1)


def partition(
    adj_t: Tensor,
    num_parts: int,
    method: Method = "metis",
    *,
    seed: int = 0,
    log: bool = True,
    cache: str | Path | None = None,
    **options: Any,
) -> Partition:
    """Divide the nodes of a graph into parts of about the same size.

    Edges between parts are what a mini-batch takes from histories, so that few of them mean little to transfer and
    little that is stale. Directed graphs are made symmetric for ``"metis"`` and ``"kaminpar"``; self-loops and
    repeated edges do not count.

    Args:
        adj_t: The graph, ``torch.sparse_csr`` [N, N], as `to_adj_t` makes it; or an ``EdgeIndex`` that is sorted by
            column and knows its size.
        num_parts: Number of parts, at least 1. With N or more, each node is a part and the rest have none.
        method: ``"metis"`` (Karypis & Kumar, 1998; needs pymetis), ``"kaminpar"`` (Gottesbüren et al., 2021; needs
            kaminpar, uses several threads), ``"random"``, or ``"contiguous"``: the order that the nodes have.
        seed: Of all but ``"contiguous"``. The same seed gives the same parts on the same machine, with
            ``"kaminpar"`` if ``threads=1``.
        log: Log time, edge cut and balance, at level INFO.
        cache: A folder in which the result is kept and found again, by the graph and all arguments.
        **options: For ``"metis"``: ``recursive=False`` (recursive bisection), ``weighted=False`` (the values of
            ``adj_t``, not negative, are edge weights: heavy edges are kept together). For ``"kaminpar"``:
            ``weighted=False``, ``imbalance=0.03`` (how far the largest part may exceed the mean), ``preset="default"``
            (one of ``kaminpar.context_names()``, such as ``"eco"`` or ``"largek"``), ``threads=None`` (torch's number).

    Raises:
        ImportError: The method's package is not installed; the message says how to get it.
        ValueError: An argument is out of its range.
    """
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(get_args(Method))}")
    adj_t = as_csr(adj_t)
    check_square(adj_t)
    num_parts, seed = as_count("num_parts", num_parts), operator.index(seed)
    if options and method not in _OPTIMISING:
        raise ValueError(f"{method} takes no {', '.join(options)}; its only option is the seed")
    start = time.perf_counter()
    settings = {"num_parts": num_parts, "method": method, "seed": seed, **options}
    clusters = cached(cache, adj_t, settings, lambda: _clusters(adj_t, num_parts, method, seed, options))
    result = _ordered(clusters.to(adj_t.device), num_parts)
    if log:
        _log(method, partition_quality(adj_t, *result), time.perf_counter() - start)
    return result


def metis(adj_t: Tensor, num_parts: int, recursive: bool = False, log: bool = True, **options: Any) -> Partition:
    """Divide a graph with METIS: `partition` with ``method="metis"``, under the name and order of PyGAS."""
    return partition(adj_t, num_parts, "metis", recursive=recursive, log=log, **options)


def partition_quality(adj_t: Tensor, perm: Tensor, ptr: Tensor) -> PartitionQuality:
    """Count the edges between parts and measure the balance of parts.

    Args:
        adj_t: The graph that was divided, before it is permuted.
        perm: [N] int64, as `partition` returns it.
        ptr: [num_parts + 1] int64, as `partition` returns it.
    """
    adj_t = as_csr(adj_t)
    check_square(adj_t)
    counts = ptr.diff()
    clusters = torch.empty_like(perm)
    parts = torch.arange(counts.numel(), device=perm.device)
    clusters[perm] = torch.repeat_interleave(parts, counts, output_size=perm.numel())
    cut = int((clusters[rows_of(adj_t)] != clusters[adj_t.col_indices()]).sum())
    largest = int(counts.max())
    balance = largest * counts.numel() / max(perm.numel(), 1)
    return PartitionQuality(counts.numel(), cut, adj_t.col_indices().numel(), largest, balance)


_OPTIMISING: dict[str, Callable[..., Tensor]] = {"metis": metis_clusters, "kaminpar": kaminpar_clusters}


def _clusters(adj_t: Tensor, num_parts: int, method: Method, seed: int, options: dict[str, Any]) -> Tensor:
    """The part of each node, [N] int64 on the CPU."""
    num_nodes = adj_t.size(0)
    if method in _OPTIMISING:
        return _OPTIMISING[method](adj_t, num_parts, seed=seed, **options)
    even = torch.arange(num_nodes, device="cpu") * num_parts // max(num_nodes, 1)
    if method == "contiguous":
        return even
    return even[torch.randperm(num_nodes, generator=torch.Generator().manual_seed(seed), device="cpu")]


def _ordered(clusters: Tensor, num_parts: int) -> Partition:
    ptr = clusters.new_zeros(num_parts + 1)
    torch.cumsum(torch.bincount(clusters, minlength=num_parts), 0, out=ptr[1:])
    return Partition(torch.argsort(clusters, stable=True), ptr)


def _log(method: str, quality: PartitionQuality, seconds: float) -> None:
    _logger.info(
        "%s: %d parts in %.2f s; %d of %d edges cut (%.1f %%), largest part %d nodes, %.3f of the mean",
        *(method, quality.num_parts, seconds, quality.edge_cut, quality.num_edges, 100 * quality.cut_share),
        *(quality.largest, quality.balance),
    )
