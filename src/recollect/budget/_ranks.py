"""Plans of several processes that train one model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from recollect.budget._rows import Row

__all__ = ["Outcome", "check_local", "of_all_ranks"]


@dataclass(frozen=True)
class Outcome:
    """What one rank has found.

    Args:
        rows: of its plan; ``None`` if it found none.
        peak: of a step, in bytes, as measured.
        kept: bytes that a step keeps with everything stored.
    """

    rows: tuple[Row, ...] | None
    peak: int
    kept: int


def check_local(model: nn.Module) -> None:
    """Refuse a model whose steps need other processes: ranks try different numbers of steps, and would wait for ever.

    Raises:
        ValueError: it is under ``DistributedDataParallel``, or its parameters are spread over processes.
    """
    wrapped = next((name for name, m in model.named_modules() if isinstance(m, DistributedDataParallel)), None)
    if wrapped is not None:
        raise ValueError(
            f"{wrapped or 'model'} is under DistributedDataParallel; plan the module in it before it is wrapped"
        )
    tensor = sys.modules.get("torch.distributed.tensor")
    spread = [name for name, p in model.named_parameters() if tensor is not None and isinstance(p, tensor.DTensor)]
    if spread:
        raise ValueError(
            f"{spread[0]} and {len(spread) - 1} other parameters are spread over processes (DTensor); plan the model "
            "before it is sharded, with group=, and apply the plan then or later"
        )


def of_all_ranks(own: Outcome, group: ProcessGroup) -> Outcome:
    """Return that of the rank which keeps most, with the largest peak; no rows if a rank found none."""
    outcomes = [own] * distributed.get_world_size(group)
    distributed.all_gather_object(outcomes, own, group)
    largest = max(outcomes, key=lambda one: one.kept)  # the first of several
    complete = all(one.rows is not None for one in outcomes)
    return Outcome(largest.rows if complete else None, max(one.peak for one in outcomes), largest.kept)
