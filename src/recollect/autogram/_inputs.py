"""A layer's inputs as rules see them: one row for each objective, or one that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.autogram._capture import Call
from recollect.autogram._layout import Axis, Layout

__all__ = ["input_layouts", "shared", "with_rows"]

InputLayouts = tuple[Layout | None, ...]
"""Where each argument's tensors have the losses apart; None: all losses share them."""


def shared(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a layer's arguments with one row for all objectives: tensors become [1, *shape]."""
    rows: tuple[Any, ...] = _map_tensors(inputs, lambda tensor: tensor.unsqueeze(0))
    return rows


def with_rows(inputs: tuple[Any, ...], layouts: InputLayouts) -> tuple[Any, ...]:
    """Return a layer's arguments with a row for each loss, [B, *shape], or [1, *shape] where all share one."""
    pairs = zip(inputs, layouts, strict=True)
    return tuple(
        _map_tensors(value, layout.rows) if layout is not None else shared((value,))[0] for value, layout in pairs
    )


def input_layouts(
    call: Call, outputs: Sequence[Layout | None], shapes: Sequence[torch.Size | None]
) -> InputLayouts | None:
    """Return where a layer's arguments have the losses, or None if its elements are not independent there.

    Args:
        call: the layer's.
        outputs: where its outputs have them; None for one without a gradient.
        shapes: the outputs'.
    """
    if call.entry.sharing is None:
        return None
    blank = torch.zeros((), device="meta")
    inputs = call.arguments(tuple(blank.expand(shape) for shape in call.shapes))
    count = next(len(layout.axes) for layout in outputs if layout is not None)
    found: list[list[Axis | None]] = [[] for _ in inputs]
    for k in range(count):
        axes = tuple(None if layout is None else layout.axes[k].dim for layout in outputs)
        taken = call.entry.sharing(call.layer, inputs, axes)
        if taken is None:
            return None
        size = next(axis.size for axis in (layout.axes[k] for layout in outputs if layout is not None))
        inner = {layout.axes[k].inner for layout in outputs if layout is not None}
        lengths = {shape[axis] for shape, axis in zip(shapes, axes, strict=True) if axis is not None and shape}
        if len(inner) > 1 or len(lengths) > 1:
            return None
        for own, value, axis in zip(found, inputs, taken, strict=True):
            if axis is not None and any(tensor.shape[axis : axis + 1] != (*lengths,) for tensor in _tensors(value)):
                return None
            own.append(None if axis is None else Axis(axis, size, *inner))
    if any(None in axes and axes != [None] * count for axes in found):
        return None
    return tuple(
        Layout(tuple(axis for axis in axes if axis is not None)) if axes and axes[0] is not None else None
        for axes in found
    )


def _tensors(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _map_tensors(value, note)
    return tensors


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    return value
