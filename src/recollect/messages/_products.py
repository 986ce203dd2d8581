"""The weighted sum over each target's edges, as a product with the adjacency, and its gradient.

No function here makes a row for each edge, neither in forward nor in backward.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recollect._torch import outside_functorch, with_signature
from recollect.messages._adjacency import check_csr, check_rows, row_pointers, sparse_csr, version_of
from recollect.messages._kernels import Constant, multiplied
from recollect.messages._weights import weighted_product

__all__ = ["know_transpose", "known_transpose", "propagate", "shifted", "transposed_rows"]

# While an adjacency lives and is not changed, its transpose does; a transpose knows what it was made of, and does not
# keep it. Each is noted with the versions that it and the other had.
_TRANSPOSES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
# Where the sources of a shifted adjacency begin.
_SHIFTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def shifted(size: int, first: int, like: Tensor) -> Tensor:
    """Return an adjacency [size, first + size] with one edge of weight 1 into each target, from the source so far on.

    :func:`propagate` copies the rows that it selects.

    Args:
        size: targets.
        first: the source of the first one.
        like: whose type and device the weights have.

    Returns:
        Sparse CSR [size, first + size].

    Example:
        >>> import torch
        >>> from recollect.messages import propagate, shifted
        >>> x = torch.arange(5.0).view(5, 1)
        >>> propagate(shifted(3, 2, x), x).flatten()  # rows 2, 3 and 4
        tensor([2., 3., 4.])
    """
    rowptr = torch.arange(size + 1, device=like.device)
    adj_t = sparse_csr(rowptr, rowptr[:-1] + first, like.new_ones(size), (size, first + size))
    _SHIFTS[adj_t] = first
    return adj_t


def propagate(adj_t: Tensor, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the weighted sum over each target's edges, ``adj_t @ x``.

    Faster in backward than the operator: what the transpose takes is made once for an adjacency and kept as long as
    that lives and is not changed; changes that torch does not count, made through ``.data`` or NumPy, are not seen.
    Computed in at least float32, also under autocast.

    Weights of edges can be learnt, as those of :func:`~recollect.autoscale.with_weights` or as ``weights``: the
    gradient of an edge's weight is the scalar product of its target's gradient and its source's row, in whatever order
    the columns are and however many edges two nodes share.

    Args:
        adj_t: sparse CSR [num_targets, num_sources].
        x: [num_sources, channels], floating point.
        weights: [num_edges], floating point, in the place of the values of ``adj_t``; for transforms of torch.func.

    Returns:
        [num_targets, channels], of the type of ``x``.

    Raises:
        TypeError: ``adj_t`` is no sparse CSR tensor, or ``x`` holds no floating-point numbers.
        ValueError: there is not a row of ``x`` for each source, or not one of the ``weights`` for each edge; or
            ``adj_t`` requires grad, was not made by :func:`~recollect.autoscale.with_weights`, and has unsorted columns
            or several edges between two nodes.

    Example:
        >>> import torch
        >>> from recollect.messages import make_adj_t, propagate, with_weights
        >>> adj_t, _ = make_adj_t(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1]), None, 2)
        >>> weights = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> propagate(with_weights(adj_t, weights), torch.tensor([[1.0], [10.0]])).sum().backward()
        >>> weights.grad
        tensor([10.,  1., 10.])
    """
    check_csr(adj_t)
    check_rows(adj_t, x)
    if weights is None and not adj_t.requires_grad:
        first = _SHIFTS.get(adj_t) if _SHIFTS else None  # type: ignore[no-untyped-call]
        if first is not None:
            return (x[first:] if first else x).clone()
        out: Tensor = _Propagate.apply(x, Constant(adj_t))  # type: ignore[no-untyped-call]
        return out
    return weighted_product(adj_t, weights, x)


