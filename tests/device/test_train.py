"""The training application on another device."""

import csv
import json

import pytest
import torch
from torch import nn

from device.emulation import device, watch
from recollect._devices import FORMS
from recollect.cli import main
from recollect.data import load
from recollect.models import GCN, RevGNN
from recollect.train import FitResult, fit
from recollect.train._step import Step
from recollect.train._trainer import Trainer

pytest.importorskip("torch_geometric")
pytest.importorskip("lightning_fabric")

TINY = (
    "dataset=karate", "model.num_layers=3", "model.hidden_channels=8", "epochs=3", "threads=1", "measure.enabled=false",
)  # fmt: skip
PARTS = ("training=autoscale", "training.num_parts=3", "training.parts_per_batch=1", "training.partition=random")
WHOLE = ("training=wholegraph", "training.num_parts=3", "training.partition=random")
LABELS = ("dataset=sbm", "dataset.options.num_labels=3")
HOST = "training.history_device=cpu"
# For each run: its settings, and how many steps an epoch has.
RUNS = {
    "revgnn": ((), 1),
    "revgnn with dropout": (("model.dropout=0.3",), 1),
    "revgnn in bfloat16": (("precision=bf16-mixed",), 1),
    "revgnn, clipped": (("clip_norm=1",), 1),
    "revgnn within a budget": (("memory_budget=60kB",), 1),
    "revgnn on parts, corrected": (("model.conv=graphconv", *PARTS, "training.compensate=cut"), 3),
    "gcn": (("model=gcn",), 1),
    "gcn on parts": (("model=gcn", *PARTS), 3),
    "gcn on parts, corrected": (("model=gcn", *PARTS, "training.compensate=cut", "training.refresh_every=2"), 3),
    "gcn on parts, combined": (("model=gcn", *PARTS, "training.compensate=cut", "training.combine=0.5"), 3),
    "gcn on parts, evaluated by layers": (("model=gcn", *PARTS, "training.layerwise=true"), 3),
    "gcn on parts of dropped edges": (("model=gcn", *PARTS, "training.edge_dropout=0.3"), 3),
    "gin on parts, smoothed": (("model=gin", *PARTS, "training.lipschitz=0.1", "model.options.noise=0.1"), 3),
    "gcn on parts, histories on the host": (("model=gcn", *PARTS, HOST), 3),
    "gcn on parts, pool": (("model=gcn", *PARTS, HOST, "training.pool_size=2"), 3),
    "losses of nodes": (("model=gcn", "objective=iwrm"), 1),
    "losses of nodes on parts": (("model=gcn", "objective=iwrm", *PARTS), 3),
    "losses of labels on parts": (("model=gcn", "objective=multitask", *LABELS, *PARTS), 3),
    "losses of nodes, revgnn": (("objective=iwrm", "objective.weighting=mgda"), 1),
}
# And on a whole graph part by part: how often a step goes over its parts.
WHOLE_RUNS = {
    "revgnn": (("model.dropout=0.3",), 15),
    "gcn": (("model=gcn", "model.dropout=0"), 7),
    "losses of labels": (("objective=multitask", *LABELS), 30),
}
LOOKED_AT = ("revgnn", "corrected", "combined")
each = pytest.mark.parametrize("name", RUNS)


def run(folder, *settings):
    assert main(["train", *TINY, *settings, f"run_dir={folder}"]) == 0
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(autouse=True)
def forms(other, monkeypatch):
    """The device gets the forms that CUDA gets, of convolutions too."""
    monkeypatch.setitem(FORMS, other, FORMS["cuda"])


@pytest.fixture
def steps(monkeypatch):
    """Where each epoch's training steps wait."""
    found, train = [], Step.train

    def watched(step):
        with watch() as log:
            value = train(step)
        found.append(log.where + [line for line in log.sent if "outside" not in line])
        return value

    monkeypatch.setattr(Step, "train", watched)
    return found


