"""Drift: how far gradients are from those of the same network with everything kept, by depth, side by side.

    python -m bench.drift                    # 8..1,001 layers, with and without normalisation; a figure
    python -m bench.drift --quick            # few layers: seconds
    python -m bench.drift --costs            # what exact streams cost too: steps and peaks
    python -m bench.drift --accuracies       # test accuracies on digits too, and on Cora where RECOLLECT_DATA has it
    python -m bench.drift --no-depths --costs

Every system runs the same blocks in float32, without dropout. Its gradients are compared with its own plain form,
which keeps every activation: what differs is what reconstruction does. Layers of recollect and torch_geometric are
GroupAddRev, those of memcnn additive couplings. Times are medians of repeats, taking turns. JSON files and the figure
go into bench/results.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench._drift_cost import accuracies, costs
from bench._drift_networks import DIGITS, NORMS, SYSTEMS, Work, errors
from bench._harness import settings
from bench._report import Target, finish, header, results_file, show, table

CPU = torch.device("cpu")
TITLES = {"layer": "with layer normalisation", "none": "without normalisation"}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1001])
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--edges", type=int, default=500)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--no-depths", action="store_true", help="only what else is asked for")
    parser.add_argument("--costs", action="store_true", help="steps and peaks of exact streams and of those that round")
    parser.add_argument("--layers", type=int, default=8, help="of the costs")
    parser.add_argument("--rows", type=int, default=2048, help="of the costs")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--accuracies", action="store_true", help="on digits, and on Cora")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="few layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="folder of the files; default: bench/results")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(depths=[4, 8], nodes=30, edges=60, channels=8, layers=3, rows=64, repeats=2, seeds=2)
        parser.set_defaults(epochs=2)
    return parser.parse_args(arguments)


def draw(rows: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Draw errors against depth, a panel for each kind of block; what is equal bit for bit lies on the bottom line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    floor = 1e-10
    plt.rcParams["svg.hashsalt"] = "drift"  # the same file for the same numbers
    figure, panels = plt.subplots(1, len(rows), figsize=(9, 3.4), sharey=True)
    for panel, (norm, found) in zip(panels, rows.items(), strict=True):
        for name, marker in zip(SYSTEMS, "os^d", strict=True):
            points = [(row["depth"], row["errors"][name]) for row in found if isinstance(row["errors"][name], float)]
            heights = [min(max(error, floor), 1.0) if error == error else 1.0 for _, error in points]
            label = "recollect, exact" if name == "exact" else "recollect" if name == "float" else name
            panel.plot([depth for depth, _ in points], heights, marker=marker, markersize=4, linewidth=1, label=label)
        panel.set(xscale="log", yscale="log", xlabel="layers", title=TITLES[norm], ylim=(floor / 2, 1.0))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative error of the gradients\n(bottom: equal bits)")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def run_depths(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    """Measure the error at every depth, with and without normalisation."""
    work = Work(options.nodes, options.edges, options.channels)
    rows: dict[str, list[dict[str, Any]]] = {}
    for norm in NORMS:
        rows[norm] = [{"depth": depth, "errors": errors(depth, work, norm)} for depth in options.depths]
        body = [[str(row["depth"]), *(show(row["errors"][name], ".1e") for name in SYSTEMS)] for row in rows[norm]]
        print(f"\nrelative error of the gradients, {TITLES[norm]}; {work}; k = {DIGITS}")
        print(table(["layers", *SYSTEMS], body), flush=True)
    targets = [
        Target(f"gradient error of an exact stream, {row['depth']} layers, {TITLES[norm]}", row["errors"]["exact"], 0.0)
        for norm, found in rows.items()
        for row in found
    ]
    return {"workload": str(work), "digits": DIGITS, "depths": rows}, targets


def run_costs(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    """Hold exact streams against those that round."""
    found = costs(options.layers, options.rows, options.repeats)
    body = [
        [
            name,
            *(show(row["seconds"][key], ".3f") for key in ("float", "exact")),
            show(row["step_ratio"], ".2f"),
            show(row["peak_ratio"], ".3f"),
        ]
        for name, row in found.items()
    ]
    print(f"\na step of {options.layers} layers, {options.rows} rows, seconds, and exact / float")
    print(table(["", "float", "exact", "step", "peak"], body), flush=True)
    targets = [
        Target(f"{name}: {kind} of exact / float", row[f"{kind}_ratio"], limit)
        for name, row in found.items()
        for kind, limit in (("step", 1.10), ("peak", 1.05))
        if "BDIA" not in name
    ]
    return {"costs": found}, targets


def run_accuracies(options: argparse.Namespace) -> tuple[dict[str, Any], list[Target]]:
    """Hold networks that were trained on exact streams against those on streams that round."""
    root = os.environ.get("RECOLLECT_DATA")
    print(f"\ntest accuracy in percent after {options.epochs} epochs, {options.seeds} seeds")
    found = accuracies(options.seeds, options.epochs, Path(root) if root else None)
    pairs = [("digits, float", "digits, exact"), ("digits, residual", "digits, BDIA"), ("cora, float", "cora, exact")]
    targets = [
        Target(
            f"{exact} below {other}, in standard deviations",
            (found[other]["mean"] - found[exact]["mean"]) / max(found[other]["standard_deviation"], 1e-9),
            1.0,
        )
        for other, exact in pairs
        if other in found
    ]
    return {"accuracies": found}, targets


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the parts that were asked for; print, write and return their reports."""
    options = _parse(arguments)
    asked = {"drift": not options.no_depths, "drift-costs": options.costs, "drift-accuracies": options.accuracies}
    parts = {
        "drift": (run_depths, ("depths", "nodes", "edges", "channels")),
        "drift-costs": (run_costs, ("layers", "rows", "repeats")),
        "drift-accuracies": (run_accuracies, ("seeds", "epochs")),
    }
    reports = {}
    for name, (run, used) in parts.items():
        if not asked[name]:
            continue
        with settings(options.threads):
            report = header(CPU, {key: getattr(options, key) for key in (*used, "threads")})
            found, targets = run(options)
        file = results_file(name + ("-quick" if options.quick else ""), CPU, options.output)
        reports[name] = finish(report | found, targets, file)
        if name == "drift":
            draw(found["depths"], file.with_suffix(".svg"))
    return reports


if __name__ == "__main__":
    main()
