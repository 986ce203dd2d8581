"""Log-determinants, of shape [batch] and in at least float32: sums of thousands of terms are lost in less."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.invertible._algebra import wide

__all__ = ["channels_log_det", "values_log_det", "zero_log_det"]


def zero_log_det(x: Tensor) -> Tensor:
    """Return that of what moves the values of x [batch, ...] without scaling them."""
    return torch.zeros(x.shape[:1], dtype=wide(x.dtype), device=x.device)


def values_log_det(log_slopes: Tensor) -> Tensor:
    """Return that of what scales each value alone, by the exponential of log_slopes [batch, ...]."""
    log_slopes = log_slopes.to(wide(log_slopes.dtype))
    return log_slopes.flatten(1).sum(1) if log_slopes.dim() > 1 else log_slopes


def channels_log_det(log_scales: Tensor, positions: int, batch: int) -> Tensor:
    """Return that of what scales each channel by the exponential of log_scales, at so many positions."""
    return (log_scales.sum(dtype=wide(log_scales.dtype)) * positions).expand(batch)
