"""Rows that are not kept: a history with a size, but no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from recollect.autoscale._codec import Codec
from recollect.autoscale._memory_rows import MemoryClock
from recollect.autoscale._rows import STAMP
from recollect.autoscale._selection import Selection
from recollect.autoscale._table import Table

__all__ = ["no_table"]


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


def no_table(codec: Codec, num_embeddings: int) -> Table:
    """Make a table that takes no memory."""
    records = NoRows((num_embeddings, codec.record_width), codec.record_dtype)
    return NoTable(codec, records, NoRows((num_embeddings, 1), STAMP), MemoryClock())
