"""Time, peak and drift of one step of each system at one depth."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from bench._harness import allocator_bytes, alternating, median, peak_bytes
from bench._report import GB
from bench._step import Step, UnavailableError, relative_error

Row = dict[str, Any]


class Work(Protocol):
    """Inputs and weights of a given size, and the systems to run on them."""

    def steps(
        self, depth: int, device: torch.device, dtype: torch.dtype = torch.float32, dropout: float = 0.0
    ) -> dict[str, Callable[[], Step]]:
        """How to make a step of each system, "plain" first, all on the same inputs and weights."""
        ...


def warm_up(work: Work, device: torch.device) -> None:
    """Let every system run once, inside `settings`: libraries allocate their own workspaces at their first use."""
    for make in work.steps(2, device).values():
        try:
            make()()
        except (UnavailableError, RuntimeError):
            continue  # measuring says why
    gc.collect()
    gc.freeze()  # what the peers loaded too is spared by the collections; `settings` undoes it


def reason(error: Exception) -> str:
    """Why there is no number, in a line."""
    return f"{type(error).__name__}: {error}"[:160]


def expected_bytes(rows: Sequence[Row], name: str, depth: int) -> float | None:
    """Foretell a peak from the line through the last two that were measured; None with fewer."""
    known = [(row["depth"], row["peak_bytes"][name]) for row in rows if name in row["peak_bytes"]][-2:]
    if len(known) < 2 or known[0][0] == known[1][0]:
        return None
    (d0, b0), (d1, b1) = known
    expected: float = b1 + (b1 - b0) / (d1 - d0) * (depth - d1)
    return expected


def measure(
    work: Work,
    depth: int,
    earlier: Sequence[Row],
    *,
    repeats: int,
    max_gb: float,
    compare: bool,
    device: torch.device,
) -> Row:
    """Measure one step of each system.

    Args:
        earlier: rows of the same workload, from which the peaks here are foretold.
        repeats: of the timing; 0 measures the peak alone.
        max_gb: systems that would need more are skipped.
        compare: also compare the gradient with plain's, and the reconstructed input with the original.

    Returns:
        By system: `peak_bytes`; `drift` (what it says itself); `seconds` (median), `all_seconds`; `allocator_bytes`
        (on the CPU, where timed and not compared); `gradient_error` and `restored_input` (where compared); and
        `skipped`, with reasons.
    """
    row: Row = {"depth": depth, "skipped": {}, "peak_bytes": {}, "drift": {}}
    steps: dict[str, Step] = {}
    for name, make in work.steps(depth, device).items():
        foretold = expected_bytes(earlier, name, depth)
        if foretold is not None and foretold > max_gb * GB:
            row["skipped"][name] = f"would need about {foretold / GB:.1f} GB, more than --max-plain-gb {max_gb:g}"
            continue
        try:
            step = make()
            step.zero_gradients()
            row["peak_bytes"][name] = peak_bytes(step, device)
        except (UnavailableError, RuntimeError) as error:
            row["skipped"][name] = reason(error)
            continue
        row["drift"][name] = step.system.last_drift()
        steps[name] = step
    if repeats:
        row["all_seconds"] = alternating(steps, repeats, device)
        row["seconds"] = {name: median(values) for name, values in row["all_seconds"].items()}
    if repeats and not compare:  # the record of a very deep step is long
        row["allocator_bytes"] = {name: allocator_bytes(step, device) for name, step in steps.items()}
    if compare:
        row.update(_compare(steps))
    return row


def _compare(steps: dict[str, Step]) -> Row:
    expected = None
    errors: dict[str, float] = {}
    restored: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        result = step.result(seed=1)
        if name == "plain":
            expected = result.gradients
        elif expected is not None:
            errors[name] = relative_error(result.gradients, expected)
        found, how = step.system.restored(result.given, result.out)
        error = None if found is None else relative_error([found], [step.x.detach()])
        restored[name] = {"error": error, "how": how}
    return {"gradient_error": errors, "restored_input": restored}
