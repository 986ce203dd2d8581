"""Which rows of a history are meant: all is checked here, before anything is read or written."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "Selection",
    "Slices",
    "check_values",
    "length",
    "numbers_of",
    "select_all",
    "select_batch",
    "select_parts",
    "select_rows",
    "select_slices",
]

Integers = Tensor | Sequence[int]

Slices = tuple[tuple[int, int], ...]
"""Half-open ranges of rows, [start, stop) each, in the order of what is copied to or from them."""

Selection = Slices | Tensor
"""Rows by ranges, which are copied in one piece, or by their numbers [rows], int64 on the CPU."""


def length(selection: Selection) -> int:
    """Return the number of rows selected."""
    if isinstance(selection, Tensor):
        return selection.numel()
    return sum(stop - start for start, stop in selection)


def numbers_of(selection: Selection) -> Tensor:
    """Return the numbers of the rows selected [rows], int64 on the CPU, in their order."""
    if isinstance(selection, Tensor):
        return selection
    ranges = [torch.arange(start, stop, device="cpu") for start, stop in selection]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device="cpu")


def select_all(num_embeddings: int) -> Slices:
    """Select every row, in order."""
    return ((0, num_embeddings),)


def select_rows(n_id: Tensor, num_embeddings: int, *, unique: bool = False) -> Tensor:
    """Select rows by number.

    Args:
        n_id: [rows], int64 or int32, on any device.
        num_embeddings: rows of the history.
        unique: whether no row may be there twice, as is needed for writing.

    Raises:
        TypeError: ``n_id`` does not hold int64 or int32.
        ValueError: ``n_id`` is not 1-D, or holds a row twice.
        IndexError: a row that the history does not have.
    """
    if not isinstance(n_id, Tensor) or n_id.dtype not in (torch.int64, torch.int32):
        found = n_id.dtype if isinstance(n_id, Tensor) else type(n_id).__name__
        raise TypeError(f"n_id: a tensor of int64 or int32 row numbers is expected (got {found})")
    if n_id.dim() != 1:
        raise ValueError(f"n_id: shape [rows] is expected (got {list(n_id.shape)})")
    rows = n_id.detach().to("cpu", torch.int64)
    if rows.numel() == 0:
        return rows
    low, high = (int(end) for end in rows.aminmax())
    if low < 0 or high >= num_embeddings:
        raise IndexError(
            f"n_id: a history of {num_embeddings} rows is numbered 0 to {num_embeddings - 1} (got {low} to {high}); "
            "was the history made for another graph?"
        )
    if unique and not bool((rows[1:] > rows[:-1]).all()):
        twice = rows.numel() - torch.unique(rows).numel()
        if twice:
            raise ValueError(f"n_id: each row can be pushed once in a call (got {twice} repetitions)")
    return rows


def _numbers(name: str, values: Integers) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(
                f"{name}: integers of shape [parts] are expected (got {values.dtype} of shape {list(values.shape)})"
            )
        return [int(value) for value in values.tolist()]
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise ValueError(f"{name}: integers of shape [parts] are expected (got {values!r})") from error


def select_slices(offset: Integers, count: Integers, num_embeddings: int) -> Slices:
    """Select ``offset[k] : offset[k] + count[k]`` for every part k of a batch; neighbouring parts become one range.

    Args:
        offset: [parts], first row of each part.
        count: [parts], rows of each part; may be 0.
        num_embeddings: rows of the history.

    Raises:
        ValueError: sizes that disagree, negative counts, or parts that overlap.
        IndexError: a part that ends behind the history's last row.
    """
    starts, counts = _numbers("offset", offset), _numbers("count", count)
    if len(starts) != len(counts):
        raise ValueError(f"offset and count need one entry per part each (got {len(starts)} and {len(counts)})")
    for start, rows in zip(starts, counts, strict=True):
        if rows < 0:
            raise ValueError(f"count: a part has 0 or more rows (got {rows})")
        if start < 0 or start + rows > num_embeddings:
            raise IndexError(
                f"a part is expected within the {num_embeddings} rows of the history (got {start}:{start + rows}); was "
                "the history made for another graph, or the data not permuted by the partition?"
            )
    parts = [(start, start + rows) for start, rows in zip(starts, counts, strict=True) if rows]
    for (first, end), (second, last) in pairwise(sorted(parts)):
        if second < end:
            raise ValueError(f"parts of one batch must not overlap (got {first}:{end} and {second}:{last})")
    merged: list[tuple[int, int]] = []
    for start, stop in parts:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def select_batch(
    n_id: Tensor | None, offset: Integers | None, count: Integers | None, num_embeddings: int
) -> Selection:
    """Select the rows of a push: the parts if there are any, else ``n_id``, else all.

    Raises:
        ValueError: one of ``offset`` and ``count`` is missing, or ``n_id`` does not begin with the nodes of the parts,
            as it does for data permuted by the partition.
        TypeError: see :func:`select_rows`.
        IndexError: see :func:`select_rows` and :func:`select_slices`.
    """
    slices = _parts_of(offset, count, num_embeddings)
    if slices is None:
        return select_all(num_embeddings) if n_id is None else select_rows(n_id, num_embeddings, unique=True)
    if n_id is not None:
        _check_order(select_rows(n_id, num_embeddings), slices)
    return slices


def select_parts(
    n_id: Tensor | None, offset: Integers | None, count: Integers | None, num_embeddings: int
) -> list[Selection]:
    """Select the rows of a pull: those of the parts, then ``n_id`` (copied); all if there is neither.

    Raises:
        TypeError: see :func:`select_rows`.
        ValueError: see :func:`select_rows` and :func:`select_slices`; one of ``offset`` and ``count`` is missing.
        IndexError: see :func:`select_rows` and :func:`select_slices`.
    """
    parts: list[Selection] = []
    slices = _parts_of(offset, count, num_embeddings)
    if slices is not None:
        parts.append(slices)
    if n_id is not None:
        parts.append(select_rows(n_id, num_embeddings).clone())  # the caller may change it before it is read
    return parts or [select_all(num_embeddings)]


def _parts_of(offset: Integers | None, count: Integers | None, num_embeddings: int) -> Slices | None:
    if (offset is None) != (count is None):
        raise ValueError(f"offset and count come together (got {'count' if offset is None else 'offset'} alone)")
    return None if offset is None or count is None else select_slices(offset, count, num_embeddings)


def _check_order(n_id: Tensor, slices: Slices) -> None:
    rows = length(slices)
    if n_id.numel() < rows or not torch.equal(n_id[:rows], numbers_of(slices)):
        raise ValueError(
            f"n_id must begin with the {rows} nodes of the batch's parts, in their order (got {n_id.numel()} nodes "
            "that begin otherwise); permute the data by the partition before it is loaded"
        )


def check_values(x: Tensor, rows: int, width: int, *, exact: bool) -> Tensor:
    """Return the first ``rows`` rows of ``x``, detached.

    Args:
        x: [rows, width] floating point; more rows are cut off unless ``exact``.
        rows: needed.
        width: channels of the history.
        exact: whether there may not be more rows.

    Raises:
        TypeError: ``x`` is not of a floating-point type.
        ValueError: another width, or another number of rows.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: a floating-point tensor is expected (got {found})")
    if x.dim() != 2 or x.size(1) != width:
        raise ValueError(f"x: a history of {width} channels takes shape [rows, {width}] (got {list(x.shape)})")
    if x.size(0) < rows or (exact and x.size(0) != rows):
        raise ValueError(f"x: {rows} rows are selected in the history (got {x.size(0)} rows)")
    return x.detach()[:rows]
