"""From the words of the command line to finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from recollect.train._config import parse
from recollect.train._errors import UsageError
from recollect.train._folder import reopen
from recollect.train._progress import show_summary
from recollect.train._several import several
from recollect.train._single import single
from recollect.train._summary import read_summary

__all__ = ["train"]


def train(overrides: Sequence[str] = (), console: Console | None = None) -> dict[str, Any]:
    """Train, measure and report: what ``recollect train`` does.

    Args:
        overrides: of the settings, as on the command line: ``["dataset=cora", "model.num_layers=112"]`` or
            ``["preset=cora_gcn", "runs=5"]``; or ``["resume=RUN_DIR"]`` to go on with a run that was interrupted.
        console: where progress and table are shown; by default nowhere.

    Returns:
        What ``summary.json`` in the run's folder holds.

    Raises:
        UsageError: a name, key or value is wrong.
        InvalidRunError: the folder to resume holds no run.
        NonFiniteLossError: the loss became NaN or infinite.
        TrainingError: something else that the user can mend: files or packages are missing, ...
    """
    console = console or Console(quiet=True)
    settings = parse(overrides)
    folder = None
    if settings.resume:
        if len(overrides) > 1:
            raise UsageError(f"resume={settings.resume} goes on under the run's own settings: leave out all others")
        folder, settings = reopen(settings.resume)
        if folder.summary.exists():
            summary = read_summary(folder.summary)
            console.print(f"the run {folder.path} is finished", highlight=False, markup=False, soft_wrap=True)
            show_summary(console, summary, folder.path)
            return summary
    return (several if settings.runs > 1 else single)(settings, console, folder)
