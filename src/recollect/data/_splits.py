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
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(y.numel(), generator=generator)
    by_class = shuffled[torch.sort(y[shuffled], stable=True).indices]
    sizes = torch.bincount(y)
    starts = sizes.cumsum(0) - sizes
    classes = y[by_class]
    rank = torch.arange(y.numel()) - starts[classes]
    train_end = (train * sizes).round().long()
    val_end = ((train + val) * sizes).round().long()
    masks = torch.zeros(3, y.numel(), dtype=torch.bool)
    part = (rank >= train_end[classes]).long() + (rank >= val_end[classes]).long()
    masks[part, by_class] = True
    return masks[0], masks[1], masks[2]
