"""The table and the figures over all runs of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml  # type: ignore[import-untyped]
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recollect.train._figures import COLORS, STYLE, WIDE, draw_runs, to_svg
from recollect.train._folder import RunFolder
from recollect.train._logs import read_history
from recollect.train._report import html_table, page
from recollect.train._stored import check_settings_text, read_text
from recollect.train._summary import read_summary
from recollect.train._text import METRICS, bytes_text, percent_text, seconds_text

__all__ = ["gather", "show_sweep", "sweep_report"]

_KEPT = ("test_accuracy", "val_accuracy", "best_epoch", "epochs", "seconds", "peak_bytes", "metric")
_COLUMNS = ("run", "test", "validation", "best epoch", "epochs", "time", "peak of a step")

Run = Mapping[str, Any]


def gather(folder: RunFolder, words: Sequence[str]) -> dict[str, Any]:
    """Read the runs in a sweep's folder.

    Args:
        folder: of the sweep; Hydra's record of a run's words is in ``.hydra`` in the run's folder.
        words: of the sweep.

    Returns:
        ``words``, ``swept`` (the keys whose values differ) and ``runs``: ``name``, ``values`` of the swept keys,
        ``failed`` (why, or None) and what is compared of their summaries.
    """
    runs: list[dict[str, Any]] = []
    for record in folder.path.glob("*/.hydra/overrides.yaml"):
        own = RunFolder(record.parents[1])
        said = yaml.safe_load(check_settings_text(read_text(record), record)) or []
        given = [str(word).removeprefix("++").partition("=") for word in said]
        run: dict[str, Any] = {"name": own.path.name, "values": {key: value for key, _, value in given}, "failed": None}
        if own.summary.exists():
            run |= {key: value for key, value in read_summary(own.summary).items() if key in _KEPT}
        else:
            failed = own.path / "failed.txt"
            run["failed"] = read_text(failed).strip() if failed.exists() else "it is not finished"
        runs.append(run)
    runs.sort(key=lambda run: (len(run["name"]), run["name"]))
    keys = dict.fromkeys(key for run in runs for key in run["values"])
    swept = [key for key in keys if len({run["values"].get(key) for run in runs}) > 1]
    for run in runs:
        run["values"] = {key: run["values"].get(key, "") for key in swept}
    return {"words": list(words), "swept": swept, "runs": runs}


def sweep_report(found: Mapping[str, Any], folder: Path) -> str:
    """Make the page of a sweep.

    Args:
        found: by `gather`.
        folder: of the sweep.
    """
    done = [run for run in found["runs"] if run["failed"] is None]
    best = max(done, key=lambda run: run["val_accuracy"], default=None)
    tiles = [("runs", str(len(found["runs"])))]
    body = f"<h2>Each run</h2>\n{html_table([*found['swept'], *_COLUMNS], [_cells(run) for run in found['runs']])}"
    if best is not None:
        metric = METRICS[best["metric"]]
        tiles += [
            (f"test {metric} of the best by validation", percent_text(best, "test_accuracy")),
            ("the best by validation", _label(best["values"])),
        ]
        scores = to_svg(_scores(done, found["swept"]))
        curves = to_svg(_curves(done, folder))
        body += f'<h2>All runs</h2>\n<div class="figure">{scores}</div>\n<div class="figure">{curves}</div>'
    facts = [(f"failed: run {run['name']}", run["failed"]) for run in found["runs"] if run["failed"]]
    title = f"A sweep over {', '.join(found['swept']) or 'one run'}"
    return page(
        title,
        f"{len(done)} of {len(found['runs'])} runs are finished",
        tiles,
        body,
        "The sweep",
        facts or [("runs that failed", "none")],
        "\n".join(found["words"]),
    )


def show_sweep(console: Console, found: Mapping[str, Any], folder: Path) -> None:
    """Print the table of a sweep."""
    grid = Table(title_justify="left")
    names = [key.rpartition(".")[2] for key in found["swept"]]
    headings = (*(names if len(set(names)) == len(names) else found["swept"]), *_COLUMNS)
    kept = [place for place, heading in enumerate(headings) if heading not in ("best epoch", "epochs", "time")]
    for place in kept:
        grid.add_column(escape(headings[place]))
    for run in found["runs"]:
        cells = _cells(run)
        grid.add_row(*(escape(cells[place]) for place in kept))
    console.print(grid)
    console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _cells(run: Run) -> list[str]:
    values = [str(value) for value in run["values"].values()]
    if run["failed"]:
        return [*values, run["name"], "failed", *[""] * (len(_COLUMNS) - 2)]
    return [
        *values,
        run["name"],
        percent_text(run, "test_accuracy"),
        percent_text(run, "val_accuracy"),
        str(run["best_epoch"]),
        str(run["epochs"]),
        seconds_text(run["seconds"]),
        bytes_text(run["peak_bytes"]),
    ]


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items()) or "as given"


def _groups(runs: Sequence[Run], without: Sequence[str]) -> dict[str, list[Run]]:
    """Runs that agree in all swept keys but these."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        values = {key: value for key, value in run["values"].items() if key not in without}
        found.setdefault(_label(values), []).append(run)
    return found


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _scores(runs: Sequence[Run], swept: Sequence[str]) -> Figure:
    """Test scores against a swept key, a line for each combination of the others; seeds are the spread."""
    keys = [key for key in swept if key != "seed"]
    numeric_keys = [key for key in keys if all(_number(run["values"].get(key, "")) is not None for run in runs)]
    axis = next(iter([*numeric_keys, *keys, *swept]), "")  # a number makes the better axis
    places = list(dict.fromkeys(run["values"].get(axis, "") for run in runs))
    numbers = [_number(place) for place in places]
    numeric = all(number is not None for number in numbers)
    where = {
        p: (n if numeric and n is not None else float(i)) for i, (p, n) in enumerate(zip(places, numbers, strict=True))
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE, layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"Test {METRICS[runs[0]['metric']]} (%)")
        lines = _groups(runs, ("seed", axis))
        for number, (label, members) in enumerate(lines.items()):
            color = COLORS[number % len(COLORS)]
            each: dict[float, list[float]] = {}
            for run in members:
                each.setdefault(where[run["values"].get(axis, "")], []).append(100 * run["test_accuracy"])
            xs = sorted(each)
            axes.plot(xs, [statistics.fmean(each[x]) for x in xs], color=color, marker="o", markersize=4, label=label)
            for x in xs:
                axes.plot([x, x], [min(each[x]), max(each[x])], color=color, alpha=0.4, linewidth=4)
        low, high = min(where.values()), max(where.values())
        if numeric and low > 0 and high >= 8 * low:
            axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(where.values())))
        names = {value: place for place, value in where.items()}
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: names.get(value, f"{value:g}")))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(axis)
        if 1 < len(lines) <= 12:
            figure.legend(loc="outside lower left", ncols=2)
        return figure


def _curves(runs: Sequence[Run], folder: Path) -> Figure:
    """Validation scores against epochs: the mean of runs that differ in their seeds, and the band of them."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE, layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"Validation {METRICS[runs[0]['metric']]} (%)")
        lines = _groups(runs, ("seed",))
        for number, (label, members) in enumerate(lines.items()):
            histories = [found for run in members if (found := read_history(folder / run["name"]))]
            if histories:
                draw_runs(axes, histories, "val_accuracy", COLORS[number % len(COLORS)], label, 100)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if 1 < len(lines) <= 12:
            figure.legend(loc="outside lower left", ncols=2)
        return figure
