"""The tables of a step: activations and gradients of each group, in memory or in files, and a journal.

With files, most of what an operation writes goes into rows that it does not read, and that nobody reads before it is
done: to write them twice changes nothing. What it writes into others goes to the journal, whole or not at all, and then
to the tables. So a process that is killed leaves the last operation either undone, to be done anew, or in the journal,
from where the rest can be done again.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale.histories import HistoryFileError, PlainRows, Where
from recollect.outofcore._journal import Journal

__all__ = ["Changes", "Places", "Rows", "Shape", "Sum", "Table", "Tables", "load", "save", "unpacked"]

_CHECKSUM = struct.Struct("<I")
Table = tuple[str, int]
"""A table by name, and the place in its file where its rows begin; see :class:`Places`."""
Rows = tuple[Table, Where, Tensor]
"""A table, rows of it, and values."""
Shape = tuple[int, torch.dtype]
"""Entries in a row, and their type."""


@dataclass(frozen=True)
class Sum:
    """Values that are added to rows.

    Attributes:
        table: where the sum lies.
        where: which rows.
        values: what is added.
        source: the table of what it is added to: the same, or the one that it was before the pass.
    """

    table: Table
    where: Where
    values: Tensor
    source: Table


@dataclass
class Changes:
    """What an operation does.

    Attributes:
        rows: new values, of rows that no operation reads before this one is done.
        added: what is added; only to rows that nobody else changes meanwhile.
        cleared: rows that become zero when all else is done, by table.
        state: what else must be known to go on.
    """

    rows: list[Rows] = field(default_factory=list)
    added: list[Sum] = field(default_factory=list)
    cleared: list[tuple[Table, tuple[int, int]]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


class Tables:
    """All tables of a step.

    Args:
        rows: N.
        shapes: of the tables, by name.
        folder: of the files and the journal; ``None``: in memory.
        moved: the names of tables that passes move; see :class:`Places`.
        spare: how many rows these have beside N.
    """

    def __init__(
        self, rows: int, shapes: dict[str, Shape], folder: Path | None, moved: Collection[str] = (), spare: int = 0
    ) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._number, self._folder = rows, folder
        self._moved, self.spare = frozenset(moved), spare
        self._journal = None if folder is None else Journal(folder)
        self._tables: dict[str, PlainRows] = {}
        for name, shape in shapes.items():
            self.make(name, shape)

    def make(self, name: str, shape: Shape) -> None:
        """Make a table, unless there is one."""
        if name not in self._tables:
            path = None if self._folder is None else self._folder / f"{name}.table"
            number = self._number + (self.spare if name in self._moved else 0)
            self._tables[name] = PlainRows(number, *shape, path)

    def __getitem__(self, name: str) -> PlainRows:
        return self._tables[name]

    @property
    def sizes(self) -> dict[str, tuple[int, int, torch.dtype]]:
        """Rows, entries in a row and their type, of each table that there is."""
        return {name: table.size for name, table in self._tables.items()}

    def at(self, table: Table) -> PlainRows:
        """Return a table's rows."""
        name, begin = table
        return self[name] if name not in self._moved else _Ring(self[name], self._number + self.spare, begin)

    def places(self, journaled: bool) -> Places:
        """Return where tables begin, in a step that has not begun."""
        return Places(self._number + self.spare, self.spare if journaled else 0)

    def read(self, at: Table, where: tuple[int, int], halo: Tensor) -> Tensor:
        """Return some rows in a row, and behind them others by number."""
        table, own = self.at(at), where[1] - where[0]
        rows = table.empty(own + halo.numel())
        table.read(where, rows[:own])
        table.read(halo, rows[own:])
        return rows

    def apply(self, changes: Changes, journaled: bool) -> None:
        """Do what an operation does; so that another process can go on behind it, if it is journaled."""
        self._write(changes.rows)
        if self._journal is None or not journaled:
            for each in changes.added:
                if each.source == each.table:
                    self.at(each.table).add(each.where, each.values)
                else:
                    self._write([self._summed(each)])
            self._clear(changes.cleared)
            return
        self._write([self._summed(each) for each in changes.added if each.source != each.table])
        rows = [self._summed(each) for each in changes.added if each.source == each.table]
        self._journal.write({"rows": rows, "cleared": changes.cleared, "state": changes.state})
        self._finish(rows, changes.cleared)

    def last(self) -> dict[str, Any] | None:
        """Finish what the journal says, and return the state that comes with it; ``None`` without a journal."""
        entry = None if self._journal is None else self._journal.last()
        if entry is None:
            return None
        rows = [
            (tuple(table), where if isinstance(where, Tensor) else tuple(where), each)
            for table, where, each in entry["rows"]
        ]
        self._finish(rows, [(tuple(table), tuple(where)) for table, where in entry["cleared"]])
        state: dict[str, Any] = entry["state"]
        return state

    def forget(self) -> None:
        """Begin anew: the journal is of a step that is over."""
        if self._journal is not None:
            self._journal.clear()

    def _summed(self, each: Sum) -> Rows:
        return each.table, each.where, self.at(each.source).read(each.where).add_(each.values)

    def _finish(self, rows: list[Rows], cleared: list[tuple[Table, tuple[int, int]]]) -> None:
        """Do what is in the journal."""
        self._write(rows)
        self._clear(cleared)

    def _write(self, rows: list[Rows]) -> None:
        for table, where, values in rows:
            self.at(table).write(where, values)

    def _clear(self, cleared: list[tuple[Table, tuple[int, int]]]) -> None:
        for table, (start, stop) in cleared:
            rows = self.at(table)
            rows.write((start, stop), rows.empty(stop - start).zero_())


