"""The transposed adjacency, the one form in which the graph is cut, permuted and partitioned."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from recollect.autoscale._checks import check_nodes
from recollect.autoscale._kinds import Kind, kinds_of
from recollect.messages import make_adj_t

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["to_adj_t"]


def to_adj_t(data: Data, kinds: Mapping[str, Kind] | None = None) -> Data:
    """Put ``adj_t`` in the place of ``edge_index``.

    ``adj_t[i, j]`` is the edge from node ``j`` to node ``i``: rows are targets, sorted by source. Its values are
    ``edge_weight``, which it replaces, or ones. All other edge-level tensors follow the edges into their new order.
    Self-loops and repeated edges stay.

    Args:
        data: With ``edge_index`` [2, E] (row 0: sources, row 1: targets), int64 or int32, a tensor or an
            ``EdgeIndex``; or with ``adj_t``, which is then kept as it is.
        kinds: What each tensor belongs to, where names and sizes do not say; see `permute`.

    Returns:
        A shallow copy of ``data`` with ``adj_t``, a ``torch.sparse_csr`` tensor [N, N].

    Raises:
        TypeError: ``data`` is no graph, or its ``edge_index`` holds no integers.
        ValueError: ``data`` has no edges, both forms of them, a tensor of the wrong size, or one of which it is
            unclear whether it belongs to nodes or to edges.
    """
    num_nodes, _, found = kinds_of(data, kinds)
    result = copy.copy(data)
    if "adj_t" in data:
        return result
    check_nodes("edge_index", data.edge_index, num_nodes)
    source, target = data.edge_index.as_subclass(Tensor).long()  # of int32, target * N + source would overflow
    weight: Tensor | None = data.edge_weight if "edge_weight" in data else None
    if weight is not None and weight.dim() != 1:
        raise ValueError(
            f"data.edge_weight has shape {tuple(weight.shape)}, but must be [E]: a number for each edge; features of "
            "edges are edge_attr"
        )
    result.adj_t, order = make_adj_t(source, target, weight, num_nodes)
    del result.edge_index
    for key, kind in found.items():
        if key == "edge_weight":
            del result.edge_weight
        elif kind == "edge":
            result[key] = data[key][order]
    return result
