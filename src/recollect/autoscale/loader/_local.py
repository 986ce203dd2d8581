"""Numbers of nodes within a mini-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.autoscale.loader._subgraph import Ranges

__all__ = ["Entries", "in_parts", "local_numbers"]


def in_parts(nodes: Tensor, ptr: Tensor) -> Tensor:
    """The part of each node, of the same shape, where part ``p`` holds those from ``ptr[p]`` to ``ptr[p + 1]``."""
    return torch.bucketize(nodes, ptr[1:].to(nodes.device), right=True)


def local_numbers(nodes: Tensor, offset: Tensor, count: Tensor) -> Tensor:
    """The row that each node has in a mini-batch, or -1 if it is in none of its parts.

    Args:
        nodes: int64, of any shape.
        offset: [parts] int64 on the CPU: the first node of each part.
        count: [parts] int64 on the CPU: the nodes of each part, at least 1.
    """
    if not offset.numel():
        return torch.full_like(nodes, -1)
    order = offset.argsort()
    first, size, row = (t[order].to(nodes.device) for t in (offset, count, count.cumsum(0) - count))
    part = torch.searchsorted(first, nodes, right=True).sub_(1).clamp_(min=0)
    place = nodes - first[part]
    return torch.where((place >= 0) & (place < size[part]), place + row[part], -1)


class Entries:
    """A tensor of nodes by number, of which a mini-batch gets the entries that lie within its parts.

    An entry of ``edge_label_index`` [2, K] is a column. Entries are found by the part of their first node, so that a
    mini-batch looks at no others.

    Args:
        nodes: An integer tensor.
        dim: The dimension along which entries lie.
        ptr: [num_parts + 1] int64 on the CPU.
    """

    def __init__(self, nodes: Tensor, dim: int, ptr: Tensor) -> None:
        self._dim, self._dtype = dim, nodes.dtype
        nodes = nodes.as_subclass(Tensor).long().movedim(dim, -1)
        self._shape = nodes.shape[:-1]
        rows = nodes.reshape(-1, nodes.size(-1)) if nodes.numel() else nodes.new_zeros(1, 0)
        part = in_parts(rows[0], ptr)
        self._order = part.argsort(stable=True)
        self._rows = rows[:, self._order]
        self._ptr = torch.zeros_like(ptr)
        torch.cumsum(torch.bincount(part, minlength=ptr.numel() - 1).cpu(), 0, out=self._ptr[1:])

    def __call__(self, parts: Tensor, offset: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The entries within some parts, as rows of the mini-batch; and which entries of the whole they are."""
        ranges = Ranges(self._ptr[parts], self._ptr[parts + 1], self._order.device)
        rows = local_numbers(self._rows[:, ranges.positions], offset, count)
        inside = (rows >= 0).all(0)
        found = rows[:, inside].to(self._dtype)
        return found.reshape(*self._shape, -1).movedim(-1, self._dim), ranges.take(self._order)[inside]
