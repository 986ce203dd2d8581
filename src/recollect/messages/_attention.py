"""Attention over each target's edges: a softmax of scores, and sums weighted by it, as products with the adjacency."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.messages._adjacency import rows_of
from recollect.messages._products import propagate

__all__ = ["attend"]


def attend(adj_t: Tensor, of_source: Tensor, of_target: Tensor, x: Tensor, negative_slope: float) -> Tensor:
    """Return for each target and head the mean of its sources' rows, weighted by a softmax over its edges.

    The score of an edge from j to i is LeakyReLU(of_source[j] + of_target[i]): graph attention, eq. 3 and 4 of
    Veličković et al. (arXiv 1710.10903). There are numbers for each edge and head, and no row of features for any.

    Args:
        adj_t: sparse CSR [num_targets, num_sources]; its values are not looked at.
        of_source: [num_sources, heads].
        of_target: [num_targets, heads].
        x: [num_sources, heads, channels].
        negative_slope: of the LeakyReLU.

    Returns:
        [num_targets, heads, channels], in at least float32; 0 for targets without an edge.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, of_source.dtype), torch.float32)
    row, col = rows_of(adj_t), adj_t.col_indices()
    score = F.leaky_relu(of_source.index_select(0, col) + of_target.index_select(0, row), negative_slope).to(dtype)
    with torch.no_grad():  # what is taken off before the exponential changes nothing but the range
        largest = score.new_zeros(adj_t.size(0), score.size(1))
        largest.scatter_reduce_(0, row.unsqueeze(1).expand_as(score), score, "amax", include_self=False)
    weights = (score - largest.index_select(0, row)).exp()
    # A column of ones sums up the weights: the numerator and the denominator are one product.
    rows = torch.cat([x.to(dtype), x.new_ones(*x.shape[:2], 1, dtype=dtype)], -1)
    sums = [propagate(adj_t, each, weight) for each, weight in zip(rows.unbind(1), weights.unbind(1), strict=True)]
    total = torch.stack(sums, 1)
    return total[..., :-1] / (total[..., -1:] + 1e-16)
