"""A table of text: CSV files, and what their first line is."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recollect.data._errors import InvalidFileError
from recollect.data.files._found import Array

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": None}  # None: any white space
UNKNOWN = ("", "nan")
_LABELS = {**dict.fromkeys(UNKNOWN, math.nan), "true": 1.0, "false": 0.0}


@dataclass
class Table:
    """Rows of equally many cells.

    Attributes:
        path: The file.
        rows: The cells, without white space around them.
        lines: The line in the file of each row, from 1.
        header: Names of the columns, if the reader took the first row for that.
    """

    path: Path
    rows: list[list[str]]
    lines: list[int]
    header: list[str] | None = None

    @property
    def width(self) -> int:
        """Columns."""
        return len(self.rows[0]) if self.rows else len(self.header or [])

    def take_header(self) -> None:
        """Let the first row be the header.

        Raises:
            InvalidFileError: Two columns have one name, or one has none.
        """
        first = self.lines[0]
        self.header, self.rows, self.lines = self.rows[0], self.rows[1:], self.lines[1:]
        if "" in self.header:
            column = self.header.index("") + 1
            raise InvalidFileError(
                f"{self.path}, line {first}: column {column} has no name, as numbers of rows that some programs write; "
                f"remove it, or call it id if it has the nodes' names"
            )
        lower = [name.lower() for name in self.header]
        for name in lower:
            if lower.count(name) > 1:
                raise InvalidFileError(
                    f"{self.path}, line {first}: two columns are called {name!r}; rename one of them"
                )

    def find(self, names: tuple[str, ...]) -> int | None:
        """The column whose header is one of these names, whatever the case."""
        found = [column for column, name in enumerate(self.header or []) if name.lower() in names]
        if len(found) > 1:
            both = " and ".join(repr((self.header or [])[column]) for column in found)
            raise InvalidFileError(f"{self.path}, line 1: {both} mean the same; keep one of them")
        return found[0] if found else None

    def column(self, column: int) -> list[str]:
        """The cells of a column."""
        return [row[column] for row in self.rows]

    def numbers(self, columns: list[int], *, labels: bool = False) -> Array:
        """Columns as numbers, [rows, columns] float64.

        Args:
            columns: Which.
            labels: Whether they are labels, so that empty cells and NaN may be there, and true and false are 1 and 0.

        Raises:
            InvalidFileError: A cell is no finite number; the message has its line.
        """
        values = np.empty((len(self.rows), len(columns)))
        for place, (row, line) in enumerate(zip(self.rows, self.lines, strict=True)):
            for out, column in enumerate(columns):
                value = as_number(row[column])
                if value is None and labels:
                    value = _LABELS.get(row[column].lower())
                if value is None:
                    what = "a number, or empty where it is unknown" if labels else "a finite number"
                    raise InvalidFileError(
                        f"{self.path}, line {line}: {row[column][:40]!r} in column {column + 1} must be {what}"
                    )
                values[place, out] = value
        return values


def read_table(path: Path) -> Table:
    """Read a file; empty lines, and those at its beginning that start with ``#``, do not count.

    Raises:
        InvalidFileError: It is empty, no UTF-8 text, or its lines differ in the number of cells.
    """
    separator = _SEPARATORS[path.suffix.lower()]
    rows: list[list[str]] = []
    lines: list[int] = []
    empty: list[int] = []  # lines, but for those at the end
    waiting: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator or "\t", strict=True)
            for cells in reader:
                if separator is None:
                    cells = " ".join(cells).split()
                cells = [cell.strip() for cell in cells]
                if cells in ([], [""]):
                    waiting.append(reader.line_num)
                elif rows or not cells[0].startswith("#"):
                    empty, waiting = [*empty, *(waiting if rows else [])], []
                    rows.append(cells)
                    lines.append(reader.line_num)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidFileError(f"{path} cannot be read as text in UTF-8 with cells between commas: {error}") from error
    if not rows:
        raise InvalidFileError(f"{path} is empty; write a line for each edge or node, or remove the file")
    for cells, line in zip(rows, lines, strict=True):
        if len(cells) != len(rows[0]):
            raise InvalidFileError(
                f"{path}, line {line}: has {len(cells)} cells, and line {lines[0]} has {len(rows[0])}; each line must "
                f"have as many"
            )
    if len(rows[0]) == 1 and empty:
        raise InvalidFileError(
            f"{path}, line {empty[0]}: is empty, which in a table of one column may be a row; write nan for what is "
            f"unknown, or remove the line"
        )
    if len(rows[0]) == 1 and separator == "," and any(mark in rows[0][0] for mark in ";\t"):
        raise InvalidFileError(f"{path}, line {lines[0]}: cells of a .csv file stand between commas, of a .tsv, tabs")
    return Table(path, rows, lines)


def is_name(cell: str) -> bool:
    """Whether a cell can be a column's name: it begins with a letter, and is neither a number nor a truth value."""
    begins = cell[:1].isalpha() or cell[:1] == "_"
    return begins and cell.lower() not in ("inf", "infinity", *_LABELS)


def as_number(text: str) -> float | None:
    """A finite number in decimal notation, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) and "_" not in text else None


def as_count(text: str) -> int | None:
    """A whole number from 0, of at most 18 digits, or None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None
