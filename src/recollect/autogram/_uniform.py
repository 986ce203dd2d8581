"""A layer's inputs as rules see them: one row for each objective, or one that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.autogram._capture import Call
from recollect.autogram._factors import NotCovered
from recollect.autogram._layout import Layout

__all__ = ["shared", "with_rows"]


def shared(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a layer's arguments with one row for all objectives: tensors become [1, *shape]."""
    rows: tuple[Any, ...] = _map_tensors(inputs, lambda tensor: tensor.unsqueeze(0))
    return rows


def with_rows(
    call: Call, inputs: tuple[Any, ...], layouts: Sequence[Layout | None], shapes: Sequence[torch.Size], batch: int
) -> tuple[Any, ...]:
    """Return a layer's arguments with a row for each element of the batch, [B, *shape], or [1, *shape] without one.

    Args:
        call: the layer's.
        inputs: its arguments.
        layouts: where its outputs have the batch; None where one had no gradient.
        shapes: the outputs'.
        batch: B.

    Raises:
        NotCovered: it cannot be told where an input has the batch.
    """
    sharing = call.entry.sharing
    owners = (0,) * len(inputs) if sharing is None else sharing(call.layer, inputs)
    rows = []
    for value, owner in zip(inputs, owners, strict=True):
        if owner is None:
            rows.append(shared((value,))[0])
            continue
        layout = layouts[owner] or _only_layout(shapes[owner], batch)
        rows.append(_map_tensors(value, _splitter(layout, shapes[owner], batch)))
    return tuple(rows)


def _splitter(layout: Layout, like: torch.Size, batch: int) -> Callable[[Tensor], Tensor]:
    def split(tensor: Tensor) -> Tensor:
        if tensor.dim() <= layout.dim or tensor.shape[layout.dim] != like[layout.dim]:
            return tensor.unsqueeze(0)
        return layout.rows(tensor, batch)

    return split


def _only_layout(shape: torch.Size, batch: int) -> Layout:
    """Return where an output that had no gradient must have the batch."""
    dims = [dim for dim, n in enumerate(shape) if n % batch == 0]
    if len(dims) != 1 or shape[dims[0]] != batch:
        raise NotCovered("an output without a gradient, that may have the batch in several places")
    return Layout(dims[0])


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    return value
