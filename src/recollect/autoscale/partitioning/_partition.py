"""Dividing a graph's nodes into parts."""

from __future__ import annotations

import hashlib
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
from recollect.autoscale.partitioning._weights import checked_weight, even_parts
from recollect.messages import rows_of

__all__ = ["Method", "Partition", "PartitionQuality", "metis", "partition", "partition_quality"]

_logger = logging.getLogger(__name__)
Method = Literal["metis", "kaminpar", "random", "contiguous"]


class Partition(NamedTuple):
    """The nodes in the order of parts.

    Attributes:
        perm: [N] int64: ``perm[new]`` is the number that a node has in the graph that was divided.
        ptr: [num_parts + 1] int64: part ``p`` holds the nodes from ``ptr[p]`` to ``ptr[p + 1]`` in the new order.

    Example:
        >>> from recollect.autoscale import get_data, partition
        >>> parts = partition(get_data(None, "karate").data.adj_t, 2, "contiguous", log=False)
        >>> parts.ptr, parts.perm[parts.ptr[1] : parts.ptr[2]][:3]  # the second part's first nodes
        (tensor([ 0, 17, 34]), tensor([17, 18, 19]))
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
        heaviest: The largest sum of ``node_weight`` in a part; None without weights.
        weight_balance: ``heaviest`` over the mean sum of ``node_weight`` in a part; 1 is best; None without weights.

    Example:
        >>> from recollect.autoscale import PartitionQuality
        >>> quality = PartitionQuality(num_parts=2, edge_cut=20, num_edges=160, largest=18, balance=18 / 17)
        >>> quality.cut_share
        0.125
    """

    num_parts: int
    edge_cut: int
    num_edges: int
    largest: int
    balance: float
    heaviest: float | None = None
    weight_balance: float | None = None

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
    node_weight: Tensor | None = None,
    **options: Any,
) -> Partition:
    """Divide the nodes of a graph into parts of about the same size, or weight.

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
        node_weight: [N], numbers or booleans, finite, not negative and not all 0: parts get about the same sum of it
            instead of the same number of nodes. ``data.train_mask`` gives each part as many nodes for training, but
            says nothing of the others; ``1 + 9 * data.train_mask`` counts a node for training ten times. METIS and
            KaMinPar get whole numbers (the heaviest is 10,000 where weights are fractions). ``"random"`` and
            ``"contiguous"`` cut their order where the sum says; then a part is off by at most the heaviest node.
        **options: For ``"metis"``: ``recursive=False`` (recursive bisection), ``weighted=False`` (the values of
            ``adj_t``, not negative, are edge weights: heavy edges are kept together). For ``"kaminpar"``:
            ``weighted=False``, ``imbalance=0.03`` (how far the largest part may exceed the mean), ``preset="default"``
            (one of ``kaminpar.context_names()``, such as ``"eco"`` or ``"largek"``), ``threads=None`` (torch's number).

    Returns:
        ``perm`` [N] and ``ptr`` [num_parts + 1], on the device of ``adj_t``.

    Raises:
        ImportError: The method's package is not installed; the message says how to get it.
        TypeError: ``adj_t`` is no adjacency, or ``node_weight`` no tensor of real numbers.
        ValueError: An argument is out of its range.

    Example:
        >>> from recollect.autoscale import get_data, partition, partition_quality
        >>> adj_t = get_data(None, "karate").data.adj_t
        >>> found, drawn = (partition(adj_t, 4, method, log=False) for method in ("metis", "random"))
        >>> partition_quality(adj_t, *found).edge_cut < partition_quality(adj_t, *drawn).edge_cut
        True
    """
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(get_args(Method))}")
    adj_t = as_csr(adj_t)
    check_square(adj_t)
    num_parts, seed = as_count("num_parts", num_parts), operator.index(seed)
    weight = checked_weight(node_weight, adj_t.size(0))
    if options and method not in _OPTIMISING:
        raise ValueError(f"{method} takes no {', '.join(options)}; its only option is the seed")
    start = time.perf_counter()
    settings = {"num_parts": num_parts, "method": method, "seed": seed, **options}
    if weight is not None:
        settings["node_weight"] = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    clusters = cached(cache, adj_t, settings, lambda: _clusters(adj_t, num_parts, method, seed, options, weight))
    result = _ordered(clusters.to(adj_t.device), num_parts)
    if log:
        _log(method, partition_quality(adj_t, *result, node_weight), time.perf_counter() - start)
    return result