class Places:
    """Where the rows of tables begin, each of which is a ring of more rows than N.

    A pass over the parts, in their order, writes the new rows of those that it changes so many places before the old
    ones. If these are as many as the largest part has, a part's new rows lie where old rows of parts before it were, or
    where there were none: what an operation reads stays until the operation behind it is under way. So a table that is
    changed in a pass takes the room of one part more, and not that of another table.

    Args:
        rows: of a ring: N, and those of the largest part.
        by: those of the largest part; 0: all is changed in place.
    """

    def __init__(self, rows: int, by: int) -> None:
        self._rows, self._by = rows, by
        self._begin: dict[str, int] = {}

    def here(self, name: str) -> Table:
        """Return a table as it is before a pass."""
        return name, self._begin.get(name, 0)

    def there(self, name: str) -> Table:
        """Return it as it is behind a pass that changes it."""
        return name, (self._begin.get(name, 0) - self._by) % self._rows

    def sums(self, name: str, where: tuple[int, int], halo: Tensor, values: Tensor) -> list[Sum]:
        """Return what adds to rows of a table in a pass that changes it, over all parts in their order.

        Args:
            name: of the table.
            where: the nodes of a part.
            halo: its neighbours, ascending.
            values: for its nodes, and for those of its halo, or for its nodes alone.
        """
        here, there, own = self.here(name), self.there(name), where[1] - where[0]
        found, around = [Sum(there, where, values[:own], here)], values[own:]
        if not around.size(0):
            return found
        if here == there:
            return [*found, Sum(here, halo, around, here)]
        before = int((halo < where[0]).sum())  # has moved already
        found.append(Sum(there, halo[:before], around[:before], there))
        return [*found, Sum(here, halo[before:], around[before:], here)]

    def turn(self, changed: Iterable[str]) -> None:
        """Take notice that a pass is over, which changed some tables."""
        self._begin.update([self.there(name) for name in dict.fromkeys(changed)])


class _Ring(PlainRows):
    """Rows that begin somewhere in a ring."""

    def __init__(self, rows: PlainRows, length: int, begin: int) -> None:
        self._plain, self._length, self._begin = rows, length, begin

    def empty(self, rows: int) -> Tensor:
        """See :class:`PlainRows`."""
        return self._plain.empty(rows)

    def read(self, where: Where, out: Tensor | None = None) -> Tensor:
        """See :class:`PlainRows`."""
        number = where.numel() if isinstance(where, Tensor) else where[1] - where[0]
        out = self.empty(number) if out is None else out
        for rows, place in self._pieces(where):
            self._plain.read(place, out[rows])
        return out

    def write(self, where: Where, values: Tensor) -> None:
        """See :class:`PlainRows`."""
        for rows, place in self._pieces(where):
            self._plain.write(place, values[rows])

    def add(self, where: Where, values: Tensor) -> None:
        """See :class:`PlainRows`."""
        for rows, place in self._pieces(where):
            self._plain.add(place, values[rows])

    def _pieces(self, where: Where) -> list[tuple[slice, Where]]:
        """Return which of some rows lie where."""
        if isinstance(where, Tensor):
            return [(slice(None), (where + self._begin) % self._length)]
        first, number = (where[0] + self._begin) % self._length, where[1] - where[0]
        left = min(number, self._length - first)
        pieces: list[tuple[slice, Where]] = [(slice(0, left), (first, first + left))]
        return pieces if left == number else [*pieces, (slice(left, number), (0, number - left))]


def save(path: Path, value: Any) -> None:
    """Write a file, whole or not at all, with a checksum."""
    stream = io.BytesIO()
    torch.save(value, stream)
    beside = path.with_suffix(".new")
    beside.write_bytes(_CHECKSUM.pack(zlib.crc32(stream.getbuffer())) + stream.getvalue())
    os.replace(beside, path)


def load(path: Path) -> Any:
    """Return what :func:`save` wrote.

    Raises:
        HistoryFileError: the file is something else.
    """
    content = path.read_bytes() if path.is_file() else b""
    body = memoryview(content)[_CHECKSUM.size :]
    if len(content) < _CHECKSUM.size or _CHECKSUM.unpack(content[: _CHECKSUM.size])[0] != zlib.crc32(body):
        raise HistoryFileError(
            f"{path}: expected what a step wrote, with its checksum (got {len(content)} bytes: it was cut or "
            "changed): the step cannot go on; remove its step.pt, and begin it anew by step(criterion)"
        )
    return unpacked(path, io.BytesIO(body))


def unpacked(path: Path, source: Any, mmap: bool = False) -> Any:
    """Return what a file of torch holds, of which nothing is run; mapped, it is read where it is looked at.

    Raises:
        HistoryFileError: it is something else.
    """
    try:
        return torch.load(source, weights_only=True, mmap=mmap)
    except Exception as error:
        raise HistoryFileError(
            f"{path}: expected tensors that WholeGraph wrote (got {type(error).__name__}: the file was cut or "
            "changed); make another WholeGraph on this folder"
        ) from error
