"""A sweep: a run for each combination of values, by Hydra's own sweeper, and one table and figure over all."""

from __future__ import annotations

import itertools
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import RangeSweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from recollect.train._config import parse, parse_override
from recollect.train._errors import Interrupted, InvalidRunError, TrainingError, UsageError
from recollect.train._files import write_text
from recollect.train._folder import RunFolder, make_folder
from recollect.train._settings import about
from recollect.train._stored import read_text

__all__ = ["resume_sweep", "sweep"]

_MOST = 10_000  # runs of a sweep; more are a slip of the keys
# Hydra's own logs would come between the runs' lines.
_QUIET = ("hydra/hydra_logging=disabled", "hydra/job_logging=disabled", "hydra.sweep.subdir=${hydra.job.num}")


def sweep(words: Sequence[str], console: Console, folder: RunFolder | None = None) -> dict[str, Any]:
    """Make a run for each combination of values, each in a folder of its own, and a report of all.

    A run that fails, because its loss becomes infinite or memory is short, is noted as such, and the others are made
    all the same. Runs that are finished already are taken as they are.

    Args:
        words: of the command line: ``["seed=1,2", "model.num_layers=2,4", "epochs=50"]``; ``hydra.`` keys and
            ``hydra/`` groups are Hydra's, so that its other sweepers and launchers can be used.
        console: where progress and the table are shown.
        folder: of the sweep, if it was there before.

    Returns:
        What ``sweep.json`` in the sweep's folder holds.

    Raises:
        UsageError: a name, key or value is wrong in one of the combinations; nothing was run then.
        TrainingError: the sweep's folder cannot be made or read.
    """
    words = [word for word in words if word]
    own = [word for word in words if not _is_hydras(word)]
    run_dir, own = _take("run_dir", own)
    if _take("resume", own)[0]:
        raise UsageError("resume= goes on with one run or sweep: leave out -m and all swept values")
    hydras = [word for word in words if _is_hydras(word)]
    if not hydras:
        _check_all(own)
    folder = folder or make_folder(run_dir, "sweep")
    write_text(folder.sweep, json.dumps({"words": list(words), "runs": []}, indent=2) + "\n")
    console.print(f"sweep: {folder.path}", highlight=False, markup=False, soft_wrap=True)
    with folder.locked():
        try:
            # Which keys there are is ours to say, and not Hydra's: ++ lets it take them all.
            passed = [f"++{parse_override(word).input_line}" for word in own]
            _multirun([*passed, *_QUIET, *hydras, f'hydra.sweep.dir="{folder.path}"'])
        except KeyboardInterrupt as error:
            raise Interrupted(shlex.join(["recollect", "train", f"resume={folder.path}", *_code(words)])) from error
        from recollect.train._sweep_report import gather, show_sweep, sweep_report

        found = gather(folder, words)
        write_text(folder.report, sweep_report(found, folder.path))
        write_text(folder.sweep, json.dumps(found, indent=2) + "\n")
        show_sweep(console, found, folder.path)
        return found


def resume_sweep(folder: RunFolder, said: Sequence[str], console: Console) -> dict[str, Any]:
    """Go on with a sweep: runs that are finished are taken as they are.

    Args:
        folder: of the sweep.
        said: those of its words that say which code runs; no file decides that.
        console: where progress and the table are shown.

    Raises:
        InvalidRunError: its file cannot be read.
        UsageError: other words were said.
    """
    try:
        words = json.loads(read_text(folder.sweep))["words"]
        if not all(isinstance(word, str) for word in words):
            raise TypeError("its words are no texts")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InvalidRunError(f"{folder.sweep} cannot be read: {error}") from error
    code = _code(words)
    if others := [word for word in said if word not in code]:
        raise UsageError(f"resume={folder.path} is a sweep, which goes on as it is: leave out {' '.join(others)}")
    if lacking := [word for word in code if word not in said]:
        raise UsageError(
            f"the sweep in {folder.path} has code that would run, and a file may be anybody's: if you trust it, go on "
            f"with {shlex.join(lacking)}"
        )
    return sweep(words, console, folder)


def _code(words: Sequence[str]) -> list[str]:
    """The words that say which code runs: Hydra's, whose values may name classes, and those of a model of one's own."""
    return [word for word in words if _is_hydras(word) or about(word.partition("=")[0]).code]


def _is_hydras(word: str) -> bool:
    return word.startswith(("hydra.", "hydra/"))


def _take(key: str, words: list[str]) -> tuple[str | None, list[str]]:
    """The value of a word with this key, and the other words."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return (values[-1] if values else None), [word for word in words if not word.startswith(f"{key}=")]


def _check_all(words: Sequence[str]) -> None:
    """Refuse a wrong word in any combination before the first run begins."""
    choices, number = [], 1
    for word in words:
        override = parse_override(word)
        values = [word]
        if override.is_sweep_override():
            swept = override.value()
            if isinstance(swept, RangeSweep):
                swept.shuffle = False  # which makes a list of all values, however many
            try:
                found = list(itertools.islice(override.sweep_string_iterator(), _MOST + 1))
            except (HydraException, ValueError) as error:  # a step of zero
                raise UsageError(f"{word!r} cannot be swept over: write its values out, as in key=a,b") from error
            values = [f"{override.key_or_group}={value}" for value in found]
        number *= len(values)
        if not number:
            raise UsageError(f"{word!r} has no value to sweep over: write them out, as in key=a,b")
        if number > _MOST:
            raise UsageError(f"these are more than {_MOST:,} runs: leave some values of {word!r} out")
        choices.append(values)
    for combination in itertools.product(*choices):
        parse(combination)


def _multirun(words: list[str]) -> None:
    hydra = GlobalHydra.instance()
    outer, hydra.hydra = hydra.hydra, None  # of a caller that uses Hydra itself
    try:
        with initialize(config_path=None, version_base="1.3"):
            instance = GlobalHydra.instance().hydra
            if instance is None:
                raise RuntimeError("Hydra was initialized, and is not there")
            instance.multirun(None, _Task(), words, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(str(error).strip().partition("\n")[0]) from error
    finally:
        GlobalHydra.instance().hydra = outer


class _Task:
    """A run of the sweep, as Hydra calls it; launchers may send it to other processes."""

    def __call__(self, _: Any) -> float:
        """Run, and return the validation score of the best epoch, NaN if there is none: what sweepers make large."""
        from recollect.train._run import start
        from recollect.train._summary import read_summary

        hydra = HydraConfig.get()
        words = [word.removeprefix("++") for word in hydra.overrides.task]
        folder = RunFolder(Path(hydra.runtime.output_dir))
        console = Console()
        console.print(f"run {hydra.job.num}: {' '.join(words)}", highlight=False, markup=False, soft_wrap=True)
        failed = folder.path / "failed.txt"
        failed.unlink(missing_ok=True)
        try:
            summary = read_summary(folder.summary) if folder.summary.exists() else start(words, console, folder)
        except UsageError:
            raise
        except TrainingError as error:  # the others may do
            write_text(failed, f"{error}\n")
            console.print(f"failed: {error}", highlight=False, markup=False, soft_wrap=True)
            return math.nan
        return float(summary["val_accuracy"])
