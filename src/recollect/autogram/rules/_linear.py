"""Linear layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recollect.autogram._factors import Factor, Outer, Rows

__all__ = ["linear"]


def linear(layer: nn.Linear, inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> dict[str, Factor]:
    """``torch.nn.Linear``: y[i, t] = W x[i, t] + b, hence dW[i] = sum_t g[i, t] x[i, t]ᵀ and db[i] = sum_t g[i, t].

    Args:
        layer: the layer.
        inputs: x [r, ..., in].
        grads: g [m, ..., out].
    """
    (g,) = grads
    if g is None:
        return {}
    g = g.flatten(1, -2) if g.dim() > 2 else g.unsqueeze(1)  # [m, T, out]
    factors: dict[str, Factor] = {}
    if layer.weight.requires_grad:
        x = inputs[0]
        x = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        factors["weight"] = Outer(g.unsqueeze(2), x.unsqueeze(2), layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        factors["bias"] = Rows(g.sum(1))
    return factors
