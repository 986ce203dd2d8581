"""The numbers that the depth benchmark is to reach, computed from what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from bench._exactness import LAYERS, Errors
from bench._measure import Row
from bench._report import OTHER_PART, OTHER_SIZE, Target, ratio
from bench._systems import Workload

# What the numbers were set for; at other sizes the ratios are of interest, but are not these targets.
WORKLOAD = Workload(nodes=20_000, edges=200_000, channels=128, norm="bare")
TIMED_DEPTH = 16
TIMES = {"pyg": 0.70, "plain": 1.40, "checkpoint": 1.0}
SHALLOW, DEEP = 8, 256
GRADIENTS = {"float64, dropout": 1e-10, "float32, dropout": 1e-5}


def depth_targets(work: Workload, rows: Sequence[Row], errors: Errors) -> list[Target]:
    """Hold rows of one workload, and gradient errors at 64 layers, against the numbers to reach."""
    return [*_times(work, rows), *_peaks(rows), *_gradients(errors)]


def _times(work: Workload, rows: Sequence[Row]) -> list[Target]:
    row = next((row for row in rows if row["depth"] == TIMED_DEPTH), {})
    seconds = row.get("seconds", {}) if work == WORKLOAD else {}
    why = OTHER_SIZE if work != WORKLOAD else "not timed" if seconds else OTHER_PART
    return [
        Target(
            f"step time at L={TIMED_DEPTH}, recollect / {peer}",
            ratio(seconds.get("recollect"), seconds.get(peer)),
            limit,
            why_not_measured=why,
        )
        for peer, limit in TIMES.items()
    ]


def _peaks(rows: Sequence[Row]) -> list[Target]:
    ours = {row["depth"]: row["peak_bytes"].get("recollect") for row in rows}
    against = [ratio(row["peak_bytes"].get("recollect"), row["peak_bytes"].get("pyg")) for row in rows]
    known = [value for value in against if value is not None]
    everywhere = bool(known) and len(known) == len(rows)
    return [
        Target(
            f"peak of a step, L={DEEP} / L={SHALLOW}",
            ratio(ours.get(DEEP), ours.get(SHALLOW)),
            1.05,
            why_not_measured="not measured at both" if {SHALLOW, DEEP} <= ours.keys() else OTHER_PART,
        ),
        Target(
            "peak of a step, recollect / pyg, the worst depth",
            max(known) if everywhere else None,
            1.0,
            strict=True,
            why_not_measured="not measured at every depth",
        ),
    ]


def _gradients(errors: Errors) -> list[Target]:
    found = {case: errors.get(case, {}).get("recollect") for case in GRADIENTS}
    return [
        Target(
            f"gradient error at {LAYERS} layers, {case}",
            value if isinstance(value, float) else None,
            limit,
            why_not_measured=value if isinstance(value, str) else "not measured",
        )
        for (case, limit), value in zip(GRADIENTS.items(), found.values(), strict=True)
    ]
