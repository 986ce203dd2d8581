"""The largest or smallest of the rows of each target's sources, and the gradients, without a row for each edge."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect._torch import outside_functorch, with_signature
from recollect.messages._adjacency import check_csr, check_rows, sparse_csr
from recollect.messages._kernels import Constant, reduced

__all__ = ["extreme"]

# Messages are compared with the extreme that they may be in pieces of so many elements, and of no more than the
# features have: pieces that fit into a core's cache, in which the time does not depend much on the number.
_PIECE = (1 << 14, 1 << 18)


def extreme(adj_t: Tensor, x: Tensor, which: Literal["max", "min"]) -> Tensor:
    """Return the largest, or the smallest, of the rows of each target's sources, channel by channel; 0 without any.

    The gradient is that of torch's ``scatter_reduce_(..., "amax", include_self=False)`` into zeros, which
    torch_geometric uses: the edges whose rows are the extreme share it evenly, and where the extreme is 0, the zero
    that was there before takes a share as well, which is lost. (No subgradient is more right than another; this one is
    what a network gets without recollect.)

    Args:
        adj_t: sparse CSR [num_targets, num_sources], on the CPU; its values are not looked at.
        x: [num_sources, channels], floating point, on the CPU.
        which: ``"max"`` or ``"min"``.

    Returns:
        [num_targets, channels], of the type of ``x``.

    Raises:
        TypeError: ``adj_t`` is no sparse CSR tensor, or ``x`` holds no real floating-point numbers.
        ValueError: ``which`` is something else, there is not a row of ``x`` for each source, or ``x`` is on another
            device than the CPU.

    Example:
        >>> import torch
        >>> from recollect.messages import extreme, sparse_csr
        >>> adj_t = sparse_csr(torch.tensor([0, 2, 2]), torch.tensor([1, 2]), torch.ones(2), (2, 3))
        >>> x = torch.tensor([[9.0, 9.0], [1.0, -2.0], [3.0, -4.0]])
        >>> extreme(adj_t, x, "max")
        tensor([[ 3., -2.],
                [ 0.,  0.]])
    """
    check_csr(adj_t)
    check_rows(adj_t, x)
    if x.is_complex():
        raise TypeError(f"x is of {x.dtype}, and complex numbers have no order: give real ones")
    if which not in ("max", "min"):
        raise ValueError(f"which={which!r} is unknown; choose 'max' or 'min'")
    if not forms_of(x.device).reductions:
        raise ValueError(f"x is on {x.device}, but torch has this reduction on the CPU only")
    out: Tensor = _Extreme.apply(x, Constant(adj_t), which)  # type: ignore[no-untyped-call]
    return out


class _Extreme(torch.autograd.Function):
    """The largest or smallest row of each target's sources."""

    independent_axes = ({1: 1},)

    @staticmethod
    @with_signature
    def forward(x: Tensor, constant: Constant, which: str) -> Tensor:
        adj_t, dtype = constant.adj_t, torch.promote_types(x.dtype, torch.float32)
        ones = torch.ones_like(adj_t.values(), dtype=dtype)
        plain = sparse_csr(adj_t.crow_indices(), adj_t.col_indices(), ones, (adj_t.size(0), adj_t.size(1)))
        return reduced(plain, x.to(dtype), f"a{which}").to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Constant, str], output: Tensor) -> None:
        x, constant, _ = inputs
        with outside_functorch():
            rowptr, col = constant.adj_t.crow_indices(), constant.adj_t.col_indices()
        ctx.save_for_backward(x, output, rowptr, col)
        ctx.save_for_forward(x, output, rowptr, col)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Shared.apply(grad, *ctx.saved_tensors, True, True), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        out: Tensor = _Shared.apply(tangent, *ctx.saved_tensors, False, False)  # type: ignore[no-untyped-call]
        return out

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], x: Tensor, constant: Constant, which: Literal["max", "min"]
    ) -> tuple[Tensor, int]:
        batched = x.movedim(in_dims[0], -1)
        out = extreme(constant.adj_t, batched.flatten(1), which)
        return out.reshape(out.size(0), *batched.shape[1:]), -1


