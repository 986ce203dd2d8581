"""A memory budget: what plans of recollect take in time and memory, beside torch's checkpoints.

    python -m bench.budget              # GPT, ResNet and an MLP; some minutes
    python -m bench.budget --quick      # small networks: seconds

Each network is a ``Sequential`` of blocks. Budgets go from the least that a plan was measured to reach to everything
kept. Beside them: ``checkpoint_sequential`` of torch at every number of segments, of which for each peak the fastest
counts that stays below it, and a checkpoint around every block. Times are medians, all systems taking turns; peaks are
of tensor bytes. JSON goes into bench/results.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import recollect
from bench._harness import alternating, median, peak_bytes, settings
from bench._report import Target, finish, header, results_file, show, table
from recollect.budget import BudgetError

CPU = torch.device("cpu")


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norms[1](x))
        return out


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x + self.body(x)).relu()
        return out


def _networks(quick: bool) -> dict[str, tuple[Callable[[], nn.Sequential], Tensor]]:
    depth, width, batch = (6, 32, 2) if quick else (16, 128, 8)
    return {
        "GPT": (lambda: nn.Sequential(*[Attention(width) for _ in range(depth)]), torch.randn(batch, 64, width)),
        "ResNet": (
            lambda: nn.Sequential(*[Residual(width // 4) for _ in range(depth)]),
            torch.randn(batch, width // 4, 32, 32),
        ),
        "MLP": (
            lambda: nn.Sequential(
                *[nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width)) for _ in range(2 * depth)]
            ),
            torch.randn(256 * batch, width),
        ),
    }


def measured(make: Callable[[], nn.Sequential], x: Tensor, count: int, repeats: int) -> dict[str, Any]:
    """Peaks and times of one network by every way."""
    torch.manual_seed(0)
    model = make()
    x = x.clone().requires_grad_()  # torch's checkpoints keep nothing of a first segment otherwise

    def step(forward: Callable[[Tensor], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        forward(x).square().mean().backward()

    def each(x: Tensor) -> Tensor:
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def sequential(segments: int, x: Tensor) -> Tensor:
        found: Tensor = checkpoint_sequential(model, segments, x, use_reentrant=False)
        return found

    ways: dict[str, Callable[[], None]] = {"plain": lambda: step(model), "each block": lambda: step(each)}
    for segments in range(1, len(model)):
        ways[f"sequential {segments}"] = functools.partial(step, functools.partial(sequential, segments))
    step(model)
    plain = peak_bytes(ways["plain"], CPU)

    def loss(out: Tensor) -> Tensor:
        return out.square().mean()

    try:
        least = recollect.plan(model, x, budget=1, loss=loss).peak
    except BudgetError as error:
        least = error.least
    budgets = [int(least + (plain - least) * k / (count - 1)) for k in range(count)]
    plans = []
    for budget in budgets:
        plan = recollect.plan(model, x, budget=max(budget, least), loss=loss)
        plans.append(plan)

        def planned(plan: Any = plan) -> None:
            with plan:
                step(model)

        ways[f"plan {len(plans) - 1}"] = planned
    peaks = {name: peak_bytes(way, CPU) for name, way in ways.items()}
    times = {name: median(values) for name, values in alternating(ways, repeats, CPU).items()}
    return {
        "budgets": budgets,
        "ways": {name: {"peak_bytes": peaks[name], "seconds": times[name]} for name in ways},
        "measured_steps": [plan.steps for plan in plans],
        "strategies": [[row.strategy for row in plan.rows] for plan in plans],
    }


def best_sequential(row: dict[str, Any], peak: int) -> float | None:
    """The fastest checkpoint_sequential whose peak is no higher."""
    found = [way["seconds"] for name, way in row["ways"].items() if "seq" in name and way["peak_bytes"] <= peak]
    return min(found, default=None)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure; print, write and return the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, default=8, help="from the least to everything kept")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder of the files; default: bench/results")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(budgets=3, repeats=1, threads=1)
    options = parser.parse_args(arguments)
    rows: dict[str, Any] = {}
    targets: list[Target] = []
    with settings(options.threads):
        for name, (make, x) in _networks(options.quick).items():
            row = rows[name] = measured(make, x, options.budgets, options.repeats)
            plain = row["ways"]["plain"]
            body = []
            for number, budget in enumerate(row["budgets"]):
                way = row["ways"][f"plan {number}"]
                other = best_sequential(row, way["peak_bytes"])
                body.append(
                    [
                        show(budget / 2**20, ".2f"),
                        show(way["peak_bytes"] / 2**20, ".2f"),
                        show(way["seconds"] / plain["seconds"], ".2f"),
                        "none" if other is None else show(other / plain["seconds"], ".2f"),
                    ]
                )
                targets.append(
                    Target(f"{name}, budget {number}: peak / budget", way["peak_bytes"] / max(1, budget), 1.0)
                )
                if other is not None and number < len(row["budgets"]) - 1:
                    targets.append(
                        Target(f"{name}, budget {number}: seconds / best sequential", way["seconds"] / other, 1.01)
                    )
            for label, number, limit in (("least", 0, 1.4), ("everything", len(row["budgets"]) - 1, 1.03)):
                value = row["ways"][f"plan {number}"]["seconds"] / plain["seconds"]
                targets.append(Target(f"{name}, {label}: seconds / plain", value, limit))
            each = row["ways"]["each block"]
            print(
                f"\n{name}: plain {plain['peak_bytes'] / 2**20:.2f} MiB; a checkpoint around each block "
                f"{each['peak_bytes'] / 2**20:.2f} MiB in {each['seconds'] / plain['seconds']:.2f} of its time"
            )
            print(table(["budget, MiB", "peak, MiB", "of plain", "best sequential, of plain"], body), flush=True)
    names = ("budgets", "repeats", "threads")
    report = header(CPU, {name: getattr(options, name) for name in names})
    file = results_file("budget" + ("-quick" if options.quick else ""), CPU, options.output)
    return {"budget": finish(report | {"networks": rows}, targets, file)}


if __name__ == "__main__":
    main()
