from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import pytest
import torch

from recollect.train import TrainingError, UsageError, train
from recollect.train._command import command
from recollect.train._errors import BusyRunError, Interrupted
from recollect.train._failures import enough_memory, explained
from recollect.train._folder import RunFolder
from recollect.train._trainer import Trainer

TINY = ["dataset=karate", "model.num_layers=2", "model.hidden_channels=8", "threads=1", "measure.enabled=false"]


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.ckpt"), r"the disk is full \(a.ckpt\)"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), r"permission denied \(a\)"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), r"not enough memory \(CUDA out of memory. Tried\)"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_what_the_machine_refuses_is_one_line(folder, error, said, saved):
    if saved:
        folder.checkpoint.touch()
    with pytest.raises(TrainingError, match=said) as found, explained(folder):
        raise error
    text = str(found.value)
    assert "\n" not in text
    assert f"recollect train resume={folder.path}" in text
    assert ("checkpoint is safe" in text) == saved


def test_too_little_memory_before_there_is_a_folder_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")):
        with pytest.raises(TrainingError, match=r"not enough memory .* Nothing was written"), enough_memory():
            raise error
    with pytest.raises(RuntimeError, match="mine"), enough_memory():
        raise RuntimeError("mine")

    def refuse(*_, **__):
        torch.empty(2**60, dtype=torch.uint8, device="cpu")  # more than there are addresses

    for name in ("recollect.train._single.build_dataset", "recollect.models.RevGNN"):
        with monkeypatch.context() as patched:
            patched.setattr(name, refuse)
            with pytest.raises(TrainingError, match=r"can't allocate memory.* Nothing was written"):
                train(TINY)
    assert list(tmp_path.iterdir()) == []


def test_torchs_own_error_for_a_full_disk_is_told_from_others(folder):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match="the disk is full"), explained(folder):
        torch.save({"a": torch.ones(3)}, Full())


def test_other_errors_are_as_they_are(folder):
    for error in (RuntimeError("mine"), ValueError("mine"), UsageError("mine")):
        with pytest.raises(type(error), match="mine") as found, explained(folder):
            raise error
        assert found.value is error


def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    sync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) > 3:  # the settings, and two checkpoints
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    words = [*TINY, "epochs=5", "checkpoint_every=1", f"run_dir={tmp_path / 'run'}"]
    assert command(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the disk is full" in error
    monkeypatch.undo()
    assert len(torch.load(tmp_path / "run" / "checkpoint.ckpt", weights_only=True)["history"]) == 2
    assert command([f"resume={tmp_path / 'run'}"]) == 0


def test_ctrl_c_prints_the_command_that_goes_on(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a b"
    save = Trainer.save

    def interrupt(self):
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", interrupt)
    assert command([*TINY, "epochs=3", "runs=2", "checkpoint_every=1", f"run_dir={folder}"]) == 130
    assert f"interrupted; go on with: recollect train 'resume={folder}'\n" in capsys.readouterr().err
    monkeypatch.undo()
    assert train([f"resume={folder}"])["epochs"] == 6


def test_ctrl_c_before_a_run_has_a_folder_says_so(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("recollect.train._run.parse", interrupt)
    assert command(TINY) == 130
    assert "nothing was written" in capsys.readouterr().err


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path):
    train([*TINY, "epochs=1", f"run_dir={tmp_path}"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    script = (
        "import sys\nfrom pathlib import Path\nfrom recollect.train._folder import RunFolder\n"
        f"with RunFolder(Path({str(tmp_path)!r})).locked():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyRunError, match="another process works on the run") as found:
            train([f"resume={tmp_path}", "epochs=3"])
        other.communicate("")
    assert found.value.exit_code == 2
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert train([f"resume={tmp_path}", "epochs=3"])["epochs"] == 3


def test_an_interrupt_names_the_folder_of_all_runs(folder, tmp_path):
    with pytest.raises(Interrupted) as found, explained(folder), explained(RunFolder(tmp_path / "seed_0")):
        raise KeyboardInterrupt
    assert found.value.again == folder.again