def metis(adj_t: Tensor, num_parts: int, recursive: bool = False, log: bool = True, **options: Any) -> Partition:
    """Divide a graph with METIS: `partition` with ``method="metis"``, under the name and order of PyGAS.

    Args:
        adj_t: The graph, as in `partition`.
        num_parts: Number of parts, at least 1.
        recursive: Bisect recursively.
        log: Log time, edge cut and balance, at level INFO.
        **options: Others of `partition`.

    Returns:
        ``perm`` [N] and ``ptr`` [num_parts + 1], as `partition` returns them.

    Raises:
        ImportError, TypeError, ValueError: As of `partition`.

    Example:
        >>> from recollect.autoscale import get_data, metis
        >>> perm, ptr = metis(get_data(None, "karate").data.adj_t, num_parts=4, log=False)
        >>> len(ptr) - 1, sorted(perm.tolist()) == list(range(34))
        (4, True)
    """
    return partition(adj_t, num_parts, "metis", recursive=recursive, log=log, **options)


def partition_quality(adj_t: Tensor, perm: Tensor, ptr: Tensor, node_weight: Tensor | None = None) -> PartitionQuality:
    """Count the edges between parts and measure the balance of parts.

    Args:
        adj_t: The graph that was divided, before it is permuted.
        perm: [N] int64, as `partition` returns it.
        ptr: [num_parts + 1] int64, as `partition` returns it.
        node_weight: [N], as `partition` takes it, in the order before it is permuted.

    Returns:
        Counts of nodes and edges, and ratios.

    Raises:
        TypeError: ``adj_t`` is no adjacency, or ``node_weight`` no tensor of real numbers.
        ValueError: ``adj_t`` is not square, or ``node_weight`` does not fit.

    Example:
        >>> import torch
        >>> from recollect.autoscale import partition_quality
        >>> from recollect.messages import make_adj_t
        >>> ring, _ = make_adj_t(torch.arange(6), torch.arange(6).roll(1), None, 6)
        >>> quality = partition_quality(ring, perm=torch.arange(6), ptr=torch.tensor([0, 2, 6]))
        >>> quality.edge_cut, quality.largest, round(quality.balance, 3)  # of parts with 2 and 4 nodes
        (2, 4, 1.333)
    """
    adj_t = as_csr(adj_t)
    check_square(adj_t)
    weight = checked_weight(node_weight, adj_t.size(0))
    perm, ptr = perm.to(adj_t.device), ptr.to(adj_t.device)  # a partition of a device's graph is made on the host
    counts = ptr.diff()
    clusters = torch.empty_like(perm)
    parts = torch.arange(counts.numel(), device=perm.device)
    clusters[perm] = torch.repeat_interleave(parts, counts, output_size=perm.numel())
    cut = int((clusters[rows_of(adj_t)] != clusters[adj_t.col_indices()]).sum())
    largest = int(counts.max())
    balance = largest * counts.numel() / max(perm.numel(), 1)
    quality = PartitionQuality(counts.numel(), cut, adj_t.col_indices().numel(), largest, balance)
    if weight is None:
        return quality
    sums = weight.new_zeros(counts.numel()).index_add_(0, clusters.cpu(), weight)
    heaviest, total = float(sums.max()), float(sums.sum())
    return quality._replace(heaviest=heaviest, weight_balance=heaviest * counts.numel() / total if total else 1.0)


_OPTIMISING: dict[str, Callable[..., Tensor]] = {"metis": metis_clusters, "kaminpar": kaminpar_clusters}


def _clusters(
    adj_t: Tensor, num_parts: int, method: Method, seed: int, options: dict[str, Any], weight: Tensor | None
) -> Tensor:
    """The part of each node, [N] int64 on the CPU."""
    num_nodes = adj_t.size(0)
    if num_parts >= num_nodes:
        weight = None  # each node is a part, whatever it weighs
    if method in _OPTIMISING:
        return _OPTIMISING[method](adj_t, num_parts, seed=seed, node_weight=weight, **options)
    order = torch.arange(num_nodes, device="cpu")
    if method == "random":
        place = torch.randperm(num_nodes, generator=torch.Generator().manual_seed(seed), device="cpu")
        order = torch.empty_like(place).scatter_(0, place, order)
    return even_parts(order, num_parts, weight)


def _ordered(clusters: Tensor, num_parts: int) -> Partition:
    ptr = clusters.new_zeros(num_parts + 1)
    torch.cumsum(torch.bincount(clusters, minlength=num_parts), 0, out=ptr[1:])
    return Partition(torch.argsort(clusters, stable=True), ptr)


def _log(method: str, quality: PartitionQuality, seconds: float) -> None:
    weights = (
        "" if quality.weight_balance is None else f"; the heaviest {quality.weight_balance:.3f} of the mean weight"
    )
    _logger.info(
        "%s: %d parts in %.2f s; %d of %d edges cut (%.1f %%), largest part %d nodes, %.3f of the mean%s",
        *(method, quality.num_parts, seconds, quality.edge_cut, quality.num_edges, 100 * quality.cut_share),
        *(quality.largest, quality.balance, weights),
    )
