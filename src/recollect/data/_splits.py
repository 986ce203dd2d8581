"""Splits of a graph's nodes."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_masks(y: Tensor, *, train: float, val: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split nodes at random so that every class has the same shares in each part.

    Args:
        y: Classes, [N] int64.
        train: Share of each class for training, rounded to whole nodes.
        val: Share of each class for validation; the rest is for testing.
        seed: The same seed gives the same split.

    Returns:
        Train, validation and test masks, [N] bool: disjoint, and together all nodes.
    """
    sizes = torch.bincount(y)
    return _cut(y, (train * sizes).round().long(), ((train + val) * sizes).round().long(), seed)


def balanced_masks(y: Tensor, *, train: int, val: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split nodes at random so that every class has the same number for training, and for validation.

    Args:
        y: Classes, [N] int64.
        train: Nodes of each class for training; all of a class that has fewer.
        val: Nodes of each class for validation, of those that remain; the rest is for testing.
        seed: The same seed gives the same split.

    Returns:
        Train, validation and test masks, [N] bool: disjoint, and together all nodes.
    """
    ends = torch.full_like(torch.bincount(y), train)
    return _cut(y, ends, ends + val, seed)


def _cut(y: Tensor, train_end: Tensor, val_end: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffle each class, and cut it at these two ranks, [num_classes] int64 each."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(y.numel(), generator=generator)
    by_class = shuffled[torch.sort(y[shuffled], stable=True).indices]
    sizes = torch.bincount(y)
    starts = sizes.cumsum(0) - sizes
    classes = y[by_class]
    rank = torch.arange(y.numel()) - starts[classes]
    masks = torch.zeros(3, y.numel(), dtype=torch.bool)
    part = (rank >= train_end[classes]).long() + (rank >= val_end[classes]).long()
    masks[part, by_class] = True
    return masks[0], masks[1], masks[2]


def check_split(name: str, split: int, num_splits: int) -> None:
    """Refuse the number of a split that is not there.

    Raises:
        ValueError: There is no such split.
    """
    if split not in range(num_splits):
        raise ValueError(f"{name}: split is {split!r}, but must be between 0 and {num_splits - 1}")
