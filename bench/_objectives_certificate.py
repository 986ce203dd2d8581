"""What the certificate in `Engine.backward` costs: the same steps with it and without, in turns.

Without it, a step is what a user writes in its place: `compute_gramian` of an engine that never compares
(`certify_every=0`), the weighting, and `losses.backward(weights)`. Both are of one engine and one model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench._harness import alternating, median
from bench._objectives_measure import Row
from bench._objectives_works import Work
from bench._report import ratio
from recollect.autogram import Engine

HOW_OFTEN = 10  # times as many repeats as for the others: what is looked for is small


def _equal_weights(gramian: Tensor) -> Tensor:
    return gramian.new_full((len(gramian),), 1 / len(gramian))


def steps(work: Work) -> dict[str, Callable[[], None]]:
    """Forward, Gramian, weights and backward pass: "certified" by `Engine.backward`, and "uncertified"."""
    engine = Engine(work.model, certify_every=0)

    def certified() -> None:
        engine.backward(work.losses(work.model), _equal_weights)

    def uncertified() -> None:
        losses = work.losses(work.model)
        losses.backward(_equal_weights(engine.compute_gramian(losses)))

    return {"certified": certified, "uncertified": uncertified}


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
