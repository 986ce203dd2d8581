"""The product of an adjacency with the rows of its sources, and its gradient."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils.weak import WeakTensorKeyDictionary

from recollect._csr import check_csr, rows_of, sparse_csr

__all__ = ["propagate"]

# While an adjacency lives, its transpose does; a transpose knows what it was made of, and does not keep it.
_TRANSPOSES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def propagate(adj_t: Tensor, x: Tensor) -> Tensor:
    """Return the weighted sum over each target's edges, ``adj_t @ x``.

    Faster in backward than the operator: the transpose is made once for an adjacency and kept as long as that lives, so
    an adjacency must not be changed in place between passes. Computed in at least float32, also under autocast. An
    adjacency that requires grad goes through the operator.

    Args:
        adj_t: sparse CSR [num_targets, num_sources].
        x: [num_sources, channels].

    Returns:
        [num_targets, channels], of the type of ``x``.

    Raises:
        TypeError: ``adj_t`` is no sparse CSR tensor.
    """
    check_csr(adj_t)
    if adj_t.requires_grad:
        return adj_t @ x
    out: Tensor = _Propagate.apply(x, _Constant(adj_t))  # type: ignore[no-untyped-call]
    return out


class _Constant:
    """Hides a sparse tensor from torch.func, which cannot wrap it and need not."""

    def __init__(self, adj_t: Tensor) -> None:
        self.adj_t = adj_t


class _Propagate(torch.autograd.Function):
    """Linear in ``x``; the adjacency is a constant."""

    @staticmethod
    def forward(x: Tensor, constant: _Constant) -> Tensor:
        adj_t = constant.adj_t
        dtype = torch.promote_types(torch.promote_types(adj_t.dtype, x.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return (adj_t.to(dtype) @ x.to(dtype)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Constant], output: Tensor) -> None:
        # An adjacency that others keep is not to be asked for; one that nobody keeps is made again of what autograd
        # saved, as that is what frames can drop.
        adj_t = inputs[1].adj_t
        ctx.kept, ctx.size = weakref.ref(adj_t), adj_t.shape
        with temporarily_clear_interpreter_stack():  # torch.func cannot take sparse tensors apart
            ctx.save_for_backward(adj_t.crow_indices(), adj_t.col_indices(), adj_t.values())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        adj_t = ctx.kept()
        if adj_t is None:
            rowptr, col, value = ctx.saved_tensors
            adj_t = sparse_csr(rowptr, col, value, ctx.size)
        return propagate(_transposed(adj_t), grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return propagate(ctx.kept(), tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, constant: _Constant) -> tuple[Tensor, int]:
        batched = x.movedim(in_dims[0], -1)  # a batch is more channels
        out = propagate(constant.adj_t, batched.flatten(1))
        return out.reshape(out.size(0), *batched.shape[1:]), -1


def _transposed(adj_t: Tensor) -> Tensor:
    """Return the transpose [num_sources, num_targets] in CSR form, made at the first call."""
    known: Tensor | weakref.ref[Tensor] | None = _TRANSPOSES.get(adj_t, None)  # type: ignore[no-untyped-call]
    transpose = known() if isinstance(known, weakref.ref) else known
    if transpose is None:
        with temporarily_clear_interpreter_stack():  # what is kept must be no tensor of a torch.func transform
            col, size = adj_t.col_indices(), (adj_t.size(1), adj_t.size(0))
            order = col.argsort(stable=True)
            rowptr = torch._convert_indices_from_coo_to_csr(col[order], adj_t.size(1))
            transpose = sparse_csr(rowptr, rows_of(adj_t)[order], adj_t.values()[order], size)
        _TRANSPOSES[adj_t] = transpose
        _TRANSPOSES[transpose] = weakref.ref(adj_t)
    return transpose
