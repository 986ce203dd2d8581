"""GraphML, through networkx."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from recollect.data._errors import InvalidFileError
from recollect.data._foreign import foreign_code, require
from recollect.data.files._found import Found, as_float32, masks_of_words

_LABEL = ("class", "y", "label")
_PIECE = 4096  # bytes


def read_graphml(path: Path) -> Found:
    """Nodes with the attribute ``class``, ``y`` or ``label``, perhaps ``split``; all other numbers are features.

    Raises:
        InvalidFileError: The file is damaged, or nodes lack an attribute.
    """
    check_no_entities(path)
    networkx = require("networkx", extra="graph")
    try:
        with foreign_code():
            graph = networkx.read_graphml(path)
    except Exception as error:  # networkx raises half a dozen unrelated types on a damaged file
        raise InvalidFileError(f"{path} cannot be read as GraphML ({type(error).__name__}: {error})") from error
    nodes = list(graph.nodes(data=True))
    if not nodes:
        raise InvalidFileError(f"{path} holds a graph without nodes")
    if any(not attributes for _, attributes in nodes):  # networkx makes nodes of what edges name
        declared = _declared(path)
        if others := [str(name) for name, _ in nodes if str(name) not in declared]:
            raise InvalidFileError(
                f"{path}: edges are of {len(others)} nodes that are not in the file, such as {others[0]!r}; give each "
                "a <node>, and each edge a source and a target"
            )
    numbers = {name: number for number, (name, _) in enumerate(nodes)}
    rows = list(graph.edges(data=True))
    pairs = np.array([[numbers[a], numbers[b]] for a, b, _ in rows], dtype=np.int64).reshape(-1, 2).T
    weights = _weights(rows, path)
    if not graph.is_directed():
        back = pairs[:, pairs[0] != pairs[1]][::-1]
        weights = None if weights is None else np.concatenate([weights, weights[pairs[0] != pairs[1]]])
        pairs = np.concatenate([pairs, back], axis=1)
    names = sorted({name for _, attributes in nodes for name in attributes})
    found = Found(str(path), pairs, len(nodes), edge_weight=weights, ids=[str(name) for name, _ in nodes])
    label = _label_name(names, path)
    found.labels = np.array([_word(attributes.get(label, "")) for _, attributes in nodes], dtype=object)
    if "split" in names:
        found.masks = masks_of_words([str(attributes.get("split", "")) for _, attributes in nodes], str(path))
    _features(found, nodes, [name for name in names if name not in (label, "split")])
    return found


def check_no_entities(path: Path) -> None:
    """Refuse a document with a type declaration: it could define entities that unfold without end.

    Raises:
        InvalidFileError: It has one, or is no XML.
    """
    parser = expat.ParserCreate()
    seen: list[str] = []
    parser.StartDoctypeDeclHandler = lambda *rest: seen.append("declaration")
    parser.StartElementHandler = lambda *rest: seen.append("root")
    try:
        with path.open("rb") as file:
            while not seen and (piece := file.read(_PIECE)):
                parser.Parse(piece)
    except (expat.ExpatError, LookupError) as error:  # or an encoding that is none
        raise InvalidFileError(f"{path} is no XML: {error}") from error
    if seen[:1] == ["declaration"]:
        raise InvalidFileError(
            f"{path} has a document type declaration, which GraphML needs not; remove <!DOCTYPE ...>"
        )


def _declared(path: Path) -> set[str]:
    """The ids of all nodes that have an element."""
    parser, found = expat.ParserCreate(namespace_separator=" "), set()

    def start(name: str, attributes: dict[str, str]) -> None:
        if name.rpartition(" ")[2] == "node" and "id" in attributes:
            found.add(attributes["id"])

    parser.StartElementHandler = start
    with path.open("rb") as file:
        parser.ParseFile(file)
    return found


def _label_name(names: list[str], path: Path) -> str:
    having = [name for name in names if name in _LABEL]
    if len(having) != 1:
        what = f"the attributes {' and '.join(having)}" if having else "no attribute class"
        raise InvalidFileError(
            f"{path}: nodes have {what}; give each node its class in one attribute, called class or y"
        )
    return having[0]


def _word(value: Any) -> str:
    return "" if isinstance(value, float) and np.isnan(value) else str(value)


def _weights(rows: list[Any], path: Path) -> Any:
    having = ["weight" in attributes for _, _, attributes in rows]
    if not any(having):
        return None
    if not all(having):
        a, b, _ = rows[having.index(False)]
        raise InvalidFileError(f"{path}: the edge from {a!r} to {b!r} has no weight, and others have; give it one")
    try:
        weights = np.array([float(attributes["weight"]) for _, _, attributes in rows])
    except (TypeError, ValueError) as error:
        raise InvalidFileError(f"{path}: weights of edges must be numbers: {error}") from error
    return as_float32(weights, f"{path}: weight")


def _features(found: Found, nodes: list[Any], names: list[str]) -> None:
    numeric = [name for name in names if all(isinstance(a.get(name, ""), (int, float)) for _, a in nodes)]
    if numeric:
        found.x = np.array([[float(attributes[name]) for name in numeric] for _, attributes in nodes])
        found.notes.append(f"features are the attributes {', '.join(numeric[:10])}")
    if others := [name for name in names if name not in numeric]:
        found.notes.append(f"not used, as no number on every node: {', '.join(others[:10])}")
