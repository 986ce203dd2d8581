"""What is no graph, or not in a form that mini-batches are cut of, is refused with what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale._adjacency import check_square
from recollect.messages import described

__all__ = ["check_data", "check_edge_index", "check_nodes", "structure_of"]

STRUCTURE = ("adj_t", "edge_index")


def check_data(data: Any) -> None:
    """Refuse what is no graph with attributes, such as its dataset, its mini-batch or one of its tensors."""
    if hasattr(data, "node_types") and hasattr(data, "edge_types"):
        raise TypeError(
            f"data is a {type(data).__name__}, but must be one graph with one set of nodes: data.to_homogeneous() "
            "makes it of a HeteroData, with node_type and edge_type"
        )
    if hasattr(data, "to_dict"):
        return
    inside = hasattr(data, "data") and hasattr(data.data, "to_dict")
    remedy = "give its attribute data" if inside else "Data(x=x, edge_index=edge_index) makes one of tensors"
    raise TypeError(f"data is {described(data)}, but must be a graph, a torch_geometric.data.Data; {remedy}")


def check_nodes(name: str, nodes: Tensor, num_nodes: int) -> None:
    """Refuse what are no numbers of nodes, or numbers that no node has."""
    if nodes.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"data.{name} is of {nodes.dtype}, but must hold nodes by number, in int64 or int32: make it "
            f"data.{name}.long(), or, if it holds none, say so with kinds={{{name!r}: 'graph'}} or another kind"
        )
    if nodes.numel() and (int(nodes.min()) < 0 or int(nodes.max()) >= num_nodes):
        raise ValueError(
            f"data.{name} has entries from {int(nodes.min())} to {int(nodes.max())}, "
            f"but the graph's {num_nodes} nodes are 0 to {num_nodes - 1}"
        )


def check_edge_index(name: str, edge_index: Any) -> None:
    """Refuse what are no edges as sources and targets [2, E], in integers."""
    if not isinstance(edge_index, Tensor):
        how = "torch.stack" if isinstance(edge_index, tuple) else "torch.as_tensor"
        raise TypeError(
            f"{name} is a {type(edge_index).__name__}, but must be an int64 tensor [2, E] of sources and targets: "
            f"write {how}({name})"
        )
    if edge_index.layout != torch.strided:
        raise TypeError(f"{name} has layout {edge_index.layout}, but must be dense [2, E]: write {name}.indices()")
    if edge_index.dim() != 2 or edge_index.size(0) != 2:
        turned = edge_index.dim() == 2 and edge_index.size(1) == 2
        remedy = f": write {name}.t().contiguous()" if turned else ""
        raise ValueError(f"{name} has shape {tuple(edge_index.shape)}, but must be [2, E], sources and targets{remedy}")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name} is of {edge_index.dtype}, but must hold nodes by number, in int64 or int32: write {name}.long()"
        )


def structure_of(attributes: Mapping[str, Any]) -> tuple[str, Any]:
    """The one of ``edge_index`` and ``adj_t`` that a graph has, by name.

    Raises:
        TypeError: It is no tensor, holds no integers, or ``adj_t`` is not in sparse CSR form.
        ValueError: There are none or both of them, or its shape is wrong.
    """
    present = [key for key in STRUCTURE if attributes.get(key) is not None]
    if len(present) != 1:
        found = "neither" if not present else "both"
        raise ValueError(f"data has {found} of edge_index and adj_t, but must have exactly one of them")
    structure = attributes[present[0]]
    if present[0] == "edge_index":
        check_edge_index("data.edge_index", structure)
    elif type(structure).__name__ == "SparseTensor":
        raise TypeError(
            "data.adj_t is a SparseTensor, but must be a torch.sparse_csr tensor: write "
            "data.adj_t = data.adj_t.to_torch_sparse_csr_tensor()"
        )
    elif isinstance(structure, Tensor) and structure.layout in (torch.sparse_coo, torch.sparse_csc):
        raise TypeError(
            f"data.adj_t is a tensor of layout {structure.layout}, but must be a torch.sparse_csr tensor: write "
            "data.adj_t = data.adj_t.to_sparse_csr()"
        )
    else:
        check_square(structure)
    return present[0], structure
