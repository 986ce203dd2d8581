"""The storages behind tensors: of one tensor, of an operation's arguments, of a model or an optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from recollect._torch import is_traceable_wrapper_subclass

__all__ = ["is_kept", "moment", "note_kept", "storages_of", "storages_within", "tensors_in"]

_ROW_COMPRESSED = (torch.sparse_csr, torch.sparse_bsr)
_COLUMN_COMPRESSED = (torch.sparse_csc, torch.sparse_bsc)
_NO_TENSORS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def storages_of(tensor: Tensor) -> Iterator[UntypedStorage]:
    """Yield the storages of a tensor: one if strided, of indices and values if sparse, none if opaque."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a DTensor names its mesh too
                yield from storages_of(part)
        return
    parts: tuple[Tensor, ...] = ()
    if tensor.layout is torch.strided:
        parts = (tensor,)
    elif tensor.layout is torch.sparse_coo:
        parts = (tensor._indices(), tensor._values())  # these two work on uncoalesced tensors too
    elif tensor.layout in _ROW_COMPRESSED:
        parts = (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in _COLUMN_COMPRESSED:
        parts = (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    for part in parts:
        yield part.untyped_storage()


def storages_within(nest: Any) -> Iterator[UntypedStorage]:
    """Yield the storages of each tensor or storage in nested tuples, lists and mappings; skip all else."""
    if isinstance(nest, Tensor):
        yield from storages_of(nest)
    elif isinstance(nest, UntypedStorage):
        yield nest
    elif isinstance(nest, torch.TypedStorage):
        yield nest._untyped_storage
    elif isinstance(nest, (tuple, list)):
        for item in nest:
            yield from storages_within(item)
    elif isinstance(nest, Mapping):
        for item in nest.values():
            yield from storages_within(item)


def tensors_in(nest: Any) -> Iterator[Tensor | UntypedStorage]:
    """Yield the tensors and storages of modules, optimizers, mappings and iterables, nested at will.

    Raises:
        TypeError: Something in the nest is neither of these nor a plain value without tensors.
    """
    if isinstance(nest, (Tensor, UntypedStorage)):
        yield nest
    elif isinstance(nest, nn.Module):
        yield from nest.parameters()
        yield from nest.buffers()
    elif isinstance(nest, torch.optim.Optimizer):
        yield from tensors_in([group["params"] for group in nest.param_groups])
        yield from tensors_in(list(nest.state.values()))
    elif isinstance(nest, Mapping):
        for item in nest.values():
            yield from tensors_in(item)
    elif isinstance(nest, Iterable) and not isinstance(nest, _NO_TENSORS):
        for item in nest:
            yield from tensors_in(item)
    elif not isinstance(nest, _NO_TENSORS):
        raise TypeError(
            f"tensor_bytes() cannot look into a {type(nest).__name__}: it takes tensors, storages, modules, "
            "optimizers, and mappings or iterables of these"
        )


_kept: dict[int, tuple[int, weakref.ref[Tensor]]] = {}  # by the keys of their storages, with the moment
_moment = 0


def note_kept(tensor: Tensor) -> None:
    """Note that somebody keeps a tensor, whatever backward needs of it, and does not change it as long as it lives."""
    global _moment
    keys = [storage._cdata for storage in storages_of(tensor)]

    def forget(_: weakref.ref[Tensor]) -> None:
        for key in keys:
            _kept.pop(key, None)

    _moment += 1
    reference = weakref.ref(tensor, forget)
    _kept.update(dict.fromkeys(keys, (_moment, reference)))


def moment() -> int:
    """Return what :func:`is_kept` tells earlier notes from later ones by."""
    return _moment


def is_kept(keys: tuple[int, ...], before: int) -> bool:
    """Return whether storages, by their keys, are of a tensor that :func:`note_kept` was told of before a moment."""
    for key in keys:
        noted = _kept.get(key)
        if noted is not None and noted[0] <= before:
            return True
    return False
