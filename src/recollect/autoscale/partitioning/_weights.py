"""Weights of nodes, by which parts are balanced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["checked_weight", "even_parts", "whole"]

_HEAVIEST, _SUM = 10_000, 2**30  # of the whole numbers that weights are rounded to; partitioners sum in 32 bits


def checked_weight(node_weight: Any, num_nodes: int) -> Tensor | None:
    """Weights of nodes as float64 on the CPU; None for None.

    Raises:
        TypeError: They are no tensor of real numbers.
        ValueError: Their number is another one than that of the nodes, one is negative or not finite, or all are 0.
    """
    if node_weight is None:
        return None
    if not isinstance(node_weight, Tensor) or node_weight.is_complex():
        found = node_weight.dtype if isinstance(node_weight, Tensor) else f"a {type(node_weight).__name__}"
        named = ", such as data.train_mask" if isinstance(node_weight, str) else ": write torch.as_tensor(node_weight)"
        raise TypeError(f"node_weight is {found}, but must be a tensor [N] of numbers or booleans{named}")
    if node_weight.shape != (num_nodes,):
        raise ValueError(
            f"node_weight has shape {tuple(node_weight.shape)}, but must be [{num_nodes}]: a number for each node"
        )
    weight = node_weight.detach().to("cpu", torch.float64)
    if not bool(weight.isfinite().all()) or bool((weight < 0).any()):
        worst = weight[~(weight >= 0) | ~weight.isfinite()][0]
        raise ValueError(f"node_weight has an entry {worst.item()}, but weights must be finite and not negative")
    if num_nodes and not bool(weight.any()):
        raise ValueError("node_weight is 0 everywhere: leave it out to balance the number of nodes")
    return weight


def whole(weight: Tensor) -> Tensor:
    """Weights as whole numbers, int64: themselves if they are and their sum is small, else scaled and rounded.

    The heaviest becomes 10,000, or less so that the sum stays below 2^30; no weight but 0 becomes 0.
    """
    total = float(weight.sum())
    if total > _SUM or bool((weight != weight.round()).any()):
        scaled = (weight * min(_HEAVIEST / float(weight.max()), _SUM / total)).round()
        weight = torch.where(weight > 0, scaled.clamp_(min=1), scaled)
    return weight.long()


def even_parts(order: Tensor, num_parts: int, weight: Tensor | None) -> Tensor:
    """Cut an order of the nodes into parts of equal number, or of about equal weight.

    By weight, each node goes to the part in whose share of the whole sum the middle of its own weight falls, so that
    a part is off by at most the heaviest node. Nodes of weight 0 stay with those before them.

    Args:
        order: [N] int64, every node once.
        num_parts: At least 1.
        weight: [N] float64, or None.

    Returns:
        The part of each node, [N] int64.
    """
    place = torch.arange(order.numel(), device="cpu")
    if weight is None:
        part = place * num_parts // max(order.numel(), 1)
    else:
        ends = weight[order].cumsum(0)
        middle = ends - weight[order] / 2
        part = (middle * (num_parts / ends[-1:])).long().clamp_(max=num_parts - 1)
    return torch.empty_like(order).scatter_(0, order, part)
