"""The numbers that the benchmark of invertible stacks is to reach, computed from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench._exactness import Errors
from bench._invertible_systems import SYSTEMS, Stack
from bench._measure import Row
from bench._report import OTHER_SIZE, Target, ratio

# What the numbers were set for; at other sizes the ratios are of interest, but are not these targets.
WORKLOADS = {"mlp": Stack("mlp", 4096, 256), "conv": Stack("conv", 32, 64, 16)}
DEPTH = 64
TIME, PEAK = 0.75, 1.0
PEERS = ("invtorch", "memcnn")
EXACT = 1e-10
RIGHT = 1e-6  # in float64: far above rounding, far below other random draws


def ratios(rows: Sequence[Row], key: str, depth: int) -> dict[str, float | None]:
    """Recollect's number over each other system's."""
    found: Row = next((row.get(key, {}) for row in rows if row["depth"] == depth), {})
    return {name: ratio(found.get("recollect"), found.get(name)) for name in SYSTEMS if name != "recollect"}


def verdicts(errors: Errors) -> dict[str, str]:
    """Whether each system's gradient is right with dropout on; or why that is not known."""
    found = errors["float64, dropout"]
    return {
        name: error if isinstance(error, str) else "yes" if error < RIGHT else "no" for name, error in found.items()
    }


def targets(work: Stack, rows: Sequence[Row], errors: Errors) -> list[Target]:
    """Hold rows of one workload, and its gradient errors, against the numbers to reach."""
    as_set = work == WORKLOADS[work.blocks]
    times: dict[str, Any] = ratios(rows, "seconds", DEPTH) if as_set else {}
    peaks: dict[str, Any] = ratios(rows, "peak_bytes", DEPTH) if as_set else {}
    why = "not measured" if as_set else OTHER_SIZE
    name = f"{work.blocks}, {DEPTH} layers: "
    error = errors["float64, dropout"]["recollect"]
    return [
        *(Target(f"{name}step time, recollect / {p}", times.get(p), TIME, why_not_measured=why) for p in PEERS),
        *(Target(f"{name}peak of a step, recollect / {p}", peaks.get(p), PEAK, why_not_measured=why) for p in PEERS),
        Target(
            f"{work.blocks}: gradient error, float64, dropout",
            error if isinstance(error, float) else None,
            EXACT,
            why_not_measured=str(error),
        ),
    ]
