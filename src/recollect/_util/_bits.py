"""Booleans as bits, eight in a byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(flags: Tensor) -> Tensor:
    """Return zeros and ones, or booleans, [..., n] as bytes [..., n / 8], rounded up."""
    padded = F.pad(flags.to(torch.uint8), (0, -flags.size(-1) % 8))
    eights = padded.view(*flags.shape[:-1], padded.size(-1) // 8, 8)
    return (eights * _places(flags.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, number: int) -> Tensor:
    """Return the first bits [..., number] of bytes [..., b], as booleans."""
    needed = bits[..., : -(-number // 8)]
    flags: Tensor = (needed.unsqueeze(-1) & _places(bits.device)).ne(0).flatten(-2)[..., :number]
    return flags


def _places(device: torch.device) -> Tensor:
    """Return 1, 2, 4, ... 128, made there: copies of numbers of Python would wait."""
    return torch.ones(8, dtype=torch.uint8, device=device) << torch.arange(8, dtype=torch.uint8, device=device)
