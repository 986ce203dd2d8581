"""Products with weights of edges that have gradients themselves.

With A(w) the adjacency of weights w, y = A(w) x. For a gradient g of y, that of x is A(w)^T g, and that of the weight
of an edge from j to i is g_i . x_j, in whatever order the edges are and however many two nodes share. The derivatives
of these two are the two again: so there are derivatives of every order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recollect._torch import outside_functorch, with_signature
from recollect.messages._adjacency import (
    check_csr,
    described,
    row_pointers,
    rows_of_entries,
    sparse_csr,
    version_of,
    weights_of,
)
from recollect.messages._kernels import edge_dots, edge_product

__all__ = ["weighted_product", "with_weights"]


class _Known:
    """What was found out of a pattern: its edges in the order of their sources, and whether they ascend."""

    __slots__ = ("__weakref__", "ascends", "reversed")

    def __init__(self) -> None:
        self.reversed: tuple[Tensor, Tensor, Tensor] | None = None
        self.ascends: bool | None = None


# It lives as long as an adjacency with these edges does, and is not changed: each is noted with its version.
_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where an adjacency has entries.

    Attributes:
        rowptr: [num_targets + 1].
        col: [E].
        num_sources: columns.
        known: kept as long as an adjacency with these entries lives.
    """

    rowptr: Tensor
    col: Tensor
    num_sources: int
    known: _Known

    def check(self, weights: Tensor) -> None:
        """Refuse weights that are not one for each edge."""
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights are {described(weights)}, but must be a tensor [{self.col.numel()}]")
        if weights.shape != self.col.shape:
            raise ValueError(
                f"weights have shape {list(weights.shape)}, but must be [{self.col.numel()}]: one for each edge"
            )

    def reversed(self) -> tuple[Pattern, Tensor]:
        """Return the pattern of the transpose, and the number here of each of its edges [E]."""
        if self.known.reversed is None:
            with outside_functorch():  # what is kept must be no tensor of a torch.func transform
                order = self.col.argsort(stable=True).to(self.col.dtype)
                begins = row_pointers(self.col, self.num_sources, self.rowptr.dtype)
                narrow = begins.dtype == torch.int32
                row = torch.searchsorted(self.rowptr, order, right=True, out_int32=narrow).sub_(1)
                self.known.reversed = begins, row, order
        begins, row, order = self.known.reversed
        return Pattern(begins, row, self.rowptr.numel() - 1, _Known()), order

    def ascends(self) -> bool:
        """Whether the columns of each row ascend, none of them twice."""
        if self.known.ascends is None:
            row = rows_of_entries(self.rowptr, self.col.numel())
            self.known.ascends = bool(((self.col.diff() > 0) | (row.diff() > 0)).all())
        return self.known.ascends


def pattern_of(adj_t: Tensor) -> Pattern:
    """Return the pattern of a sparse CSR tensor."""
    version, known = _KNOWN.get(adj_t, (0, None))  # type: ignore[no-untyped-call]
    if known is None or version != version_of(adj_t):
        known = _Known()
        _KNOWN[adj_t] = version_of(adj_t), known
    with outside_functorch():  # torch.func cannot take sparse tensors apart
        return Pattern(adj_t.crow_indices(), adj_t.col_indices(), adj_t.size(1), known)


def with_weights(adj_t: Tensor, weights: Tensor) -> Tensor:
    """Return an adjacency of the same edges with other weights [num_edges].

    Weights that require grad get theirs from :func:`propagate`, the models and ``adj_t @ x``.

    Args:
        adj_t: sparse CSR [num_targets, num_sources].
        weights: in the adjacency's order [num_edges], floating point; they are not copied.

    Raises:
        TypeError: it is no sparse CSR tensor, or the weights are no tensor, or belong to a transform of torch.func.
        ValueError: there is not one weight for each edge.

    Example:
        >>> import torch
        >>> from recollect.messages import make_adj_t, propagate, with_weights
        >>> adj_t, _ = make_adj_t(torch.tensor([0, 1]), torch.tensor([1, 0]), None, 2)
        >>> weights = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> out = propagate(with_weights(adj_t, weights), torch.tensor([[10.0], [20.0]]))
        >>> out.flatten().tolist()
        [40.0, 30.0]
        >>> out.sum().backward()
        >>> weights.grad
        tensor([20., 10.])
    """
    check_csr(adj_t)
    pattern = pattern_of(adj_t)
    pattern.check(weights)
    other = sparse_csr(pattern.rowptr, pattern.col, weights, (adj_t.size(0), adj_t.size(1)))
    _KNOWN[other] = version_of(other), pattern.known
    return other


