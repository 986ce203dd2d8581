"""The tables of a step: activations and gradients of each group, in memory or in files, and a journal of what is written.

With files, what an operation writes goes to the journal first, whole or not at all, and then to the tables. So a
process that is killed leaves the last operation either undone or in the journal, from where it can be done again.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale.histories._codec import codec_for
from recollect.autoscale.histories._file import FileRows, FileTable
from recollect.autoscale.histories._memory import memory_table
from recollect.autoscale.histories._selection import Slices, length

__all__ = ["Changes", "Rows", "Tables"]

Where = tuple[int, int] | Tensor
"""Rows from one to before another, or by number [rows]."""


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


class Rows:
    """One table.

    Args:
        rows: how many.
        width: entries in a row.
        dtype: of the entries: floating point for activations and gradients, uint8 for bits.
        path: of its file; ``None``: in memory.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, path: Path | None) -> None:
        self._dtype, self._width = dtype, width
        self._rows: Any
        if path is None:
            self._rows = (
                memory_table(codec_for(dtype, width), rows, torch.device("cpu")).records
                if (dtype.is_floating_point)
                else _Bits(torch.zeros(rows, width, dtype=dtype, device="cpu"))
            )
        elif dtype.is_floating_point:
            self._table = FileTable(path, rows, width, dtype, codec_for(dtype, width))
            self._rows = self._table.records
        else:
            self._rows = _mapped(path, rows, width, dtype)

    def read(self, where: Where) -> Tensor:
        """Return a copy of some rows."""
        selection = _selection(where)
        out = torch.empty(length(selection), self._width, dtype=self._dtype, device="cpu")
        self._rows.read(selection, out)
        return out

    def write(self, where: Where, values: Tensor) -> None:
        """Write some rows."""
        self._rows.write(values, _selection(where))

    def zero_(self) -> None:
        """Set all to 0."""
        self._rows.zero_()


class _Bits:
    """Rows of bytes in memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def read(self, where: Slices | Tensor, out: Tensor) -> None:
        if isinstance(where, Tensor):
            torch.index_select(self._tensor, 0, where, out=out)
        else:
            out.copy_(self._tensor[where[0][0] : where[0][1]])

    def write(self, values: Tensor, where: Slices | Tensor) -> None:
        if isinstance(where, Tensor):
            self._tensor.index_copy_(0, where, values)
        else:
            self._tensor[where[0][0] : where[0][1]] = values

    def zero_(self) -> None:
        self._tensor.zero_()


def _mapped(path: Path, rows: int, width: int, dtype: torch.dtype) -> FileRows:
    """Open a file of plain rows, or make it."""
    nbytes = max(rows * width * dtype.itemsize, 1)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if os.fstat(descriptor).st_size != nbytes:
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, nbytes)
        mapped = mmap.mmap(descriptor, nbytes)
    except BaseException:
        os.close(descriptor)
        raise
    return FileRows(descriptor, mapped, 0, (rows, width), dtype)


def _selection(where: Where) -> Slices | Tensor:
    return where if isinstance(where, Tensor) else (where,)


class Tables:
    """All tables of a step.

    Args:
        rows: N.
        widths: entries in a row, by name.
        dtypes: of the entries, by name.
        folder: of the files and the journal; ``None``: in memory.
    """

    def __init__(self, rows: int, widths: dict[str, int], dtypes: dict[str, torch.dtype], folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._tables = {
            name: Rows(rows, width, dtypes[name], None if folder is None else folder / f"{name}.table")
            for name, width in widths.items()
        }

    def __getitem__(self, name: str) -> Rows:
        return self._tables[name]

    def apply(self, changes: Changes) -> None:
        """Do what an operation does."""
        rows = list(changes.rows)
        for name, where, values in changes.added:
            rows.append((name, where, self._tables[name].read(where).add_(values)))
        if self._folder is not None:
            _save(self._journal, {"rows": rows, "state": changes.state})
        self._write(rows)

    def last(self) -> dict[str, Any] | None:
        """Do again what the journal says, and return the state that comes with it; ``None`` without a journal."""
        if self._folder is None or not self._journal.is_file():
            return None
        journal: dict[str, Any] = torch.load(self._journal, weights_only=True)
        self._write(journal["rows"])
        state: dict[str, Any] = journal["state"]
        return state

    def forget(self) -> None:
        """Begin anew: the journal is of a step that is over."""
        if self._folder is not None:
            self._journal.unlink(missing_ok=True)

    def _write(self, rows: list[tuple[str, Where, Tensor]]) -> None:
        for name, where, values in rows:
            self._tables[name].write(where, values)

    @property
    def _journal(self) -> Path:
        assert self._folder is not None
        return self._folder / "journal.pt"


def _save(path: Path, value: Any) -> None:
    """Write a file, whole or not at all."""
    beside = path.with_suffix(".new")
    torch.save(value, beside)
    os.replace(beside, path)
