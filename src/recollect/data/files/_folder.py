"""A graph in a folder: ``edges``, ``features``, ``labels`` and ``split``, or all of the nodes in one table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from recollect.data._errors import InvalidFileError
from recollect.data.files._found import Array, Found, as_float32, masks_of_words
from recollect.data.files._table import UNKNOWN, Table, as_count, as_number, is_name, read_table

ROLES = ("edges", "nodes", "features", "labels", "split")
SUFFIXES = (".csv", ".tsv", ".txt")

_ID = ("id", "node", "node_id", "nodeid")
_SOURCE = ("source", "src", "from", "id1", "id_1", "node1", "node_1")
_TARGET = ("target", "dst", "to", "destination", "id2", "id_2", "node2", "node_2")
_WEIGHT = ("weight", "edge_weight")
_LABEL = ("label", "labels", "class", "y", "target", "category")
_SPLIT = ("split", "part", "set")
_REMEDY = "edges.csv, features.csv, labels.csv and, if there is one, split.csv; or edges.csv and nodes.csv"


def read_folder(folder: Path) -> Found:
    """Read the tables of a folder by their names.

    Raises:
        InvalidFileError: A table is missing, there twice, or cannot be understood.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and path.stem.lower() in ROLES and path.is_file():
            role = path.stem.lower()
            if role in files:
                raise InvalidFileError(f"{folder} has both {files[role].name} and {path.name}; remove one of them")
            files[role] = path
    return read_tables(files, str(folder))


def read_tables(files: Mapping[str, Path], source: str) -> Found:
    """Read tables whose roles are told.

    Args:
        files: Role -> file, of `ROLES`.
        source: What they are together, for messages.

    Raises:
        InvalidFileError: See `read_folder`.
    """
    if "edges" not in files:
        raise InvalidFileError(f"{source} has no edges.csv; a graph in a folder is {_REMEDY}")
    if "nodes" in files and (both := sorted({"features", "labels", "split"} & set(files))):
        raise InvalidFileError(f"{source} has nodes.csv and {both[0]}.csv, which tell the same; remove one of them")
    if not {"nodes", "labels"} & set(files):
        raise InvalidFileError(f"{source} has no labels.csv; a graph in a folder is {_REMEDY}")
    tables = {role: read_table(path) for role, path in files.items()}
    for role, table in tables.items():
        _HEADERS[role](table)
    ids = _node_ids([table for role, table in tables.items() if role != "edges"])
    size = len(ids) if ids is not None else len(tables["nodes" if "nodes" in tables else "labels"].rows)
    numbers = {name: number for number, name in enumerate(ids or ())}
    edge_index, weight = _edges(tables["edges"], numbers if ids is not None else None, size)
    found = Found(source, edge_index, size, edge_weight=weight, ids=ids)
    for role, table in tables.items():
        if role == "edges":
            continue
        own = table.find(_ID)
        rows = np.arange(size) if own is None else np.array([numbers[name] for name in table.column(own)], dtype=int)
        columns = [column for column in range(table.width) if column != own]
        _READERS[role](found, table, columns, rows)
    return found


def _edges_header(table: Table) -> None:
    first = table.rows[0]
    table.header = first
    if table.find(_SOURCE) is not None and table.find(_TARGET) is not None:
        table.take_header()
        extra = [name for name in table.header if name.lower() not in (*_SOURCE, *_TARGET, *_WEIGHT)]
        if extra:
            raise InvalidFileError(
                f"{table.path}, line 1: the column {extra[0]!r} is unknown; keep source, target, weight"
            )
        return
    table.header = None
    others = all(as_count(cell) is not None for row in table.rows[1:] for cell in row[:2])
    if len(table.rows) > 1 and others and any(as_count(cell) is None for cell in first[:2]):
        raise InvalidFileError(
            f"{table.path}, line {table.lines[0]}: {', '.join(first)[:60]!r} is neither two numbers, as in the other "
            f"lines, nor a known header; write source,target or source,target,weight"
        )
    if len(first) not in (2, 3):
        raise InvalidFileError(
            f"{table.path}, line {table.lines[0]}: has {len(first)} cells; a line is source,target or "
            f"source,target,weight"
        )


def _words_header(table: Table) -> None:
    """Of a table of numbers: the first line is a header if it has a cell that can be a name."""
    if any(is_name(cell) for cell in table.rows[0]):
        table.take_header()


def _labels_header(table: Table) -> None:
    names = [cell.lower() for cell in table.rows[0]]
    if len(names) > 1:
        _words_header(table)
        return
    if names[0] in _LABEL:
        table.take_header()
        return
    rest = table.rows[1:]
    if (
        as_number(names[0]) is None
        and names[0] not in UNKNOWN
        and rest
        and all(as_number(row[0]) is not None for row in rest)
    ):
        raise InvalidFileError(
            f"{table.path}, line {table.lines[0]}: {table.rows[0][0][:40]!r} is neither a number, as in the other "
            f"lines, nor a known header; write label"
        )


def _split_header(table: Table) -> None:
    if any(cell.lower() in _SPLIT for cell in table.rows[0]):
        table.take_header()
    elif table.width > 1:
        raise InvalidFileError(
            f"{table.path}, line {table.lines[0]}: must be one word, or begin with the line id,split"
        )


