"""The tables of a step: activations and gradients of each group, in memory or in files, and a journal.

With files, what an operation writes goes to the journal first, whole or not at all, and then to the tables. So a
process that is killed leaves the last operation either undone or in the journal, from where it can be done again.
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

__all__ = ["Changes", "Shape", "Tables", "load", "save", "unpacked"]

_CHECKSUM = struct.Struct("<I")
Rows = tuple[str, Where, Tensor]
"""A table by name, rows of it, and values."""
Shape = tuple[int, torch.dtype]
"""Entries in a row, and their type."""


@dataclass
class Changes:
    """What an operation does, to be written as a whole.

    Attributes:
        rows: new values.
        added: what is added; only to rows that nobody else changes meanwhile.
        state: what else must be known to go on.
    """

    rows: list[Rows] = field(default_factory=list)
    added: list[Rows] = field(default_factory=list)
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
        """Do what an operation does; written down before, if that can be."""
        if self._journal is None or not journaled:
            self._write(changes.rows)
            for name, where, values in changes.added:
                self._tables[name].add(where, values)
            return
        rows = list(changes.rows)
        for name, where, values in changes.added:
            rows.append((name, where, self._tables[name].read(where).add_(values)))
        self._journal.write({"rows": rows, "state": changes.state})
        self._write(rows)

    def last(self) -> dict[str, Any] | None:
        """Do again what the journal says, and return the state that comes with it; ``None`` without a journal."""
        entry = None if self._journal is None else self._journal.last()
        if entry is None:
            return None
        rows = [
            (name, where if isinstance(where, Tensor) else tuple(where), each) for name, where, each in entry["rows"]
        ]
        self._write(rows)
        state: dict[str, Any] = entry["state"]
        return state

    def forget(self) -> None:
        """Begin anew: the journal is of a step that is over."""
        if self._journal is not None:
            self._journal.clear()

    def _write(self, rows: list[Rows]) -> None:
        for name, where, values in rows:
            self._tables[name].write(where, values)


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
