"""What is wrong where a convolution of torch_geometric gets one tensor of features with a mini-batch's adjacency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from torch import Tensor

__all__ = ["naming_pairs"]


@contextmanager
def naming_pairs(adj_t: Tensor) -> Iterator[None]:
    """Name the remedy where a convolution of torch_geometric fails on a rectangular adjacency.

    Args:
        adj_t: sparse CSR [num_targets, num_sources], of the layer that runs.

    Raises:
        ValueError: in the place of an error of sizes that comes from within a convolution.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import SAGEConv
        >>> from recollect.messages import naming_pairs, sparse_csr
        >>> conv, x = SAGEConv(4, 4), torch.randn(3, 4)
        >>> adj_t = sparse_csr(torch.tensor([0, 2, 3]), torch.tensor([1, 2, 0]), torch.ones(3), (2, 3))
        >>> try:
        ...     with naming_pairs(adj_t):
        ...         conv(x, adj_t)
        ... except ValueError as error:
        ...     print("(x, x[: adj_t.size(0)])" in str(error))
        True
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        if adj_t.size(0) != adj_t.size(1) and _is_from_a_convolution(error.__traceback__):
            raise ValueError(
                f"a convolution of torch_geometric failed on an adjacency of {adj_t.size(0)} targets and "
                f"{adj_t.size(1)} sources, such as mini-batches have: give it the features of both, "
                "(x, x[: adj_t.size(0)]), if they take a pair, and propagate(adj_t, linear(x)) in the place of GCNConv"
            ) from error
        raise


def _is_from_a_convolution(traceback: TracebackType | None) -> bool:
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__", "").startswith("torch_geometric.nn.conv."):
            return True
        traceback = traceback.tb_next
    return False
