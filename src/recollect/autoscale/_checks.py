"""What tensors must be before anything is done with them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_csr", "check_nodes", "check_square"]


def check_csr(adj_t: Tensor) -> None:
    """Refuse what is not in sparse CSR form."""
    if not isinstance(adj_t, Tensor) or adj_t.layout != torch.sparse_csr:
        found = f"a tensor of layout {adj_t.layout}" if isinstance(adj_t, Tensor) else f"a {type(adj_t).__name__}"
        raise TypeError(f"adj_t is {found}, but must be a torch.sparse_csr tensor; to_adj_t(data) makes one")


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