class _Propagate(torch.autograd.Function):
    """Linear in ``x``; the adjacency is a constant."""

    independent_axes = ({1: 1},)

    @staticmethod
    @with_signature
    def forward(x: Tensor, constant: Constant) -> Tensor:
        return multiplied(constant.adj_t, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Constant], output: Tensor) -> None:
        # An adjacency that others keep is not to be asked for; one that nobody keeps is made again of what autograd
        # saved, as that is what frames can drop.
        adj_t = inputs[1].adj_t
        ctx.kept, ctx.version, ctx.size = weakref.ref(adj_t), version_of(adj_t), adj_t.shape
        with outside_functorch():  # torch.func cannot take sparse tensors apart
            ctx.save_for_backward(adj_t.crow_indices(), adj_t.col_indices(), adj_t.values())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        adj_t = ctx.kept()
        if adj_t is None or version_of(adj_t) != ctx.version:
            rowptr, col, value = ctx.saved_tensors  # of one that was changed since, this is autograd's own error
            adj_t = sparse_csr(rowptr, col, value, ctx.size)
        return propagate(_transposed(adj_t), grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return propagate(ctx.kept(), tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, constant: Constant) -> tuple[Tensor, int]:
        batched = x.movedim(in_dims[0], -1)  # a batch is more channels
        out = propagate(constant.adj_t, batched.flatten(1))
        return out.reshape(out.size(0), *batched.shape[1:]), -1


def _transposed(adj_t: Tensor) -> Tensor:
    """Return the transpose [num_sources, num_targets] in CSR form, made at the first call."""
    transpose = known_transpose(adj_t)
    if transpose is None:
        with outside_functorch():  # what is kept must be no tensor of a torch.func transform
            begins, col = adj_t.crow_indices(), adj_t.col_indices()
            order, rowptr = col.argsort(stable=True), row_pointers(col, adj_t.size(1), begins.dtype)
            # The row of an entry is the last that begins with it or before it. (Sought, as memory may be short here.)
            narrow = begins.dtype == torch.int32
            row = torch.searchsorted(begins, order.to(begins.dtype), right=True, out_int32=narrow).sub_(1)
            transpose = sparse_csr(rowptr, row, adj_t.values()[order], (adj_t.size(1), adj_t.size(0)))
        know_transpose(adj_t, transpose)
    return transpose


def transposed_rows(adj_t: Tensor, count: int) -> Tensor:
    """Return the edges out of the first sources, so many, as sparse CSR matrix [count, num_targets].

    The host waits for the device once, for how many these edges are.

    Args:
        adj_t: sparse CSR [num_targets, num_sources].
        count: of the sources, from the first on.

    Example:
        >>> import torch
        >>> from recollect.messages import make_adj_t, transposed_rows
        >>> adj_t, _ = make_adj_t(torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2]), None, 3)
        >>> transposed_rows(adj_t, 2).to_dense()  # what the first two of three sources send
        tensor([[0., 1., 0.],
                [1., 0., 1.]])
    """
    transpose = _transposed(adj_t)
    rowptr = transpose.crow_indices()[: count + 1]
    edges = int(rowptr[-1])
    col, value = transpose.col_indices()[:edges], transpose.values()[:edges]
    return sparse_csr(rowptr, col, value, (count, adj_t.size(0)))


def known_transpose(adj_t: Tensor) -> Tensor | None:
    """Return the transpose, if it was made and neither was changed since."""
    known: tuple[Tensor | weakref.ref[Tensor], tuple[int, int]] | None
    known = _TRANSPOSES.get(adj_t, None)  # type: ignore[no-untyped-call]
    if known is None:
        return None
    transpose = known[0]() if isinstance(known[0], weakref.ref) else known[0]
    if transpose is None or (version_of(adj_t), version_of(transpose)) != known[1]:
        return None
    return transpose


def know_transpose(adj_t: Tensor, transpose: Tensor) -> None:
    """Note that one is the transpose of the other, as long as the first lives and neither is changed."""
    versions = version_of(adj_t), version_of(transpose)
    _TRANSPOSES[adj_t] = transpose, versions
    _TRANSPOSES[transpose] = weakref.ref(adj_t), versions[::-1]
