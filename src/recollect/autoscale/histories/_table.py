"""The rows of a history, each with the time of its last push, and what they need of the place that they lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from recollect.autoscale._stamp import GraphStamp
from recollect.autoscale.histories._codec import Codec
from recollect.autoscale.histories._selection import Selection, Slices, length, numbers_of, select_all

__all__ = ["STAMP", "STATE", "Clock", "Rows", "Table", "UnderWay"]

STAMP = torch.int32
"""Type of the number of the push in which a row was written last, as 32 bits without a sign; 0: never."""

_LARGEST = 2**32 - 1
"""Of the numbers that are a stamp."""

_PIECE = 1 << 20
"""Rows whose stamps are looked at in one go."""

_COPY_BYTES = 8 << 20
"""What is copied from one table to another in one go."""


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


class UnderWay(IntEnum):
    """What a table is doing, as its clock notes it: so is known what a process that died left half done."""

    NOTHING = 0
    PUSH = 1
    REBASE = 2


class Clock(Protocol):
    """Counts the pushes."""

    @property
    def pushes(self) -> int:
        """So far."""
        ...

    @property
    def base(self) -> int:
        """What stamps are numbers above: 0 for the first 2**32 - 1 pushes."""
        ...

    def note(self, pushes: int, base: int, under_way: UnderWay = UnderWay.NOTHING) -> None:
        """Take over these numbers, and what begins or ended now."""
        ...

    def reset(self, pushes: int = 0) -> None:
        """Count from here, with the base 0."""
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

    Attributes:
        graph: whose nodes the rows are; ``None``: not known.
    """

    graph: GraphStamp | None = None

    def __init__(self, codec: Codec, records: Rows, stamps: Rows, clock: Clock) -> None:
        self.codec = codec
        self.records = records
        self.stamps = stamps
        self.clock = clock

    def write(self, x: Tensor, where: Selection) -> None:
        """Write ``x`` [rows, channels] to the selected rows, as one more push.

        Where that fails, rows that were not written keep their stamps, and a push that wrote none does not count.
        """
        self.mend()
        self.put(self.codec.encode(x), where, self.next_push())

    def put(self, records: Tensor, where: Selection, number: int) -> None:
        """Do the push of this number."""
        try:
            self.records.write(records, where)
        except BaseException:
            written = numbers_of(where)[self.holding(records, where)]
            if written.numel():
                self.clock.note(number, self.clock.base)
                self.stamps.write(self.stamp(number).expand(written.numel(), 1), written)
            raise
        self.clock.note(number, self.clock.base)
        self.stamps.write(self.stamp(number).expand(records.size(0), 1), where)

    def mend(self) -> None:
        """Finish what a push that failed left half done, before anything else; here it leaves nothing so."""

    def read(self, where: Selection, out: Tensor) -> None:
        """Read the selected rows into ``out`` [rows, channels], contiguous, of any float type, on any device."""
        self.mend()
        if self.codec.decodes_to(out.dtype) and out.device == self.records.device:
            self.records.read(where, out)
            return
        records = torch.empty(
            length(where), self.codec.record_width, dtype=self.codec.record_dtype, device=self.records.device
        )
        self.records.read(where, records)
        self.codec.decode(records, out)

    def read_own(self, where: Selection, out: Tensor) -> None:
        """Do what :meth:`read` does, for rows that lie here, whatever other ranks do."""
        self.read(where, out)

    def ages(self, where: Selection) -> Tensor:
        """Return the pushes since the selected rows were written, [rows] int64 on the CPU."""
        self.mend()
        above = self.numbers(where)
        return self.clock.pushes - torch.where(above > 0, above + self.clock.base, 0)

    def state(self) -> dict[str, Tensor]:
        """Return what ``state_dict`` holds: the tensors themselves, as it does of parameters."""
        self.mend()
        return {
            "table": self.records.whole(),
            "stamps": self.stamps.whole(),
            "pushes": torch.tensor(self.clock.pushes - self.clock.base, device="cpu"),
        }

    def load(self, state: Mapping[str, Tensor]) -> str | None:
        """Take over a state; one that does not fit is left alone, and what is wrong is returned."""
        self.mend()
        for name, rows in (("table", self.records), ("stamps", self.stamps)):
            found = state[name]
            if found.shape != rows.shape or found.dtype != rows.dtype:
                return (
                    f"{name}: a history of {list(rows.shape)} records in {rows.dtype} cannot load "
                    f"{list(found.shape)} in {found.dtype}"
                )
        pushes = state["pushes"]
        if pushes.numel() != 1 or pushes.is_floating_point() or not 0 <= int(pushes) < 2**62:
            return f"pushes: the number of pushes is expected (got {pushes.tolist()})"
        latest = int(_unsigned(state["stamps"]).max())
        if latest > int(pushes):
            return f"stamps: numbers of at most {int(pushes)} pushes are expected (got {latest})"
        # As in a push: what was being loaded when the process died is known by its number.
        number = max(self.next_push(), int(pushes) + 1)
        self.clock.note(number, max(self.clock.base, number - _LARGEST // 2), UnderWay.PUSH)
        self.stamps.write(self.stamp(number).expand(self.stamps.shape), self.everything)
        self.records.write(state["table"], self.everything)
        self.stamps.write(state["stamps"], self.everything)
        self.clock.reset(int(pushes))
        self.graph = None
        return None

    def reset(self) -> None:
        """Set all rows to 0, never pushed."""
        self.mend()
        self.graph = None
        if self.clock.pushes == 0:  # they are; a large file is made in no time, but not written in none
            return
        number = self.next_push()  # as in a push: what was being set to 0 when the process died is known
        self.clock.note(number, self.clock.base, UnderWay.PUSH)
        self.stamps.write(self.stamp(number).expand(self.stamps.shape), self.everything)
        self.records.zero_()
        self.stamps.zero_()
        self.clock.reset()

    def extended(self, rows: int) -> Table:
        """Return a table in the place of this one that begins with its rows; further ones are 0, never pushed."""
        raise NotImplementedError

    def copy_to(self, other: Table) -> None:
        """Copy all rows, their stamps and the numbers of pushes to the first rows of another table."""
        for ours, theirs in ((self.stamps, other.stamps), (self.records, other.records)):
            for piece in self.pieces(max(1, _COPY_BYTES // (ours.shape[1] * ours.dtype.itemsize))):
                values = torch.empty(length(piece), ours.shape[1], dtype=ours.dtype, device=ours.device)
                ours.read(piece, values)
                theirs.write(values, piece)
        other.clock.note(self.clock.pushes, self.clock.base)

    @property
    def everything(self) -> Slices:
        """All rows."""
        return select_all(self.records.shape[0])

    def stamp(self, number: int) -> Tensor:
        """Return a push's number as a stamp [1, 1]."""
        above = number - self.clock.base
        signed = above if above <= _LARGEST // 2 else above - _LARGEST - 1
        return torch.tensor([[signed]], dtype=STAMP, device="cpu")

    def numbers(self, where: Selection) -> Tensor:
        """Return the stamps of the selected rows as numbers above the clock's base [rows] int64; 0: never pushed."""
        stamps = torch.empty(length(where), 1, dtype=STAMP, device="cpu")
        self.stamps.read(where, stamps)
        return _unsigned(stamps).squeeze(1)

    def next_push(self) -> int:
        """Return the number of the next push, and see to it that there is a stamp for it.

        After 2**32 - 1 pushes there is a new base, and rows that are older than it count as 2**31 pushes old.
        """
        number = self.clock.pushes + 1
        if number - self.clock.base > _LARGEST:
            base = number - _LARGEST // 2 - 1
            shift = base - self.clock.base
            self.clock.note(self.clock.pushes, base, UnderWay.REBASE)
            self.restamp(lambda above: (above - shift).clamp_min(1))
            self.clock.note(self.clock.pushes, base)
        return number

    def restamp(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change the numbers [rows] int64 of all rows that were ever pushed."""
        for piece in self.pieces():
            above = self.numbers(piece)
            new = torch.where(above > 0, function(above), 0)
            self.stamps.write(new.to(STAMP).unsqueeze(1), piece)

    def pieces(self, size: int = _PIECE) -> Iterator[Slices]:
        """Cut all rows into ranges that are looked at one after the other."""
        rows = self.records.shape[0]
        for start in range(0, rows, size):
            yield ((start, min(rows, start + size)),)

    def holding(self, records: Tensor, where: Selection) -> Tensor:
        """Return which of the selected rows hold these records bit for bit [rows] bool; none if they are unreadable."""
        found = torch.empty(length(where), self.records.shape[1], dtype=self.records.dtype, device=self.records.device)
        try:
            self.records.read(where, found)
            wanted = records.to(found.device, found.dtype).contiguous()
        except Exception:  # that they are older than they are is the safe side
            return torch.zeros(found.size(0), dtype=torch.bool, device="cpu")
        return (found.view(torch.uint8) == wanted.view(torch.uint8)).all(1).cpu()


def _unsigned(stamps: Tensor) -> Tensor:
    return stamps.to(torch.int64).bitwise_and_(_LARGEST)
