"""Normalisations: y = weight · x̂ + bias, where x̂ has no parameter of the layer in it.

Row i of the weight's Jacobian sums g·x̂ over what shares an entry of the weight, and the bias' sums g. What was
normalised is computed again from the layer's input: it costs less than to keep it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.autogram._factors import Factor, NotCovered, Rows
from recollect.autogram.rules._view import total, wide

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

SPATIAL = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}


def layer_norm(layer: nn.LayerNorm, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """LayerNorm (arXiv 1607.06450); the normalised dimensions come last."""
    normed = F.layer_norm(wide(x), layer.normalized_shape, eps=layer.eps)
    return _affine(normed, grad, tuple(range(-len(layer.normalized_shape), 0)))


def rms_norm(layer: nn.RMSNorm, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """RMSNorm (arXiv 1910.07467); the normalised dimensions come last."""
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps  # of the layer's own dtype, not of a wider one
    normed = F.rms_norm(wide(x), layer.normalized_shape, eps=eps)
    return _affine(normed, grad, tuple(range(-len(layer.normalized_shape), 0)))


def group_norm(layer: nn.GroupNorm, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """GroupNorm (arXiv 1803.08494) of [N, C, *]."""
    normed = F.group_norm(wide(x).flatten(0, 1), layer.num_groups, eps=layer.eps).view_as(x)
    return _affine(normed, grad, (2,))


def instance_norm(layer: nn.InstanceNorm1d, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """InstanceNorm (arXiv 1607.08022) of [N, C, *] or [C, *], by its input's or by its running statistics."""
    channel = x.ndim - _spatial(layer) - 1
    if layer.training or layer.running_mean is None:
        normed = F.instance_norm(wide(x).flatten(0, channel - 1), eps=layer.eps).view_as(x)
    else:
        normed = _by_running_statistics(layer, x, channel)
    return _affine(normed, grad, (channel,))


def batch_norm(layer: nn.BatchNorm1d, x: Tensor, grad: Tensor) -> dict[str, Factor]:
    """BatchNorm (arXiv 1502.03167) of [N, C, *]; by its batch's statistics only where all rows share that batch."""
    if not layer.training and layer.running_mean is not None:
        normed = _by_running_statistics(layer, x, 2)
    elif len(x) == 1 and not isinstance(layer, nn.SyncBatchNorm):
        normed = F.batch_norm(wide(x)[0], None, None, training=True, eps=layer.eps).unsqueeze(0)
    else:
        raise NotCovered("statistics of a batch whose elements are rows of their own")
    return _affine(normed, grad, (2,))


def _spatial(layer: nn.Module) -> int:
    return next(dims for kind, dims in SPATIAL.items() if isinstance(layer, kind))


def _by_running_statistics(layer: nn.BatchNorm1d | nn.InstanceNorm1d, x: Tensor, channel: int) -> Tensor:
    assert layer.running_mean is not None
    shape = (-1, *[1] * (x.ndim - channel - 1))
    mean, var = wide(layer.running_mean).view(shape), wide(layer.running_var).view(shape)
    return (wide(x) - mean) * (var + layer.eps).rsqrt()


def _affine(normed: Tensor, grad: Tensor, kept: tuple[int, ...]) -> dict[str, Factor]:
    """Rows for ``weight`` and ``bias``, which have the dimensions ``kept`` of the normalised input."""
    return {"weight": Rows(total(wide(grad) * normed, kept)), "bias": Rows(total(grad, kept))}
