"""Generated graphs with planted labels, of any size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Generator, Tensor

from recollect.data._dataset import GraphDataset, assemble
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

    Raises:
        ValueError: An argument is out of its range, or the graph has no room for so many edges.
        MissingDependencyError: torch_geometric is not installed.
    """
    _check(num_nodes, num_classes, average_degree, homophily, num_features, noise)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randperm(num_nodes, generator=generator) % num_classes
    return assemble(
        "sbm",
        x=_features(y, num_classes, num_features, noise, generator),
        edge_index=_edges(y, num_classes, average_degree, homophily, generator),
        y=y,
        masks=stratified_masks(y, train=0.6, val=0.2, seed=seed),
        num_classes=num_classes,
    )


def _check(
    num_nodes: int, num_classes: int, average_degree: float, homophily: float, num_features: int, noise: float
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


def _features(y: Tensor, num_classes: int, num_features: int, noise: float, generator: Generator) -> Tensor:
    means = torch.randn(num_classes, num_features, generator=generator)
    means /= means.norm(dim=1, keepdim=True)
    x = torch.randn(y.numel(), num_features, generator=generator).mul_(noise)
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
