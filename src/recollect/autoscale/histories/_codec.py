"""How a row of floats is kept: as it is, in fewer bits, or as int8 with a scale."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from recollect._transfer import sent, write

__all__ = ["DTYPES", "Codec", "codec_for"]

_SCALE_BYTES = 4
_STEPS = 127
"""Of a scale between zero and a row's largest entry: int8 without -128, so that the code is symmetric."""


class Codec(Protocol):
    """Floats [rows, channels] to records [rows, record_width] of one type, and back."""

    record_dtype: torch.dtype
    record_width: int

    def encode(self, x: Tensor) -> Tensor:
        """Return what is written; the table converts it to ``record_dtype`` where it is of another float type."""
        ...

    def decode(self, records: Tensor, out: Tensor) -> None:
        """Write the floats of ``records``, which are not pinned, into ``out``, perhaps of another type or elsewhere."""
        ...

    def decodes_to(self, dtype: torch.dtype) -> bool:
        """Return whether records are already floats of this type."""
        ...


class FloatCodec:
    """A row is kept in a floating-point type; values beyond its range become infinite."""

    def __init__(self, dtype: torch.dtype, channels: int) -> None:
        self.record_dtype = dtype
        self.record_width = channels

    def encode(self, x: Tensor) -> Tensor:
        """Return ``x`` itself: copying into the table converts it, in one pass."""
        return x

    def decode(self, records: Tensor, out: Tensor) -> None:
        """Convert."""
        write(out, records)

    def decodes_to(self, dtype: torch.dtype) -> bool:
        """Return whether this is the type."""
        return dtype == self.record_dtype


class Int8Codec:
    """A row is kept as round(x / scale), scale = max|x| / 127: the error is at most half a scale per entry.

    The scale (float32) stands in the first four bytes of the record, so that a row stays one piece. A row of zeros has
    the scale 0. A row with an entry that is not finite has no scale: all of it comes back as NaN.
    """

    record_dtype = torch.int8

    def __init__(self, channels: int) -> None:
        self.record_width = channels + _SCALE_BYTES

    def encode(self, x: Tensor) -> Tensor:
        """Quantise row by row."""
        x = x.to(torch.float32)
        scale = x.abs().amax(1, keepdim=True) * (1 / _STEPS)  # a division by a number is rounded otherwise on CUDA
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        steps = (x / scale).round_().clamp_(-_STEPS, _STEPS)
        steps = torch.where(scale > 0, steps, 0.0)  # converting NaN to integers is undefined
        return torch.cat([_reread(scale, torch.int8), steps.to(torch.int8)], 1)

    def decode(self, records: Tensor, out: Tensor) -> None:
        """Multiply by the scales, on the device of the result: a transfer then carries bytes."""
        records = sent(records, out.device)
        torch.mul(records[:, _SCALE_BYTES:], _reread(records[:, :_SCALE_BYTES], torch.float32), out=out)

    def decodes_to(self, dtype: torch.dtype) -> bool:
        """Return False."""
        return False


def _reread(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bytes of each row as another type.

    They are copied: a single row is contiguous with any stride, and not every stride has a view of another type.
    """
    return values.clone(memory_format=torch.contiguous_format).view(dtype)


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float64)


def codec_for(dtype: torch.dtype, channels: int) -> Codec:
    """Return the codec of a history's ``dtype``.

    Raises:
        ValueError: a type in which no history is kept.
    """
    if dtype not in DTYPES:
        raise ValueError(f"the dtype of a history must be one of {', '.join(map(str, DTYPES))} (got {dtype!r})")
    return Int8Codec(channels) if dtype == torch.int8 else FloatCodec(dtype, channels)
