"""metrics.csv and TensorBoard, written by Fabric's loggers."""

from __future__ import annotations

import csv
import math
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

from lightning_fabric.loggers.csv_logs import CSVLogger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from recollect.train._errors import TrainingError
from recollect.train._trainer import Row

__all__ = ["Logs", "read_history"]


def _clear(run_dir: Path) -> None:
    """Remove old logs; of what is a link, the link alone.

    Raises:
        TrainingError: there is something else in their place.
    """
    metrics, folder = run_dir / "metrics.csv", run_dir / "tensorboard"
    try:
        metrics.unlink(missing_ok=True)
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise TrainingError(f"the old logs in {run_dir} cannot be removed ({error}); remove them") from error


class Logs:
    """The logs of a run. Old ones in the folder are replaced by the epochs that the checkpoint knows of.

    Args:
        run_dir: metrics.csv comes into this folder, TensorBoard's files into ``tensorboard`` in it.
        history: epochs that are done.
    """

    def __init__(self, run_dir: Path, history: Iterable[Row]) -> None:
        # Rows that were logged after the last checkpoint come again, and a killed process can leave half a row.
        _clear(run_dir)
        self._csv = CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)
        with warnings.catch_warnings():
            # The folder holds the run's other files, and replacing metrics.csv is what is wanted.
            warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
            _ = self._csv.experiment
        self._tensorboard = TensorBoardLogger(run_dir, name="tensorboard", version="", flush_secs=5)
        for row in history:
            self.add(row)

    def add(self, row: Row) -> None:
        """Log an epoch."""
        step = int(row["epoch"])
        self._csv.log_metrics(dict(row), step)
        finite = {name: value for name, value in row.items() if name != "epoch" and math.isfinite(value)}
        self._tensorboard.log_metrics(finite, step)

    def close(self) -> None:
        """Write what is left."""
        self._csv.finalize("success")
        self._tensorboard.finalize("success")


def read_history(run_dir: Path) -> list[Row]:
    """The epochs of a run's metrics.csv; none if it cannot be read.

    Args:
        run_dir: its folder.
    """
    try:
        with (run_dir / "metrics.csv").open(newline="") as file:
            rows = [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError):
        return []
    return [{key: value for key, value in row.items() if key != "step"} for row in rows]
