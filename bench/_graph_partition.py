"""Time, edge cut and balance of partitioning methods on a graph whose best parts are known."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from bench._measure import reason
from bench._report import show, table
from recollect.autoscale import Partition as Parts
from recollect.autoscale import PartitionQuality, partition, partition_quality, to_adj_t
from recollect.data import load

Method = Literal["metis", "kaminpar", "random", "contiguous"]
METHODS: tuple[Method, ...] = get_args(Method)
PLANTED = "planted"


@dataclass(frozen=True)
class Divided:
    """A stochastic block model with as many blocks as parts are wanted.

    Attributes:
        nodes: N.
        edges: E, directed: each undirected edge counts twice.
        parts: of the graph, and blocks in it.
        homophily: share of the edges inside of blocks; the rest is cut even if all blocks are found.
    """

    nodes: int = 1_000_000
    edges: int = 10_000_000
    parts: int = 1_000
    homophily: float = 0.8

    def __str__(self) -> str:
        return (
            f"{self.nodes:,} nodes, {self.edges:,} edges, {self.parts:,} parts, "
            f"{1 - self.homophily:.0%} of the edges between blocks"
        )


QUICK = Divided(nodes=1_000, edges=10_000, parts=10)


def partition_figures(
    work: Divided,
    *,
    methods: tuple[Method, ...] = METHODS,
    seed: int = 0,
    options: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Divide one graph by each method, once.

    Args:
        work: the graph and the number of parts.
        methods: of `recollect.autoscale.partition`.
        seed: of the graph and of the methods.
        options: further arguments by method, such as ``{"kaminpar": {"preset": "largek"}}``.

    Returns:
        `workload`; and by method `seconds`, `edge_cut`, `cut_share`, `balance` and `largest`, or `skipped` with the
        reason. ``planted`` are the blocks themselves.
    """
    shape: dict[str, Any] = {"num_nodes": work.nodes, "num_classes": work.parts}
    shape["average_degree"] = work.edges / work.nodes
    data = load("sbm", seed=seed, homophily=work.homophily, num_features=1, **shape).data
    adj_t = to_adj_t(data).adj_t
    planted = Parts(torch.argsort(data.y, stable=True), _ptr(data.y, work.parts))
    found: dict[str, Any] = {PLANTED: _figures(partition_quality(adj_t, *planted))}
    del data, planted
    for method in methods:
        start = time.perf_counter()
        try:
            parts = partition(adj_t, work.parts, method, seed=seed, log=False, **(options or {}).get(method, {}))
        except ImportError as error:
            found[method] = {"skipped": reason(error)}
            continue
        seconds = time.perf_counter() - start
        found[method] = {"seconds": seconds, **_figures(partition_quality(adj_t, *parts))}
    return {"workload": str(work), "threads": torch.get_num_threads(), "methods": found}


def _ptr(clusters: torch.Tensor, parts: int) -> torch.Tensor:
    return torch.cat([clusters.new_zeros(1), torch.bincount(clusters, minlength=parts).cumsum(0)])


def _figures(quality: PartitionQuality) -> dict[str, Any]:
    return {**quality._asdict(), "cut_share": quality.cut_share}


def partition_table(found: dict[str, Any]) -> str:
    """Seconds, share of edges cut and balance, one line for each method."""
    body = [
        [
            method,
            show(row.get("seconds"), ".1f"),
            show(row.get("cut_share"), ".1f", 0.01),
            show(row.get("balance"), ".3f"),
        ]
        for method, row in found["methods"].items()
    ]
    return f"{found['workload']}\n{table(['method', 'seconds', 'edges cut, %', 'largest / mean part'], body)}"
