"""Rows in host memory or on a device; and rows that are not kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

import torch
from torch import Tensor

from recollect._transfer import sent
from recollect.autoscale.histories._codec import Codec
from recollect.autoscale.histories._selection import Selection
from recollect.autoscale.histories._table import STAMP, Table, UnderWay

__all__ = ["MemoryClock", "MemoryRows", "MemoryTable", "memory_table", "no_table"]


class MemoryRows:
    """Rows in a tensor [rows, width] on any device.

    Args:
        tensor: the rows.
        pinned: whether a copy of them, made in this process or read in another, is pinned where that is of use.
    """

    def __init__(self, tensor: Tensor, pinned: bool = False) -> None:
        self.tensor = tensor
        self.pinned = pinned
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.shape = (tensor.size(0), tensor.size(1))

    def write(self, values: Tensor, where: Selection) -> None:
        """See :class:`Rows`."""
        if isinstance(where, Tensor):
            self.tensor.index_copy_(0, sent(where, self.device), values.to(self.device, self.dtype))
            return
        if values.device != self.device:  # in the table's type, so that fewer bytes travel
            values = values.to(self.dtype)
        done = 0
        for start, stop in where:
            self.tensor[start:stop].copy_(values[done : done + stop - start])
            done += stop - start

    def read(self, where: Selection, out: Tensor) -> None:
        """See :class:`Rows`."""
        if isinstance(where, Tensor):
            torch.index_select(self.tensor, 0, sent(where, self.device), out=out)
            return
        done = 0
        for start, stop in where:
            out[done : done + stop - start].copy_(self.tensor[start:stop])
            done += stop - start

    def whole(self) -> Tensor:
        """See :class:`Rows`."""
        return self.tensor

    def zero_(self) -> None:
        """See :class:`Rows`."""
        self.tensor.zero_()

    def __reduce__(self) -> tuple[Callable[[Tensor, bool], MemoryRows], tuple[Tensor, bool]]:
        return _copied, (self.tensor, self.pinned)


def _copied(tensor: Tensor, pinned: bool) -> MemoryRows:
    """Make rows of a copied or unpickled tensor, which torch does not pin."""
    return MemoryRows(tensor.pin_memory() if pinned and _is_pinnable(tensor.device) else tensor, pinned)


def _is_pinnable(device: torch.device) -> bool:
    return device.type == "cpu" and torch.cuda.is_available()


class MemoryClock:
    """The number of pushes, in the process alone."""

    def __init__(self) -> None:
        self.pushes = 0
        self.base = 0

    def note(self, pushes: int, base: int, under_way: UnderWay = UnderWay.NOTHING) -> None:
        """See :class:`Clock`."""
        self.pushes, self.base = pushes, base

    def reset(self, pushes: int = 0) -> None:
        """See :class:`Clock`."""
        self.note(pushes, 0)


def memory_table(codec: Codec, num_embeddings: int, device: torch.device) -> Table:
    """Allocate a table of zeros on a device; host memory is pinned where there is CUDA to copy to.

    The stamps are always in host memory: the rows to stamp are known there.
    """
    with torch.inference_mode(False):  # a table made in inference mode could not be written outside of it
        shape = num_embeddings, codec.record_width
        records = torch.zeros(shape, dtype=codec.record_dtype, device=device, pin_memory=_is_pinnable(device))
        stamps = torch.zeros(num_embeddings, 1, dtype=STAMP, device="cpu")
    return MemoryTable(codec, MemoryRows(records, pinned=True), MemoryRows(stamps), MemoryClock())


class MemoryTable(Table):
    """A table in a tensor."""

    def extended(self, rows: int) -> Table:
        """See :class:`Table`."""
        other = memory_table(self.codec, rows, self.records.device)
        self.copy_to(other)
        return other


class NoRows:
    """Rows that can be written, which does nothing, but not read."""

    device = torch.device("cpu")

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype

    def write(self, values: Tensor, where: Selection) -> None:
        """See :class:`Rows`."""

    def read(self, where: Selection, out: Tensor) -> NoReturn:
        """Refuse."""
        self.whole()

    def whole(self) -> NoReturn:
        """Refuse."""
        raise RuntimeError(
            "this history was made with keep=False, as those of a network with keep_histories=False are, so it has no "
            "rows: it serves passes over the whole graph alone; make it with keep=True for mini-batches"
        )

    def zero_(self) -> None:
        """See :class:`Rows`."""


class NoTable(Table):
    """A table of these rows, which takes over no state."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Leave it: there is no place for what was kept elsewhere."""

    def extended(self, rows: int) -> Table:
        """See :class:`Table`."""
        return no_table(self.codec, rows)


def no_table(codec: Codec, num_embeddings: int) -> Table:
    """Make a table that takes no memory."""
    records = NoRows((num_embeddings, codec.record_width), codec.record_dtype)
    return NoTable(codec, records, NoRows((num_embeddings, 1), STAMP), MemoryClock())
