"""RevGNN on parts: against loops written out, the whole graph, and the explicit Jacobian."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning_fabric import Fabric

from recollect import models
from recollect.aggregation import UPGradWeighting
from recollect.autoscale import SubgraphLoader
from recollect.train import UsageError, train
from recollect.train._config import parse
from recollect.train._metrics import losses
from recollect.train._room import histories_of
from recollect.train._step import Step
from recollect.train._text import histories_text
from recollect.train.families import ReversiblePartsFamily, family_of

CPU = torch.device("cpu")
SMALL = ["model=revgnn", "model.num_layers=3", "model.hidden_channels=8", "model.dropout=0", "optimizer.lr=0.05"]
PARTS = ["training=autoscale", "training.num_parts=4", "training.parts_per_batch=1", "training.partition=contiguous"]
MANY = ["objective=multitask"]


def prepared(graph, overrides):
    family = family_of(parse([*SMALL, *overrides]))
    return family, family.prepare(graph)


def make(graph, overrides):
    family, ready = prepared(graph, overrides)
    torch.manual_seed(0)
    return Step(Fabric(accelerator="cpu", devices=1), family, ready, family.build(ready, CPU))


@pytest.fixture
def graph(graph_maker):
    return graph_maker("multilabel", "micro_f1", 3)


def by_hand(step, several):
    """An epoch, with one backward pass for each objective."""
    model, data = copy.deepcopy(step.network), step.graph.data
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=parse(SMALL).optimizer.weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = step.optimizer.param_groups[0]["lr"]
    model.train()
    for batch in SubgraphLoader(data, step.graph.ptr, 1, shuffle=True, log=False):
        rows = batch.data.train_mask[: batch.batch_size].nonzero().flatten()
        logits = model(batch.data.x, batch.data.adj_t, *batch[1:])
        found = losses("multilabel", logits[rows], batch.data.y[: batch.batch_size][rows])
        parameters = list(model.parameters())
        objectives = found.mean(0) if several else found.mean()[None]
        rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in objectives]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        update = UPGradWeighting()(jacobian @ jacobian.T) @ jacobian if several else jacobian[0]
        for parameter, part in zip(parameters, update.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
        optimizer.step()
    return model


@pytest.mark.parametrize("several", [False, True])
def test_an_epoch_is_the_loop_written_out(graph, several):
    step = make(graph, [*PARTS, *(MANY if several else [])])
    step.fill()
    torch.manual_seed(7)
    expected = by_hand(step, several)
    torch.manual_seed(7)
    step.train()
    for one, other in zip(step.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert ("conflict" in step.observe(errors=False)) is several


@pytest.mark.parametrize("options", [[], MANY])
def test_all_parts_in_one_batch_train_as_the_whole_graph_does(graph, options):
    whole, parts = make(graph, options), make(graph, [*PARTS, *options, "training.parts_per_batch=4"])
    parts.fill()
    for _ in range(3):
        assert parts.train() == pytest.approx(whole.train(), rel=1e-4)
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layerwise", ["false", "true"])
def test_evaluation_fills_the_histories_and_is_that_of_the_whole_graph(graph, layerwise):
    step, whole = make(graph, [*PARTS, f"training.layerwise={layerwise}", "training.errors_every=1"]), make(graph, [])
    assert step.network.never_pushed() == [12, 12, 12]
    order = step.graph.data.node_order
    torch.testing.assert_close(step.evaluate(), whole.evaluate()[order], rtol=1e-4, atol=1e-5)
    assert step.network.never_pushed() == [0, 0, 0]
    seen = step.observe(errors=True)
    assert list(seen) == ["drift", "age_1", "age_2", "age_3", "error_1", "error_2", "error_3"]
    assert max(seen[f"error_{layer}"] for layer in (1, 2, 3)) < 1e-5


def gradients_of_an_epoch(step):
    """The mean of its steps' gradients, as the parameters stay what they are."""
    step.model.train()
    number = 0
    for inputs, target, rows in step.batches:
        losses("multilabel", step.family.call(step.model, inputs)[rows], target[rows]).mean().backward()
        number += 1
    return [parameter.grad / number for parameter in step.network.parameters()]


