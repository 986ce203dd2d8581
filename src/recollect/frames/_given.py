"""Where among the arguments of a call a saved tensor lies: what comes back with them needs no fingerprint."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Given", "Part"]


class Part(NamedTuple):
    """A part of an argument's memory, or a whole argument."""

    argument: int  # which of the tensors
    strides: tuple[int, ...] | None  # of that argument; None: the part is the argument itself
    offset: int  # in bytes, from its first element
    layout: tuple[int, ...]  # the part's own strides


class Given:
    """The tensors of a call, to tell a part of them from another: two parts of one argument have other values.

    Args:
        tensors: in the order in which they stand among the arguments.

    Example:
        >>> import torch
        >>> from recollect.frames._given import Given
        >>> x = torch.arange(6.0).view(3, 2)
        >>> part = Given([x]).part_of(x[:, 1])
        >>> again = Given([x.clone()])  # what backward brings back
        >>> again.is_at(part, again.tensors[0][:, 1]), again.is_at(part, again.tensors[0][:, 0])
        (True, False)
        >>> again.value_of(part, torch.Size([3]), x.dtype)
        tensor([1., 3., 5.])
    """

    __slots__ = ("_storages", "tensors")

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._storages: dict[int, list[int]] | None = None

    def part_of(self, tensor: Tensor) -> Part | None:
        """Return which part of which argument a tensor is; ``None`` if it is no part of one."""
        for index, argument in enumerate(self.tensors):
            if argument is tensor:  # most often
                return _whole(index)
        if not _is_plain(tensor):
            return None
        if self._storages is None:
            self._storages = self._by_storage()
        found = self._storages.get(tensor.untyped_storage()._cdata)
        if found is None or _is_lazily_changed(tensor):
            return None
        strides = tensor.stride()
        found = [index for index in found if not _is_lazily_changed(self.tensors[index])]
        for index in found:  # a detached one, as a whole
            argument = self.tensors[index]
            if (
                tensor.shape == argument.shape
                and tensor.storage_offset() == argument.storage_offset()
                and tensor.dtype is argument.dtype
                and strides == argument.stride()
            ):
                return Part(index, strides, 0, strides)
        begin, end = _span(tensor)
        for index in found:
            argument = self.tensors[index]
            first, last = _span(argument)
            if first <= begin and end <= last:
                return Part(index, argument.stride(), begin - first, strides)
        return None

    def _by_storage(self) -> dict[int, list[int]]:
        storages: dict[int, list[int]] = {}
        for index, tensor in enumerate(self.tensors):
            if _is_plain(tensor):
                storages.setdefault(tensor.untyped_storage()._cdata, []).append(index)
        return storages

    def is_at(self, part: Part, tensor: Tensor) -> bool:
        """Whether a tensor is this part of these arguments."""
        if part.argument >= len(self.tensors):
            return False
        argument = self.tensors[part.argument]
        if part.strides is None or not _is_plain(tensor) or not _is_plain(argument):
            return tensor is argument
        return (
            tensor.untyped_storage()._cdata == argument.untyped_storage()._cdata
            and tensor.storage_offset() * tensor.element_size()
            == argument.storage_offset() * argument.element_size() + part.offset
            and tensor.stride() == part.layout
            and argument.stride() == part.strides
            and not _is_lazily_changed(tensor)
        )

    def value_of(self, part: Part, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Return what this part of the arguments holds, whatever their strides are now; ``None`` if there is no such.

        Args:
            part: of arguments with the same values.
            shape: the part's.
            dtype: the part's.
        """
        if part.argument >= len(self.tensors):
            return None
        argument = self.tensors[part.argument].detach()
        if part.strides is None or not _is_plain(argument):
            return argument
        if argument.dim() != len(part.strides):
            return None
        if argument.numel() == 0:
            return torch.empty(shape, dtype=dtype, device=argument.device)
        size = 1 + sum((n - 1) * step for n, step in zip(argument.shape, part.strides, strict=True))
        places = torch.arange(size, device=argument.device).as_strided(argument.shape, part.strides)
        memory = torch.zeros(size, dtype=argument.dtype, device=argument.device)
        memory[places.reshape(-1)] = argument.reshape(-1)
        value = torch.empty(0, dtype=dtype, device=argument.device)
        return value.set_(memory.untyped_storage(), part.offset // value.element_size(), shape, part.layout)


@functools.cache
def _whole(index: int) -> Part:
    return Part(index, None, 0, ())


def _is_plain(tensor: Tensor) -> bool:
    kind = type(tensor)
    return (kind is Tensor or kind is nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested


def _is_lazily_changed(tensor: Tensor) -> bool:
    """Whether its elements are not those in its memory."""
    return tensor.is_conj() or tensor.is_neg()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte in the storage, and the one behind the last element."""
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    if tensor.numel() == 0:
        return begin, begin
    steps = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + size * (1 + steps)
