"""The tables of a step: activations and gradients of each group, in memory or in files, and a journal.

With files, what an operation writes goes to the journal first, whole or not at all, and then to the tables. So a
process that is killed leaves the last operation either undone or in the journal, from where it can be done again.
"""

from __future__ import annotations

import io
import os
import struct
import weakref
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale.histories import HistoryFileError, PlainRows, Where

__all__ = ["Changes", "Tables", "load", "save", "unpacked"]

_CHECKSUM = struct.Struct("<I")


@dataclass
class Changes:
    """What an operation does, to be written as a whole.

    Attributes:
        rows: tables by name, rows, and their new values.
        added: tables by name, rows, and what is added to them; only to rows that nobody else changes meanwhile.
        state: what else must be known to go on.
    """

    rows: list[tuple[str, Where, Tensor]] = field(default_factory=list)
    added: list[tuple[str, Where, Tensor]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


class Tables:
    """All tables of a step.

    Args:
        rows: N.
        widths: entries in a row, by name.
        dtypes: of the entries, by name.
        folder: of the files and the journal; ``None``: in memory.
    """

    def __init__(self, rows: int, widths: dict[str, int], dtypes: dict[str, torch.dtype], folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._journal = None if folder is None else _Journal(folder)
        self._tables = {
            name: PlainRows(rows, width, dtypes[name], None if folder is None else folder / f"{name}.table")
            for name, width in widths.items()
        }

    def __getitem__(self, name: str) -> PlainRows:
        return self._tables[name]

    def apply(self, changes: Changes) -> None:
        """Do what an operation does."""
        rows = list(changes.rows)
        for name, where, values in changes.added:
            rows.append((name, where, self._tables[name].read(where).add_(values)))
        if self._journal is not None:
            self._journal.write({"rows": rows, "state": changes.state})
        self._write(rows)

    def last(self) -> dict[str, Any] | None:
        """Do again what the journal says, and return the state that comes with it; ``None`` without a journal."""
        entry = None if self._journal is None else self._journal.last()
        if entry is None:
            return None
        self._write(entry["rows"])
        state: dict[str, Any] = entry["state"]
        return state

    def forget(self) -> None:
        """Begin anew: the journal is of a step that is over."""
        if self._journal is not None:
            self._journal.clear()

    def _write(self, rows: list[tuple[str, Where, Tensor]]) -> None:
        for name, where, values in rows:
            self._tables[name].write(where, values)


class _Journal:
    """The last two entries, in two places of which one is whole at any time.

    Both files are written in place: to replace a file makes the file system wait for the disk.

    Args:
        folder: of the files.
    """

    _HEAD = struct.Struct("<qqI")  # number of the entry from 1, its bytes, and their checksum

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal"
        self._files = [os.open(folder / f"journal{i}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666) for i in (0, 1)]
        for descriptor in self._files:
            weakref.finalize(self, os.close, descriptor)
        self._number = max((head[0] for head, _ in self._entries()), default=0)

    def write(self, entry: Any) -> None:
        """Write an entry over the one before the last."""
        stream = io.BytesIO()
        torch.save(entry, stream)
        self._put(stream.getbuffer())

    def clear(self) -> None:
        """Say that nothing is under way."""
        self._put(memoryview(b""))

    def last(self) -> Any:
        """Return the last entry that is whole; ``None`` if nothing is under way."""
        entries = self._entries()
        if not entries:
            return None
        _, content = max(entries, key=lambda entry: entry[0][0])
        return unpacked(self._path, io.BytesIO(content)) if content else None

    def _put(self, content: memoryview) -> None:
        number = self._number + 1
        descriptor = self._files[number % 2]
        position = self._HEAD.size
        left = content
        while left:
            done = os.pwrite(descriptor, left, position)
            left, position = left[done:], position + done
        os.pwrite(descriptor, self._HEAD.pack(number, len(content), zlib.crc32(content)), 0)  # last: now it is whole
        self._number = number

    def _entries(self) -> list[tuple[tuple[int, int, int], bytes]]:
        found = []
        for descriptor in self._files:
            head = os.pread(descriptor, self._HEAD.size, 0)
            if len(head) < self._HEAD.size:
                continue
            number, size, checksum = self._HEAD.unpack(head)
            content = os.pread(descriptor, size, self._HEAD.size) if 0 <= size < os.fstat(descriptor).st_size else b""
            if number > 0 and len(content) == size and zlib.crc32(content) == checksum:
                found.append(((number, size, checksum), content))
        return found


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


def unpacked(path: Path, source: Any) -> Any:
    """Return what a file of torch holds, of which nothing is run.

    Raises:
        HistoryFileError: it is something else.
    """
    try:
        return torch.load(source, weights_only=True)
    except Exception as error:
        raise HistoryFileError(
            f"{path}: expected tensors that WholeGraph wrote (got {type(error).__name__}: the file was cut or "
            "changed); make another WholeGraph on this folder"
        ) from error
