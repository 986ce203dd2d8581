"""What tensors must be before anything is done with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.messages import check_csr, described

__all__ = ["check_data", "check_nodes", "check_square"]


def check_data(data: Any) -> None:
    """Refuse what is no graph with attributes, such as its dataset, its mini-batch or one of its tensors."""
    if hasattr(data, "to_dict"):
        return
    inside = hasattr(data, "data") and hasattr(data.data, "to_dict")
    remedy = "give its attribute data" if inside else "Data(x=x, edge_index=edge_index) makes one of tensors"
    raise TypeError(f"data is {described(data)}, but must be a graph, a torch_geometric.data.Data; {remedy}")


def check_square(adj_t: Tensor) -> None:
    """Refuse what is not the adjacency of one set of nodes in sparse CSR form."""
    check_csr(adj_t)
    if adj_t.dim() != 2 or adj_t.size(0) != adj_t.size(1):
        raise ValueError(f"adj_t has shape {tuple(adj_t.shape)}, but must be [N, N]")


def check_nodes(name: str, nodes: Tensor, num_nodes: int) -> None:
    """Refuse what are no numbers of nodes, or numbers that no node has."""
    if nodes.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"data.{name} is of {nodes.dtype}, but must hold nodes by number, in int64 or int32")
    if nodes.numel() and (int(nodes.min()) < 0 or int(nodes.max()) >= num_nodes):
        raise ValueError(
            f"data.{name} has entries from {int(nodes.min())} to {int(nodes.max())}, "
            f"but the graph's {num_nodes} nodes are 0 to {num_nodes - 1}"
        )
