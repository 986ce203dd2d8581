"""A run that is killed goes on, and ends with the numbers of an unbroken one."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recollect.train import train

EPOCHS = 6
RUN = [
    *("dataset=digits", "model.num_layers=4", "model.hidden_channels=16", f"epochs={EPOCHS}", "patience=null"),
    *("threads=1", "seed=4", "warmup_epochs=3", "measure.repeats=1", "checkpoint_every=1"),
]


def rows(folder: Path) -> list[dict[str, str]]:
    try:
        with (folder / "metrics.csv").open() as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def results(folder: Path) -> tuple[object, ...]:
    """What must not depend on being killed: all but times."""
    summary = json.loads((folder / "summary.json").read_text())
    timeless = {name: value for name, value in summary.items() if not name.startswith("seconds")}
    assert {"test_accuracy", "val_accuracy", "epochs", "peak_bytes", "peak_bytes_plain", "parameters"} <= set(timeless)
    kept = torch.load(folder / "checkpoint.ckpt", weights_only=True)["best_state"]
    weights = {name: value.tolist() for name, value in kept.items()}
    return timeless, weights, [{name: row[name] for name in row if name != "seconds"} for row in rows(folder)]


def kill_when(folder: Path, arguments: list[str], moment: Callable[[Path], bool]) -> None:
    """Start the command, and end it by SIGKILL as soon as the moment has come."""
    command = [sys.executable, "-m", "recollect.cli", "train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not moment(folder):
                if process.poll() is not None or time.monotonic() > deadline:
                    process.kill()
                    pytest.fail(f"the moment did not come: {process.communicate()[1]}")
                time.sleep(0.001)
        finally:
            process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    train([*RUN, f"run_dir={folder}"])
    return results(folder)


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first epoch": lambda folder: (folder / "config.yaml").exists(),
    "while the second checkpoint is written": lambda folder: (
        len(rows(folder)) == 1 and (folder / ".checkpoint.ckpt.partial").exists()
    ),
    "when training is over": lambda folder: len(rows(folder)) >= EPOCHS,
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=[name.replace(" ", "-") for name in MOMENTS])
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path, unbroken, moment):
    folder = tmp_path / "run"
    kill_when(folder, [*RUN, f"run_dir={folder}"], moment)
    train([f"resume={folder}"])
    assert results(folder) == unbroken
    assert [int(row["epoch"]) for row in rows(folder)] == list(range(1, EPOCHS + 1))
    assert not list(folder.glob(".*"))  # what the killed process left half written is gone


def test_a_run_can_be_killed_and_resumed_again_and_again(tmp_path, unbroken):
    folder = tmp_path / "run"
    kill_when(folder, [*RUN, f"run_dir={folder}"], lambda folder: len(rows(folder)) >= 2)
    done = len(rows(folder))
    kill_when(folder, [f"resume={folder}"], lambda folder: len(rows(folder)) >= done + 2)
    train([f"resume={folder}"])
    assert results(folder) == unbroken
