"""Some ranges of rows, one after the other."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Ranges"]

_ROWS_OF_ONE_SLICE = 512  # ranges shorter than this on average are gathered rather than sliced


class Ranges:
    """The rows from ``start[k]`` to ``stop[k]``, for one ``k`` after the other.

    Args:
        start: [K] int64 on the CPU.
        stop: [K] int64 on the CPU, nowhere below ``start``.
        device: Of the tensors that rows are taken of.
    """

    def __init__(self, start: Tensor, stop: Tensor, device: torch.device) -> None:
        nonempty = stop > start
        self._start, self._stop = start[nonempty], stop[nonempty]
        self._device = device
        self.total = int((stop - start).sum())

    @cached_property
    def positions(self) -> Tensor:
        """The numbers of the rows, [total] int64: sums of steps of one, but for the jumps between ranges."""
        steps = torch.ones(self.total, dtype=torch.int64, device=self._device)
        if self.total:
            count = self._stop - self._start
            jumps = self._start.clone()
            jumps[1:] -= self._stop[:-1] - 1
            steps[(count.cumsum(0) - count).to(self._device)] = jumps.to(self._device)
        return steps.cumsum_(0)

    def take(self, value: Tensor) -> Tensor:
        """The rows of ``value``: slices where ranges are few and long, as then nothing is looked up."""
        if self.total < _ROWS_OF_ONE_SLICE * self._start.numel() or not self.total:
            return value.index_select(0, self.positions)
        pairs = zip(self._start.tolist(), self._stop.tolist(), strict=True)
        return torch.cat([value[start:stop] for start, stop in pairs])
