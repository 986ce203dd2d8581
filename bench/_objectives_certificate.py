"""What the certificate in `Engine.backward` costs: the same steps with it and without, in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from unittest import mock

import torch
from torch import Tensor

from bench._harness import alternating, median
from bench._objectives_measure import Row
from bench._objectives_works import Work
from bench._report import ratio
from recollect.autogram import Engine, _engine

HOW_OFTEN = 5  # times as many repeats as for the others: what is looked for is small


class _NoNorm:
    """Stands for the norm that a backward pass sums up; nothing is compared with it."""

    def total(self) -> None:
        return None


def _equal_weights(gramian: Tensor) -> Tensor:
    return gramian.new_full((len(gramian),), 1 / len(gramian))


def steps(work: Work) -> dict[str, Callable[[], None]]:
    """Forward and `Engine.backward`, "certified" and "uncertified", each on a copy of the model."""

    def certified() -> Callable[[], None]:
        model = copy.deepcopy(work.model)
        engine = Engine(model)

        def step() -> None:
            engine.backward(work.losses(model), _equal_weights)

        return step

    plain = certified()

    def uncertified() -> None:
        with (
            mock.patch.object(_engine, "squared_norm", return_value=nullcontext(_NoNorm())),
            mock.patch.object(Engine, "_certify", return_value=None),
        ):
            plain()

    return {"certified": certified(), "uncertified": uncertified}


def certificate_row(work: Work, repeats: int, device: torch.device) -> Row:
    """Time both.

    Returns:
        `all_seconds` and `seconds` (median) of each, and `share`: the median of what a step with the certificate takes
        longer than the one without it in the same turn, over the step with it.
    """
    both = steps(work)
    for step in both.values():
        step()
    times = alternating(both, HOW_OFTEN * repeats, device)
    seconds = {name: median(values) for name, values in times.items()}
    longer = [one - other for one, other in zip(times["certified"], times["uncertified"], strict=True)]
    share = (median(longer) or 0.0) / (seconds["certified"] or 1.0)
    row = {"kind": work.kind, "size": work.size, "all_seconds": times, "seconds": seconds, "share": share}
    return {**row, "ratio": ratio(seconds["certified"], seconds["uncertified"])}


def certificate_line(rows: Sequence[Row]) -> str:
    """What is printed of the rows."""
    lines = [
        f"  {row['kind']}, {row['size']}: {row['share']:.1%} of {1e3 * row['seconds']['certified']:.2f} ms"
        for row in rows
    ]
    return "\n".join(["the certificate's share of forward and Engine.backward", *lines])
