"""Layers whose parameters scale what passes, entry by entry."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recollect.autogram._factors import Factor, Rows
from recollect.autogram.rules._view import needs, one_input, sum_to, wide

__all__ = ["prelu", "prelu_sharing"]


def prelu_sharing(
    layer: nn.PReLU, inputs: tuple[Any, ...], axes: tuple[int | None, ...]
) -> tuple[int | None, ...] | None:
    """Entries are independent; channels, if each has a weight, are along the second axis."""
    return None if layer.num_parameters > 1 and axes == (1,) else axes


@one_input
def prelu(layer: nn.PReLU, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """PReLU (arXiv 1502.01852): y = max(x, 0) + weight · min(x, 0), with one weight, or one for each channel."""
    if not needs(layer, "weight"):
        return {}
    rows = sum_to(wide(grad) * wide(x).clamp(max=0), (2,) if layer.num_parameters > 1 else ())
    return {"weight": Rows(rows.view(-1, layer.num_parameters))}
