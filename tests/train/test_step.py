from __future__ import annotations

import math

import pytest
import torch
from lightning_fabric import Fabric

from recollect.autoscale import Combination
from recollect.train._config import parse
from recollect.train._errors import UsageError
from recollect.train._step import Step
from recollect.train.families import family_of

# Without dropout and clipping all that is random is the order of the parts.
BASE = ["optimizer=adam", "optimizer.lr=0.05", "model.dropout=0", "model.num_layers=3", "model.hidden_channels=8"]
PARTS = ["training=autoscale", "training.num_parts=4", "training.parts_per_batch=1", "training.partition=contiguous"]


def make(graph, overrides, model="gcn"):
    settings = parse([f"model={model}", *BASE, *overrides])
    family = family_of(settings)
    prepared = family.prepare(graph)
    torch.manual_seed(0)
    network = family.build(prepared, torch.device("cpu"))
    return Step(Fabric(accelerator="cpu", devices=1), family, prepared, network)


@pytest.fixture
def graph(graph_maker):
    return graph_maker("multiclass", "accuracy", 3)


@pytest.mark.parametrize("model", ["gcn", "gat", "gcn2", "appnp"])
def test_all_parts_in_one_batch_train_as_the_whole_graph_does(graph, model):
    whole, parts = make(graph, [], model), make(graph, [*PARTS, "training.parts_per_batch=4"], model)
    parts.fill()
    for _ in range(3):
        assert parts.train() == pytest.approx(whole.train(), rel=1e-5)
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_an_epochs_loss_is_the_mean_over_training_nodes(graph):
    graph.data.train_mask = torch.arange(12) < 7  # 3, 3, 1 and 0 in the parts
    step = make(graph, [*PARTS, "optimizer.lr=0"])
    step.fill()  # the histories then stay exact
    logits = step.evaluate()
    assert step.train() == pytest.approx(float(step.loss(logits, "train")), rel=1e-5)


def test_histories_are_exact_when_they_are_filled_and_stale_after_training(graph):
    step = make(graph, [*PARTS, "training.errors_every=1"])
    step.fill()
    seen = step.observe(errors=True)
    assert list(seen) == ["age_1", "age_2", "error_1", "error_2"]
    assert [seen[name] for name in seen] == pytest.approx([0.0] * 4, abs=1e-6)
    step.train()
    seen = step.observe(errors=True)
    # Four pushes to each history, of three nodes each: these are 0, 1, 2 and 3 pushes old.
    assert (seen["age_1"], seen["age_2"]) == (1.5, 1.5)
    assert min(seen["error_1"], seen["error_2"]) > 1e-3
    assert all(math.isnan(value) for name, value in step.observe(errors=False).items() if name.startswith("error"))


def test_errors_are_those_that_the_formula_gives(graph):
    step = make(graph, [*PARTS, "training.errors_every=1", "model.num_layers=2"])
    step.fill()
    step.train()
    held, x, adj_t = step.network.histories[0].pull(), step.graph.data.x, step.graph.data.adj_t
    step.network.eval()
    with torch.no_grad():
        fresh = step.network.forward_layer(0, x, adj_t, {})
    expected = float((held - fresh).norm() / fresh.norm())
    assert step.observe(errors=True)["error_1"] == pytest.approx(expected, rel=1e-5)


def test_without_parts_there_is_no_history_to_see(graph):
    step = make(graph, [])
    step.train()
    assert step.observe(errors=True) == {}
    assert step.modes == ["whole graph"]


@pytest.mark.parametrize("model", ["gcn", "gat", "gcn2", "appnp", "pna", "pna_jk", "gin"])
def test_evaluation_by_parts_is_that_of_the_whole_graph(graph, model):
    whole, parts = make(graph, PARTS, model), make(graph, [*PARTS, "training.layerwise=true"], model)
    assert torch.allclose(whole.evaluate(), parts.evaluate(), atol=1e-5)
    parts.train()
    assert parts.evaluate().shape == (12, 3)


def test_the_second_mode_is_the_whole_graph(graph):
    step = make(graph, [*PARTS, "training.layerwise=true"])
    assert step.modes == ["histories", "whole graph"]
    step.switch(second=True)
    assert [inputs[0].size(0) for inputs, _, _ in step.batches] == [12]
    step.switch(second=False)
    assert len(list(step.batches)) > 1


def test_the_lipschitz_regularisation_is_part_of_the_loss(graph):
    plain, regularised = (
        make(graph, [*PARTS, "model.options.noise=0.5", f"training.lipschitz={weight}", "optimizer.lr=0"], "gin")
        for weight in (0.0, 10.0)
    )
    losses = []
    for step in (plain, regularised):
        step.fill()
        torch.manual_seed(1)
        losses.append(step.train())
    assert losses[1] > losses[0] + 1e-3


def test_gradients_of_each_step_are_clipped(graph):
    step = make(graph, [*PARTS, "clip_norm=1e-3"])
    step.train()
    norms = [parameter.grad.norm() for parameter in step.network.parameters()]
    assert float(torch.stack(norms).norm()) <= 1.001e-3


