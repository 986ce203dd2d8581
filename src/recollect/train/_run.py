"""From the words of the command line to finished runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recollect.train._check import check
from recollect.train._config import changed, code_of, parse, parse_override
from recollect.train._errors import Interrupted, TrainingError
from recollect.train._folder import RunFolder, create, extend, reopen
from recollect.train._settings import Settings, about

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CHANGEABLE", "start", "to_the_end", "train"]

CHANGEABLE = ("epochs", "runs", "patience", "checkpoint_every", "device", "devices", "threads", "measure")


def train(overrides: Sequence[str] = (), console: Console | None = None) -> dict[str, Any]:
    """Train, measure and report: what ``recollect train`` does.

    Args:
        overrides: of the settings, as on the command line: ``["dataset=cora", "model.num_layers=112"]`` or
            ``["preset=cora_gcn", "runs=5"]``; or ``["config=FILE", "seed=3"]`` to begin with the settings of a file; or
            ``["resume=RUN_DIR"]`` to go on with a run that was interrupted, ``["resume=RUN_DIR", "epochs=200"]`` to
            extend one that is finished; it has so many epochs then, unless ``patience`` is given as well.
        console: where progress and table are shown; by default nowhere.

    Returns:
        What ``summary.json`` in the run's folder holds.

    Raises:
        UsageError: a name, key or value is wrong.
        InvalidRunError: the folder to resume holds no run.
        NonFiniteLossError: the loss became NaN or infinite.
        TrainingError: something else that the user can mend: files or packages are missing, the disk is full, ...

    Example:
        >>> import tempfile
        >>> from recollect.train import train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     words = ["dataset=karate", "model.num_layers=2", "epochs=2", "measure.enabled=false"]
        ...     summary = train([*words, f"run_dir={folder}/run"])
        >>> summary["epochs"]
        2
    """
    words = [(parse_override(text), text) for text in overrides]
    resumed = [str(word.value()) for word, _ in words if word.key_or_group == "resume" and word.value()]
    if not resumed:
        return _start(parse(overrides), console, None)
    if RunFolder(Path(resumed[-1]).expanduser()).sweep.is_file():
        return _sweep_again(resumed[-1], [text for word, text in words if word.key_or_group != "resume"], console)
    code = {word.key_or_group: word.value() for word, _ in words if about(word.key_or_group).code}
    folder, before = reopen(resumed[-1], code=code)
    others = [text for word, text in words if word.key_or_group not in ("resume", *code)]
    settings = changed(before, to_the_end(others), CHANGEABLE, folder.path)
    return _start(settings, console, folder)


def to_the_end(words: Sequence[str]) -> list[str]:
    """Words for a run that is there: who extends it to ``epochs`` wants them all, unless patience is named too."""
    keys = [word.partition("=")[0] for word in words]
    return [*words, "patience=null"] if "epochs" in keys and "patience" not in keys else list(words)


def start(overrides: Sequence[str], console: Console, folder: RunFolder) -> dict[str, Any]:
    """Start a run in a folder, or go on with the one that is there.

    Args:
        overrides: see `train`; without ``resume`` and ``run_dir``.
        console: where progress is shown.
        folder: of the run; may be empty.
    """
    if folder.config.exists():
        code = code_of(parse(overrides))
        return _start(reopen(str(folder.path), code=code)[1], console, folder, brief=True)
    return _start(parse([*overrides, f"run_dir={folder.path}"]), console, None, brief=True)


def _sweep_again(path: str, others: Sequence[str], console: Console | None) -> dict[str, Any]:
    from rich.console import Console

    from recollect.train._sweep import resume_sweep

    return resume_sweep(RunFolder(Path(path).expanduser()), others, console or Console(quiet=True))


def _start(
    settings: Settings, console: Console | None, folder: RunFolder | None, brief: bool = False
) -> dict[str, Any]:
    """Run, now that nothing is wrong with the words: what follows needs torch, which takes seconds to import."""
    from rich.console import Console

    from recollect.train._several import several
    from recollect.train._single import single
    from recollect.train._team import joined

    console = console or Console(quiet=True)
    with joined() as team:
        if team.size == 1 and settings.devices > 1:
            return _launched(settings, folder, console)
        if settings.devices != team.size:
            settings = replace(settings, devices=team.size)
            check(settings)
        if not team.is_first:
            console = Console(quiet=True)
        if folder is not None:
            finished: dict[str, Any] | None = None
            if team.is_first:
                finished = _finished(settings, folder, console)
            finished = team.share(finished)
            if finished is not None:
                return finished
        if settings.runs > 1:
            return several(settings, console, folder)
        return single(settings, console, folder, brief=brief)


def _finished(settings: Settings, folder: RunFolder, console: Console) -> dict[str, Any] | None:
    """What a run gave that is there and has nothing more to do; else give it these settings."""
    from recollect.train._progress import show_summary
    from recollect.train._summary import read_summary

    with folder.locked():
        if not extend(folder, settings, reopen(str(folder.path), code=code_of(settings))[1]):
            return None
        summary = read_summary(folder.summary)
        console.print(f"the run {folder.path} is finished", highlight=False, markup=False, soft_wrap=True)
        show_summary(console, summary, folder.path)
        return summary


def _launched(settings: Settings, folder: RunFolder | None, console: Console) -> dict[str, Any]:
    """Train in processes of their own; the run's folder tells them the settings."""
    from recollect.train._room import check_processes
    from recollect.train._summary import read_summary
    from recollect.train._team import launch

    new = folder is None
    if folder is not None and (finished := _finished(settings, folder, console)) is not None:
        return finished
    check_processes(settings.devices)
    folder = folder or create(settings)
    try:
        code = launch([f"resume={folder.path}"], settings.devices)
    except KeyboardInterrupt as error:
        raise Interrupted(folder.again) from error
    if code:
        if new and not folder.checkpoint.exists():
            folder.config.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.path.rmdir()  # what cannot start leaves no folder behind
            raise TrainingError(f"the {settings.devices} processes ended with code {code}; what is wrong stands above")
        raise TrainingError(
            f"the {settings.devices} processes ended with code {code}; what is wrong stands above. Go on with: "
            f"{folder.again}"
        )
    return read_summary(folder.summary)
