from __future__ import annotations

import copy
import csv

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recollect.autoscale import ScalableGNN, propagate, to_adj_t, with_weights
from recollect.data import load
from recollect.models import GCN, RevGNN
from recollect.train import FitResult, InvalidRunError, TrainingError, UsageError, fit, train

QUIET = ("measure.enabled=false", "threads=1")


class Net(nn.Module):
    def __init__(self, channels=34, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(channels, classes)

    def forward(self, x, edge_index):
        mixed = torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])
        return self.head(mixed)


@pytest.fixture
def graph():
    return load("karate")


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_it_trains_as_a_plain_loop_does(graph, tmp_path):
    model, oracle, data = Net(), Net(), graph.data
    result = fit(model, graph, epochs=6, lr=0.05, out=tmp_path, overrides=[*QUIET, "warmup_epochs=0"])
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=0.05, weight_decay=1e-4)
    losses, best, kept = [], (-1.0, 0.0), {}
    for _ in range(6):
        loss = F.cross_entropy(oracle(data.x, data.edge_index)[data.train_mask], data.y[data.train_mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        logits = oracle(data.x, data.edge_index).detach()
        right = float((logits.argmax(1) == data.y)[data.val_mask].double().mean())
        rank = (right, -float(F.cross_entropy(logits[data.val_mask], data.y[data.val_mask])))
        if rank > best:
            best, kept = rank, {name: value.clone() for name, value in oracle.state_dict().items()}
    assert [float(row["loss"]) for row in rows(tmp_path)] == pytest.approx(losses, rel=1e-5)
    assert result.val_accuracy == best[0]
    for name, value in model.state_dict().items():
        assert torch.allclose(value, kept[name], atol=1e-6)


def test_the_result_has_types_and_a_folder(graph, tmp_path):
    result = fit(Net(), graph, epochs=2, out=tmp_path / "run", overrides=["measure.repeats=1", "threads=1"])
    assert isinstance(result, FitResult)
    assert (result.epochs, result.metric, result.folder) == (2, "accuracy", tmp_path / "run")
    assert result.peak_bytes > 0
    assert result.peak_bytes_plain is None
    assert {path.name for path in result.folder.iterdir()} >= {"report.html", "metrics.csv", "summary.json"}
    assert "Net, on karate" in (result.folder / "report.html").read_text()


def test_a_reversible_model_is_measured_beside_the_same_with_everything_kept(graph, tmp_path):
    model = RevGNN(34, 16, 4, num_layers=12)
    result = fit(model, graph, epochs=1, out=tmp_path, overrides=["measure.repeats=1", "threads=1"])
    assert 0 < result.peak_bytes < result.peak_bytes_plain
    assert not model.disable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert float(rows(tmp_path)[0]["drift"]) < 1e-3


def test_measuring_leaves_the_best_parameters(graph, tmp_path):
    models = [Net(), Net()]
    for number, words in enumerate((QUIET, ("measure.repeats=1", "threads=1"))):
        fit(models[number], graph, epochs=3, out=tmp_path / str(number), overrides=words)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_is_extended_as_if_it_had_been_longer(graph, tmp_path):
    one, other = Net(), Net()
    whole = fit(one, graph, epochs=6, out=tmp_path / "whole", overrides=QUIET)
    fit(other, graph, epochs=3, out=tmp_path / "run", overrides=QUIET)
    more = fit(other, graph, epochs=6, resume=tmp_path / "run")
    assert [row["loss"] for row in rows(tmp_path / "run")] == [row["loss"] for row in rows(tmp_path / "whole")]
    assert (more.epochs, more.val_accuracy) == (6, whole.val_accuracy)
    assert fit(Net(), graph, resume=tmp_path / "run").summary == more.summary


def test_a_run_of_a_given_model_is_not_for_the_command(graph, tmp_path):
    fit(Net(), graph, epochs=1, out=tmp_path, overrides=QUIET)
    with pytest.raises(InvalidRunError, match=r"was made by recollect.train.fit.*resume="):
        train([f"resume={tmp_path}"])


class Own(ScalableGNN):
    def __init__(self, num_nodes):
        super().__init__(num_nodes, hidden_channels=8, num_layers=2)
        self.layers = nn.ModuleList([nn.Linear(34, 8), nn.Linear(8, 4)])

    def forward_layer(self, layer, x, adj_t, state):
        return self.layers[layer](adj_t @ x)


@pytest.mark.parametrize("made", [lambda n: Own(n), lambda n: GCN(n, 34, 8, 4, 2)])
def test_a_network_with_histories_trains_on_parts(graph, tmp_path, made):
    histories = {"num_parts": 4, "parts_per_batch": 1, "partition": "contiguous", "adjacency": "symmetric"}
    words = ["measure.repeats=1", "threads=1"]
    result = fit(made(34), graph, epochs=2, histories=histories, out=tmp_path, overrides=words)
    assert result.summary["histories"]["layers"] == 1
    assert result.peak_bytes_plain > 0
    assert float(rows(tmp_path)[0]["age_1"]) > 0


class OfEdges(ScalableGNN):
    """Sums over edges with weights that are made of what the edges have."""

    inputs = ("edge_attr",)

    def __init__(self, num_nodes, compensate=False):
        super().__init__(num_nodes, hidden_channels=8, num_layers=2, compensate=compensate)
        self.layers = nn.ModuleList([nn.Linear(34, 8), nn.Linear(8, 4)])
        self.gate = nn.Linear(2, 1)

    def forward_layer(self, layer, x, adj_t, state):
        weights = self.gate(state["edge_attr"]).squeeze(1)
        return propagate(with_weights(adj_t, weights), self.layers[layer](x))


@pytest.mark.parametrize("compensate", [None, "cut"])
def test_layers_get_what_they_take_of_edges(graph, tmp_path, compensate):
    data = copy.copy(graph.data)
    data.edge_attr = torch.rand(data.num_edges, 2)
    histories = {"num_parts": 4, "parts_per_batch": 2, "compensate": compensate}
    model = OfEdges(34, compensate is not None)
    words = ["measure.repeats=1", "threads=1", "training.errors_every=1"]
    result = fit(model, data, epochs=2, histories=histories, out=tmp_path / "run", overrides=words)
    whole = to_adj_t(data)
    logits = model.eval()(whole.x, whole.adj_t, edge_attr=whole.edge_attr)
    share = (logits.argmax(1) == data.y)[data.test_mask].double().mean()
    assert result.test_accuracy == pytest.approx(float(share))
    for other, adjacency in ((data, "loops"), (graph.data, "plain")):
        with pytest.raises(UsageError, match="layers of the OfEdges need edge_attr"):
            fit(OfEdges(34), other, histories=histories | {"adjacency": adjacency}, out=tmp_path / "none")


def test_objectives_are_chosen(graph, tmp_path):
    words = [*QUIET]
    result = fit(Net(), graph, epochs=1, objective={"name": "iwrm", "weighting": "mgda"}, out=tmp_path, overrides=words)
    assert result.summary["objective"] == "iwrm"
    assert result.summary["conflict"] is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": "mena"}, r"there is no objective 'mena'; did you mean mean"),
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"lr": -1.0}, "optimizer.lr=-1.0: must be at least 0"),
        ({"histories": {"num_part": 3}}, r"did you mean training.num_parts"),
        ({"histories": {"adjacency": None}}, r"model.adjacency=null: must be one of plain, loops, symmetric"),
        ({"training": "wholegraf"}, "did you mean wholegraph"),
        ({"training": {"num_parts": 3}}, "counts only with training=autoscale or wholegraph"),
        ({"training": "full", "histories": True}, "give one of the two"),
        ({"overrides": ["optimizer.learning_rate=3"]}, "did you mean optimizer.lr"),
        ({"resume": "x", "lr": 0.1}, "leave out out, lr"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_made(graph, tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        fit(Net(), graph, **changed)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_called_leaves_no_folder(graph, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Wants(Net):
        def forward(self, x, edge_index, position):
            return x

    with pytest.raises(TrainingError, match="wants 'position'"):
        fit(Wants(), graph, epochs=1)
    with pytest.raises(UsageError, match=r"returned logits \[34, 3\], and the graph has 34 nodes and 4 classes"):
        fit(Net(34, 3), graph, epochs=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)], ids=str)
def test_features_have_the_type_of_the_parameters(graph, tmp_path, dtype, rtol):
    model, oracle, data = Net().to(dtype), Net().to(dtype), graph.data
    fit(model, graph, epochs=1, lr=0.05, out=tmp_path, overrides=[*QUIET, "warmup_epochs=0"])
    loss = F.cross_entropy(oracle(data.x.to(dtype), data.edge_index)[data.train_mask], data.y[data.train_mask])
    assert float(rows(tmp_path)[0]["loss"]) == pytest.approx(float(loss.detach()), rel=rtol)
    assert graph.data.x.dtype is torch.float32
    assert model.head.weight.dtype is dtype


def test_fewer_parts_than_a_usual_step_takes_are_all_taken(graph, tmp_path):
    model = GCN(34, 34, 8, 4, num_layers=2)
    fit(model, graph, epochs=1, histories={"num_parts": 3}, out=tmp_path, overrides=QUIET)
    assert "parts_per_batch: 3" in (tmp_path / "config.yaml").read_text()
