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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale.histories import HistoryFileError, PlainRows, Where
from recollect.outofcore._journal import Journal

__all__ = ["Changes", "Rows", "Shape", "Slots", "Sum", "Tables", "load", "save", "unpacked"]

_CHECKSUM = struct.Struct("<I")
Rows = tuple[str, Where, Tensor]
"""A table by name, rows of it, and values."""
Shape = tuple[int, torch.dtype]
"""Entries in a row, and their type."""


@dataclass(frozen=True)
class Sum:
    """Values that are added to rows.

    Attributes:
        table: where the sum lies, by name.
        where: which rows.
        values: what is added.
        source: the table of what it is added to: the same, or another one.
    """

    table: str
    where: Where
    values: Tensor
    source: str


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
    cleared: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


class Tables:
    """All tables of a step.

    Args:
        rows: N.
        shapes: of the tables, by name.
        folder: of the files and the journal; ``None``: in memory.
    """

    def __init__(self, rows: int, shapes: dict[str, Shape], folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._number, self._folder = rows, folder
        self._journal = None if folder is None else Journal(folder)
        self._tables: dict[str, PlainRows] = {}
        for name, shape in shapes.items():
            self.make(name, shape)

    def make(self, name: str, shape: Shape) -> None:
        """Make a table, unless there is one."""
        if name not in self._tables:
            path = None if self._folder is None else self._folder / f"{name}.table"
            self._tables[name] = PlainRows(self._number, *shape, path)

    def __getitem__(self, name: str) -> PlainRows:
        return self._tables[name]

    def read(self, name: str, where: tuple[int, int], halo: Tensor) -> Tensor:
        """Return some rows in a row, and behind them others by number."""
        table, own = self._tables[name], where[1] - where[0]
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
                    self._tables[each.table].add(each.where, each.values)
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
            (name, where if isinstance(where, Tensor) else tuple(where), each) for name, where, each in entry["rows"]
        ]
        self._finish(rows, [(name, tuple(where)) for name, where in entry["cleared"]])
        state: dict[str, Any] = entry["state"]
        return state

    def forget(self) -> None:
        """Begin anew: the journal is of a step that is over."""
        if self._journal is not None:
            self._journal.clear()

    def _summed(self, each: Sum) -> Rows:
        return each.table, each.where, self._tables[each.source].read(each.where).add_(each.values)

    def _finish(self, rows: list[Rows], cleared: list[tuple[str, tuple[int, int]]]) -> None:
        """Do what is in the journal."""
        self._write(rows)
        self._clear(cleared)

    def _write(self, rows: list[Rows]) -> None:
        for name, where, values in rows:
            self._tables[name].write(where, values)

    def _clear(self, cleared: list[tuple[str, tuple[int, int]]]) -> None:
        for name, (start, stop) in cleared:
            table = self._tables[name]
            table.write((start, stop), table.empty(stop - start).zero_())


class Slots:
    """Which table each group is in: those that a pass changes go from one table to a spare one, which changes places.

    So what an operation reads stays until its pass is over. Without spare tables all is changed in place.

    Args:
        kind: "x", of activations, of which a pass changes one group, or "g", of gradients, of which it may change all
            but one.
        groups: how many there are.
        spare: whether there are spare tables.
    """

    def __init__(self, kind: str, groups: int, spare: bool) -> None:
        number = (1 if kind == "x" else max(1, groups - 1)) if spare else 0
        self.names = [f"{kind}{i}" for i in range(groups + number)]
        self._at, self._spare = list(range(groups)), list(range(groups, groups + number))

    def here(self, group: int) -> str:
        """Return the table in which a group is before a pass."""
        return self.names[self._at[group]]

    def there(self, group: int, changed: list[int]) -> str:
        """Return the table in which it is behind the pass, which changes some groups."""
        return self.names[self._spare[changed.index(group)]] if self._spare else self.here(group)

    def turn(self, changed: list[int]) -> None:
        """Take notice that a pass is over."""
        if self._spare:
            for place, group in enumerate(changed):
                self._at[group], self._spare[place] = self._spare[place], self._at[group]


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
