"""Bilinear layers: linear in the outer product of their two inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recollect.autogram._factors import Factor, Outer
from recollect.autogram.rules._view import bias_rows, needs, wide

__all__ = ["bilinear"]


def bilinear(layer: nn.Bilinear, inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> dict[str, Factor]:
    """``torch.nn.Bilinear``: y[o] = x₁ᵀ W[o] x₂ + b[o], hence dW[o] = g[o] x₁ x₂ᵀ.

    Args:
        layer: the layer.
        inputs: x₁ [r, *, in₁] and x₂ [r, *, in₂].
        grads: g [m, *, out].
    """
    (grad,) = grads
    if grad is None:
        return {}
    factors = bias_rows(layer, grad, -1)
    if needs(layer, "weight"):
        first, second = (wide(x).reshape(len(x), -1, x.shape[-1]) for x in inputs)
        pairs = first.unsqueeze(3) * second.unsqueeze(2)  # [r, T, in₁, in₂]
        left = wide(grad).reshape(len(grad), -1, 1, layer.out_features)
        factors["weight"] = Outer(left, pairs.flatten(2).unsqueeze(2), layer.weight.shape)
    return factors
