"""Times, peaks and the Gramian of each system on one work."""

from __future__ import annotations

from typing import Any

import torch

from bench._harness import alternating, median, peak_bytes, seconds
from bench._measure import reason
from bench._objectives_systems import HOLDS_THE_JACOBIAN, SYSTEMS, GramianStep, make_step
from bench._objectives_works import Work
from bench._report import GB
from bench._step import UnavailableError, relative_error

Row = dict[str, Any]


def foretold_bytes(name: str, work: Work, device: torch.device) -> float | None:
    """The peak of a system whose memory grows by the row, from those of two and four rows; None for the others."""
    if name not in HOLDS_THE_JACOBIAN or work.objectives <= 4:
        return None
    two, four = (peak_bytes(make_step(name, work, device, rows), device) for rows in (2, 4))
    return four + (four - two) / 2 * (work.objectives - 4)


def measure(work: Work, *, repeats: int, patience: float, max_gb: float, device: torch.device) -> Row:
    """Measure forward and Gramian of each system, taking turns after a first run that does not count.

    Args:
        repeats: of the timing.
        patience: seconds: a system whose first run took longer is timed twice only.
        max_gb: systems that would need more are skipped.

    Returns:
        By system: `peak_bytes`; `seconds` (median) and `all_seconds` of forward and Gramian; `gramian_seconds`
        (median) without the forward; `difference`: of the Gramian from recollect's; `skipped`, with reasons.
    """
    row: Row = {"kind": work.kind, "size": work.size, "objectives": work.objectives, "skipped": {}}
    steps: dict[str, GramianStep] = {}
    first: dict[str, float] = {}
    row["peak_bytes"] = {}
    for name in SYSTEMS:
        if name in HOLDS_THE_JACOBIAN and not work.by_rows:
            row["skipped"][name] = "not measured on deep networks, where it takes minutes"
            continue
        try:
            foretold = foretold_bytes(name, work, device)
            if foretold is not None and foretold > max_gb * GB:
                row["skipped"][name] = f"would need about {foretold / GB:.1f} GB, more than --max-gb {max_gb:g}"
                continue
            step = make_step(name, work, device)
            first[name] = seconds(step, device)
            row["peak_bytes"][name] = peak_bytes(step, device)
        except (UnavailableError, RuntimeError, ValueError) as error:
            row["skipped"][name] = reason(error)
            continue
        steps[name] = step
    row["difference"] = _differences(steps)
    for step in steps.values():
        step.forget()
    turns = {name: repeats if first[name] <= patience else min(repeats, 2) for name in steps}
    row["all_seconds"] = alternating(steps, turns, device)
    row["seconds"] = {name: median(values) for name, values in row["all_seconds"].items()}
    row["gramian_seconds"] = {name: median(step.seconds) for name, step in steps.items()}
    return row


def _differences(steps: dict[str, GramianStep]) -> dict[str, float]:
    found = {name: step.gramian for name, step in steps.items() if step.gramian is not None}
    ours = found.pop("recollect", None)
    return {} if ours is None else {name: relative_error([gramian], [ours]) for name, gramian in found.items()}
