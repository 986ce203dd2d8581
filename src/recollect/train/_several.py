"""Several runs, which differ in their seeds, and what they have in common."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console

from recollect.train._config import code_of, write
from recollect.train._failures import explained
from recollect.train._files import write_text
from recollect.train._folder import RunFolder, create, extend, reopen
from recollect.train._graph import TrainingGraph
from recollect.train._logs import read_history
from recollect.train._progress import show_summary
from recollect.train._report import report
from recollect.train._settings import Settings
from recollect.train._single import load_graph, single
from recollect.train._summary import Summary, combine, read_summary, write_summary
from recollect.train._text import METRICS, percent_text

__all__ = ["several"]


def several(settings: Settings, console: Console, folder: RunFolder | None = None) -> Summary:
    """Make runs with the seeds ``seed``, ``seed + 1``, ..., each in a folder of its own, and a report of all.

    Of a graph that has several splits run k takes the k-th after the settings' own, beginning again after the last.
    What one run costs is measured in the first.

    Args:
        settings: of the runs.
        console: where progress and table are shown.
        folder: of the runs, if it was there before: those that are finished are taken as they are.
    """
    graph = load_graph(_run_settings(settings, 0, 1), console)
    folder = folder or create(settings)
    console.print(f"runs: {folder.path}", highlight=False, markup=False, soft_wrap=True)
    with folder.locked(), explained(folder):
        return _all(settings, console, folder, graph)


def _all(settings: Settings, console: Console, folder: RunFolder, graph: TrainingGraph) -> Summary:
    summaries = []
    for number, (own, prepared) in enumerate(_runs(settings, graph, console)):
        child = RunFolder(folder.path / f"seed_{own.seed}")
        if not child.config.exists():
            create(replace(own, run_dir=str(child.path)))
        if extend(child, own, reopen(str(child.path), code=code_of(own))[1]):
            summary = read_summary(child.summary)
        else:
            summary = single(own, console, child, prepared, brief=True)
            gc.collect()  # Fabric's models stand in circles of references, and with them histories and their files
        summaries.append(summary)
        metric = METRICS[summary["metric"]]
        scores = [percent_text(summary, key) for key in ("test_accuracy", "val_accuracy")]
        which = f"run {number + 1} of {settings.runs} (seed {own.seed})"
        console.print(f"{which}: test {metric} {scores[0]}, validation {scores[1]}", highlight=False)
    combined = combine(summaries)
    histories = [read_history(folder.path / f"seed_{summary['seed']}") for summary in summaries]
    write_text(folder.report, report(combined, [], write(settings), histories))
    write_summary(folder.summary, combined)
    show_summary(console, combined, folder.path)
    return combined


def _runs(settings: Settings, graph: TrainingGraph, console: Console) -> Iterator[tuple[Settings, TrainingGraph]]:
    """The settings and the graph of each run; the graph is loaded again only where the split is another."""
    for number in range(settings.runs):
        own = _run_settings(settings, number, graph.num_splits)
        if number and graph.num_splits > 1:
            graph = load_graph(own, Console(quiet=True))
        yield own, graph


def _run_settings(settings: Settings, number: int, num_splits: int) -> Settings:
    dataset = settings.dataset
    if num_splits > 1:
        split = (dataset.options["split"] + number) % num_splits
        dataset = replace(dataset, options={**dataset.options, "split": split})
    measured = replace(settings.measure, enabled=settings.measure.enabled and number == 0)
    return replace(settings, dataset=dataset, measure=measured, seed=settings.seed + number, runs=1)