def _nodes_header(table: Table) -> None:
    table.header = table.rows[0]
    if table.find(_LABEL) is None and not _label_columns(table):
        raise InvalidFileError(
            f"{table.path}, line {table.lines[0]}: must name the columns: id, label (or label_a, label_b, ... with "
            f"zeros and ones), split, and the features; {', '.join(table.rows[0])[:60]!r} names no label"
        )
    table.take_header()


_HEADERS = {
    **{"edges": _edges_header, "features": _words_header, "labels": _labels_header},
    **{"split": _split_header, "nodes": _nodes_header},
}


def _node_ids(tables: list[Table]) -> list[str] | None:
    """What the nodes are called, in the order of the tables; None if no table has a column for it."""
    having = [table for table in tables if table.find(_ID) is not None]
    if not having:
        for table in tables[1:]:
            if len(table.rows) != len(tables[0].rows):
                raise InvalidFileError(
                    f"{table.path} has {len(table.rows)} rows, and {tables[0].path} has {len(tables[0].rows)}: a row "
                    f"for each node must be in both, or a column id, under that header, in both"
                )
        return None
    if len(having) < len(tables):
        without = next(table for table in tables if table.find(_ID) is None)
        raise InvalidFileError(
            f"{having[0].path} has a column of ids, and {without.path} has none; add it, with a header"
        )
    ids: dict[str, None] = {}
    for table in tables:
        own = table.column(table.find(_ID) or 0)
        seen: set[str] = set()
        for name, line in zip(own, table.lines, strict=True):
            if name in seen:
                raise InvalidFileError(f"{table.path}, line {line}: the node {name[:40]!r} is there twice")
            seen.add(name)
            ids.setdefault(name)
    return list(ids)


def _edges(table: Table, numbers: dict[str, int] | None, size: int) -> tuple[Array, Array | None]:
    columns = [0, 1]
    weight = 2 if table.width == 3 else None
    if table.header is not None:
        columns = [table.find(_SOURCE) or 0, table.find(_TARGET) or 0]
        weight = table.find(_WEIGHT)
    ends = np.empty((2, len(table.rows)), dtype=np.int64)
    for place, (row, line) in enumerate(zip(table.rows, table.lines, strict=True)):
        for end, column in enumerate(columns):
            cell = row[column]
            number = as_count(cell) if numbers is None else numbers.get(cell)
            if number is None or number >= size:
                remedy = (
                    f"nodes are the rows of the other files, from 0 to {size - 1}; number them so, or add a column id, "
                    f"with that header, to the other files"
                    if numbers is None
                    else "it is not in the column of ids of the other files; add it there"
                )
                raise InvalidFileError(f"{table.path}, line {line}: there is no node {cell[:40]!r}: {remedy}")
            ends[end, place] = number
    return ends, None if weight is None else as_float32(table.numbers([weight])[:, 0], f"{table.path}: weight")


def _features(found: Found, table: Table, columns: list[int], rows: Array) -> None:
    if not columns:
        return
    if len(rows) != found.num_nodes:
        raise InvalidFileError(
            f"{table.path} has features of {len(rows)} nodes, and there are {found.num_nodes}; add the missing rows"
        )
    x = np.empty((found.num_nodes, len(columns)))
    x[rows] = table.numbers(columns)
    found.x = x


def _labels(found: Found, table: Table, columns: list[int], rows: Array) -> None:
    if not columns:
        raise InvalidFileError(f"{table.path} has ids and no labels; add a column label")
    if len(columns) > 1:
        labels = np.full((found.num_nodes, len(columns)), np.nan)
        labels[rows] = table.numbers(columns, labels=True)
        found.labels = labels
        return
    words = ["" if cell.lower() in UNKNOWN else cell for cell in table.column(columns[0])]
    counts = [as_count(word.removeprefix("-")) for word in words if word]
    if None not in counts:
        values = np.full(found.num_nodes, np.nan)
        values[rows] = [float(word) if word else np.nan for word in words]
        found.labels = values
        return
    names = np.full(found.num_nodes, "", dtype=object)
    names[rows] = words
    found.labels = names


def _split(found: Found, table: Table, columns: list[int], rows: Array) -> None:
    named = table.find(_SPLIT)
    words = np.full(found.num_nodes, "", dtype=object)
    masks = masks_of_words(table.column(columns[0] if named is None else named), str(table.path), table.lines[0])
    for part, mask in zip(("train", "val", "test"), masks, strict=True):
        words[rows[mask[:, 0]]] = part
    found.masks = masks_of_words(list(words), str(table.path))


def _label_columns(table: Table) -> list[int]:
    return [column for column, name in enumerate(table.header or []) if name.lower().startswith("label_")]


def _nodes(found: Found, table: Table, columns: list[int], rows: Array) -> None:
    one, split = table.find(_LABEL), table.find(_SPLIT)
    several = _label_columns(table)
    if one is not None and several:
        raise InvalidFileError(
            f"{table.path}, line 1: has a column for the class and columns for labels; keep one kind"
        )
    labels = several if one is None else [one]
    _labels(found, table, labels, rows)
    if split is not None:
        _split(found, table, [split], rows)
    _features(found, table, [column for column in columns if column not in (*labels, split)], rows)


_READERS = {"features": _features, "labels": _labels, "split": _split, "nodes": _nodes}
