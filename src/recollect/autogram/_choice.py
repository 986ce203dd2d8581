"""Which losses one backward pass is for: those along some of their axes, as far as the structure keeps them apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from recollect.autogram._plan import Declined, Plan, plan_batch
from recollect.autogram._sites import Stuck
from recollect.autogram._structure import Layouts, Structure
from recollect.autogram._walk import Graph

__all__ = ["BatchDim", "Choice", "choose"]

BatchDim = int | Literal["auto"] | None
"""In which dimension of the losses elements are independent: in this one; in those that are found; in none."""

# Of a backward pass, the gradients of parameters are a third: what a layer costs in a pass whose rows of it are known.
_PARAMETERS = 1 / 3
# Where parameters go by rows all the same, what passes for many losses save has to be worth their memory.
_WORTH = 0.9
# More axes of losses than so many are tried all together and one by one only.
_FEW = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """The passes that give a Gramian.

    Attributes:
        structure: where every tensor has which axes of the losses.
        layouts: where the losses of one pass are apart; without axes, a pass is for one loss.
        plan: who accounts for which parameter in such a pass.
    """

    structure: Structure
    layouts: Layouts
    plan: Plan

    @property
    def passes(self) -> int:
        """How many such passes are needed; beside them there is one for each loss if any parameter goes by rows."""
        return math.prod(self.structure.sizes) // self.layouts.batch


def choose(
    graph: Graph,
    parameters: Mapping[int, Tensor],
    declined: Declined,
    structure: Structure,
    batch_dim: BatchDim,
    bound: int,
) -> Choice:
    """Return the passes that take least, or those for the elements along the dimension that is given.

    Args:
        graph: the output's.
        parameters: those that count, by id.
        declined: what rules do not cover.
        structure: where every tensor has which axes of the losses.
        batch_dim: see :data:`BatchDim`.
        bound: how many elements of one layer's gradient, masked for every loss, may be held.
    """
    every_loss = Choice(structure, Layouts(), Plan(by_rows=dict.fromkeys(graph.uses, Stuck())))
    if batch_dim == "auto":
        candidates = list(_subsets(len(structure.sizes)))
    else:
        own = tuple(axis for axis, dim in enumerate(structure.dims) if dim == batch_dim)
        candidates = [own] if own else []
    best, nearest = every_loss, every_loss
    least = _WORTH * math.prod(structure.sizes) if batch_dim == "auto" else math.inf
    for axes in candidates:
        layouts = structure.layouts(axes)
        choice = Choice(structure, layouts, plan_batch(graph, parameters, declined, layouts, bound))
        cost = _cost(choice, parameters)
        if cost < least:
            best, least = choice, cost
        if nearest is every_loss or len(choice.plan.by_rows) < len(nearest.plan.by_rows):
            nearest = choice
    if best is every_loss:
        best.plan.by_rows.update(nearest.plan.by_rows)  # for the reasons
    return best


def _subsets(count: int) -> Iterator[Sequence[int]]:
    """Yield what axes may be taken together, more of them first."""
    sizes = range(count, 0, -1) if count <= _FEW else (count, 1)
    for size in sizes:
        yield from itertools.combinations(range(count), size)


def _cost(choice: Choice, parameters: Mapping[int, Tensor]) -> float:
    """Return how many passes of one loss each take as long, about."""
    by_rows = choice.plan.by_rows
    if not by_rows:
        return choice.passes
    elements = {key: parameter.numel() for key, parameter in parameters.items()}
    share = sum(elements[key] for key in by_rows) / max(1, sum(elements.values()))
    return choice.passes + math.prod(choice.structure.sizes) * (1 - _PARAMETERS * (1 - share))
