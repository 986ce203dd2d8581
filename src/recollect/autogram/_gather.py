"""Takes each parameter's factors as backward passes bring them, and has them squared as soon as all are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recollect.autogram._contract import add_gramian
from recollect.autogram._factors import Blocks, Factor, Outer, Picked, Rows
from recollect.autogram._merge import join, merge
from recollect.autogram._rows import form_rows
from recollect.autogram._square import SquareSum

__all__ = ["Gather"]


class Gather:
    """Factors on their way to a Gramian.

    Args:
        total: takes their Gramians.
        parameters: by id.
        events: how often each parameter is heard of in one pass.
        passes: the number of backward passes, in each of which the same number of rows comes.
    """

    def __init__(
        self, total: SquareSum, parameters: Mapping[int, Tensor], events: Mapping[int, int], passes: int, rows: int
    ) -> None:
        self._total = total
        self._parameters = parameters
        self._events = events
        self._passes = passes
        self._rows = rows
        self._pass = 0
        self._now: dict[int, list[Factor]] = {}
        self._waiting = dict(events)
        self._held: dict[int, dict[int, Factor]] = {}

    def add(self, parameter: int, factor: Factor | None) -> None:
        """Take a factor of this pass; None: a use of the parameter that contributes nothing."""
        if factor is not None:
            factors = self._now.setdefault(parameter, [])
            factors.append(factor)
            if len(factors) > 1:
                self._now[parameter] = self._fold(parameter, factors)
        self._waiting[parameter] -= 1
        if self._waiting[parameter] == 0:
            self._close(parameter)

    def end_pass(self) -> None:
        """Take notice that this backward pass is over."""
        for parameter in list(self._now):
            self._close(parameter)
        self._waiting = dict(self._events)
        self._pass += 1

    def finish(self) -> None:
        """Square what had to wait for the last pass."""
        while self._held:
            parameter, held = self._held.popitem()
            none = Rows(torch.zeros(()).expand(self._rows, *self._parameters[parameter].shape))
            like = next(iter(held.values()))
            if len(held) < self._passes:
                none = Rows(form_rows([like], slice(0, 1)).new_zeros(self._rows, *self._parameters[parameter].shape))
            add_gramian(self._total, self._join([held.get(k, none) for k in range(self._passes)], parameter))

    def _close(self, parameter: int) -> None:
        factors = self._now.pop(parameter, None)
        if not factors:
            return
        if self._passes == 1:
            add_gramian(self._total, factors)
            return
        factors = merge(factors)
        if len(factors) > 1 or isinstance(factors[0], Blocks) or self._is_large(parameter, factors):
            factors = [self._form(parameter, factors)]
        self._held.setdefault(parameter, {})[self._pass] = factors[0]

    def _fold(self, parameter: int, factors: list[Factor]) -> list[Factor]:
        """Hold no more of a parameter that is used again and again than its rows are."""
        return [self._form(parameter, factors)] if self._is_large(parameter, factors) else factors

    def _is_large(self, parameter: int, factors: Sequence[Factor]) -> bool:
        return sum(map(_elements, factors)) > self._rows * self._parameters[parameter].numel()

    def _form(self, parameter: int, factors: Sequence[Factor]) -> Rows:
        rows = form_rows(factors, slice(0, self._rows))
        return Rows(rows.view(self._rows, *self._parameters[parameter].shape))

    def _join(self, parts: Sequence[Factor], parameter: int) -> list[Factor]:
        joined = join(parts)
        return [join([self._form(parameter, [part]) for part in parts]) or parts[0] if joined is None else joined]


def _elements(factor: Factor) -> int:
    if isinstance(factor, Outer):
        return factor.left.numel() + factor.right.numel()
    if isinstance(factor, Picked):
        return factor.grad.numel() + factor.index.numel()
    return factor.values.numel() if isinstance(factor, Rows) else 0
