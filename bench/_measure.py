"""Time, peak and drift of one step of each system at one depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench._harness import allocator_bytes, alternating, median, peak_bytes
from bench._report import GB
from bench._step import Step, make_step, relative_error
from bench._systems import SYSTEMS, UnavailableError, build_blocks

Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A random graph with random features, and the blocks to run on it, in float32.

    Attributes:
        norm: "bare" for convolutions alone, "layer" or "batch" for (norm, ReLU, conv).
    """

    nodes: int
    edges: int
    channels: int
    norm: str

    def make(self, depth: int, device: torch.device) -> tuple[list[nn.ModuleList], Tensor, Tensor]:
        torch.manual_seed(0)
        graph = torch.randint(self.nodes, (2, self.edges), device=device)
        x = torch.randn(self.nodes, self.channels, device=device, requires_grad=True)
        return build_blocks(depth, self.channels, self.norm, dtype=x.dtype, device=device), x, graph

    def __str__(self) -> str:
        blocks = "bare SAGE" if self.norm == "bare" else f"{self.norm} norm, ReLU, SAGE"
        return f"{self.nodes:,} nodes, {self.edges:,} edges, {self.channels} channels, 2 groups, {blocks}"


def warm_up(device: torch.device) -> None:
    """Let every system run once on a small graph: libraries allocate their own workspaces at their first use."""
    blocks, x, graph = Workload(64, 128, 16, "layer").make(2, device)
    for name in SYSTEMS:
        try:
            make_step(name, blocks, x, graph)()
        except (UnavailableError, RuntimeError):
            continue  # measuring says why


def expected_bytes(rows: Sequence[Row], name: str, depth: int) -> float | None:
    """Foretell a peak from the line through the last two that were measured; None with fewer."""
    known = [(row["depth"], row["peak_bytes"][name]) for row in rows if name in row["peak_bytes"]][-2:]
    if len(known) < 2 or known[0][0] == known[1][0]:
        return None
    (d0, b0), (d1, b1) = known
    return b1 + (b1 - b0) / (d1 - d0) * (depth - d1)


def measure(
    work: Workload,
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
    blocks, x, graph = work.make(depth, device)
    row: Row = {"depth": depth, "skipped": {}, "peak_bytes": {}, "drift": {}}
    steps: dict[str, Step] = {}
    for name in SYSTEMS:
        foretold = expected_bytes(earlier, name, depth)
        if foretold is not None and foretold > max_gb * GB:
            row["skipped"][name] = f"would need about {foretold / GB:.1f} GB, more than --max-plain-gb {max_gb:g}"
            continue
        try:
            step = make_step(name, blocks, x, graph)
            step.zero_gradients()
            row["peak_bytes"][name] = peak_bytes(step, device)
        except (UnavailableError, RuntimeError) as error:
            row["skipped"][name] = f"{type(error).__name__}: {error}"[:160]
            continue
        row["drift"][name] = step.system.last_drift()
        steps[name] = step
    if repeats:
        row["all_seconds"] = alternating(steps, repeats, device)
        row["seconds"] = {name: median(values) for name, values in row["all_seconds"].items()}
    if repeats and not compare:  # the record of a very deep step is long
        row["allocator_bytes"] = {name: allocator_bytes(step, device) for name, step in steps.items()}
    if compare:
        row.update(_compare(steps, x))
    return row


def _compare(steps: dict[str, Step], x: Tensor) -> Row:
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
        error = None if found is None else relative_error([found], [x.detach()])
        restored[name] = {"error": error, "how": how}
    return {"gradient_error": errors, "restored_input": restored}
