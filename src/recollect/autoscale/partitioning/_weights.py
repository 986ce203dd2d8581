"""Weights of nodes, by which parts are balanced, and of parts, by which ranks are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.autoscale._adjacency import as_csr
from recollect.messages import rows_of

__all__ = ["checked_weight", "even_parts", "part_weights", "whole"]

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


def part_weights(adj_t: Any, ptr: Tensor) -> Tensor:
    """Return what a step on each part takes, about: its nodes, the edges into them, and its halo.

    They are for :class:`~recollect.distributed.Shares`, which gives each rank parts of the same weight together.

    Args:
        adj_t: adjacency [N, N] of the permuted graph, targets by sources.
        ptr: [num_parts + 1] int64: part ``p`` holds the nodes from ``ptr[p]`` to ``ptr[p + 1]``.

    Returns:
        Nodes, edges into them, and nodes of other parts that these come from, together, [num_parts] int64 on the CPU.

    Raises:
        TypeError: ``adj_t`` is no adjacency.
        ValueError: ``ptr`` does not ascend from 0 to N.

    Example:
        >>> import torch
        >>> from recollect.autoscale import part_weights
        >>> from recollect.messages import make_adj_t
        >>> ring, _ = make_adj_t(torch.arange(6), torch.arange(6).roll(1), None, 6)
        >>> part_weights(ring, torch.tensor([0, 2, 6]))  # 2 nodes, 2 edges and a node before them; 4, 4 and 1
        tensor([5, 9])
    """
    adj_t, ptr = as_csr(adj_t), ptr.detach().to("cpu", torch.int64)
    nodes = adj_t.size(0)
    if ptr.dim() != 1 or ptr.numel() < 2 or ptr[0] != 0 or ptr[-1] != nodes or bool((ptr.diff() < 0).any()):
        raise ValueError(f"ptr must ascend from 0 to the {nodes} nodes of adj_t (got a tensor of {list(ptr.shape)})")
    target, source = rows_of(adj_t).cpu(), adj_t.col_indices().cpu()
    part, home = (torch.searchsorted(ptr, each, right=True) - 1 for each in (target, source))
    halo = (part * nodes + source)[part != home].unique() // max(nodes, 1)
    number = ptr.numel() - 1
    return ptr.diff() + torch.bincount(part, minlength=number) + torch.bincount(halo, minlength=number)
