"""What a reader of files found, in the same form for every format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recollect.data._errors import InvalidFileError

Array = NDArray[Any]

PARTS = ("train", "val", "test")
# Words of a split, by the part that they name; "" names none.
PART_WORDS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **dict.fromkeys(("", "nan", "none"), ""),
}


@dataclass
class Found:
    """Arrays of N nodes and E directed edges.

    Attributes:
        source: The file or folder, for messages.
        edge_index: [2, E] int64, from 0 to N - 1.
        num_nodes: N.
        x: Features [N, F] of real numbers, or None.
        labels: Classes [N], numbers or words, or a column for each label [N, K]; unknown ones are NaN or "".
        masks: Train, validation and test, each [N, S] bool for S splits; or None.
        edge_weight: [E] float32 or None.
        edge_attr: [E, D] float32 or None.
        ids: What the files call the nodes, N of them; None if that is their number.
        notes: What was not used, or made up, in sentences.
    """

    source: str
    edge_index: Array
    num_nodes: int
    x: Array | None = None
    labels: Array | None = None
    masks: tuple[Array, Array, Array] | None = None
    edge_weight: Array | None = None
    edge_attr: Array | None = None
    ids: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def masks_of_words(words: list[str], where: str, first_line: int = 0) -> tuple[Array, Array, Array]:
    """Turn a word for each node into three masks [N, 1].

    Args:
        words: ``"train"``, ``"val"`` or ``"test"``; empty: in none.
        where: The file, for messages.
        first_line: The line of the first word; 0 where there are no lines, and nodes are counted.

    Raises:
        InvalidFileError: A word names no part.
    """
    parts = []
    for number, word in enumerate(words):
        part = PART_WORDS.get(str(word).strip().lower())
        if part is None:
            place = f"line {first_line + number}" if first_line else f"node {number}"
            raise InvalidFileError(
                f"{where}, {place}: {str(word)[:40]!r} is no part of a split; write train, val or test, or nan for a "
                f"node in none of them"
            )
        parts.append(part)
    found = np.array(parts, dtype=object)
    train, val, test = ((found == part)[:, None] for part in PARTS)
    return train, val, test


def check_edges(edge_index: Array, num_nodes: int, where: str) -> Array:
    """Refuse edges that are no pairs of nodes.

    Args:
        edge_index: Anything.
        num_nodes: N.
        where: The file and the array, for messages.

    Returns:
        [2, E] int64.

    Raises:
        InvalidFileError: They are not whole numbers from 0 to N - 1, or not [2, E].
    """
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise InvalidFileError(
            f"{where} has the shape {list(edge_index.shape)}, but must be [2, E]: sources, then targets"
        )
    if edge_index.dtype.kind not in "iu":
        raise InvalidFileError(f"{where} holds {edge_index.dtype}, but must hold whole numbers, of type int64 or int32")
    if edge_index.size:
        low, high = int(edge_index.min()), int(edge_index.max())
        if low < 0 or high >= num_nodes:
            wrong = low if low < 0 else high
            raise InvalidFileError(
                f"{where} names the node {wrong}, and the {num_nodes} nodes are numbered from 0 to {num_nodes - 1}: "
                f"number them from 0, or add the missing rows to features and labels"
            )
    return edge_index.astype(np.int64)


def as_float32(array: Array, what: str) -> Array:
    """Numbers as float32.

    Args:
        array: Of any shape.
        what: The file and the array, for messages.

    Raises:
        InvalidFileError: It holds no numbers, or one that is not finite, or too large for float32.
    """
    if array.dtype.kind not in "biuf":
        raise InvalidFileError(f"{what} is of type {array.dtype}, but must hold numbers")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not (finite := np.isfinite(numbers)).all():
        place = tuple(int(axis[0]) for axis in (~finite).nonzero())
        raise InvalidFileError(f"{what} holds {array[place]} at {list(place)}; numbers must be finite in float32")
    return numbers
