"""Products of the Jacobians of two lists of losses, J Kᵀ: the factors of the one are held, and meet those of the other.

Passes for the rows are held a group at a time, within half of the bound, and for each group passes for the columns run,
which are held in groups too unless one pass brings them all: then each layer's factors are multiplied and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from recollect.autogram._choice import Choice
from recollect.autogram._contract import add_cross
from recollect.autogram._factors import Factor, merge
from recollect.autogram._passes import Declines, Job, Passes, passes_of
from recollect.autogram._sums import Joined

__all__ = ["cross_of"]


class _Held(Joined):
    """Holds each parameter's Jacobian as it comes."""

    def __init__(
        self, parameters: Mapping[int, Tensor], passes: int, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(parameters, passes, rows, dtype, device)
        self.factors: dict[int, Sequence[Factor]] = {}

    def add(self, parameter: int, factors: Sequence[Factor]) -> None:
        self.factors[parameter] = merge(factors)

    def total(self) -> Tensor:
        raise TypeError("what is held has no sum; it meets another's")


class _Met(Joined):
    """Multiplies each parameter's Jacobian with what is held of the parameter.

    Args:
        held: the rows' side.
        block: [m, n], to which the products are added.
        passes: the number of backward passes.
        rows: how many rows come in each.
    """

    def __init__(self, held: _Held, block: Tensor, passes: int, rows: int) -> None:
        super().__init__(held.parameters, passes, rows, held.dtype, held.device)
        self._factors = held.factors
        self._block = block

    def add(self, parameter: int, factors: Sequence[Factor]) -> None:
        first = self._factors.get(parameter)
        if first is not None:
            add_cross(self._block, first, factors)

    def total(self) -> Tensor:
        self.finish()
        return self._block


def cross_of(rows: Job, columns: Job, choices: tuple[Choice, Choice]) -> Tensor | tuple[Declines, Declines]:
    """Return the products [m, n] of the gradients of two lists of losses; or what rules declined, of each.

    Args:
        rows: the losses of the rows, flattened.
        columns: those of the columns.
        choices: the passes of both.
    """
    none: Declines = frozenset()
    dtype, device = torch.promote_types(rows.dtype, columns.dtype), rows.output.device
    total = torch.zeros(rows.output.numel(), columns.output.numel(), dtype=dtype, device=device)
    for first in passes_of(rows, choices[0], holds=True, at_once=False):
        others = list(passes_of(columns, choices[1], holds=True, at_once=False))
        part = torch.zeros_like(total)
        for chosen in _groups(first):
            held = _Held(rows.parameters, len(chosen), first.rows, dtype, device)
            declined = first.run(held, chosen)
            if declined is not None:
                return declined, none
            held.finish()
            band = part[chosen.start * first.rows : chosen.stop * first.rows]
            for second in others:
                if first.parameters.keys().isdisjoint(second.parameters):
                    continue
                met = torch.zeros_like(band)
                for other in _groups(second):
                    block = met[:, other.start * second.rows : other.stop * second.rows]
                    declined = second.run(meeting := _Met(held, block, len(other), second.rows), other)
                    if declined is not None:
                        return none, declined
                    meeting.finish()
                band += met if second.places is None else met[:, second.places]
        total += part if first.places is None else part[first.places]
    return total


def _groups(passes: Passes) -> Iterator[range]:
    """Yield the passes in groups that fit half of the bound."""
    step = max(1, passes.fit // 2)
    for start in range(0, passes.count, step):
        yield range(start, min(start + step, passes.count))
