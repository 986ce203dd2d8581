"""From what a file has as labels to a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from recollect.data._dataset import Task
from recollect.data._errors import InvalidFileError
from recollect.data.files._found import Array

TASKS = ("auto", *get_args(Task))


@dataclass(frozen=True)
class Labels:
    """Labels that are understood.

    Attributes:
        y: [N] int64, -1 where the class is unknown; or [N, K] float32 of zeros and ones, NaN where unknown.
        task: What they are.
        names: Of the classes, in the file's own words; of labels, their numbers.
        known: Nodes that have a class, or of which a label is known, [N] bool.
    """

    y: Tensor
    task: Task
    names: tuple[str, ...]
    known: Tensor


def understand(values: Array, task: str, where: str) -> Labels:
    """Decide what labels are by their form: a list holds a class for each node, columns hold a label each.

    Args:
        values: See `Found.labels`.
        task: ``"multiclass"`` or ``"multilabel"`` where the form does not say; ``"auto"``: it does.
        where: The file, for messages.

    Raises:
        InvalidFileError: They are no labels, or can be read in two ways.
    """
    if values.ndim == 2 and values.dtype.kind in "biuf":
        values = values.astype(np.float64)
        if values.shape[1] == 1 and task != "multilabel":
            if task == "auto" and bool((np.isnan(values) | np.isin(values, (0, 1))).all()):
                raise InvalidFileError(
                    f"{where}: the labels have the shape {list(values.shape)}, so they are two classes, or one label "
                    f"that is there or not; write task=multiclass or task=multilabel (on the command line "
                    f"dataset.options.task)"
                )
            return _classes(values[:, 0], where)
        return _columns(values, task, where)
    if values.ndim != 1:
        raise InvalidFileError(
            f"{where}: the labels have the shape {list(values.shape)} and the type {values.dtype}; they must be [N], a "
            f"class for each node, or [N, K] of zeros and ones"
        )
    if task == "multilabel":
        raise InvalidFileError(f"{where}: task=multilabel needs a column for each label, and there is one class a node")
    return _classes(values, where)


def _classes(values: Array, where: str) -> Labels:
    if values.dtype.kind in "biuf":
        numbers = values.astype(np.float64)
        known = ~np.isnan(numbers)
        wrong = known & ~((numbers >= 0) & (np.floor(numbers) == numbers) & (numbers < 2**53))
        if wrong.any():
            node = int(wrong.nonzero()[0][0])
            raise InvalidFileError(
                f"{where}: the class of node {node} is {numbers[node]:g}; classes are whole numbers from 0, or words, "
                f"and NaN where the class is unknown"
            )
        names, y = np.unique(numbers[known].astype(np.int64), return_inverse=True)
    elif values.dtype.kind in "OSU":
        words = np.array([_text(value) for value in values], dtype=object)
        known = words != ""
        names, y = np.unique(words[known].astype(str), return_inverse=True)
    else:
        raise InvalidFileError(f"{where}: labels of the type {values.dtype} are no classes; use numbers or words")
    if len(names) < 2:
        raise InvalidFileError(
            f"{where}: {len(names)} classes are known of {int(known.sum())} nodes; there must be at least 2"
        )
    whole = torch.full((len(values),), -1, dtype=torch.int64)
    whole[torch.from_numpy(known)] = torch.from_numpy(y.astype(np.int64))
    return Labels(whole, "multiclass", tuple(str(name) for name in names), torch.from_numpy(known))


def _text(value: object) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return "" if text.strip().lower() == "nan" else text.strip()


def _columns(values: Array, task: str, where: str) -> Labels:
    unknown = np.isnan(values)
    wrong = ~(unknown | np.isin(values, (0, 1)))
    if wrong.any():
        node, column = (int(place[0]) for place in wrong.nonzero())
        raise InvalidFileError(
            f"{where}: label {column} of node {node} is {values[node, column]:g}; in columns labels are 0 or 1, or "
            f"NaN if unknown. A class for each node is one column, with the header label"
        )
    if values.shape[1] == 0:
        raise InvalidFileError(f"{where}: the labels have no column")
    one_each = bool(((values == 1).sum(1) == 1).all()) and not unknown.any() and values.shape[1] > 1
    if task == "auto" and one_each:
        raise InvalidFileError(
            f"{where}: each node has exactly one of the {values.shape[1]} labels, so the columns are classes, or "
            f"labels of which there could be more; write task=multiclass or task=multilabel (on the command line "
            f"dataset.options.task)"
        )
    if task == "multiclass":
        if not one_each:
            raise InvalidFileError(f"{where}: task=multiclass needs exactly one 1 in each row of the labels")
        return _classes(values.argmax(1), where)
    names = tuple(str(column) for column in range(values.shape[1]))
    known = torch.from_numpy(~unknown.all(1))
    return Labels(torch.from_numpy(values.astype(np.float32)), "multilabel", names, known)
