"""How products with an adjacency are computed. Nothing here makes a row for each edge."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect.messages._adjacency import rows_of_entries, sparse_csr

__all__ = ["Constant", "edge_dots", "edge_product", "multiplied", "reduced"]

# Bytes of a row from which on the CPU's kernel for reductions is faster than the library's product.
_LONG_ROW = 256

# Bytes of the rows that are multiplied at a time where there is no kernel for it: so much as a core's cache holds.
_BLOCK = 1 << 20


class Constant:
    """Hides a sparse tensor from torch.func, which cannot wrap it and need not."""

    def __init__(self, adj_t: Tensor) -> None:
        self.adj_t = adj_t


def multiplied(adj_t: Tensor, x: Tensor) -> Tensor:
    """``adj_t @ x``, computed in at least float32, also under autocast; of the type of ``x``.

    Args:
        adj_t: sparse CSR [num_targets, num_sources].
        x: [num_sources, channels], floating point.

    Returns:
        [num_targets, channels].

    Example:
        >>> import torch
        >>> from recollect.messages import make_adj_t, multiplied
        >>> adj_t, _ = make_adj_t(torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([2.0, 3.0]), 2)
        >>> multiplied(adj_t, torch.tensor([[10.0], [20.0]], dtype=torch.float16))
        tensor([[40.],
                [30.]], dtype=torch.float16)
    """
    dtype = torch.promote_types(torch.promote_types(adj_t.dtype, x.dtype), torch.float32)
    if not torch.is_autocast_enabled(x.device.type):
        return _product(adj_t.to(dtype), x.to(dtype)).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return _product(adj_t.to(dtype), x.to(dtype)).to(x.dtype)


def _product(adj_t: Tensor, x: Tensor) -> Tensor:
    """``adj_t @ x``, by the faster of two ways: on long rows torch's kernel for reductions, where it is, by far."""
    is_long = x.size(1) * x.element_size() >= _LONG_ROW or not torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if forms_of(x.device).reductions and x.is_floating_point() and is_long:
        return reduced(adj_t, x, "sum")
    return adj_t @ x


def reduced(adj_t: Tensor, x: Tensor, how: str) -> Tensor:
    """The reduction of the weighted rows of each target's sources: sum, mean, amax or amin."""
    out: Tensor = torch.sparse.mm(adj_t, x, how)
    return out


# Operators, over which batched gradients can loop.


@torch.library.custom_op("recollect::edge_product", mutates_args=())
def edge_product(x: Tensor, value: Tensor, rowptr: Tensor, col: Tensor) -> Tensor:
    """Return the weighted sum over each target's edges [num_targets, channels].

    Args:
        x: [num_sources, channels].
        value: [E].
        rowptr: where each target's edges begin, [num_targets + 1].
        col: the source of each edge, [E].
    """
    return multiplied(sparse_csr(rowptr, col, value, (rowptr.numel() - 1, x.size(0))), x)


@edge_product.register_fake
def _(x: Tensor, value: Tensor, rowptr: Tensor, col: Tensor) -> Tensor:
    return x.new_empty(rowptr.numel() - 1, x.size(1))


@torch.library.custom_op("recollect::edge_dots", mutates_args=())
def edge_dots(y: Tensor, x: Tensor, rowptr: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    """Return for each edge the scalar product of its target's and its source's row, [E]; summed in at least float32.

    Args:
        y: [num_targets, channels].
        x: [num_sources, channels].
        rowptr: where each target's edges begin, [num_targets + 1].
        col: the source of each edge, [E].
        dtype: of the result.
    """
    wide = torch.promote_types(torch.promote_types(y.dtype, x.dtype), torch.float32)
    fits = col.numel() <= y.size(0) * x.size(0)  # the kernel copies no more than all places
    if forms_of(x.device).sampled_products and fits and torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        zeros = sparse_csr(rowptr, col, x.new_zeros(col.numel(), dtype=wide), (y.size(0), x.size(0)))
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = torch.sparse.sampled_addmm(zeros, y.to(wide), x.to(wide).t(), beta=0).values()
        return found.to(dtype)
    row, dots = rows_of_entries(rowptr, col.numel()), x.new_empty(col.numel(), dtype=dtype)
    room = max(_BLOCK, x.nbytes) if forms_of(x.device).wide_blocks else _BLOCK
    block = max(room // max(x.size(1) * wide.itemsize, 1), 1)
    for start in range(0, col.numel(), block):
        edges = slice(start, start + block)
        rows = y.index_select(0, row[edges]).to(wide)
        dots[edges] = rows.mul_(x.index_select(0, col[edges])).sum(1)
    return dots


@edge_dots.register_fake
def _(y: Tensor, x: Tensor, rowptr: Tensor, col: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(col.numel(), dtype=dtype)
