"""Generated graphs with planted labels, of any size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator, Tensor

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._limits import fits_in_memory
from recollect.data._pairs import distinct_pairs
from recollect.data._splits import stratified_masks

_ROWS_AT_ONCE = 65_536


def sbm(
    root: Path,
    seed: int,
    *,
    num_nodes: int = 10_000,
    num_classes: int = 10,
    average_degree: float = 10.0,
    homophily: float = 0.8,
    num_features: int = 64,
    noise: float = 1.0,
    num_labels: int = 0,
) -> GraphDataset:
    """A stochastic block model (Holland et al. 1983): blocks are labels, features noisy signs of them.

    The numbers of edges inside and between blocks are fixed at ``homophily`` and ``1 - homophily`` of the
    total, rounded; which edges these are is uniformly random among all such graphs without self-loops and
    double edges. Every edge is there in both directions, sorted by source, then target.

    Each class has a mean of length 1 in a random direction; a node's features are its class's mean plus
    Gaussian noise in each of the features. 60 % of each class are for training, 20 % each for validation
    and testing.

    Args:
        root: Not used.
        seed: Of everything that is random here.
        num_nodes: N. Classes differ by at most one node in size.
        num_classes: C, at least 1; at least 5 nodes for each.
        average_degree: Neighbours per node, on average: the graph has ``N * average_degree / 2`` undirected
            edges.
        homophily: Share of the edges that join nodes of the same class, from 0 to 1.
        num_features: F, at least 1.
        noise: Standard deviation of each feature, not negative.
        num_labels: K. If it is not 0, nodes have K labels in place of a class: each label is on every node of some
            blocks, half of them at random, and on no other.

    Raises:
        ValueError: An argument is out of its range, or the graph has no room for so many edges.
        MissingDependencyError: torch_geometric is not installed.
    """
    _check(num_nodes, num_classes, average_degree, homophily, num_features, noise, num_labels)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randperm(num_nodes, generator=generator) % num_classes
    x = _features(y, num_classes, num_features, noise, generator)
    edge_index = _edges(y, num_classes, average_degree, homophily, generator)
    return assemble(
        "sbm",
        x=x,
        edge_index=edge_index,
        y=_labels(y, num_classes, num_labels, generator) if num_labels else y,
        masks=stratified_masks(y, train=0.6, val=0.2, seed=seed),
        num_classes=num_labels or num_classes,
        task="multilabel" if num_labels else "multiclass",
    )


def _check(
    num_nodes: int,
    num_classes: int,
    average_degree: float,
    homophily: float,
    num_features: int,
    noise: float,
    num_labels: int,
) -> None:
    if num_classes < 1:
        raise ValueError(f"sbm: num_classes is {num_classes}, but must be at least 1")
    if num_nodes < 5 * num_classes:
        raise ValueError(
            f"sbm: num_nodes is {num_nodes}, but must be at least 5 for each of the {num_classes} classes, "
            f"so that each part of the split has each class"
        )
    if not average_degree >= 0:
        raise ValueError(f"sbm: average_degree is {average_degree}, but must not be negative")
    if not 0 <= homophily <= 1:
        raise ValueError(f"sbm: homophily is {homophily}, but must be between 0 and 1")
    if num_features < 1:
        raise ValueError(f"sbm: num_features is {num_features}, but must be at least 1")
    if not noise >= 0:
        raise ValueError(f"sbm: noise is {noise}, but must not be negative")
    numbers = num_nodes * (num_features + 2 * average_degree + 1)  # features, and both ends of edges
    numbers += max(num_labels, 0) * (num_nodes / 4 + num_classes)  # a byte for each label of a node
    if not fits_in_memory([numbers], item_bytes=4):
        gib = 4 * numbers / 2**30
        several = f" and num_labels={num_labels}" if num_labels > 0 else ""
        raise ValueError(
            f"sbm: {num_nodes} nodes with num_features={num_features} and average_degree={average_degree}{several} "
            f"take {gib:{',.0f' if gib < 1e12 else '.1g'}} GiB, more than this machine's memory: choose fewer"
        )
    if num_labels < 0 or (num_labels and num_classes < 2):
        raise ValueError(
            f"sbm: num_labels is {num_labels}, of {num_classes} blocks, but must be 0, or at least 1 with 2 blocks or "
            f"more, so that each label both occurs and is missing"
        )


def _labels(y: Tensor, num_classes: int, num_labels: int, generator: Generator) -> Tensor:
    order = torch.rand(num_classes, num_labels, generator=generator, dtype=torch.float32).argsort(0)
    return (order < num_classes // 2)[y]


def _features(y: Tensor, num_classes: int, num_features: int, noise: float, generator: Generator) -> Tensor:
    means = torch.randn(num_classes, num_features, generator=generator, dtype=torch.float32)
    means /= means.norm(dim=1, keepdim=True)
    x = torch.randn(y.numel(), num_features, generator=generator, dtype=torch.float32).mul_(noise)
    for start in range(0, y.numel(), _ROWS_AT_ONCE):  # in pieces: all of means[y] would be as large as x
        rows = slice(start, start + _ROWS_AT_ONCE)
        x[rows] += means[y[rows]]
    return x


def _edges(y: Tensor, num_classes: int, average_degree: float, homophily: float, generator: Generator) -> Tensor:
    n = y.numel()
    total = round(n * average_degree / 2)
    inside = round(total * homophily)
    order = torch.sort(y, stable=True).indices
    sizes = torch.bincount(y, minlength=num_classes)
    keys = torch.cat(
        [
            distinct_pairs(order, sizes, inside, same_block=True, generator=generator),
            distinct_pairs(order, sizes, total - inside, same_block=False, generator=generator),
        ]
    )
    low, high = keys // n, keys % n
    both = torch.cat([keys, high * n + low]).sort().values
    return torch.stack([both // n, both % n])
