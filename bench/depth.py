"""Depth: what a training step of L grouped reversible layers costs in time and memory, side by side with the peers.

    python -m bench.depth                    # L = 4..256 on 20,000 nodes, times at some, gradients at 64 layers
    python -m bench.depth --no-edges         # only where the peers have the adjacency in CSR form
    python -m bench.depth --quick            # a small graph and few layers; well under a minute
    python -m bench.depth --long             # 1001 layers too, on a smaller graph, with the drift of the inputs
    python -m bench.depth --tolokers ROOT    # one step of 1001 x 80 on a real graph too; ROOT holds the raw files

The first table is of blocks of (norm, ReLU, SAGE); the peers have what a careful user would give them, the adjacency
in CSR form. Its last column is recollect without the certificate. In the second table all have a plain `edge_index`,
and the blocks are bare convolutions.

Times are medians of repeats in one run, the systems taking turns. Peaks are of tensor bytes beyond the inputs, the
parameters and their gradients. Gradients are compared with plain autograd's, in the same precision and with the same
random draws. Each part writes a JSON file into bench/results, with the reason for every number that is missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import _tolokers
from bench._exactness import LAYERS, Errors, gradient_errors
from bench._harness import settings
from bench._measure import Row, measure, warm_up
from bench._report import GB, Target, finish, header, results_file, show
from bench._systems import Workload
from bench._tables import depth_tables, gradient_table, progress
from bench._targets import csr_targets, depth_targets


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--timed", type=int, nargs="*", default=[16], help="depths at which steps are timed")
    parser.add_argument("--csr-timed", type=int, nargs="*", default=[4, 16, 32], help="the same in the first table")
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--edges", type=int, default=200_000)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--norm", choices=["bare", "layer", "batch"], default="bare", help="bare: convolutions alone")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-plain-gb", type=float, default=6.0, help="skip a system that would need more")
    parser.add_argument("--quick", action="store_true", help="a small graph and few layers")
    parser.add_argument("--no-csr", action="store_true", help="without the first table")
    parser.add_argument("--no-edges", action="store_true", help="without the second table")
    parser.add_argument("--no-table", action="store_true", help="only --long or --tolokers")
    parser.add_argument("--long", action="store_true", help="1001 layers too, with layer norm, on a smaller graph")
    parser.add_argument("--long-depths", type=int, nargs="+", default=[8, 16, 1001])
    parser.add_argument("--long-nodes", type=int, default=2_000)
    parser.add_argument("--long-edges", type=int, default=20_000)
    parser.add_argument(
        "--tolokers",
        metavar="ROOT",
        nargs="?",
        type=Path,
        const=os.environ.get("RECOLLECT_DATA") or False,
        help="folder of raw files; without one: the environment variable RECOLLECT_DATA",
    )
    parser.add_argument("--tolokers-layers", type=int, default=_tolokers.LAYERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--output", type=Path, help="folder of the JSON files; default: bench/results")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(nodes=500, edges=2000, channels=32, depths=[4, 8, 16], repeats=3)
    options = parser.parse_args(arguments)
    if options.tolokers is False:
        parser.error("--tolokers needs a folder: --tolokers ROOT, or set the environment variable RECOLLECT_DATA")
    if options.tolokers and not (options.tolokers / _tolokers.RAW_FILE).is_file():
        parser.error(f"--tolokers: there is no {_tolokers.RAW_FILE} in {options.tolokers}")
    return options


def _rows(
    work: Workload,
    depths: Sequence[int],
    timed: Sequence[int],
    options: argparse.Namespace,
    device: torch.device,
    long: bool = False,
) -> list[Row]:
    """Measure one depth after the other; in the long part every depth once, and the deepest is compared."""
    print(f"\n{work}; {device}")
    rows: list[Row] = []
    for depth in depths:
        repeats = 1 if long else options.repeats if depth in timed else 0
        row = measure(work, depth, rows, repeats=repeats, max_gb=options.max_plain_gb, compare=long, device=device)
        print(progress(row, work.systems), flush=True)
        rows.append(row)
    print(f"\n{depth_tables(rows, work.systems)}")
    return rows


def run_csr(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[Target]]:
    """Blocks of (norm, ReLU, SAGE), the peers on a CSR adjacency: peaks at every depth, times at some, gradients."""
    work = Workload(options.nodes, options.edges, options.channels, "layer", csr=True)
    rows = _rows(work, options.depths, options.csr_timed, options, device)
    errors = _errors(Workload(200, 1000, 32, "layer", csr=True), device)
    return {"workload": str(work), "rows": rows, "gradient_errors": errors}, csr_targets(work, rows, errors)


def run_depths(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[Target]]:
    """The same on a plain `edge_index`, by default with bare convolutions."""
    work = Workload(options.nodes, options.edges, options.channels, options.norm)
    rows = _rows(work, options.depths, options.timed, options, device)
    errors = _errors(Workload(200, 1000, 32, "layer"), device)
    return {"workload": str(work), "rows": rows, "gradient_errors": errors}, depth_targets(work, rows, errors)


def _errors(work: Workload, device: torch.device) -> Errors:
    errors = gradient_errors(work, device)
    print(f"\n{gradient_table(errors, f'{LAYERS} layers of (norm, ReLU, dropout, SAGE)', work.systems)}")
    return errors


def run_long(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[Target]]:
    """1001 layers on a smaller graph, one repeat: a step there takes seconds, where the main graph takes minutes.

    With layer norm: a thousand bare convolutions overflow float32.
    """
    work = Workload(options.long_nodes, options.long_edges, options.channels, "layer")
    return {"workload": str(work), "rows": _rows(work, options.long_depths, (), options, device, long=True)}, []


def run_tolokers(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], list[Target]]:
    """One step on a real graph, in a process of its own."""
    found = _tolokers.in_own_process(options.tolokers, options.tolokers_layers, device, options.threads)
    print(f"\n{found['layers']} layers x {found['channels']} channels on tolokers; {device}")
    for key in ("tensor_bytes", "parameter_bytes", "resident_bytes"):
        print(f"  {key.replace('_', ' '):<16} {show(found[key], '.3f', GB)} GB")
    print(f"  {'seconds':<16} {found['seconds']:.1f}\n  {'drift':<16} {show(found['drift'], '.1e')}")
    return {"step": found}, _tolokers.targets(found)


Part = Callable[[argparse.Namespace, torch.device], tuple[dict[str, Any], list[Target]]]
_SETTINGS: dict[Part, tuple[str, ...]] = {  # the options that each part looks at; no folders among them
    run_csr: ("depths", "csr_timed", "nodes", "edges", "channels", "repeats", "max_plain_gb"),
    run_depths: ("depths", "timed", "nodes", "edges", "channels", "norm", "repeats", "max_plain_gb"),
    run_long: ("long_depths", "long_nodes", "long_edges", "channels", "max_plain_gb"),
    run_tolokers: ("tolokers_layers",),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the parts that were asked for; print, write and return the report of each."""
    options = _parse(arguments)
    device = torch.device(options.device)
    size = "-quick" if options.quick else ""
    parts: dict[str, Part] = {}
    if not (options.no_table or options.no_csr):
        parts["depth-csr" + size] = run_csr
    if not (options.no_table or options.no_edges):
        parts["depth" + size] = run_depths
    if options.long:
        parts["depth-long" + size] = run_long
    if options.tolokers:
        parts["tolokers" + ("" if options.tolokers_layers == _tolokers.LAYERS else "-try")] = run_tolokers
    reports = {}
    with settings(options.threads):
        warm_up(Workload(64, 128, 16, "layer"), device)
        for name, part in parts.items():
            used = {key: getattr(options, key) for key in (*_SETTINGS[part], "device", "threads")}
            report = header(device, used)  # before the part: the load average is then the others', not its own
            found, targets = part(options, device)
            reports[name] = finish(report | found, targets, results_file(name, device, options.output))
    return reports


if __name__ == "__main__":
    main()
