"""The form in which partitioners want a graph: undirected, without self-loops and repeated edges."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.messages import rows_of

__all__ = ["Undirected", "undirected"]

_HEAVIEST = 10_000  # of the whole numbers that weights are rounded to


class Undirected(NamedTuple):
    """Neighbours of each node, each edge in both directions; on the CPU.

    Attributes:
        rowptr: [N + 1] int64.
        col: [E'] int64, ascending in each row.
        weight: [E'] int64 from 1, or None.
    """

    rowptr: Tensor
    col: Tensor
    weight: Tensor | None


def undirected(adj_t: Tensor, weighted: bool) -> Undirected:
    """Join nodes that an edge joins in any direction; the weight is then the sum of both directions.

    Weights that are not whole numbers are scaled so that the heaviest is 10,000, and rounded, at least to 1.

    Raises:
        ValueError: A weight is negative or not finite, or weights are no scalars.
    """
    n = adj_t.size(0)
    row, col, value = rows_of(adj_t).cpu(), adj_t.col_indices().long().cpu(), adj_t.values().detach().cpu()
    if weighted and (value.dim() != 1 or not bool((value >= 0).all()) or not bool(value.isfinite().all())):
        raise ValueError("weighted=True needs edge weights that are finite and not negative, one for each edge")
    apart = row != col
    row, col, value = row[apart], col[apart], value[apart]
    keys = torch.cat([row * n + col, col * n + row])
    if weighted:
        keys, place = torch.unique(keys, return_inverse=True)
        weight = value.new_zeros(keys.numel(), dtype=torch.float64).index_add_(0, place, value.double().repeat(2))
        weight = _whole(weight)
    else:
        keys, weight = torch.unique(keys), None
    rowptr = torch.searchsorted(keys, torch.arange(n + 1, device="cpu") * n)
    return Undirected(rowptr, keys % n if n else keys, weight)


def _whole(weight: Tensor) -> Tensor:
    if weight.numel() and bool((weight != weight.round()).any()):
        weight = weight * (_HEAVIEST / weight.max())
    return weight.round().long().clamp_(min=1)