class _Shared(torch.autograd.Function):
    """Hands values of the targets to the sources that are their extremes, in even shares; or the other way round.

    Linear in the values; backward is the other way round. Which messages are extremes is found by comparing them again,
    in pieces.
    """

    @staticmethod
    @with_signature
    def forward(*args: Any) -> Tensor:
        """Arguments as of :func:`_share`."""
        shared: Tensor = _share(*args)
        return shared

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:5])
        ctx.save_for_forward(*inputs[1:5])
        ctx.flags = inputs[5:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        to_sources, with_zero = ctx.flags
        back = _Shared.apply(grad, *ctx.saved_tensors, not to_sources, with_zero)  # type: ignore[no-untyped-call]
        return back, *[None] * 6

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        out: Tensor = _Shared.apply(tangent, *ctx.saved_tensors, *ctx.flags)  # type: ignore[no-untyped-call]
        return out

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        each = [
            _Shared.apply(  # type: ignore[no-untyped-call]
                *(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        return torch.stack(each), 0


@torch.library.custom_op("recollect::share", mutates_args=())  # an operator, over which batched gradients can loop
def _share(
    values: Tensor, x: Tensor, out: Tensor, rowptr: Tensor, col: Tensor, to_sources: bool, with_zero: bool
) -> Tensor:
    """Return what the sources get [num_sources, channels], or what the targets get [num_targets, channels].

    Args:
        values: of the targets, [num_targets, channels]; the other way round of the sources.
        x: [num_sources, channels], the messages.
        out: [num_targets, channels], the extremes.
        rowptr: where each target's edges begin, [num_targets + 1].
        col: the source of each edge, [num_edges].
        to_sources: the way.
        with_zero: an extreme that is 0 has one more to share with.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    found = torch.zeros_like(x if to_sources else out, dtype=dtype)
    for rows, edges, channels in _pieces(rowptr.tolist(), x):
        source, top, given = col[edges], out[rows, channels], values[:, channels]
        degrees = rowptr[rows.start : rows.stop + 1].diff()
        target = torch.repeat_interleave(degrees, output_size=source.numel())
        is_top = (x[:, channels].index_select(0, source) == top.index_select(0, target)).to(dtype)
        number = torch.zeros_like(top, dtype=dtype).index_add_(0, target, is_top)
        if with_zero:
            number += top == 0
        if to_sources:
            share = given[rows] / number
            found[:, channels].index_add_(0, source, is_top.mul_(share.index_select(0, target)))
        else:
            whole = torch.zeros_like(number).index_add_(0, target, is_top.mul_(given.index_select(0, source)))
            found[rows, channels] = whole / number.clamp_(min=1)
    return found.to(values.dtype)


@_share.register_fake
def _(values: Tensor, x: Tensor, out: Tensor, rowptr: Tensor, col: Tensor, to_sources: bool, with_zero: bool) -> Tensor:
    return torch.empty_like(x if to_sources else out, dtype=values.dtype)


def _pieces(rowptr: list[int], x: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Cut the messages into pieces: the targets, their edges, and the channels of each.

    A piece has all edges of its targets; one with very many goes by a few channels at a time.
    """
    channels = x.size(1)
    size = min(max(x.numel(), _PIECE[0]), _PIECE[1])
    start, last = 0, len(rowptr) - 1
    while start < last and channels:
        end = bisect.bisect_right(rowptr, rowptr[start] + size // channels) - 1
        width = channels
        if end <= start:
            end, width = start + 1, max(size // (rowptr[start + 1] - rowptr[start]), 1)
        edges = slice(rowptr[start], rowptr[end])
        if edges.stop > edges.start:
            for channel in range(0, channels, width):
                yield slice(start, end), edges, slice(channel, min(channel + width, channels))
        start = end
