"""Graph: what training on mini-batches with histories costs, side by side with the whole graph and with other ways.

    python -m bench.graph                         # loader, step, memory, partition: about a quarter of an hour
    python -m bench.graph --quick                 # small graphs; well under a minute
    python -m bench.graph --only accuracy --root ROOT    # Cora, hours; ROOT holds the raw files
    python -m bench.graph --only epoch            # one epoch of 1,000,000 nodes
    python -m bench.graph --only corrected rates scores --runs 10 --root ROOT  # corrected histories: half an hour

Times are medians of repeats in one run, the systems taking turns; partitions and epochs are timed once. Peaks are of
tensor bytes; resident memory is that of a process of its own. Each part writes a JSON file into bench/results, with
the reason for every number that is missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import _graph_accuracy as accuracy
from bench import _graph_corrected as corrected
from bench import _graph_corrected_accuracy as scores
from bench import _graph_histories as histories
from bench import _graph_loader as loader
from bench import _graph_models as models
from bench import _graph_partition as partition
from bench import _graph_resident as resident
from bench._harness import settings
from bench._report import Target, finish, header, results_file

Found = tuple[dict[str, Any], list[Target]]
Part = Callable[[argparse.Namespace, torch.device], Found]


def run_loader(options: argparse.Namespace, device: torch.device) -> Found:
    """Edges per second that are cut into mini-batches."""
    works = loader.QUICK if options.quick else loader.LOADED
    rows = [loader.loader_figures(work, repeats=options.repeats, device=device) for work in works]
    print(loader.loader_table(works, rows))
    return {"rows": rows}, loader.loader_targets(works[0], rows[0])


def run_step(options: argparse.Namespace, device: torch.device) -> Found:
    """A training step with the histories in each place."""
    work = histories.QUICK if options.quick else histories.LARGE
    row = histories.measure_steps(work, device, repeats=options.repeats)
    print(f"{work}\n{histories.steps_table(row)}\nthe same losses: {row['same_losses']}")
    return row, histories.steps_targets(row) if not options.quick else []


def run_memory(options: argparse.Namespace, device: torch.device) -> Found:
    """Peaks of steps on a small and on a large graph, in tensor bytes, and the resident part of a file."""
    rows = models.measure_peaks(models.QUICK if options.quick else models.PEAKS, device)
    print(models.peaks_table(rows))
    sizes: dict[str, Any] = {"sizes": (2_000, 10_000), "batch": 200, "halo": 400} if options.quick else {}
    files = resident.measure_resident(**sizes)
    print(f"\n{resident.resident_table(files)}")
    found = [] if options.quick else [*models.peaks_targets(rows), *resident.resident_targets(files)]
    return {"steps": rows, "files": files}, found


def run_partition(options: argparse.Namespace, device: torch.device) -> Found:
    """Time, edge cut and balance of each method, on the CPU."""
    found = partition.partition_figures(partition.QUICK if options.quick else partition.Divided())
    print(partition.partition_table(found))
    return found, []


def run_epoch(options: argparse.Namespace, device: torch.device) -> Found:
    """One epoch of a large graph, and the whole graph at once if it fits."""
    found = models.measure_epoch(models.QUICK_EPOCH if options.quick else models.EPOCH, device)
    print(models.epoch_table(found))
    return found, []


def run_accuracy(options: argparse.Namespace, device: torch.device) -> Found:
    """Cora by every model, both ways."""
    rows = []
    for row in accuracy.measure_accuracy(options.root, options.models, options.runs, options.epochs):
        rows.append(row)
        print(accuracy.accuracy_table([row]), flush=True)
    return {"rows": rows}, accuracy.accuracy_targets(rows)


def run_corrected(options: argparse.Namespace, device: torch.device) -> Found:
    """Bias of gradients, and the time of a step, with histories that are corrected."""
    if options.quick:
        courses = [corrected.Course("sbm", 3, 4, nodes=1_000, channels=8)]
        timed = courses
    else:
        courses = [corrected.Course(graph, layers, 40) for graph in ("cora", "sbm") for layers in (2, 4)]
        wide = corrected.Course("sbm", 4, 40, channels=256)
        dropping = [corrected.Course(graph, 4, 40, dropout=0.5) for graph in ("cora", "sbm")]
        timed = [*courses, wide, *dropping]
    epochs = (1, 2) if options.quick else (1, 2, 3, 5, 7, 10, 20, 30, 40)
    biases, steps = [], []
    for course in courses:
        biases.append(corrected.measure_bias(course, options.root, epochs))
        print(corrected.bias_table(course, biases[-1]), flush=True)
    for course in timed:
        steps.append(corrected.measure_step(course, options.root, options.repeats, device))
    print(corrected.step_table(timed, steps))
    targets = [] if options.quick else corrected.corrected_targets(biases, steps)
    return {"bias": biases, "steps": steps}, targets


def run_rates(options: argparse.Namespace, device: torch.device) -> Found:
    """Bias of corrected gradients against the learning rate, and the number of steps in an epoch."""
    courses: list[tuple[corrected.Course, Sequence[float]]]
    warm, few, many = 30, (1e-3, 2e-4, 3e-5), (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
    courses = [
        (corrected.Course(graph, 4, 40, parts_in_batch=parts), many if parts == 10 else few)
        for graph in ("cora", "sbm")
        for parts in (10, 20, 4)
    ]
    if options.quick:
        warm, courses = 1, [(corrected.Course("sbm", 3, 4, nodes=1_000, channels=8), (1e-3,))]
    rows = []
    for course, rates in courses:
        rows += corrected.measure_rates(course, options.root, warm, rates)
    print(corrected.rates_table(rows))
    return {"rows": rows}, []


def run_scores(options: argparse.Namespace, device: torch.device) -> Found:
    """Test scores with corrected histories beside the other ways."""
    courses = [corrected.Course(graph, 4, 25, dropout=0.5) for graph in ("cora", "pcg")]
    rows = []
    for course in courses:
        rows.append(scores.measure_scores(course, options.root, options.runs))
        print(scores.scores_table([course], rows[-1:]), flush=True)
    return {"rows": rows}, []


PARTS: dict[str, Part] = {
    "loader": run_loader,
    "step": run_step,
    "memory": run_memory,
    "partition": run_partition,
    "epoch": run_epoch,
    "accuracy": run_accuracy,
    "corrected": run_corrected,
    "rates": run_rates,
    "scores": run_scores,
}
DEFAULT = ("loader", "step", "memory", "partition")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(DEFAULT), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--quick", action="store_true", help="small graphs")
    parser.add_argument("--repeats", type=int, help="of timings; default 7, with --quick 2")
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("RECOLLECT_DATA"),
        help="folder of raw files, for accuracy; default: the environment variable RECOLLECT_DATA",
    )
    parser.add_argument("--models", nargs="+", choices=accuracy.PUBLISHED, default=list(accuracy.PUBLISHED))
    parser.add_argument("--runs", type=int, default=20, help="seeds of each accuracy")
    parser.add_argument("--epochs", type=int, help="fewer than published, to try")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--output", type=Path, help="folder of the JSON files; default: bench/results")
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (2 if options.quick else 7)
    if "accuracy" in options.only and not (options.root and (options.root / accuracy.RAW_FILE).is_file()):
        parser.error(f"accuracy needs --root ROOT with {accuracy.RAW_FILE} in it, or the variable RECOLLECT_DATA")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the parts that were asked for; print, write and return the report of each."""
    options = _parse(arguments)
    device = torch.device(options.device)
    reports = {}
    with settings(options.threads):
        for part in options.only:
            print(f"\n{part}; {device}", flush=True)
            used = {key: value for key, value in vars(options).items() if key not in ("only", "output", "root")}
            report = header(device, used)
            found, targets = PARTS[part](options, device)
            words = ["graph", part]
            if part == "accuracy" and len(options.models) < len(accuracy.PUBLISHED):
                words += options.models
            words += ["quick"] if options.quick else []
            file = results_file("-".join(words), device, options.output)
            reports[part] = finish(report | found, targets, file)
    return reports


if __name__ == "__main__":
    main()
