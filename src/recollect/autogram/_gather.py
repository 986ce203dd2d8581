"""Takes each parameter's factors as a backward pass brings them, and hands them on as soon as all are there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from recollect.autogram._factors import Factor
from recollect.autogram._rows import as_rows, held_elements
from recollect.autogram._sums import Sum

__all__ = ["Gather"]


class Gather:
    """Factors on their way to what is summed up of them.

    Args:
        total: takes all factors of a parameter in a pass together.
        parameters: by id.
        events: how often each parameter is heard of in one pass.
        rows: how many rows come in each pass.
    """

    def __init__(self, total: Sum, parameters: Mapping[int, Tensor], events: Mapping[int, int], rows: int) -> None:
        self._total = total
        self._parameters = parameters
        self._events = events
        self._rows = rows
        self._pass = 0
        self._now: dict[int, list[Factor]] = {}
        self._waiting = dict(events)

    def add(self, parameter: int, factor: Factor | None) -> None:
        """Take a factor of this pass; None: a use of the parameter that contributes nothing."""
        if factor is not None:
            factors = self._now.setdefault(parameter, [])
            factors.append(factor)
            if len(factors) > 1 and held_elements(factors) > self._rows * self._parameters[parameter].numel():
                # No more is held of a parameter that is used again and again than its rows are.
                self._now[parameter] = [as_rows(factors, self._parameters[parameter].shape)]
        self._waiting[parameter] -= 1
        if self._waiting[parameter] == 0:
            self._close(parameter)

    def end_pass(self) -> None:
        """Take notice that this backward pass is over."""
        for parameter in list(self._now):
            self._close(parameter)
        self._waiting = dict(self._events)
        self._pass += 1

    def _close(self, parameter: int) -> None:
        factors = self._now.pop(parameter, None)
        if factors:
            self._total.take(parameter, self._pass, factors)
