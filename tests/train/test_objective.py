from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from recollect.aggregation import UPGradWeighting
from recollect.train import UsageError, train
from recollect.train._objective import _WEIGHTINGS, make_objective
from recollect.train._settings import ObjectiveSettings, keys


def make_losses(network, labels=None):
    torch.manual_seed(1)
    outputs = network(torch.randn(6, 3, dtype=torch.float64)).square()
    return outputs[:, :labels] if labels else outputs.sum(1)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()


def update_of(network, losses):
    """UPGrad's update, by the explicit Jacobian."""
    parameters = list(network.parameters())
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in losses]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return jacobian.T @ UPGradWeighting()(jacobian @ jacobian.T)


def gradient_of(network, update):
    grads = torch.autograd.grad(update, list(network.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def test_the_mean_is_what_goes_backward(network, graph_maker):
    graph = graph_maker("multiclass", "accuracy", 4)
    losses = make_losses(network)
    value, update = make_objective(ObjectiveSettings("mean", "upgrad", 3), graph, network)(losses)
    assert value is update
    assert torch.equal(value, losses.mean())


def test_each_label_is_an_objective(network, graph_maker):
    objective = make_objective(
        ObjectiveSettings("multitask", "upgrad", 3), graph_maker("multilabel", "micro_f1", 5), network
    )
    losses = make_losses(network, labels=5)
    value, update = objective(losses)
    assert torch.equal(value, losses.mean())
    expected = update_of(network, losses.mean(0))
    torch.testing.assert_close(gradient_of(network, update), expected, rtol=1e-6, atol=1e-9)


def test_some_nodes_are_objectives(network, graph_maker):
    graph = graph_maker("multiclass", "accuracy", 4)
    objective = make_objective(ObjectiveSettings("iwrm", "upgrad", 4), graph, network)
    losses = make_losses(network)
    torch.manual_seed(5)
    _, update = objective(losses)
    torch.manual_seed(5)
    chosen = torch.randperm(6)[:4]
    expected = update_of(network, losses[chosen])
    torch.testing.assert_close(gradient_of(network, update), expected, rtol=1e-6, atol=1e-9)


def test_conflict_is_that_of_the_steps_since_the_last_look(network, graph_maker):
    objective = make_objective(
        ObjectiveSettings("multitask", "mean", 3), graph_maker("multilabel", "micro_f1", 2), network
    )
    assert math.isnan(objective.observe()["conflict"])
    weight = network[0].weight
    objective(torch.stack([weight.sum(), -weight.sum()])[None])  # opposed
    objective(torch.stack([weight.sum(), weight.sum() * 2])[None])
    # The update of the first step is zero; that of the second has both gradients' direction.
    expected = {"conflict": 0.5, "cosine": 0.0, "cosine_mean": 0.5, "cosine_1": 0.5, "cosine_2": 0.5}
    assert objective.observe() == pytest.approx(expected)
    assert set(objective.observe()) == set(expected)
    assert math.isnan(objective.observe()["cosine_2"])


def test_cosines_are_those_of_each_label(network, graph_maker):
    settings = ObjectiveSettings("multitask", "mean", 3)
    objective = make_objective(settings, graph_maker("multilabel", "micro_f1", 2), network)
    weight = network[0].weight
    objective(torch.stack([3 * weight.sum(), -weight.sum()])[None])  # the mean of both follows the first
    seen = objective.observe()
    assert (seen["cosine_1"], seen["cosine_2"]) == pytest.approx((1.0, -1.0))
    assert (seen["cosine"], seen["cosine_mean"]) == pytest.approx((-1.0, 0.0))


def test_a_loss_that_is_not_finite_is_left_to_the_trainer(network, graph_maker):
    objective = make_objective(
        ObjectiveSettings("multitask", "upgrad", 3), graph_maker("multilabel", "micro_f1", 2), network
    )
    value, _ = objective(network[0].weight.sum() * torch.tensor([[1.0, math.nan]]))
    assert math.isnan(value.detach())


def test_labels_are_asked_for(network, graph_maker):
    with pytest.raises(UsageError, match="the nodes of 'ring' have one class each"):
        make_objective(ObjectiveSettings("multitask", "upgrad", 3), graph_maker("multiclass", "accuracy", 4), network)


def test_all_weightings_can_be_chosen():
    assert set(keys()["objective.weighting"].choices) == set(_WEIGHTINGS)
    gramian = torch.eye(3, dtype=torch.float64)
    for make in _WEIGHTINGS.values():
        assert make()(gramian).shape == (3,)


@pytest.mark.parametrize(
    "words",
    [
        ["objective=iwrm", "objective.samples=5"],
        ["objective=iwrm", "objective.samples=5", "model=gcn", "training=autoscale", "training.num_parts=4"],
        ["objective=multitask", "dataset=sbm", "dataset.options.num_nodes=100", "dataset.options.num_labels=3"],
    ],
    ids=["reversible", "histories", "labels"],
)
def test_a_run_tells_of_conflict(tiny, tmp_path, words):
    base = [word for word in tiny if not word.startswith("dataset=") or "dataset=sbm" not in words]
    if "training=autoscale" in words:
        words = [*words, "training.parts_per_batch=2"]
    folder = tmp_path / "run"
    summary = train([*base, *words, f"run_dir={folder}", "measure.enabled=false"])
    assert summary["objective"] == words[0].partition("=")[2]
    assert 0 <= summary["conflict"] <= 1
    assert -1 <= summary["smallest_cosine"] <= 1
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"conflict", "cosine", "cosine_mean"} < set(columns)
    assert sum(column.startswith("cosine_") for column in columns) == (4 if "objective=multitask" in words else 1)
    assert "pairs in conflict" in (folder / "report.html").read_text()


def test_scaled_losses_are_refused(tiny):
    with pytest.raises(UsageError, match="precision=16-mixed scales losses"):
        train([*tiny, "objective=iwrm", "precision=16-mixed"])
