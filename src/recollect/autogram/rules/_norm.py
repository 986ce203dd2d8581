"""Normalisations: y = weight · x̂ + bias, where x̂ has no parameter of the layer in it.

Row i of the weight's Jacobian sums g·x̂ over all that shares an entry of the weight, and the bias' sums g. x̂ is
computed again from the layer's input: that costs less than keeping it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from recollect.autogram._factors import Factor, NotCovered, Rows
from recollect.autogram._registry import Rule
from recollect.autogram.rules._view import bias_rows, needs, one_input, sum_to, wide

__all__ = ["batch_norm", "batch_norm_sharing", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


@one_input
def layer_norm(layer: nn.LayerNorm, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """LayerNorm (arXiv 1607.06450): the normalised dimensions come last."""
    normed = F.layer_norm(wide(x), layer.normalized_shape, eps=layer.eps)
    return _affine(layer, normed, grad, *range(-len(layer.normalized_shape), 0))


@one_input
def rms_norm(layer: nn.RMSNorm, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """RMSNorm (arXiv 1910.07467): the normalised dimensions come last."""
    normed = F.rms_norm(wide(x), layer.normalized_shape, eps=layer.eps)
    return _affine(layer, normed, grad, *range(-len(layer.normalized_shape), 0))


@one_input
def group_norm(layer: nn.GroupNorm, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """GroupNorm (arXiv 1803.08494) of [N, C, *]."""
    normed = F.group_norm(wide(x).flatten(0, 1), layer.num_groups, eps=layer.eps).view(x.shape)
    return _affine(layer, normed, grad, 2)


def instance_norm(spatial: int) -> Rule:
    """Return the rule of InstanceNorm (arXiv 1607.08022) over ``spatial`` dimensions, of [N, C, *] or [C, *]."""

    @one_input
    def rule(layer: nn.InstanceNorm1d, x: Tensor, grad: Tensor) -> dict[str, Factor]:
        channel = x.ndim - spatial - 1
        if layer.training or layer.running_mean is None:
            normed = F.instance_norm(wide(x).flatten(0, channel - 1), eps=layer.eps).view(x.shape)
        else:
            normed = _by_running_statistics(layer, x, channel)
        return _affine(layer, normed, grad, channel)

    return rule


def batch_norm_sharing(
    layer: nn.BatchNorm1d, inputs: tuple[Any, ...], axes: tuple[int | None, ...]
) -> tuple[int | None, ...] | None:
    """Elements are independent if their statistics are not those of the batch."""
    fixed = not layer.training and layer.running_mean is not None
    return (0,) if fixed and axes == (0,) else None


@one_input
def batch_norm(layer: nn.BatchNorm1d, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """BatchNorm (arXiv 1502.03167) of [N, C, *]; by the batch's statistics only where all objectives share the batch.

    Raises:
        NotCovered: the statistics are those of elements that are different rows, or of several devices.
    """
    if not layer.training and layer.running_mean is not None:
        return _affine(layer, _by_running_statistics(layer, x, 2), grad, 2)
    if len(x) > 1 or isinstance(layer, nn.SyncBatchNorm):
        raise NotCovered("statistics of more than one row of the inputs")
    normed = F.batch_norm(wide(x)[0], None, None, training=True, eps=layer.eps).unsqueeze(0)
    return _affine(layer, normed, grad, 2)


def _by_running_statistics(layer: nn.BatchNorm1d | nn.InstanceNorm1d, x: Tensor, channel: int) -> Tensor:
    shape = (-1, *[1] * (x.ndim - channel - 1))
    mean, var = (wide(getattr(layer, name)).view(shape) for name in ("running_mean", "running_var"))
    return (wide(x) - mean) * (var + layer.eps).rsqrt()


def _affine(layer: nn.Module, normed: Tensor, grad: Tensor, *kept: int) -> dict[str, Factor]:
    """Return the factors of ``weight`` and ``bias``, which have the dimensions ``kept`` of what was normalised."""
    factors = bias_rows(layer, grad, *kept)
    if needs(layer, "weight"):
        grad = wide(grad)
        in_place = normed.shape == grad.shape and normed.dtype == grad.dtype  # nobody else has what was normalised
        factors["weight"] = Rows(sum_to(normed.mul_(grad) if in_place else grad * normed, kept))
    return factors
