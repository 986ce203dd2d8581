"""Dropout masks of a whole graph, a bit for each node and channel."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect._util._bits import pack_bits, unpack_bits
from recollect.autoscale.histories import PlainRows, Where

__all__ = ["Masks", "width_of"]

_LEVELS = 2**16  # as of recollect.models.RevGNN's own masks: 16 random bits for each element


def width_of(channels: int) -> int:
    """Return the bytes of a row."""
    return -(-channels // 8)


class Masks:
    """What a network of the whole graph multiplies its activations by, drawn from the same random numbers.

    Args:
        rows: its bits.
        channels: of each node.

    Attributes:
        p: the probability of zero, which may change from step to step.
    """

    def __init__(self, rows: PlainRows, channels: int) -> None:
        self._rows = rows
        self._channels = channels
        self.p = 0.0

    @property
    def _dropped(self) -> int:
        return min(round(self.p * _LEVELS), _LEVELS - 1)

    def draw(self, bounds: list[tuple[int, int]]) -> None:
        """Draw all, in the order of nodes, from torch's generator."""
        left = torch.empty(0, dtype=torch.int16, device="cpu")
        total = bounds[-1][1] * self._channels
        done = 0
        for start, stop in bounds:
            needed = (stop - start) * self._channels
            words = -(-(needed - left.numel()) // 4)
            fresh = torch.empty(max(words, 0), dtype=torch.int64, device="cpu").random_(-(2**63), None)
            numbers = torch.cat([left, fresh.view(torch.int16)])
            left = numbers[needed:].clone()
            kept = (numbers[:needed] >= self._dropped - _LEVELS // 2).view(stop - start, self._channels)
            self._rows.write((start, stop), pack_bits(kept))
            done += needed
        assert done == total

    def read(self, where: Where, dtype: torch.dtype) -> Tensor:
        """Return the factors of some nodes [rows, channels]."""
        kept = unpack_bits(self._rows.read(where), self._channels)
        return kept.to(dtype).mul_(_LEVELS / (_LEVELS - self._dropped))
