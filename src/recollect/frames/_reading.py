"""The numbers that a tensor holds, of whatever layout and type it is: in an order, in samples, piece by piece."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect._torch import is_in_transform, without_overrides

__all__ = [
    "AS_IT_IS", "GROUP", "MANY", "Order", "Values", "indices_of", "limit_of", "order_of", "pieces_of", "sample_of",
    "step_of", "values_of",
]  # fmt: skip

# Where reading all elements would cost more than it proves, groups of some are read: they come from memory together.
_GROUPS = 63
GROUP = 2
MANY = 4096
"""So many are read in whole all the same."""

Order = tuple[int, ...] | None
AS_IT_IS: Order = ()
"""The order in which a tensor that was one block of memory is read again: a transpose of it may be another tensor."""
Values = tuple[Tensor | None, Order]


def values_of(tensor: Tensor, order: Order = None) -> Values:
    """Return a strided tensor with a tensor's values in the order in which they are read, and that order.

    Args:
        tensor: any, without history.
        order: of the dimensions, to read it in; ``None``: that of its memory; ``AS_IT_IS``: that of its dimensions.
    """
    if is_in_transform() or tensor.device.type == "meta":
        return None, None
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        return _values_of_subclass(tensor, order)
    if tensor.layout is not torch.strided:
        return _values_of_sparse(tensor)
    if tensor.is_nested:
        return values_of(tensor.contiguous().values())
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:  # somebody has taken the memory away
        return None, None
    if tensor.is_complex():
        real = torch.view_as_real(tensor.resolve_conj())
        if order is None and not real.is_contiguous():
            order = (*order_of(tensor), tensor.dim())
        return (real.permute(order) if order else real), order
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if order is None and not tensor.is_contiguous():
        order = order_of(tensor)
    return (tensor.permute(order) if order else tensor), order


def order_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the dimensions in the order of memory."""
    strides = [tensor.stride(i) if tensor.size(i) > 1 else 0 for i in range(tensor.dim())]
    return tuple(sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True))


def indices_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return where the values of a sparse tensor stand."""
    if tensor.layout is torch.sparse_coo:
        return (tensor._indices(),)
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices()
    return ()


def _values_of_sparse(tensor: Tensor) -> Values:
    if tensor.layout is torch.sparse_coo:
        return values_of(tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return values_of(tensor.values())
    return None, None


def _values_of_subclass(tensor: Tensor, order: Order) -> Values:
    """Return the values of a subclass that is a plain tensor underneath; of others nothing is known."""
    if tensor.layout is torch.jagged:
        return values_of(tensor.values())
    local = getattr(tensor, "_local_tensor", None)  # DTensor: this rank's part
    if isinstance(local, Tensor):
        return values_of(local, order)
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        with without_overrides():
            return values_of(tensor.as_subclass(Tensor), order)
    return None, None


@functools.lru_cache(maxsize=256)
def step_of(groups: int) -> int:
    """Return how many groups on the next one is read: prime to all, so that rows and columns are met equally often."""
    step = -(-groups // _GROUPS)
    while math.gcd(step, groups) != 1:
        step += 1
    return step


def sample_of(values: Tensor) -> Tensor:
    """Return some elements of a strided tensor that has thousands, in groups of neighbours, [groups, elements]."""
    groups = values.numel() // GROUP
    step = step_of(groups)
    if values.is_contiguous():
        return values.as_strided((1 + (groups - 1) // step, GROUP), (step * GROUP, 1))
    first = torch.arange(0, groups, step, device=values.device).mul_(GROUP)
    places = first.unsqueeze(1) + torch.arange(GROUP, device=values.device)
    offsets, extent = torch.zeros_like(places), 1
    for size, stride in zip(reversed(values.shape), reversed(values.stride()), strict=True):
        offsets += places.remainder(size).mul_(stride)
        places = places.div_(size, rounding_mode="floor")
        extent += (size - 1) * stride
    return values.as_strided((extent,), (1,)).index_select(0, offsets.view(-1)).view(offsets.shape)


def limit_of(values: Tensor) -> int:
    """Return how many elements are copied at a time: of wide types fewer."""
    return forms_of(values.device).piece * 4 // max(values.element_size(), 4)


def pieces_of(values: Tensor, limit: int) -> Iterator[Tensor]:
    """Yield the elements of a strided tensor in rows, in their order; what is copied of it is not above the limit."""
    if values.is_contiguous():
        yield from torch.split(values.view(-1), limit)
    elif values.numel() <= limit:
        yield values.reshape(-1)
    else:
        within = values[0].numel()
        if within > limit:
            for part in values:
                yield from pieces_of(part, limit)
        else:
            for part in torch.split(values, max(limit // within, 1)):
                yield part.reshape(-1)