@each
def test_a_run_waits_once_a_step_at_most(other, name, tmp_path, steps):
    """With one loss, once an epoch, for its value; with several, in each step for the Gramian."""
    device.lag = 10**6
    settings, number = RUNS[name]
    summary = run(tmp_path, "device=other", *settings)
    assert summary["device"] == summary["device_name"] == other
    assert summary["epochs"] == len(steps) == 3
    for epoch, where in enumerate(steps):
        own = where
        if HOST in settings:  # rows on the host are copied
            own = [one for one in own if not one.startswith("copy_ at")]
        if epoch == 0 and any(each in name for each in LOOKED_AT):  # once, at edges that are new, and at what layers do
            continue
        if epoch == 0:  # layers of mini-batches are looked at on the host, once
            own = [one for one in own if "_locality.py" not in one]
        assert len(own) == (number if "losses" in name else 1), own
        assert all(("_objective.py" if "losses" in name else "_step.py") in one for one in own)


@pytest.mark.parametrize("name", WHOLE_RUNS)
def test_a_whole_graph_part_by_part(other, name, tmp_path, steps):
    """A step waits for what its parts bring back, and for the parameters, whose bits are in the store.

    With several losses once more for the Gramian, for what is known of them in the store, and for the verdict.
    """
    settings, passes = (*WHOLE, *WHOLE_RUNS[name][0]), WHOLE_RUNS[name][1]
    summary = run(tmp_path / "there", "device=other", *settings, f"training.store={tmp_path / 'tables'}")
    assert summary["device"] == other
    for where in steps[1:]:
        crossed = [line for line in where if "_crossing.py" in line or "_verdicts.py" in line]
        assert 0 < len(crossed) <= 3 * passes + (3 if "losses" in name else 1)
        rest = [line.split(" at ")[1].split()[0].split(":")[0] for line in where if line not in crossed]
        assert rest == (["_whole_graph.py"] if "losses" in name else []) + ["_single.py"], where  # for the loss, once
    run(tmp_path / "here", "device=cpu", *settings)
    assert losses_of(tmp_path / "there") == pytest.approx(losses_of(tmp_path / "here"), rel=1e-4)


def test_costs_are_measured_there(other, tmp_path):
    """And leave the random numbers as they are."""
    measured = ("measure.enabled=true", "measure.repeats=1", "measure.depths=[3]", "model.dropout=0.3")
    found = run(tmp_path / "measured", "device=other", *measured)
    assert 0 < found["peak_bytes"] < found["peak_bytes_plain"]
    device.manual_seed(0)
    run(tmp_path / "not", "device=other", "model.dropout=0.3")
    assert losses_of(tmp_path / "measured") == losses_of(tmp_path / "not")


def test_a_budget_is_kept(other, tmp_path):
    summary = run(tmp_path, "device=other", "memory_budget=20kB", "model.num_layers=6", "model=gcn")
    assert summary["memory_budget"]["peak_bytes"] <= 20_000
    assert summary["memory_budget"]["bytes"] == 20_000


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(34, 4)

    def forward(self, x, edge_index):
        return self.linear(x)


@pytest.mark.parametrize(
    ("make", "histories"),
    [
        (Own, None),
        (lambda: RevGNN(34, 8, 4, num_layers=2), None),
        (lambda: GCN(34, 34, 8, 4, num_layers=2), {"num_parts": 2, "parts_per_batch": 1}),
    ],
    ids=["own", "revgnn", "gcn on parts"],
)
def test_a_model_of_ones_own(other, make, histories, tmp_path):
    found = []
    for place in ("cpu", other):
        torch.manual_seed(0)
        model, settings = make(), (f"device={place}", "measure.enabled=false")
        result = fit(model, load("karate"), epochs=3, histories=histories, out=tmp_path / place, overrides=settings)
        assert isinstance(result, FitResult)
        assert result.summary["device"] == place
        assert next(model.parameters()).device.type == place
        result = fit(model, load("karate"), epochs=5, resume=tmp_path / place)
        assert (result.epochs, result.summary["device"]) == (5, place)
        found.append(losses_of(tmp_path / place))
    assert len(found[1]) == 5
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def losses_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", ["revgnn", "gcn", "gcn on parts, combined", "losses of nodes"])
def test_it_learns_what_the_cpu_does(other, name, tmp_path):
    settings = ("model.dropout=0", *RUNS[name][0])
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


def test_a_device_that_is_not_there_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "present", False)
    assert main(["train", *TINY, "device=other", f"run_dir={tmp_path}"]) == 2
    assert "choose from: auto, cpu, cuda" in capsys.readouterr().err
