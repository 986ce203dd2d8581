"""The training application on another device."""

import csv
import json

import pytest
import torch

from device.emulation import device, watch
from recollect.cli import main
from recollect.train._step import Step
from recollect.train._trainer import Trainer

pytest.importorskip("torch_geometric")
pytest.importorskip("lightning_fabric")

TINY = ("dataset=karate", "model.num_layers=3", "model.hidden_channels=8", "epochs=3", "threads=1")
PARTS = ("training=autoscale", "training.num_parts=3", "training.parts_per_batch=1", "training.partition=random")
RUNS = {
    "revgnn": (),
    "revgnn with dropout": ("model.dropout=0.3",),
    "revgnn in bfloat16": ("precision=bf16-mixed",),
    "gcn": ("model=gcn",),
    "gcn on parts": ("model=gcn", *PARTS),
    "gcn on parts, histories on the host": ("model=gcn", *PARTS, "training.history_device=cpu"),
}
each = pytest.mark.parametrize("name", RUNS)


def run(folder, *settings):
    assert main(["train", *TINY, *settings, f"run_dir={folder}"]) == 0
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def steps(monkeypatch):
    """Where each epoch's training steps wait."""
    found, train = [], Step.train

    def watched(step):
        with watch() as log:
            value = train(step)
        found.append(log.where)
        return value

    monkeypatch.setattr(Step, "train", watched)
    return found


@pytest.mark.parametrize("objective", ["iwrm", "multitask"])
def test_many_objectives_wait_once_a_step(other, objective, tmp_path, steps):
    graph = ["dataset=sbm", "dataset.options.num_labels=3"] if objective == "multitask" else []
    run(tmp_path, "device=other", "model=gcn", f"objective={objective}", "measure.enabled=false", *graph)
    for where in steps:  # of one step an epoch, and the epoch's loss
        assert len(where) == 2, where
        assert "_objective.py" in where[0]
        assert "_step.py" in where[1]


@each
def test_a_run(other, name, tmp_path, steps):
    device.lag = 10**6
    summary = run(tmp_path, "device=other", *RUNS[name])
    assert summary["device"] == summary["device_name"] == other
    assert summary["epochs"] == len(steps) == 3
    for where in steps:
        own = where
        if name.endswith("host"):  # rows on the host are copied
            own = [one for one in own if not one.startswith("copy_ at")]
        assert len(own) == 1
        assert "_step.py" in own[0]


def losses_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["revgnn", "gcn", "gcn on parts"])
def test_it_learns_what_the_cpu_does(other, name, tmp_path):
    settings = ("measure.enabled=false", "model.dropout=0", *RUNS[name])
    there = run(tmp_path / "there", "device=other", *settings)
    here = run(tmp_path / "here", "device=cpu", *settings)
    assert losses_of(tmp_path / "there") == pytest.approx(losses_of(tmp_path / "here"), rel=1e-4)
    assert there["test_accuracy"] == pytest.approx(here["test_accuracy"], abs=1e-6)


def test_a_run_goes_on_with_the_same_random_numbers(other, tmp_path, monkeypatch):
    settings = ("device=other", "model.dropout=0.5", "checkpoint_every=1", "epochs=4")
    run(tmp_path / "whole", *settings)

    class Killed(BaseException):
        pass

    def save_and_die(trainer, save=Trainer.save):
        save(trainer)
        if trainer.epoch == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_die)
        with pytest.raises(Killed):
            run(tmp_path / "parts", *settings)
    torch.get_device_module("other").manual_seed(123)
    assert main(["train", f"resume={tmp_path / 'parts'}"]) == 0
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


def test_a_device_that_is_not_there_is_refused(capsys, tmp_path):
    assert main(["train", *TINY, "device=other", f"run_dir={tmp_path}"]) == 2
    assert "choose from: auto, cpu, cuda" in capsys.readouterr().err
