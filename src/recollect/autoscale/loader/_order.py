"""The forms of a graph: its transposed adjacency, and its nodes in the order of its parts."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recollect.autoscale.loader._roles import Kind, check_nodes, kinds_of
from recollect.messages import make_adj_t, rows_of

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["permute", "to_adj_t"]


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


_logger = logging.getLogger(__name__)


def permute(data: Data, perm: Tensor, log: bool = True, kinds: Mapping[str, Kind] | None = None) -> Data:
    """Renumber the nodes of a graph: node ``k`` of the result is node ``perm[k]`` of ``data``.

    Node-level tensors are put into the new order; ``edge_index`` or ``adj_t`` get the new numbers, and so do other
    tensors that hold nodes. Edge-level tensors follow the edges: with ``adj_t`` their order changes, with
    ``edge_index`` it does not. The result has ``node_order`` [N] int64, the numbers that its nodes had at first,
    also after several permutations: ``at_first[result.node_order] = out`` takes an output back.

    What a tensor belongs to is told by its name (``x``, ``y``, ``pos``, ``train_mask``, ``val_mask``, ``test_mask``;
    ``edge_attr``, ``edge_weight``; ``index`` in the name: entries are nodes), else by its size. Where these do not
    say, or say wrong, ``kinds`` does.

    Args:
        data: The graph. It is not changed.
        perm: [N] int64, every node once.
        log: Log the time taken, at level INFO.
        kinds: ``"node"``, ``"edge"``, ``"index"`` or ``"graph"`` (not permuted) by the names of tensors.

    Raises:
        TypeError: ``data`` is no graph, or ``perm`` no tensor; rows of nodes or edges are not in a dense tensor, or
            ``adj_t`` is not in sparse CSR form.
        ValueError: ``perm`` is no permutation of the nodes; a tensor has the wrong size, or belongs to nodes or
            edges and nothing says to which.
    """
    start = time.perf_counter()
    num_nodes, _, found = kinds_of(data, kinds)
    structure = data.adj_t if "adj_t" in data else data.edge_index
    inverse = _inverse(perm, num_nodes).to(structure.device)
    for key in ("edge_index", *(key for key, kind in found.items() if kind == "index")):
        if key in data:
            check_nodes(key, data[key], num_nodes)
    result = copy.copy(data)
    order = None
    if "adj_t" in data:
        order = _permute_adj_t(result, inverse)
    else:
        result.edge_index = inverse[data.edge_index.as_subclass(Tensor)]
    for key, kind in found.items():
        if kind == "node":
            result[key] = data[key][perm.to(data[key].device)]
        elif kind == "index":
            result[key] = inverse.to(data[key].device)[data[key]]
        elif kind == "edge" and order is not None:
            result[key] = data[key][order.to(data[key].device)]
    if "node_order" not in data:
        result.node_order = perm.clone()
    if log:
        _logger.info("permuted %d nodes in %.2f s", num_nodes, time.perf_counter() - start)
    return result


def _inverse(perm: Tensor, num_nodes: int) -> Tensor:
    if not isinstance(perm, Tensor):
        raise TypeError(
            f"perm is a {type(perm).__name__}, but must be an int64 tensor [N], the first of what metis(...) returns"
        )
    if perm.dtype != torch.int64 or perm.shape != (num_nodes,):
        raise ValueError(
            f"perm has dtype {perm.dtype} and shape {tuple(perm.shape)}, "
            f"but must be int64 with an entry for each of the {num_nodes} nodes"
        )
    if num_nodes and (int(perm.min()) < 0 or int(perm.max()) >= num_nodes):
        raise ValueError(f"perm has entries from {int(perm.min())} to {int(perm.max())}, but nodes are 0 to N - 1")
    inverse = torch.full_like(perm, -1)
    inverse[perm] = torch.arange(num_nodes, device=perm.device)
    if bool((inverse < 0).any()):
        raise ValueError(f"perm leaves out node {int((inverse < 0).nonzero()[0])}, but must name every node once")
    return inverse


def _permute_adj_t(result: Data, inverse: Tensor) -> Tensor:
    adj_t: Tensor = result.adj_t
    source, target = inverse[adj_t.col_indices()], inverse[rows_of(adj_t)]
    result.adj_t, order = make_adj_t(source, target, adj_t.values(), adj_t.size(0))
    return order
