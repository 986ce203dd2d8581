"""Handwritten digits as a graph: scikit-learn's `load_digits`, embedded in that package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from recollect.data._dataset import GraphDataset, assemble
from recollect.data._foreign import require
from recollect.data._splits import stratified_masks

_MAX_PIXEL = 16.0


def digits(root: Path, seed: int, *, k: int = 10) -> GraphDataset:
    """1,797 images of 8 x 8 pixels in 10 classes, joined to their nearest neighbours.

    The split is fixed, whatever the seed: 60 % of each class for training, 20 % each for validation and
    testing.

    Args:
        root: Not used.
        seed: Not used.
        k: Neighbours that each image chooses by Euclidean distance of the pixels; an edge is there in both
            directions if one of its ends chose it.

    Raises:
        ValueError: k is not between 1 and 1,796.
        MissingDependencyError: scikit-learn or torch_geometric is not installed.
    """
    bunch = require("sklearn.datasets", extra="train").load_digits()
    pixels = torch.from_numpy(bunch.data)
    y = torch.from_numpy(bunch.target).to(torch.int64)
    if not 1 <= k < len(pixels):
        raise ValueError(f"digits: k is {k}, but must be between 1 and {len(pixels) - 1}")
    return assemble(
        "digits",
        x=pixels / _MAX_PIXEL,
        edge_index=nearest_neighbours(pixels, k),
        y=y,
        masks=stratified_masks(y, train=0.6, val=0.2, seed=0),
        num_classes=10,
    )


def nearest_neighbours(points: Tensor, k: int) -> Tensor:
    """Join every point with its k nearest others.

    Squared distances of whole numbers in float64 are exact, and ties go to the lower index, so that
    whole-number points give the same graph on every machine.

    Args:
        points: [N, F] float64.
        k: Below N.

    Returns:
        edge_index [2, E] int64: both directions of each edge once, no self-loops, sorted by source, then
        target.
    """
    n = len(points)
    squares = (points**2).sum(1)
    distances = squares[:, None] + squares[None, :] - 2 * points @ points.T
    distances.fill_diagonal_(torch.inf)
    chosen = torch.sort(distances, dim=1, stable=True).indices[:, :k]
    adjacent = torch.zeros(n, n, dtype=torch.bool)
    adjacent.scatter_(1, chosen, True)
    return (adjacent | adjacent.T).nonzero().T.contiguous()
