"""What the terminal shows of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from recollect.train._text import METRICS, per_layer, range_text, table
from recollect.train._trainer import Row

__all__ = ["Bar", "show_graph", "show_summary", "training_bar"]


class _TwoLines(Progress):
    """How far training is and the time left on one line, and below it what the last epoch gave."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["note"])


class Bar:
    """A progress bar of epochs; where the output is no terminal, a line for every tenth of them unless it is brief."""

    def __init__(self, console: Console, progress: Progress, epochs: int, done: int, metric: str, brief: bool) -> None:
        self._console = console
        self._lines = not console.is_terminal and not brief
        self._progress = progress
        self._metric = METRICS[metric]
        self._epochs = epochs
        self._task = progress.add_task("training", total=epochs, completed=done, note="")

    def advance(self, row: Row) -> None:
        """Show an epoch that is done."""
        epoch = int(row["epoch"])
        note = f"loss {row['loss']:.4f}  validation {self._metric} {100 * row['val_accuracy']:.2f} %"
        note += _staleness(row) + _conflict(row)
        self._progress.update(self._task, completed=epoch, note=note)
        if self._lines and (epoch % max(self._epochs // 10, 1) == 0 or epoch == self._epochs):
            self._console.print(f"epoch {epoch}/{self._epochs}  {note}", highlight=False, soft_wrap=True)

    def stop(self, epoch: int) -> None:
        """Training ended, perhaps early: the bar is full."""
        self._progress.update(self._task, total=epoch, completed=epoch)


def _staleness(row: Row) -> str:
    """Mean age of the histories, layer by layer, and their errors where they were measured."""
    age, error = range_text(per_layer(row, "age")), range_text(per_layer(row, "error"), ".1e")
    return (f"  age {age}" if age else "") + (f"  error {error}" if error else "")


def _conflict(row: Row) -> str:
    """Share of pairs of objectives whose gradients are opposed."""
    return f"  conflict {100 * row['conflict']:.1f} %" if "conflict" in row else ""


@contextmanager
def training_bar(console: Console, epochs: int, done: int, metric: str, brief: bool = False) -> Iterator[Bar]:
    """Show a bar while the block runs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with _TwoLines(*columns, console=console, expand=True, disable=not console.is_terminal) as progress:
        yield Bar(console, progress, epochs, done, metric, brief)


def show_graph(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print what was understood of a graph."""
    grid = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        grid.add_row(escape(name), escape(value))
    console.print(grid)


def show_summary(console: Console, summary: dict[str, Any], run_dir: Path) -> None:
    """Print the table of a finished run."""
    facts, costs = table(summary)
    grid = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts:
        grid.add_row(escape(name), f"[bold]{escape(value)}[/bold]" if name.startswith("test ") else escape(value))
    console.print(grid)
    if summary["peak_bytes"] is not None:
        comparison = Table(title_justify="left")
        modes = summary["modes"]
        for heading in ("measured", *modes, "")[: 2 * len(modes)]:
            comparison.add_column(heading)
        for row in costs:
            comparison.add_row(*map(escape, row[: 2 * len(modes)]))
        console.print(comparison)
    console.print(f"report: {run_dir / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
