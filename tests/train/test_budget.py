"""Runs with a memory budget: steps stay within it, numbers are those of runs without, and a run goes on as it was."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from recollect.data import load
from recollect.memory import peak_memory
from recollect.models import RevGNN
from recollect.train import InvalidRunError, TrainingError, UsageError, fit, train
from recollect.train._config import parse
from recollect.train._step import Step

QUIET = ["measure.enabled=false", "threads=1"]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.2))

    def forward(self, x):
        return x + self.inner(x)


class Net(nn.Module):
    """Eight blocks of one kind; dropout draws in each step."""

    def __init__(self, depth=8):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(34, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(Block(32) for _ in range(depth))

    def forward(self, x, edge_index):
        x = self.first(torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]]))
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@pytest.fixture
def graph():
    return load("sbm", num_nodes=600, num_classes=4, num_features=34)


@pytest.fixture
def peaks(monkeypatch):
    """Peaks of the steps of all runs, measured around them."""
    found, plain = [], Step.train

    def measured(self):
        self.optimizer.zero_grad(set_to_none=True)
        first = not self.optimizer.optimizer.state  # makes the optimizer's state
        with peak_memory("cpu") as memory:
            loss = plain(self)
        if not first:
            found.append(memory.peak_bytes)
        return loss

    monkeypatch.setattr(Step, "train", measured)
    return found


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [(row["loss"], row["val_loss"]) for row in csv.DictReader(file)]


def is_plain(model):
    return all("forward" not in vars(part) for part in model.modules())


def test_steps_stay_within_the_budget_and_numbers_are_those_without(graph, tmp_path, peaks):
    models = [Net(), Net(), Net()]
    fit(models[0], graph, epochs=4, out=tmp_path / "plain", overrides=QUIET)
    budget = max(peaks) * 6 // 10
    for model, name, given in zip(models[1:], ("number", "words"), (budget, f"{budget} B"), strict=True):
        peaks.clear()
        result = fit(model, graph, epochs=4, memory_budget=given, out=tmp_path / name, overrides=QUIET)
        assert 0 < max(peaks) <= budget
        assert losses(tmp_path / name) == losses(tmp_path / "plain")
        assert all(map(torch.equal, model.state_dict().values(), models[0].state_dict().values()))
        assert list(model.state_dict()) == list(models[0].state_dict())
        assert is_plain(model)
        kept = result.summary["memory_budget"]
        assert (kept["bytes"], len(kept["units"])) == (budget, 8)
        assert 0 < kept["peak_bytes"] <= budget
        assert kept["units"][0]["unit"] == "blocks.0"
        assert {unit["strategy"] for unit in kept["units"]} - {"store"}


@pytest.mark.parametrize("share", [0.7, 0.5])
def test_a_reversible_network_keeps_what_the_budget_allows(graph, tmp_path, peaks, share):
    words = [
        "dataset=sbm",
        "dataset.options.num_nodes=300",
        "model.num_layers=8",
        "model.hidden_channels=16",
        "epochs=3",
        *QUIET,
    ]
    train([*words, "model.disable=true", f"run_dir={tmp_path / 'plain'}"])
    budget = int(max(peaks) * share)
    peaks.clear()
    train([*words, f"memory_budget={budget}", f"run_dir={tmp_path / 'run'}"])
    assert 0 < max(peaks) <= budget
    for row, plain in zip(losses(tmp_path / "run"), losses(tmp_path / "plain"), strict=True):
        assert [float(value) for value in row] == pytest.approx([float(value) for value in plain], rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_a_reversible_network_takes_by_itself_is_a_budget_that_can_be_met(tmp_path, peaks, precision):
    words = ["dataset=sbm", "dataset.options.num_nodes=300", "model.num_layers=8", "model.hidden_channels=16"]
    words += ["epochs=2", f"precision={precision}", *QUIET]
    train([*words, f"run_dir={tmp_path / 'plain'}"])
    budget = max(peaks) * 102 // 100
    peaks.clear()
    train([*words, f"memory_budget={budget}", f"run_dir={tmp_path / 'run'}"])
    assert 0 < max(peaks) <= budget


def test_networks_with_histories_on_the_whole_graph_and_edge_dropout(tmp_path, peaks):
    words = [
        "dataset=sbm",
        "dataset.options.num_nodes=300",
        "model=gin",
        "training=full",
        "training.edge_dropout=0.5",
        "model.num_layers=6",
    ]
    words += ["model.hidden_channels=32", "epochs=3", *QUIET]
    train([*words, f"run_dir={tmp_path / 'plain'}"])
    budget = max(peaks) * 8 // 10
    peaks.clear()
    train([*words, f"memory_budget={budget}", f"run_dir={tmp_path / 'run'}"])
    assert 0 < max(peaks) <= budget
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_a_run_goes_on_with_its_plan_and_its_numbers(graph, tmp_path):
    """Which layers are inverted is chosen by times, and an inverse rounds: the choice is the run's."""
    models, run, whole = [RevGNN(34, 16, 4, num_layers=8) for _ in range(2)], tmp_path / "run", tmp_path / "whole"
    models[1].load_state_dict(models[0].state_dict())
    fit(models[0], graph, epochs=3, memory_budget="700 kB", out=run, overrides=QUIET)
    whole.mkdir()
    for name in ("config.yaml", "plan.json"):  # a run that was killed before its first checkpoint
        (whole / name).write_text((run / name).read_text())
    chosen = json.loads((run / "plan.json").read_text())
    assert [row["unit"] for row in chosen] == [f"layers.{k}" for k in range(8)]
    assert {row["strategy"] for row in chosen} - {"store"}
    for model, folder in zip(models, (run, whole), strict=True):
        summary = fit(model, graph, epochs=6, resume=folder).summary
        assert json.loads((folder / "plan.json").read_text()) == chosen
        assert summary["memory_budget"]["bytes"] == 700_000
    assert losses(run) == losses(whole)
    with pytest.raises(UsageError, match="leave out out, lr, objective, training, histories, memory_budget"):
        fit(models[1], graph, resume=run, memory_budget="1 GB")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "plan.json is not the plan of a run"),
        ('[{"unit": "blocks.0"}]', "plan.json is not the plan of a run"),
        (
            '[{"unit": "blocks.0", "keeps": 1, "strategy": "forget", "bytes": 0, "seconds": 0.0}]',
            "a row has another strategy",
        ),
        (
            '[{"unit": "tail", "keeps": 1, "strategy": "store", "bytes": 0, "seconds": 0.0}]',
            r"of another network, which has 'tail'",
        ),
    ],
)
def test_a_damaged_plan_is_refused(graph, tmp_path, text, message):
    fit(Net(), graph, epochs=1, memory_budget="100 MB", out=tmp_path, overrides=QUIET)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InvalidRunError, match=message):
        fit(Net(), graph, epochs=2, resume=tmp_path)


