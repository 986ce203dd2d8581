"""Uniformly random pairs of nodes, inside or between blocks, each pair at most once.

All ordered pairs of one kind (both ends in one block, or in two) are numbered without gaps, so that a
uniform number is a uniform pair: nothing is drawn in vain, whatever the sizes of the blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

_DRAWS_AT_ONCE = 4_194_304


def distinct_pairs(order: Tensor, sizes: Tensor, count: int, *, same_block: bool, generator: Generator) -> Tensor:
    """Draw a uniformly random set of unordered pairs of distinct nodes.

    Draws with repetition until there are enough different pairs; as no pair is preferred at any step, every
    set is equally likely.

    Args:
        order: The nodes 0..N-1, block by block, [N] int64.
        sizes: Nodes of each block, [C] int64.
        count: Pairs wanted.
        same_block: Whether both ends must be in one block, or in different ones.
        generator: Source of randomness.

    Returns:
        Keys ``low * N + high`` of the pairs, with ``low < high``, [count] int64.

    Raises:
        ValueError: There are fewer such pairs than are wanted.
    """
    n = order.numel()
    available = num_ordered_pairs(sizes, same_block=same_block) // 2
    if count > available:
        where = "inside the classes" if same_block else "between the classes"
        raise ValueError(
            f"sbm: {count} edges {where} are asked for, but only {available} are possible; "
            f"lower average_degree, or change homophily"
        )
    keys = order.new_empty(0)
    while (missing := count - keys.numel()) > 0:
        # A draw is new with probability (available - have) / available; a little more saves most second
        # rounds.
        draws = math.ceil(1.05 * missing * available / (available - keys.numel())) + 64
        pieces = [keys]
        for start in range(0, draws, _DRAWS_AT_ONCE):
            size = (min(_DRAWS_AT_ONCE, draws - start),)
            ranks = torch.randint(2 * available, size, generator=generator)
            a, b = ordered_pairs(ranks, sizes, same_block=same_block)
            a, b = order[a], order[b]
            pieces.append(torch.minimum(a, b) * n + torch.maximum(a, b))
        keys = torch.unique_consecutive(torch.cat(pieces).sort().values)
        if keys.numel() > count:
            keys = keys[torch.randperm(keys.numel(), generator=generator)[:count]]
    return keys


def num_ordered_pairs(sizes: Tensor, *, same_block: bool) -> int:
    """How many ordered pairs of distinct positions have their ends in one block, or in different ones."""
    return int((sizes * _partners(sizes, same_block=same_block)).sum())


def ordered_pairs(ranks: Tensor, sizes: Tensor, *, same_block: bool) -> tuple[Tensor, Tensor]:
    """The ordered pairs of positions with the given numbers.

    Positions 0..N-1 are block by block. The numbering runs over the first end, and for each over its
    possible partners.

    Args:
        ranks: From 0 to below `num_ordered_pairs`, [R] int64.
        sizes: Positions in each block, [C] int64.
        same_block: Whether both ends are in one block, or in different ones.

    Returns:
        First and second ends, [R] int64 each.
    """
    partners = _partners(sizes, same_block=same_block)
    pairs = sizes * partners
    block = torch.bucketize(ranks, pairs.cumsum(0), right=True)
    start = (sizes.cumsum(0) - sizes)[block]
    within = ranks - (pairs.cumsum(0) - pairs)[block]
    first = start + within // partners[block]
    second = within % partners[block]
    if same_block:
        second = start + second
        second += second >= first  # leaves out the first end itself
    else:
        second += (second >= start) * sizes[block]  # leaves out the first end's block
    return first, second


def _partners(sizes: Tensor, *, same_block: bool) -> Tensor:
    return sizes - 1 if same_block else sizes.sum() - sizes