def gradients_of_an_epoch(step):
    """The mean of its steps' gradients, as the parameters stay what they are."""
    step.model.train()
    number = 0
    for inputs, target, rows in step.batches:
        out = step.family.call(step.model, inputs)
        torch.nn.functional.cross_entropy(out[rows], target[rows]).backward()
        number += 1
    return [parameter.grad / number for parameter in step.network.parameters()]


@pytest.mark.parametrize(("model", "edges"), [("gcn", "cut"), ("gcn2", "cut"), ("gat", "complete")])
def test_corrected_histories_give_the_whole_graphs_gradient_after_a_refresh(graph, model, edges):
    whole = gradients_of_an_epoch(make(graph, [], model))
    options = [*PARTS, f"training.compensate={edges}", "training.refresh_every=3"]
    corrected = make(graph, options, model)
    corrected.begin(1)
    for found, expected in zip(gradients_of_an_epoch(corrected), whole, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    pushed = [history.table.clock.pushes for history in corrected.network.tables]
    corrected.begin(2)
    assert [history.table.clock.pushes for history in corrected.network.tables] == pushed  # not due yet
    corrected.begin(4)
    assert [history.table.clock.pushes for history in corrected.network.tables] > pushed


def test_a_layer_that_is_no_sum_asks_for_all_edges(graph):
    step = make(graph, [*PARTS, "training.compensate=cut"], "gat")
    step.fill()
    with pytest.raises(UsageError, match="compensate=complete"):
        step.train()


@pytest.mark.parametrize(("edges", "form"), [("cut", "induced"), ("complete", "complete")])
def test_rows_around_a_mini_batch_are_combined_as_the_settings_say(graph, edges, form):
    options = [*PARTS, f"training.compensate={edges}", "training.combine=0.5", "training.combine_score=sin(x)"]
    step = make(graph, options, "gcn")
    assert step.network.combine == Combination(0.5, "sin(x)")
    step.fill()
    assert [batch.inputs[6].form for batch in step.batches] == [form] * len(list(step.batches))
    assert step.train() > 0
    found = {}
    for alpha in ("null", "0", "1"):  # where nothing is combined gradients are those of histories alone
        step = make(graph, [*PARTS, f"training.compensate={edges}", f"training.combine={alpha}"], "gcn")
        assert step.network.combine == (None if alpha == "null" else Combination(float(alpha), "x^2"))
        step.fill()
        torch.manual_seed(0)
        found[alpha] = torch.cat([grad.flatten() for grad in gradients_of_an_epoch(step)])
    assert torch.allclose(found["0"], found["null"], atol=1e-6)
    assert not torch.allclose(found["1"], found["null"], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.combine=1"], "training.combine=1.0 is part of the correction .* add training.compensate=cut"),
        (["training.compensate=cut", "training.combine=1.5"], "training.combine=1.5: must be at least 0 and at most 1"),
        (["training.compensate=cut", "training.combine=-1"], "training.combine=-1.0: must be at least 0"),
        (["training.compensate=cut", "training.combine_score=x"], "training.combine=1 .* as well, or leave it out"),
        (["training.compensate=cut", "training.combine_score=y"], "training.combine_score: .*sin"),
        (["model=pna_jk", "training.compensate=complete", "training.combine=1"], "model=pna_jk has no combined rows"),
        (["model=revgnn", "training.compensate=cut", "training.combine=1"], "model=revgnn has no combined rows"),
    ],
)
def test_what_does_not_go_with_combined_rows(options, message):
    with pytest.raises(UsageError, match=message):
        parse(["model=gcn", *PARTS, *options])


@pytest.mark.parametrize(
    "options",
    [
        ["training.compensate=cut", "objective=iwrm"],
        ["training.compensate=cut", "training.edge_dropout=0.1"],
        ["training.refresh_every=2"],
    ],
)
def test_what_does_not_go_with_corrected_histories(options):
    with pytest.raises(UsageError, match=r"training\.(compensate|refresh_every)"):
        parse(["model=gcn", *PARTS, *options])


WHOLE = ["training=wholegraph", "training.num_parts=3", "training.partition=contiguous"]


@pytest.mark.parametrize("exact", ["false", "true"])
def test_part_by_part_trains_as_the_whole_graph_does(graph, exact, tmp_path):
    options = ["model.hidden_channels=8", "model.dropout=0.3", f"model.exact={exact}"]
    whole = make(graph, options, "revgnn")
    parts = make(graph, [*WHOLE, *options, f"training.store={tmp_path}"], "revgnn")
    for _ in range(3):
        losses = []
        for step in (whole, parts):
            torch.manual_seed(3)
            losses.append(step.train())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-3)
    assert torch.allclose(whole.evaluate(), parts.evaluate(), atol=1e-2)
    assert parts.observe(errors=False) == {"drift": 0.0}
    parts.switch(second=True)
    assert parts.train() == pytest.approx(whole.train(), rel=0.2)  # other masks, with everything kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model=gcn", "objective=iwrm"], "objective=mean or multitask"),
        (["model=revgnn", "objective=iwrm"], "objective=mean or multitask"),
        (["model=revgnn", "model.norm=batch"], r"model\.norm=layer"),
        (["model=revgnn", "precision=bf16-mixed"], "precision=32-true"),
    ],
)
def test_what_does_not_go_part_by_part(options, message):
    with pytest.raises(UsageError, match=message):
        parse([*WHOLE, *options])
