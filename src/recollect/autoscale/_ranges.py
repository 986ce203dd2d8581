"""Some ranges of rows, one after the other."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Ranges"]

_FEW, _LONG = 32, 512  # ranges; rows of the mean range


class Ranges:
    """The rows from ``start[k]`` to ``stop[k]``, for one ``k`` after the other.

    Few or long ranges are taken as slices, of which nothing is looked up; many short ones by the numbers of their rows,
    so that no step is made for each.

    Args:
        start: [K] int64 on the CPU.
        stop: [K] int64 on the CPU, nowhere below ``start``.
        device: Of the tensors that rows are taken of.
    """

    def __init__(self, start: Tensor, stop: Tensor, device: torch.device) -> None:
        self._start, self._stop = start, stop
        self._device = device
        self.total = int((stop - start).sum())
        self._sliced = start.numel() <= _FEW or self.total >= _LONG * start.numel()

    def take(self, value: Tensor) -> Tensor:
        """The rows of ``value``."""
        if not self.total:
            return value[:0]
        if self._sliced:
            return torch.cat([value[start:stop] for start, stop in self._pairs])
        return value.index_select(0, self.positions)

    @cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self._start.tolist(), self._stop.tolist(), strict=True))

    @cached_property
    def positions(self) -> Tensor:
        """The numbers of the rows, [total] int64."""
        if not self.total:
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        if self._sliced:
            return torch.cat([torch.arange(start, stop, device=self._device) for start, stop in self._pairs])
        return self._sums_of_steps()

    def _sums_of_steps(self) -> Tensor:
        """Steps of one, but for the jumps from one range to the next."""
        nonempty = self._stop > self._start
        start, stop = self._start[nonempty], self._stop[nonempty]
        count = stop - start
        jumps = start.clone()
        jumps[1:] -= stop[:-1] - 1
        steps = torch.ones(self.total, dtype=torch.int64, device=self._device)
        steps[(count.cumsum(0) - count).to(self._device)] = jumps.to(self._device)
        return steps.cumsum_(0)
