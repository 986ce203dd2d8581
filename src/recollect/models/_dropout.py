"""Dropout that draws four elements from one random number on CPU, where torch draws one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect._devices import forms_of

__all__ = ["dropout", "dropout_mask"]

_LEVELS = 2**16  # of the 16 random bits of an element


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero elements with probability p and scale the others by 1 / (1 - p), while training (arXiv 1207.0580).

    On CPU 4 to 6 times as fast as :func:`torch.nn.functional.dropout`; elsewhere, and compiled, it is that.

    Args:
        x: of any shape, of floating point.
        p: probability in [0, 1), on CPU rounded to a multiple of 2^-16 (the scale is that of the rounded one).
        training: otherwise x is returned.
    """
    if not training or p == 0:
        return x
    if torch.compiler.is_compiling() or not forms_of(x.device).packed_dropout:
        return F.dropout(x, p)
    return x * dropout_mask(x, p)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """Return what :func:`dropout` multiplies x by: zeros and 1 / (1 - p), of the shape, dtype and device of x."""
    if torch.compiler.is_compiling() or not forms_of(x.device).packed_dropout:
        return torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    words = x.new_empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)  # of x, for torch.func.vmap
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    del words
    return kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))
