"""Which of a graph's tensors belong to nodes, which to edges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from recollect.autoscale._adjacency import check_square
from recollect.messages import described

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Kind", "check_data", "check_nodes", "kinds_of"]


def check_data(data: Any) -> None:
    """Refuse what is no graph with attributes, such as its dataset, its mini-batch or one of its tensors."""
    if hasattr(data, "to_dict"):
        return
    inside = hasattr(data, "data") and hasattr(data.data, "to_dict")
    remedy = "give its attribute data" if inside else "Data(x=x, edge_index=edge_index) makes one of tensors"
    raise TypeError(f"data is {described(data)}, but must be a graph, a torch_geometric.data.Data; {remedy}")


def check_nodes(name: str, nodes: Tensor, num_nodes: int) -> None:
    """Refuse what are no numbers of nodes, or numbers that no node has."""
    if nodes.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"data.{name} is of {nodes.dtype}, but must hold nodes by number, in int64 or int32")
    if nodes.numel() and (int(nodes.min()) < 0 or int(nodes.max()) >= num_nodes):
        raise ValueError(
            f"data.{name} has entries from {int(nodes.min())} to {int(nodes.max())}, "
            f"but the graph's {num_nodes} nodes are 0 to {num_nodes - 1}"
        )


Kind = Literal["node", "edge", "index", "graph"]
"""A row for each node; a row for each edge; entries that are nodes; or neither of them."""

_KINDS = ("node", "edge", "index", "graph")
_STRUCTURE = ("adj_t", "edge_index")
_NODE_NAMES = frozenset({"x", "y", "pos", "train_mask", "val_mask", "test_mask", "node_order"})
_EDGE_NAMES = frozenset({"edge_attr", "edge_weight"})


def kinds_of(data: Data, kinds: Mapping[str, Kind] | None = None) -> tuple[int, int, dict[str, Kind]]:
    """Count nodes and edges and sort all other tensors of ``data`` by what they belong to.

    The customary names decide (``x``, ``y``, ``pos``, masks; ``edge_attr``, ``edge_weight``), and must have the size
    that goes with them. A name with ``index`` in it holds nodes, as torch_geometric takes it. Of all others the size
    decides, or, where there are as many nodes as edges, ``node``, ``edge`` or ``mask`` in the name. Integers that fit
    neither and have ``idx`` in their name are refused until ``kinds`` says what they are.

    Returns:
        N, E, and the kind of each dense tensor but ``edge_index`` and ``adj_t``.

    Raises:
        TypeError: ``data`` is no graph, rows of nodes or edges are not in a dense tensor, or ``adj_t`` is not in sparse
            CSR form.
        ValueError: There are no edges, or both forms of them; a size does not fit; a kind cannot be decided.
    """
    check_data(data)
    attributes: dict[str, Any] = data.to_dict()
    num_edges = _num_edges(attributes)
    num_nodes = int(data.num_nodes)
    given = dict(kinds or {})
    for key, kind in given.items():
        if kind not in _KINDS or key not in attributes or key in _STRUCTURE:
            raise ValueError(
                f"kinds[{key!r}] is {kind!r}, but kinds must say one of {', '.join(_KINDS)} for attributes of data; "
                f"it has {', '.join(sorted(set(attributes) - set(_STRUCTURE)))}"
            )
    found: dict[str, Kind] = {}
    for key, value in attributes.items():
        if key in _STRUCTURE or given.get(key) == "graph":
            continue
        if not isinstance(value, Tensor):
            _check_not_rows(key, value, num_nodes, num_edges)
            continue
        found[key] = kind = given.get(key) or _kind(key, value, num_nodes, num_edges)
        _check_rows(key, value, kind, {"node": num_nodes, "edge": num_edges}.get(kind))
    return num_nodes, num_edges, found


def _check_rows(key: str, value: Tensor, kind: Kind, expected: int | None) -> None:
    if expected is None:
        return
    if value.dim() == 0 or value.size(0) != expected:
        raise ValueError(
            f"data.{key} has shape {tuple(value.shape)}, but a row is expected for each of the {expected} "
            f"{kind}s; if it belongs to something else, say so with kinds={{{key!r}: 'graph'}} or another kind"
        )
    if value.layout != torch.strided:
        raise TypeError(f"data.{key} has layout {value.layout}, but must be dense: its rows are taken one by one")


def _check_not_rows(key: str, value: Any, num_nodes: int, num_edges: int) -> None:
    """Rows of anything but tensors would stay in their old order without a word."""
    rows = None if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") else len(value)
    if rows is not None and rows > 1 and rows in (num_nodes, num_edges):
        raise TypeError(
            f"data.{key} is a {type(value).__name__} of {rows} entries, as many as there are "
            f"{'nodes' if rows == num_nodes else 'edges'}: make it a tensor, delete it, or, if it belongs to the graph "
            f"as a whole, say so with kinds={{{key!r}: 'graph'}}"
        )


def _num_edges(attributes: Mapping[str, Any]) -> int:
    present = [key for key in _STRUCTURE if attributes.get(key) is not None]
    if len(present) != 1:
        found = "neither" if not present else "both"
        raise ValueError(f"data has {found} of edge_index and adj_t, but must have exactly one of them")
    structure = attributes[present[0]]
    if present[0] == "edge_index":
        return int(structure.size(1))
    check_square(structure)
    return int(structure.values().size(0))


def _kind(key: str, value: Tensor, num_nodes: int, num_edges: int) -> Kind:
    if key in _NODE_NAMES:
        return "node"
    if key in _EDGE_NAMES:
        return "edge"
    if "index" in key:
        return "index"
    size = value.size(0) if value.dim() else -1
    if size == num_nodes == num_edges:
        return _kind_by_name(key, size)
    kind: Kind = "node" if size == num_nodes else "edge" if size == num_edges else "graph"
    if kind == "graph" and "idx" in key and size >= 0 and not value.is_floating_point() and value.dtype != torch.bool:
        raise ValueError(
            f"data.{key} has shape {tuple(value.shape)} and may hold nodes by number, which get new numbers: say so "
            f"with kinds={{{key!r}: 'index'}}, or that it does not with kinds={{{key!r}: 'graph'}}"
        )
    return kind


def _kind_by_name(key: str, size: int) -> Kind:
    if "edge" in key:
        return "edge"
    if "node" in key or "mask" in key:
        return "node"
    raise ValueError(
        f"data.{key} has {size} rows, and the graph {size} nodes and {size} edges: "
        f"say which it belongs to with kinds={{{key!r}: 'node'}} or kinds={{{key!r}: 'edge'}}"
    )
