"""The folder of a run: which files it has, how it is made, how it is known again."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, replace
from pathlib import Path

from recollect.train._config import read, write
from recollect.train._errors import MissingRunError, TrainingError, UsageError
from recollect.train._files import write_text
from recollect.train._settings import Settings

__all__ = ["RunFolder", "create", "reopen"]


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


def create(settings: Settings) -> RunFolder:
    """Make the folder of a new run and write its settings.

    Raises:
        UsageError: the folder exists and is not empty.
        TrainingError: it cannot be made.
    """
    try:
        folder = RunFolder(_make(settings))
        # The run may be gone on with from another working directory.
        data = replace(settings.data, root=_absolute(settings.data.root))
        dataset = replace(settings.dataset, path=_absolute(settings.dataset.path))
        training = replace(
            settings.training,
            history_path=_absolute(settings.training.history_path),
            partition_cache=_absolute(settings.training.partition_cache),
        )
        own = replace(settings, dataset=dataset, data=data, training=training, run_dir=None, resume=None)
        write_text(folder.config, write(own))
    except OSError as error:
        raise TrainingError(f"the run's folder cannot be made: {error}") from error
    return folder


def reopen(path: str) -> tuple[RunFolder, Settings]:
    """Find a run again.

    Raises:
        MissingRunError: the folder holds none.
        InvalidRunError: its settings cannot be read.
    """
    folder = RunFolder(Path(path).expanduser())
    if not folder.config.is_file():
        what = "is a file" if folder.path.is_file() else "does not exist"
        if folder.path.is_dir():
            what = "has no config.yaml, so it is not the folder of a run"
        raise MissingRunError(f"resume={path}: {folder.path} {what}; give a folder that recollect train has made")
    return folder, read(folder.config)


def _absolute(path: str | None) -> str | None:
    return str(Path(path).expanduser().resolve()) if path else None


def _make(settings: Settings) -> Path:
    if settings.run_dir:
        path = Path(settings.run_dir).expanduser()
        if RunFolder(path).config.exists():
            raise UsageError(f"run_dir={path} holds a run: go on with it by resume={path}, or choose another folder")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"run_dir={path} exists and is not an empty folder: choose another")
        path.mkdir(parents=True, exist_ok=True)
        return path
    label = re.sub(r"[^\w.-]+", "-", f"{settings.dataset.name}_{settings.model.name}")[:100]  # it stays in the folder
    name = f"{datetime.datetime.now():%Y%m%d-%H%M%S}_{label}"
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        path = Path("runs") / f"{name}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise TrainingError(f"a thousand runs have the name {name}: give one by run_dir=")