@pytest.mark.parametrize(
    ("conv", "edges"),
    [
        (["model.conv=graphconv"], "cut"),
        (["model.conv=sage", "model.conv_kwargs.aggr=sum"], "cut"),
        (["model.conv=sage"], "complete"),
        (["model.conv=gat", "model.edge_features=true"], "complete"),
    ],
)
def test_corrected_histories_give_the_whole_graphs_gradient_after_a_refresh(graph_maker, conv, edges):
    graph = graph_maker("multilabel", "micro_f1", 3, edge_attr=True)
    whole = gradients_of_an_epoch(make(graph, conv))
    options = [*PARTS, f"training.compensate={edges}", "training.refresh_every=3"]
    corrected = make(graph, [*conv, *options])
    corrected.begin(1)
    for found, expected in zip(gradients_of_an_epoch(corrected), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_blocks_that_are_no_sums_ask_for_all_edges(graph):
    step = make(graph, [*PARTS, "training.compensate=cut"])
    step.fill()
    with pytest.raises(UsageError, match=r"training.compensate=complete is needed: block 1 of layer 0"):
        step.train()


def test_edge_features_reach_the_layers(graph_maker):
    graph = graph_maker("multilabel", "micro_f1", 3, edge_attr=True)
    options = ["model.conv=gat", "model.edge_features=true"]
    whole, parts = make(graph, options), make(graph, [*PARTS, *options, "training.parts_per_batch=4"])
    parts.fill()
    torch.testing.assert_close(parts.evaluate(), whole.evaluate()[parts.graph.data.node_order], rtol=1e-4, atol=1e-5)
    assert parts.train() == pytest.approx(whole.train(), rel=1e-4)


@pytest.mark.parametrize("layers", [4, 7])
def test_what_histories_will_take_is_what_they_take(graph, tmp_path, layers):
    options = [*PARTS, f"model.num_layers={layers}", "training.history_dtype=int8", f"training.history_path={tmp_path}"]
    family, ready = prepared(graph, options)
    assert isinstance(family, ReversiblePartsFamily)
    expected = family.expected_histories(ready, CPU)
    model = family.build(ready, CPU)
    assert isinstance(model, models.RevGNN)
    assert expected == histories_of(model, family.settings.training, CPU)
    assert (expected["layers"], expected["rows"], expected["place"]) == (layers, 12, str(tmp_path))
    assert family.expect(ready, CPU) == f"histories: {histories_text(expected)}"


def test_steps_are_measured_beside_the_whole_graph_with_everything_kept(graph):
    step = make(graph, PARTS)
    step.fill()
    assert step.modes == ["histories", "whole graph, everything kept"]
    step.switch(second=True)
    assert step.network.disable
    assert len(list(step.batches)) == 1
    most, about = step.family.plain_bytes(step.network, step.graph, step.own, 1000)
    assert most == 1000 * 12 // 5 * 3  # a part with its halo has 5 of 12 nodes, and there are three layers
    assert about == min(most, 1000 * 12 // 5 + 4 * 5 * 12 * 8 * 3)
    step.switch(second=False)
    assert not step.network.disable
    assert len(list(step.batches)) == 4


GRAPH = [
    *("dataset=sbm", "dataset.options.num_nodes=60", "dataset.options.num_labels=3"),
    *("dataset.options.average_degree=4", "threads=1"),
]


def test_a_run_with_corrected_histories_goes_on_as_the_unbroken_one_where_they_are_refreshed(tmp_path):
    words = [*GRAPH, *SMALL, *PARTS, "training.compensate=complete", "training.refresh_every=2", "patience=null"]
    words += ["model.dropout=0.2", "measure.enabled=false"]
    whole = train([*words, "epochs=4", f"run_dir={tmp_path / 'whole'}"])
    train([*words, "epochs=2", f"run_dir={tmp_path / 'run'}"])
    more = train([f"resume={tmp_path / 'run'}", "epochs=4"])
    assert more["test_accuracy"] == whole["test_accuracy"]
    assert more["histories"]["ages"] == whole["histories"]["ages"]
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "run")]
    column = rows[0][0].split(",").index("loss")
    losses_of = [[float(row.split(",")[column]) for row in run[1:]] for run in rows]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-6)
    assert len(losses_of[0]) == 4


def test_a_run_goes_on_as_the_unbroken_one_and_shows_its_histories(tmp_path):
    words = [*GRAPH, *SMALL, *PARTS]
    words += [*MANY, "model.dropout=0.2", "patience=null", "measure.repeats=1"]
    whole = train([*words, "epochs=4", f"run_dir={tmp_path / 'whole'}"])
    train([*words, "epochs=2", f"run_dir={tmp_path / 'run'}"])
    more = train([f"resume={tmp_path / 'run'}", "epochs=4"])
    assert more["test_accuracy"] == whole["test_accuracy"]
    assert more["histories"]["ages"] == whole["histories"]["ages"]
    text = (tmp_path / "run" / "report.html").read_text()
    for part in (histories_text(more["histories"]), "largest drift", "pairs in conflict", "everything kept"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.compensate=cut", *MANY], "training.compensate=cut takes one backward pass of one loss"),
        (["model.conv=gcn"], "model.conv=gcn divides by the degrees of neighbours"),
        (["devices=2"], "devices=2: several processes train on parts, and need training.layerwise=true"),
        (["training.edge_dropout=0.1"], "model=revgnn takes no notice of the edges' weights"),
        (["training.lipschitz=0.1"], "needs model=gin"),
        (["training.parts_per_batch=5"], "must be at most training.num_parts=4"),
    ],
)
def test_what_does_not_go_with_histories(options, message):
    with pytest.raises(UsageError, match=message):
        parse([*SMALL, *PARTS, *options])


def test_gcn_without_its_own_degrees_goes(graph):
    step = make(graph, [*PARTS, "model.conv=gcn", "model.conv_kwargs.normalize=false"])
    step.fill()
    assert step.train() > 0
