"""The rows of a history, each with the time of its last push, and what they need of the place that they lie in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from recollect.autoscale.histories._codec import Codec
from recollect.autoscale.histories._selection import Selection, Slices, length, select_all

__all__ = ["STAMP", "STATE", "Clock", "Rows", "Table"]

STAMP = torch.int32
"""Type of the number of the push in which a row was written last; 0: never."""


class Rows(Protocol):
    """Equal rows of one type."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        ...

    @property
    def device(self) -> torch.device:
        """On which rows are read and written."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and entries of a row."""
        ...

    def write(self, values: Tensor, where: Selection) -> None:
        """Copy ``values`` [rows, width] to the selected rows, converting type and device."""
        ...

    def read(self, where: Selection, out: Tensor) -> None:
        """Copy the selected rows into ``out`` [rows, width], contiguous and of this type and device."""
        ...

    def whole(self) -> Tensor:
        """Return all of them, not copied."""
        ...

    def zero_(self) -> None:
        """Set all to 0."""
        ...


class Clock(Protocol):
    """Counts the pushes."""

    @property
    def pushes(self) -> int:
        """So far."""
        ...

    def push(self) -> AbstractContextManager[int]:
        """Count one more; in the body its rows are written. Gives its number."""
        ...

    def reset(self, pushes: int = 0) -> None:
        """Count from here."""
        ...


STATE = ("table", "stamps", "pushes")
"""What a table's state consists of."""


class Table:
    """Rows of floats: records, their stamps and their clock. It trusts its arguments.

    Args:
        codec: between floats and records.
        records: [rows, codec.record_width].
        stamps: [rows, 1], numbers of pushes.
        clock: of the pushes.
    """

    def __init__(self, codec: Codec, records: Rows, stamps: Rows, clock: Clock) -> None:
        self.codec = codec
        self.records = records
        self.stamps = stamps
        self.clock = clock

    def write(self, x: Tensor, where: Selection) -> None:
        """Write ``x`` [rows, channels] to the selected rows, as one more push."""
        records = self.codec.encode(x)
        with self.clock.push() as number:
            # Stamps first: what was being written when the process died is known by its number.
            self.stamps.write(torch.full((x.size(0), 1), number, dtype=STAMP, device="cpu"), where)
            self.records.write(records, where)

    def read(self, where: Selection, out: Tensor) -> None:
        """Read the selected rows into ``out`` [rows, channels], contiguous, of any float type, on any device."""
        if self.codec.decodes_to(out.dtype) and out.device == self.records.device:
            self.records.read(where, out)
            return
        records = torch.empty(
            length(where), self.codec.record_width, dtype=self.codec.record_dtype, device=self.records.device
        )
        self.records.read(where, records)
        self.codec.decode(records, out)

    def ages(self, where: Selection) -> Tensor:
        """Return the pushes since the selected rows were written, [rows] int64 on the CPU."""
        stamps = torch.empty(length(where), 1, dtype=STAMP, device="cpu")
        self.stamps.read(where, stamps)
        return self.clock.pushes - stamps.squeeze(1).to(torch.int64)

    def state(self) -> dict[str, Tensor]:
        """Return what ``state_dict`` holds: the tensors themselves, as it does of parameters."""
        return {
            "table": self.records.whole(),
            "stamps": self.stamps.whole(),
            "pushes": torch.tensor(self.clock.pushes, device="cpu"),
        }

    def load(self, state: Mapping[str, Tensor]) -> str | None:
        """Take over a state; of another shape or type it is left alone, and what is wrong is returned."""
        for name, rows in (("table", self.records), ("stamps", self.stamps)):
            found = state[name]
            if found.shape != rows.shape or found.dtype != rows.dtype:
                return (
                    f"{name}: a history of {list(rows.shape)} records in {rows.dtype} cannot load "
                    f"{list(found.shape)} in {found.dtype}"
                )
        pushes = state["pushes"]
        if pushes.numel() != 1 or pushes.is_floating_point() or int(pushes) < 0:
            return f"pushes: the number of pushes is expected (got {pushes.tolist()})"
        self.records.write(state["table"], self._everything)
        self.stamps.write(state["stamps"], self._everything)
        self.clock.reset(int(pushes))
        return None

    def reset(self) -> None:
        """Set all rows to 0, never pushed."""
        if self.clock.pushes == 0:  # they are; a large file is made in no time, but not written in none
            return
        with self.clock.push() as number:  # as in a push: what was being set to 0 when the process died is known
            stamp = torch.tensor([[number]], dtype=STAMP, device="cpu")
            self.stamps.write(stamp.expand(self.stamps.shape), self._everything)
            self.records.zero_()
            self.stamps.zero_()
        self.clock.reset()

    @property
    def _everything(self) -> Slices:
        return select_all(self.records.shape[0])