def test_what_cannot_be_met_says_the_least_and_leaves_no_folder(graph, tmp_path):
    model = Net()
    with pytest.raises(TrainingError, match=r"memory_budget=9 kB cannot be met: .* (\d+) bytes") as caught:
        fit(model, graph, epochs=1, memory_budget="9 kB", out=tmp_path / "run", overrides=QUIET)
    assert is_plain(model)
    assert not (tmp_path / "run").exists()
    least = int(str(caught.value).partition("measured is ")[2].split()[0])
    summary = fit(model, graph, epochs=1, memory_budget=least, out=tmp_path / "run", overrides=QUIET).summary
    assert summary["memory_budget"]["peak_bytes"] <= least


def test_a_network_without_units_is_refused_by_its_name(graph, tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(34, 4)

        def forward(self, x):
            return self.head(x)

    with pytest.raises(UsageError, match="memory_budget=100 MB: Bare has no units"):
        fit(Bare(), graph, epochs=1, memory_budget="100 MB", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["memory_budget=5XB"], "memory_budget='5XB' cannot be read"),
        (["memory_buget=5MB"], r"did you mean memory_budget\?"),
        (["memory_budget=5MB", "training=wholegraph"], "training=wholegraph takes steps part by part.*num_parts"),
        (["memory_budget=5MB", "model=gcn", "training=autoscale"], "training=autoscale.*parts_per_batch"),
        (["memory_budget=5MB", "objective=iwrm"], "objective=iwrm goes backward for each of many"),
        (["memory_budget=5MB", "measure.depths=[2,4]"], "no curve over measure.depths"),
        (["memory_budget=5MB", "device=mps"], "device"),
    ],
)
def test_what_a_budget_is_not_for_is_refused_by_name(words, message):
    with pytest.raises(UsageError, match=message):
        parse(words)


@pytest.mark.parametrize("word", ["500MB", "1.5 GB", "60%", "500000000"])
def test_budgets_are_words_of_the_command_line(word):
    assert parse([f"memory_budget={word}"]).memory_budget == word


def test_the_page_and_the_terminal_show_the_plan(tmp_path):
    written = io.StringIO()
    words = [
        "dataset=sbm",
        "dataset.options.num_nodes=300",
        "model.num_layers=6",
        "model.hidden_channels=16",
        "epochs=1",
        "threads=1",
    ]
    words += ["measure.repeats=1", "memory_budget=60%", f"run_dir={tmp_path}"]
    summary = train(words, Console(file=written, width=200))
    assert summary["modes"] == ["within the budget", "everything kept"]
    assert 0 < summary["peak_bytes"] <= summary["memory_budget"]["bytes"]
    assert summary["peak_bytes_plain"] > 0
    first = written.getvalue().splitlines()[0]
    assert first.startswith("memory budget: ")
    assert "of 6 units 6 stored" in first
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Memory budget</h2>" in page
    assert "<td>layers.0 to layers.5 (6)</td>" in page or "layers.0" in page