def weighted_product(adj_t: Tensor, weights: Tensor | None, x: Tensor) -> Tensor:
    """Return A(weights) x, [num_targets, channels], of the type of x, with the gradients of both.

    Args:
        adj_t: sparse CSR.
        weights: [num_edges]; default: its values, which require grad.
        x: [num_sources, channels].
    """
    pattern = pattern_of(adj_t)
    if weights is not None:
        pattern.check(weights)
    else:
        weights = weights_of(adj_t)
    if weights is None:  # torch adds up its gradients
        if not pattern.ascends():
            raise ValueError(
                "adj_t requires grad, but its columns are unsorted, or nodes share several edges: torch has no right "
                "gradients for these. Give its weights as with_weights(adj_t.detach(), weights)"
            )
        weights = adj_t.values()
    return _product(pattern, weights, x)


def _product(pattern: Pattern, weights: Tensor, x: Tensor) -> Tensor:
    out: Tensor = _Product.apply(x, weights, pattern)  # type: ignore[no-untyped-call]
    return out


def _dots(y: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor:
    """Return y_i . x_j for each edge from j to i, [E]."""
    out: Tensor = _Dots.apply(y, x, pattern, dtype)  # type: ignore[no-untyped-call]
    return out


class _Bilinear(torch.autograd.Function):
    """What a function of two tensors and a pattern keeps."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        one, other, pattern, *_ = inputs
        # The edges in the other order are not to be asked for while others keep them; they are made again otherwise.
        ctx.kept, ctx.num_sources = weakref.ref(pattern.known), pattern.num_sources
        ctx.save_for_backward(one, other, pattern.rowptr, pattern.col)
        ctx.save_for_forward(one, other, pattern.rowptr, pattern.col)


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Pattern]:
    one, other, rowptr, col = ctx.saved_tensors
    return one, other, Pattern(rowptr, col, ctx.num_sources, ctx.kept() or _Known())


class _Product(_Bilinear):
    """A(w) x, bilinear in the two."""

    independent_axes: tuple[dict[int, int], ...] = ({1: 1}, {})

    @staticmethod
    @with_signature
    def forward(x: Tensor, weights: Tensor, pattern: Pattern) -> Tensor:
        out: Tensor = edge_product(x, weights, pattern.rowptr, pattern.col)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weights, pattern = _saved(ctx)
        of_x = of_weights = None
        if ctx.needs_input_grad[0]:
            transpose, order = pattern.reversed()
            of_x = _product(transpose, weights.index_select(0, order), grad)
        if ctx.needs_input_grad[1]:
            of_weights = _dots(grad, x, pattern, weights.dtype)
        return of_x, of_weights, None

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor, of_weights: Tensor, _: None) -> Tensor:
        x, weights, pattern = _saved(ctx)
        return _product(pattern, weights, of_x) + _product(pattern, of_weights, x)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None, None], x: Tensor, weights: Tensor, pattern: Pattern
    ) -> tuple[Tensor, int]:
        if in_dims[1] is not None or in_dims[0] is None:
            return _looped(info, in_dims, (x, weights), lambda x, weights: _product(pattern, weights, x))
        batched = x.movedim(in_dims[0], -1)  # a batch is more channels
        out = _product(pattern, weights, batched.flatten(1))
        return out.reshape(out.size(0), *batched.shape[1:]), -1


class _Dots(_Bilinear):
    """y_i . x_j for each edge from j to i, bilinear in the two."""

    @staticmethod
    @with_signature
    def forward(y: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor:
        out: Tensor = edge_dots(y, x, pattern.rowptr, pattern.col, dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        y, x, pattern = _saved(ctx)
        of_y = of_x = None
        if ctx.needs_input_grad[0]:
            of_y = _product(pattern, grad, x).to(y.dtype)
        if ctx.needs_input_grad[1]:
            transpose, order = pattern.reversed()
            of_x = _product(transpose, grad.index_select(0, order), y).to(x.dtype)
        return of_y, of_x, None, None

    @staticmethod
    def jvp(ctx: Any, of_y: Tensor, of_x: Tensor, *_: None) -> Tensor:
        y, x, pattern = _saved(ctx)
        return _dots(of_y, x, pattern, of_y.dtype) + _dots(y, of_x, pattern, of_x.dtype)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], y: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype
    ) -> tuple[Tensor, int]:
        return _looped(info, in_dims, (y, x), lambda y, x: _dots(y, x, pattern, dtype))


def _looped(
    info: Any, in_dims: tuple[Any, ...], pair: tuple[Tensor, Tensor], function: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, int]:
    """Return what a function makes of each element of a batch, one after the other."""
    one, other = (
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(pair, in_dims, strict=False)
    )
    return torch.stack([function(a, b) for a, b in zip(one, other, strict=True)]), 0
