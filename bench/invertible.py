"""Invertible: what a training step of a stack of additive couplings costs, side by side with the peers.

    python -m bench.invertible               # 8, 64 and 128 couplings with MLP blocks, then with convolutions
    python -m bench.invertible --quick       # small inputs and few layers; seconds

Times are medians of repeats in one run, the systems taking turns. Peaks are of tensor bytes beyond the inputs, the
parameters and their gradients. Gradients are compared with plain autograd's, in the same precision and with the same
random draws. A JSON file goes into bench/results, with the reason for every number that is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench._exactness import Errors, gradient_errors
from bench._harness import settings
from bench._invertible_systems import NOTES, SYSTEMS, Stack
from bench._invertible_targets import ratios, targets, verdicts
from bench._measure import Row, measure, warm_up
from bench._report import Target, finish, header, results_file, show, table
from bench._tables import depth_tables, gradient_table, progress


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", choices=["mlp", "conv"], default=["mlp", "conv"])
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--timed", type=int, nargs="*", default=[64], help="depths at which steps are timed")
    parser.add_argument("--batch", type=int, default=4096, help="rows of the MLP's input")
    parser.add_argument("--channels", type=int, default=256, help="of the MLP's input, both groups together")
    parser.add_argument("--conv-batch", type=int, default=32, help="number of images")
    parser.add_argument("--conv-channels", type=int, default=64, help="of the images, both groups together")
    parser.add_argument("--side", type=int, default=16, help="height and width of the images")
    parser.add_argument("--exact-depth", type=int, default=64, help="layers whose gradients are compared")
    parser.add_argument("--dropout", type=float, default=0.3, help="where gradients are compared with dropout")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-plain-gb", type=float, default=6.0, help="skip a system that would need more")
    parser.add_argument("--quick", action="store_true", help="small inputs and few layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--output", type=Path, help="folder of the JSON files; default: bench/results")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(batch=256, channels=32, conv_batch=4, conv_channels=8, side=8, repeats=3)
        parser.set_defaults(depths=[4, 8, 16], timed=[16], exact_depth=16)
    return parser.parse_args(arguments)


def _ratio_table(rows: Sequence[Row], depth: int) -> str:
    by_key = {"step time": ratios(rows, "seconds", depth), "peak": ratios(rows, "peak_bytes", depth)}
    others = [name for name in SYSTEMS if name != "recollect"]
    body = [[key, *(show(found[name], ".2f") for name in others)] for key, found in by_key.items()]
    return f"recollect / other, {depth} layers\n{table(['', *others], body)}"


def _verdict_table(found: dict[str, str]) -> str:
    cells = [word if (word := found.get(name, "-")) in ("yes", "no") else "-" for name in SYSTEMS]
    return table(["", *SYSTEMS], [["dropout on: is the gradient right?", *cells]])


def run(work: Stack, options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[Target]]:
    """Peaks at every depth, times at some, gradients of a small stack, and the numbers to reach."""
    print(f"\n{work}; {device}")
    rows: list[Row] = []
    for depth in options.depths:
        repeats = options.repeats if depth in options.timed else 0
        row = measure(work, depth, rows, repeats=repeats, max_gb=options.max_plain_gb, compare=False, device=device)
        print(progress(row, SYSTEMS), flush=True)
        rows.append(row)
    print(f"\n{depth_tables(rows, SYSTEMS)}")
    for row in rows:
        if row.get("seconds"):
            print(f"\n{_ratio_table(rows, row['depth'])}")
    small = Stack(work.blocks, 16, 32, 8)
    errors: Errors = gradient_errors(small, device, options.exact_depth, options.dropout)
    print(f"\n{gradient_table(errors, f'{options.exact_depth} layers, dropout {options.dropout:g}', SYSTEMS)}")
    right = verdicts(errors)
    print(f"\n{_verdict_table(right)}", flush=True)
    found = {"workload": str(work), "rows": rows, "gradient_errors": errors, "right_with_dropout": right}
    return found, targets(work, rows, errors)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the workloads that were asked for; print, write and return the report."""
    options = _parse(arguments)
    device = torch.device(options.device)
    works = {
        "mlp": Stack("mlp", options.batch, options.channels),
        "conv": Stack("conv", options.conv_batch, options.conv_channels, options.side),
    }
    used = {key: value for key, value in vars(options).items() if key not in ("output", "quick")}
    reached: list[Target] = []
    with settings(options.threads):
        report = header(device, used)  # before the work: the load average is then the others', not its own
        report |= {"systems": NOTES, "parts": {}}
        for blocks in options.blocks:
            warm_up(Stack(blocks, 4, 8, 4), device)
            report["parts"][blocks], found = run(works[blocks], options, device)
            reached += found
    size = "-quick" if options.quick else ""
    return finish(report, reached, results_file("invertible" + size, device, options.output))


if __name__ == "__main__":
    main()
