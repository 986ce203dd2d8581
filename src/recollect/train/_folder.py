"""The folder of a run: which files it has, how it is made, how it is known again."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recollect.train._config import code_of, read, with_absolute_paths, with_code, write
from recollect.train._errors import BusyRunError, InvalidRunError, MissingRunError, TrainingError, UsageError
from recollect.train._files import write_text
from recollect.train._settings import Settings
from recollect.train._stored import read_text

__all__ = ["RunFolder", "create", "extend", "make_folder", "reopen"]


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings; the first file to be there, by which the folder is known."""
        return self.path / "config.yaml"

    @property
    def checkpoint(self) -> Path:
        """State after the last saved epoch, and the best parameters."""
        return self.path / "checkpoint.ckpt"

    @property
    def metrics(self) -> Path:
        """A row for each epoch."""
        return self.path / "metrics.csv"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        """What came out; the last file to be there, so the run is finished."""
        return self.path / "summary.json"

    @property
    def plan(self) -> Path:
        """What is kept of each layer, in a run with a memory budget."""
        return self.path / "plan.json"

    @property
    def sweep(self) -> Path:
        """The words of a sweep, whose runs are in this folder."""
        return self.path / "sweep.json"

    @property
    def again(self) -> str:
        """The command that goes on with the run, or the call for one whose model was given."""
        words = [f"resume={self.path}"]
        with contextlib.suppress(InvalidRunError):
            settings = read(self.config)
            if not settings.model.is_known:
                return f"recollect.train.fit(model, data, resume={str(self.path)!r})"
            words += [f"{key}={value}" for key, value in code_of(settings).items() if value]
        return f"recollect train {' '.join(map(shlex.quote, words))}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the run while the body works on it.

        Raises:
            BusyRunError: another process works on it.
        """
        try:
            import fcntl
        except ImportError:  # a system without it
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)  # the folder itself, as its files are replaced
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyRunError(
                    f"another process works on the run in {self.path}: wait until it is done, or end it"
                ) from error
            except OSError:  # a file system that has no locks
                pass
            yield
        finally:
            os.close(folder)


def create(settings: Settings) -> RunFolder:
    """Make the folder of a new run and write its settings.

    Raises:
        UsageError: the folder exists and is not empty.
        TrainingError: it cannot be made.
    """
    # A model's name stays in the folder of runs.
    label = re.sub(r"[^\w.-]+", "-", f"{settings.dataset.label}_{settings.model.name}")[:100]
    folder = make_folder(settings.run_dir, label)
    try:
        # The run may be gone on with from another working directory.
        write_text(folder.config, write(with_absolute_paths(replace(settings, run_dir=None, resume=None, config=None))))
    except OSError as error:
        raise TrainingError(f"the run's settings cannot be written: {error}") from error
    return folder


def make_folder(run_dir: str | None, label: str) -> RunFolder:
    """Make the folder of a new run or sweep.

    Args:
        run_dir: its path; None: one in ``runs``, named by the time.
        label: of that name.

    Raises:
        UsageError: the folder exists and is not empty.
        TrainingError: it cannot be made.
    """
    try:
        if run_dir:
            path = Path(run_dir).expanduser()
            if RunFolder(path).config.exists():
                raise UsageError(
                    f"run_dir={path} holds a run: go on with it by resume={path}, or choose another folder"
                )
            if path.exists() and (not path.is_dir() or any(entry.name != ".hydra" for entry in path.iterdir())):
                raise UsageError(f"run_dir={path} exists and is not an empty folder: choose another")
            path.mkdir(parents=True, exist_ok=True)
            return RunFolder(path)
        name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}_{label}"
        for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                path = Path("runs") / f"{name}{suffix}"
                path.mkdir(parents=True)
                return RunFolder(path)
    except OSError as error:
        raise TrainingError(f"the folder of the run cannot be made: {error}") from error
    raise TrainingError(f"a thousand runs have the name {name}: give one by run_dir=")


def extend(folder: RunFolder, settings: Settings, before: Settings) -> bool:
    """Give a run that is there its new settings, if they are others; say whether it is finished.

    Args:
        folder: of the run; locked.
        settings: that it is to have.
        before: that it has.

    Raises:
        UsageError: it has more epochs than it is to have.
    """
    finished = folder.summary.exists()
    if settings == before:
        return finished
    done = _epochs(folder) if finished and settings.runs == 1 else 0
    if settings.epochs < done:
        raise UsageError(f"epochs={settings.epochs}: the run in {folder.path} has {done} already; give more")
    write_text(folder.config, write(replace(settings, run_dir=None, resume=None, config=None)))
    folder.summary.unlink(missing_ok=True)
    return False


def reopen(
    path: str, given: bool = False, code: Mapping[str, Any] = MappingProxyType({})
) -> tuple[RunFolder, Settings]:
    """Find a run again.

    Args:
        path: of its folder.
        given: whether its model is given anew.
        code: what was said of the code that makes the model: ``model.target``, ``model.folder``.

    Raises:
        MissingRunError: the folder holds none.
        UsageError: its file names code that was not said.
        InvalidRunError: its settings cannot be read.
    """
    folder = RunFolder(Path(path).expanduser())
    if not folder.config.is_file():
        what = "is a file" if folder.path.is_file() else "does not exist"
        if folder.path.is_dir():
            what = "has no config.yaml, so it is not the folder of a run"
        raise MissingRunError(f"resume={path}: {folder.path} {what}; give a folder that recollect train has made")
    settings = read(folder.config)
    if not settings.model.is_known and not given:
        raise InvalidRunError(
            f"resume={path}: the run was made by recollect.train.fit, with a model that is not in its files: go on by "
            f"fit(model, data, resume={str(folder.path)!r})"
        )
    return folder, with_code(settings, dict(code), folder.path)


def _epochs(folder: RunFolder) -> int:
    try:
        return int(json.loads(read_text(folder.summary))["epochs"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise InvalidRunError(f"{folder.summary} cannot be read: {error}") from error
