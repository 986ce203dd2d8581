"""A memory budget: what plans of recollect take in time and memory, beside torch's checkpoints.

    python -m bench.budget                          # GPT, ViT, ResNet, an MLP, a GCN and a RevGNN: some minutes
    python -m bench.budget --networks GPT ResNet
    python -m bench.budget --compile                # torch.compile's activation budgets of GPT too: minutes each
    python -m bench.budget --quick                  # small networks: seconds

Each network is a ``Sequential`` of blocks. Budgets go from the least that a plan was measured to reach to everything
kept. Beside them: ``checkpoint_sequential`` of torch at numbers of segments, of which for each peak the fastest counts
that stays below it, a checkpoint around every block, and RevGNN by its inverses alone. What certificates cost is told
by the same plans with ``certify=False``. Plans are made once, on models
of their own. Times are medians, all systems taking turns; peaks are of tensor bytes, which a compiled step does not
show: of those the bytes that are kept for backward are told. JSON and a figure go into bench/results.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import recollect
from bench._budget_networks import Work, networks
from bench._harness import alternating, median, peak_bytes, settings
from bench._report import Target, finish, header, results_file, show, table
from recollect.budget import BudgetError
from recollect.frames import keep_everything

CPU = torch.device("cpu")
SEGMENTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 21, 24, 28, 32, 48, 64)
COMPILED = (1.0, 0.75, 0.5, 0.25, 0.0)  # activation_memory_budget


def made(work: Work) -> nn.Sequential:
    torch.manual_seed(0)
    return work.make()


def loss_of(out: Tensor) -> Tensor:
    return out.square().mean()


def step(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    loss_of(forward(x)).backward()


def by_hand(work: Work, model: nn.Sequential, x: Tensor) -> dict[str, Callable[[], None]]:
    """Everything kept, and what torch's checkpoints are put around."""

    def plain(forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with keep_everything():
                step(model, forward, x)

        return run

    def each(x: Tensor) -> Tensor:
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def sequential(segments: int, x: Tensor) -> Tensor:
        found: Tensor = checkpoint_sequential(model, segments, x, use_reentrant=False)
        return found

    ways = {"plain": plain(model), "each block": plain(each)}
    for segments in SEGMENTS:
        if segments < len(model):
            ways[f"sequential {segments}"] = plain(functools.partial(sequential, segments))
    if work.inverts:
        ways["inverse"] = functools.partial(step, model, model, x)
    return ways


def measured(work: Work, count: int, repeats: int) -> dict[str, Any]:
    """Peaks and times of one network by every way."""
    model = made(work)
    x = work.x.clone().requires_grad_()  # torch's checkpoints keep nothing of a first segment otherwise
    ways = by_hand(work, model, x)
    ways["plain"]()
    plain = peak_bytes(ways["plain"], CPU)
    try:
        least = recollect.plan(made(work), x, budget=1, loss=loss_of).peak
    except BudgetError as error:
        least = error.least
    budgets = [max(least, int(least + (plain - least) * k / (count - 1))) for k in range(count)]
    plans = []
    for number, budget in enumerate(budgets):
        planned = made(work)
        plans.append(recollect.plan(planned, x, budget=budget, loss=loss_of).apply())
        ways[f"plan {number}"] = functools.partial(step, planned, planned, x)
        bare = made(work)
        recollect.plan(bare, x, budget=budget, loss=loss_of, rows=plans[-1].rows, certify=False).apply()
        ways[f"uncertified {number}"] = functools.partial(step, bare, bare, x)
    peaks = {name: peak_bytes(way, CPU) for name, way in ways.items()}
    times = {name: median(values) for name, values in alternating(ways, repeats, CPU).items()}
    return {
        "budgets": budgets,
        "ways": {name: {"peak_bytes": peaks[name], "seconds": times[name]} for name in ways},
        "measured_steps": [plan.steps for plan in plans],
        "strategies": [[row.strategy for row in plan.rows] for plan in plans],
    }


def compiled(work: Work, repeats: int) -> list[dict[str, Any]]:
    """Times of a compiled step for each of torch's activation budgets, and the bytes that it keeps for backward."""
    import torch._functorch.config as config

    model, x, found = made(work), work.x.clone().requires_grad_(), []
    for budget in COMPILED:
        torch._dynamo.reset()
        with config.patch(activation_memory_budget=budget):
            forward = torch.compile(model)
            step(model, forward, x)
            kept: dict[int, int] = {}

            def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = loss_of(forward(x))
            loss.backward()
            times = alternating({"step": functools.partial(step, model, forward, x)}, repeats, CPU)["step"]
        found.append({"budget": budget, "kept_bytes": sum(kept.values()), "seconds": median(times)})
    return found


def best_sequential(row: Mapping[str, Any], peak: int) -> float | None:
    """The fastest checkpoint_sequential whose peak is no higher."""
    found = [way["seconds"] for name, way in row["ways"].items() if "seq" in name and way["peak_bytes"] <= peak]
    return min(found, default=None)


def compared(name: str, row: Mapping[str, Any]) -> list[Target]:
    """Print one network's table, and return what was to be reached."""
    plain, each, targets, body = row["ways"]["plain"], row["ways"]["each block"], list[Target](), []
    last = len(row["budgets"]) - 1
    for number, budget in enumerate(row["budgets"]):
        way, bare = row["ways"][f"plan {number}"], row["ways"][f"uncertified {number}"]
        other = best_sequential(row, way["peak_bytes"])
        body.append(
            [
                show(budget / 2**20, ".2f"),
                show(way["peak_bytes"] / 2**20, ".2f"),
                show(way["seconds"] / plain["seconds"], ".2f"),
                show(bare["seconds"] / plain["seconds"], ".2f"),
                "none" if other is None else show(other / plain["seconds"], ".2f"),
            ]
        )
        targets.append(Target(f"{name}, budget {number}: peak / budget", way["peak_bytes"] / max(1, budget), 1.0))
        if other is not None and number < last:
            targets.append(Target(f"{name}, budget {number}: seconds / best sequential", way["seconds"] / other, 1.01))
    for label, number, limit in (("least", 0, 1.4), ("everything", last, 1.03)):
        value = row["ways"][f"plan {number}"]["seconds"] / plain["seconds"]
        targets.append(Target(f"{name}, {label}: seconds / plain", value, limit))
    print(
        f"\n{name}: plain {plain['peak_bytes'] / 2**20:.2f} MiB; a checkpoint around each block "
        f"{each['peak_bytes'] / 2**20:.2f} MiB in {each['seconds'] / plain['seconds']:.2f} of its time"
    )
    for extra in row.get("compiled", []):
        of_plain = f"{extra['seconds'] / plain['seconds']:.2f} of its time"
        print(f"torch.compile, budget {extra['budget']}: keeps {extra['kept_bytes'] / 2**20:.2f} MiB, {of_plain}")
    head = ["budget, MiB", "peak, MiB", "of plain", "not certified", "best sequential, of plain"]
    print(table(head, body), flush=True)
    return targets


def draw(rows: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Draw time against peak, a panel for each network; down and to the left is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "budget"  # the same file for the same numbers
    across = min(3, len(rows))
    rows_of_panels = -(-len(rows) // across)
    figure, panels = plt.subplots(
        rows_of_panels, across, figsize=(3.4 * across, 2.7 * rows_of_panels + 0.7), squeeze=False
    )
    systems = (
        ("plan", "recollect.plan", "o", "-"),
        ("uncertified", "recollect.plan, certify=False", ".", "--"),
        ("seq", "checkpoint_sequential (torch)", "s", ":"),
        ("each block", "checkpoint, each block (torch)", "^", ""),
        ("inverse", "inverses alone", "d", ""),
        ("plain", "everything kept", "x", ""),
    )
    for panel, (name, row) in zip(panels.flat, rows.items(), strict=False):
        plain = row["ways"]["plain"]["seconds"]
        for prefix, label, marker, line in systems:
            points = sorted(
                (way["peak_bytes"] / 2**20, way["seconds"] / plain)
                for key, way in row["ways"].items()
                if key.startswith(prefix)
            )
            if points:
                panel.plot(*zip(*points, strict=True), marker + line, markersize=4, linewidth=1, label=label)
        panel.set(title=name)
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("peak, MiB")
    for panel in panels[:, 0]:
        panel.set_ylabel("time / everything kept")
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        handles.update({label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)})
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.3 / (rows_of_panels + 0.3) / 1.6, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure; print, write and return the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(networks(True)), default=list(networks(True)))
    parser.add_argument("--budgets", type=int, default=8, help="from the least to everything kept")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile of GPT too; needs a C++ compiler")
    parser.add_argument("--quick", action="store_true", help="small networks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder of the files; default: bench/results")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(budgets=3, repeats=1, threads=1)
    options = parser.parse_args(arguments)
    rows: dict[str, Any] = {}
    targets: list[Target] = []
    with settings(options.threads):
        works = networks(options.quick)
        for name in options.networks:
            rows[name] = measured(works[name], options.budgets, options.repeats)
            if options.compile and name == "GPT":
                rows[name]["compiled"] = compiled(works[name], options.repeats)
            targets += compared(name, rows[name])
    names = ("networks", "budgets", "repeats", "compile", "threads")
    report = header(CPU, {name: getattr(options, name) for name in names})
    file = results_file("budget" + ("-quick" if options.quick else ""), CPU, options.output)
    draw(rows, file.with_suffix(".svg"))
    return {"budget": finish(report | {"networks": rows}, targets, file)}


if __name__ == "__main__":
    main()
