"""Linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from recollect.autogram._factors import Factor, Outer
from recollect.autogram.rules._view import bias_rows, needs, one_input

__all__ = ["linear"]


@one_input
def linear(layer: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """``torch.nn.Linear``: y[i, t] = W x[i, t] + b, hence dW[i] = sum_t g[i, t] x[i, t]ᵀ and db[i] = sum_t g[i, t].

    Args:
        layer: the layer.
        x: [r, *, in].
        grad: g [m, *, out].
    """
    factors = bias_rows(layer, grad, -1)
    if needs(layer, "weight"):
        factors["weight"] = Outer(_positions(grad), _positions(x), layer.weight.shape)
    return factors


def _positions(tensor: Tensor) -> Tensor:
    """Return [r, *, d] as [r, positions, one group, d]."""
    return (tensor.flatten(1, -2) if tensor.dim() > 2 else tensor.unsqueeze(1)).unsqueeze(2)
