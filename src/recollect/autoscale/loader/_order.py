"""The forms of a graph: its transposed adjacency, and its nodes in the order of its parts."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recollect.autoscale.loader._attributes import Path, found_at, put
from recollect.autoscale.loader._roles import Role, Roles, roles_of
from recollect.autoscale.loader._storage import graph_copy
from recollect.messages import make_adj_t, rows_of

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["permute", "to_adj_t", "without_bounds"]


def to_adj_t(data: Data, kinds: Mapping[str, str] | None = None) -> Data:
    """Put ``adj_t`` in the place of ``edge_index``.

    ``adj_t[i, j]`` is the edge from node ``j`` to node ``i``: rows are targets, sorted by source. Its values are
    ``edge_weight``, which it replaces, or ones. All other edge-level tensors follow the edges into their new order.
    Self-loops and repeated edges stay.

    Args:
        data: With ``edge_index`` [2, E] (row 0: sources, row 1: targets), int64 or int32, a tensor or an
            ``EdgeIndex``; or with ``adj_t``, which is then kept as it is.
        kinds: What each tensor belongs to, where names do not say; see `permute`.

    Returns:
        A shallow copy of ``data`` with ``adj_t``, a ``torch.sparse_csr`` tensor [N, N].

    Raises:
        TypeError: ``data`` is no graph, or its ``edge_index`` holds no integers.
        ValueError: ``data`` has no edges, both forms of them, a tensor of the wrong size, or one of which it is
            unclear whether it belongs to nodes or to edges.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from recollect.autoscale import to_adj_t
        >>> edge_index, edge_weight = torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.tensor([5.0, 6.0, 7.0])
        >>> to_adj_t(Data(edge_index=edge_index, edge_weight=edge_weight, num_nodes=3)).adj_t.to_dense()
        tensor([[0., 0., 7.],
                [5., 0., 0.],
                [0., 6., 0.]])
    """
    roles = roles_of(data, kinds, edges_alone=True)
    result = graph_copy(data)
    if roles.structure == "adj_t":
        return result
    source, target = data.edge_index.as_subclass(Tensor).long()  # of int32, target * N + source would overflow
    weight: Tensor | None = data.edge_weight if "edge_weight" in data else None
    if weight is not None and weight.dim() != 1:
        raise ValueError(
            f"data.edge_weight has shape {tuple(weight.shape)}, but must be [E]: a number for each edge; features of "
            "edges are edge_attr"
        )
    result.adj_t, order = make_adj_t(source, target, weight, roles.num_nodes)
    del result.edge_index
    if weight is not None:
        del result.edge_weight
    edges = {path: role for path, role in roles.of_kind("edge").items() if path != ("edge_weight",)}
    put(result, _in_order(data, edges, order))
    return result


_logger = logging.getLogger(__name__)


def permute(data: Data, perm: Tensor, log: bool = True, kinds: Mapping[str, str] | None = None) -> Data:
    """Renumber the nodes of a graph: node ``k`` of the result is node ``perm[k]`` of ``data``.

    Node-level tensors are put into the new order; ``edge_index`` or ``adj_t`` get the new numbers, and so do other
    tensors that hold nodes. Edge-level tensors follow the edges: with ``adj_t`` their order changes, with
    ``edge_index`` it does not. The result has ``node_order`` [N] int64, the numbers that its nodes had at first,
    also after several permutations: ``at_first[result.node_order] = out`` takes an output back.

    What a tensor belongs to is declared, by the first of these that says something, and never found by size alone:

    1. ``kinds``, by name; what lies in a dictionary or list is called ``"name.key"``, and all of it ``"name"``.
    2. ``data.__inc__(name)`` is the number of nodes (for torch_geometric: names with ``index``, and ``face``): entries
       are nodes.
    3. The class of ``data`` has an ``is_node_attr`` or ``is_edge_attr`` of its own that says so, whatever the sizes.
    4. The conventions of torch_geometric for names: ``x``, ``feat``, ``pos``, ``y``, ``batch``, ``node_type``,
       ``n_id``, ``train_mask``, ``val_mask`` and ``test_mask`` have a row for each node; ``edge_attr``,
       ``edge_weight``, ``edge_type`` and ``e_id`` for each edge; another size is an error. ``edge_label`` and
       ``edge_label_...`` go with ``edge_label_index``, ``edge_attr_2`` with ``edge_index_2``, where the sizes agree.
       ``ptr`` says where graphs of a ``Batch`` begin; no permutation keeps that, and the result has none.
    5. A name and a size that agree: ``edge`` in the name, and as many rows as edges; ``node_...``, ``..._mask``,
       ``..._pe``, ``x_...``, ``y_...``, ``feat_...``, ``pos_...``, ``z`` or ``normal``, and as many rows as nodes; any
       name of booleans, which are a mask, of as many rows as nodes or as edges, but not as both.
    6. The class of ``data`` has a ``__cat_dim__`` of its own for this name, along which there are as many rows as nodes
       or as edges, but not as both.

    Anything else belongs to the graph as a whole. If it has as many rows as there are nodes or edges nevertheless, that
    may be chance, and is an error until ``kinds`` says what it is; so are integers with ``idx`` or ``nodes`` in their
    name, or in that of what they lie in, and pairs of integers that are called ``edges``. Nodes by number are in
    tensors: lists, arrays and numbers of Python that may hold some, by such a name or by rule 2, are refused. Rows lie
    along ``data.__cat_dim__(name)``. The inner name counts in a dictionary, then the outer ones.

    Args:
        data: The graph. It is not changed.
        perm: [N] int64, every node once.
        log: Log the time taken, at level INFO.
        kinds: ``"node"``, ``"edge"``, ``"index"`` (entries are nodes) or ``"graph"`` (not permuted) by the names of
            tensors; or the name of a tensor of nodes with whose entries one goes, such as ``"edge_label_index"``.

    Returns:
        A shallow copy of the graph, in the new order.

    Raises:
        TypeError: ``data`` is no graph, or ``perm`` no tensor; rows of nodes or edges are not in a dense tensor, or
            ``adj_t`` is not in sparse CSR form.
        ValueError: ``perm`` is no permutation of the nodes; a tensor or ``adj_t`` has the wrong size, or may belong to
            nodes or edges and nothing says so.

    Example:
        >>> import torch
        >>> from recollect.autoscale import get_data, permute
        >>> data = get_data(None, "karate").data
        >>> perm = torch.arange(34).flip(0)
        >>> moved = permute(data, perm, log=False)
        >>> torch.equal(moved.y, data.y[perm])
        True
        >>> torch.equal(moved.adj_t.to_dense(), data.adj_t.to_dense()[perm][:, perm])
        True
    """
    start = time.perf_counter()
    roles = roles_of(data, kinds)
    inverse = _inverse(perm, roles.num_nodes)
    result = graph_copy(data)
    if roles.structure == "adj_t":
        order = _permute_adj_t(result, inverse.to(data.adj_t.device))
        put(result, _in_order(data, roles.of_kind("edge"), order))
    else:
        result.edge_index = inverse.to(data.edge_index.device)[data.edge_index.as_subclass(Tensor)]
    put(result, _in_order(data, roles.of_kind("node"), perm))
    put(result, {path: _renumbered(found_at(data, path), inverse) for path in roles.of_kind("index")})
    without_bounds(result, roles, kinds or {})
    if "node_order" not in data:
        result.node_order = perm.clone()
    if log:
        _logger.info("permuted %d nodes in %.2f s", roles.num_nodes, time.perf_counter() - start)
    return result


def _in_order(data: Data, roles: Mapping[Path, Role], order: Tensor) -> dict[Path, Tensor]:
    """The tensors of these roles, their rows in another order."""
    values: dict[Path, Tensor] = {path: found_at(data, path) for path in roles}
    return {path: value.index_select(roles[path].dim or 0, order.to(value.device)) for path, value in values.items()}


def _renumbered(nodes: Tensor, inverse: Tensor) -> Tensor:
    return inverse.to(nodes.device)[nodes.as_subclass(Tensor).long()].to(nodes.dtype)


def without_bounds(data: Data, roles: Roles, kinds: Iterable[str]) -> None:
    """Take away what says where the graphs of a ``Batch`` begin: their nodes do not lie together any more."""
    for path, role in roles.roles.items():
        name = str(path[0])
        if role.kind == "graph" and len(path) == 1 and (name == "ptr" or name.endswith("_ptr")) and name not in kinds:
            del data[name]
    store = data.__dict__.get("_store")
    for name in ("_slice_dict", "_inc_dict"):  # of which get_example would make graphs
        getattr(store, "__dict__", {}).pop(name, None)


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
