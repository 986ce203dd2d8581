"""A memory budget of a run: the plan of its steps, where it is kept, and what is shown of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recollect.budget import BudgetError, Plan, Row, find_units, plan
from recollect.train._errors import InvalidRunError, TrainingError, UsageError
from recollect.train._files import write_text
from recollect.train._stored import read_text
from recollect.train._text import STRATEGIES, bytes_text

__all__ = ["Planned", "make_plan", "read_rows", "write_rows"]


class Planned:
    """The plan of a network's steps, which can be applied and removed.

    Args:
        plan: of the network.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def switch(self, on: bool) -> None:
        """Apply the plan, or remove it."""
        if on:
            self.plan.apply()
        else:
            self.plan.remove()

    @property
    def plain_bytes(self) -> int:
        """Bytes that a step with everything kept takes at most."""
        return self.plan.peak + sum(row.keeps for row in self.plan.rows)

    def summarize(self) -> dict[str, Any]:
        """What summary.json holds of it."""
        return {
            "bytes": self.plan.budget,
            "peak_bytes": self.plan.peak,
            "added_seconds": self.plan.seconds,
            "units": [asdict(row) for row in self.plan.rows],
        }


def make_plan(
    network: nn.Module,
    loss: Callable[..., Tensor],
    inputs: tuple[Any, ...],
    budget: str,
    rows: Iterable[Row] = (),
) -> Planned:
    """Plan the step of a run; the network, its gradients and random state stay as they were.

    Args:
        network: whose units are treated; in training mode.
        loss: from a batch's inputs to its loss, through this network.
        inputs: of the first batch.
        budget: as in the settings.
        rows: of the plan that the run had before.

    Raises:
        UsageError: the network has no units.
        InvalidRunError: ``rows`` are of another network.
        TrainingError: the budget cannot be met; the message has the least that can.
    """
    rows = tuple(rows)
    try:
        units = find_units(network)
        other = [row.unit for row in rows if row.unit not in units]
        if other:
            raise InvalidRunError(f"the run's plan.json is of another network, which has {other[0]!r}; remove it")
        return Planned(plan(network, inputs, budget=budget, step=loss, rows=rows))
    except BudgetError as error:
        raise TrainingError(
            f"memory_budget={budget} cannot be met: the least peak of a step that was measured is {error.least} bytes "
            f"({bytes_text(error.least)}). Give that, fewer model.hidden_channels, or training=autoscale, whose steps "
            "are on parts of the graph"
        ) from error
    except ValueError as error:
        raise UsageError(f"memory_budget={budget}: {error}. Or leave memory_budget out") from error


def write_rows(path: Path, planned: Planned) -> None:
    """Write what the plan chose, so that who goes on with the run computes the same."""
    write_text(path, json.dumps([asdict(row) for row in planned.plan.rows], indent=2) + "\n")


def read_rows(path: Path) -> tuple[Row, ...]:
    """Read a file that `write_rows` wrote; nothing if there is none.

    Raises:
        InvalidRunError: it is damaged.
    """
    if not path.exists():
        return ()
    kinds = {"unit": str, "keeps": int, "strategy": str, "bytes": int, "seconds": float}
    assert kinds.keys() == {item.name for item in fields(Row)}
    try:
        found = json.loads(read_text(path))
        for row in found:
            wrong = [name for name, kind in kinds.items() if type(row[name]) is not kind]
            if row["strategy"] not in STRATEGIES:
                wrong.append("strategy")
            if wrong or len(row) != len(kinds) or not math.isfinite(row["seconds"]):
                raise ValueError(f"a row has another {', '.join(wrong) or 'form'}")
        return tuple(Row(**row) for row in found)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise InvalidRunError(f"{path} is not the plan of a run ({error}); remove it, and one is made anew") from error
