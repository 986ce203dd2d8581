"""What an engine remembers of graphs of one form, and when it has to look again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from torch import Tensor

from recollect.autogram._independence import Independence
from recollect.autogram._plan import Declined, Plan, plan_batch
from recollect.autogram._probe import Layouts, probe
from recollect.autogram._walk import Graph

__all__ = ["Known", "plan_by_layouts"]


class Known:
    """What was found out about graphs of one form.

    Attributes:
        declined: captures, and names of parameters, for which a rule gave nothing.
        in_turn: whether passes do not run at once.
        settled: whether a plan came to its end, and so will not have to be made anew.
        layouts: where the batch is.
    """

    __slots__ = ("declined", "in_turn", "layouts", "settled")

    def __init__(self) -> None:
        self.declined: set[tuple[int, str]] = set()
        self.in_turn = False
        self.settled = False
        self.layouts: Layouts | None = None


def plan_by_layouts(
    output: Tensor,
    graph: Graph,
    parameters: Mapping[int, Tensor],
    leaf: Tensor,
    known: Known,
    declined: Declined,
    independence: Independence,
    batch_dim: int,
) -> tuple[Plan, Layouts]:
    """Plan by where the batch was in a graph of this form, if it must be there still; else look where it is.

    Args:
        output: the losses.
        graph: theirs.
        parameters: by id.
        leaf: what all captures lead to.
        known: of graphs of this form.
        declined: what rules do not cover.
        independence: refuses what mixes the batch.
        batch_dim: of the output.

    Raises:
        ValueError: the elements of the batch are not independent.
        EntangledError: some parameters' rows do not come apart in passes for the whole batch.
    """
    if known.layouts is not None:
        with suppress(ValueError):  # what was refused may be right by now
            plan = plan_batch(graph, parameters, declined, known.layouts, independence)
            if known.layouts.fit(graph, output.shape[batch_dim], plan.nodes()):
                return plan, known.layouts
    layouts = probe(output, graph, [leaf, *(parameters[k] for k in graph.uses)], batch_dim)
    known.layouts = layouts if layouts.certain else None  # else it is looked for again the next time
    plan = plan_batch(graph, parameters, declined, layouts, independence)
    if layouts.crossed or layouts.doubtful & plan.nodes():
        known.layouts = None
    return plan, layouts
