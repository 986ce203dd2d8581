"""RevGNN part by part: against loops written out, the whole graph, and what tables take."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from recollect.aggregation import UPGradWeighting
from recollect.autoscale import ScalableGNN, propagate, with_weights
from recollect.data import load
from recollect.models import GCN, RevGNN
from recollect.train import TrainingError, UsageError, fit, train
from recollect.train._config import parse
from recollect.train._metrics import losses
from recollect.train._step import Step
from recollect.train._text import tables_text
from recollect.train.families import WholeGraphFamily, family_of, own_family

SMALL = ["model=revgnn", "model.num_layers=3", "model.hidden_channels=8", "model.dropout=0", "optimizer.lr=0.05"]
WHOLE = ["training=wholegraph", "training.num_parts=3", "training.partition=contiguous"]
MANY = ["objective=multitask"]
CPU = torch.device("cpu")


def make(graph, overrides):
    return step_of(family_of(parse([*SMALL, *overrides])), graph)


def step_of(family, graph):
    ready = family.prepare(graph)
    torch.manual_seed(0)
    return Step(Fabric(accelerator="cpu", devices=1), family, ready, family.build(ready, CPU))


@pytest.fixture
def graph(graph_maker):
    return graph_maker("multilabel", "micro_f1", 3)


def hidden(graph):
    """Some labels are not known, more of them on some nodes than on others."""
    graph = copy.deepcopy(graph)
    graph.data.y[0, :2] = math.nan
    graph.data.y[6, 1] = math.nan
    return graph


def gradient_of(step):
    return torch.cat([parameter.grad.flatten() for parameter in step.network.parameters()])


def by_hand(step, several):
    """The gradient, with one backward pass over the whole graph for each objective."""
    network, data = step.network, step.graph.data
    network.train()
    mask = data.train_mask
    found = losses("multilabel", network(data.x, data.edge_index)[mask], data.y[mask])
    parameters = list(network.parameters())
    objectives = found.mean(0) if several else found.mean()[None]
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in objectives]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return found.detach().mean(), UPGradWeighting()(jacobian @ jacobian.T) @ jacobian if several else jacobian[0]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("several", [False, True])
def test_a_step_is_the_loop_written_out(graph, known, several):
    step = make(graph if known else hidden(graph), [*WHOLE, "optimizer.lr=0", *(MANY if several else [])])
    loss, expected = by_hand(step, several)
    assert step.train() == pytest.approx(float(loss), rel=1e-4)
    torch.testing.assert_close(gradient_of(step), expected, rtol=1e-2, atol=1e-4)
    assert ("conflict" in step.observe(errors=False)) is several


def test_several_objectives_train_as_on_the_whole_graph(graph, tmp_path):
    whole, parts = make(graph, MANY), make(graph, [*WHOLE, *MANY, f"training.store={tmp_path}"])
    for _ in range(3):
        assert parts.train() == pytest.approx(whole.train(), rel=1e-3)
        ours, theirs = parts.observe(errors=False), whole.observe(errors=False)
        assert ours["conflict"] == theirs["conflict"]
        assert ours["cosine_3"] == pytest.approx(theirs["cosine_3"], abs=1e-3)
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=3e-3)
    parts.switch(second=True)
    assert parts.train() == pytest.approx(whole.train(), rel=1e-2)


@pytest.mark.parametrize("several", [False, True])
def test_what_tables_will_take_is_what_they_take(graph, tmp_path, several):
    step = make(graph, [*WHOLE, *(MANY if several else []), f"training.store={tmp_path}"])
    assert isinstance(step.family, WholeGraphFamily)
    step.train()
    found = step.family.summarize(step.network, [], CPU)["tables"]
    names = [file.stem for file in tmp_path.glob("[xg][0-9]*.table")]  # of groups of 4 channels
    numbers = sum(4 * (3 if name.endswith("x3.0") else 1) for name in names)
    assert len(names) == (6 if several else 4)
    spare = 4 * 4 * int(step.graph.ptr.diff().max())
    assert found == {"rows": 12, "numbers": numbers, "bytes": 4 * (12 * numbers + spare), "place": str(tmp_path)}
    assert step.family.expect(step.graph, CPU) == f"tables: {tables_text(found)}"


def test_a_run_goes_on_as_the_unbroken_one_and_shows_its_tables(tmp_path):
    graph = {"num_nodes": 60, "num_labels": 3, "average_degree": 4}
    words = ["dataset=sbm", *(f"dataset.options.{key}={value}" for key, value in graph.items()), *SMALL, *WHOLE]
    words += [*MANY, "model.dropout=0.2", "patience=null", "measure.repeats=1", "threads=1"]
    whole = train([*words, "epochs=4", f"run_dir={tmp_path / 'whole'}"])
    train([*words, "epochs=2", f"training.store={tmp_path / 'store'}", f"run_dir={tmp_path / 'run'}"])
    more = train([f"resume={tmp_path / 'run'}", "epochs=4"])
    assert more["test_accuracy"] == whole["test_accuracy"]
    assert more["largest_drift"] == 0.0
    assert more["tables"]["place"] == str(tmp_path / "store")
    text = (tmp_path / "run" / "report.html").read_text()
    for part in (tables_text(more["tables"]), "pairs in conflict", "everything kept"):
        assert part in text


def test_what_leaves_the_range_of_the_exact_stream_stops_the_run_with_advice(tmp_path):
    words = ["dataset=sbm", "dataset.options.num_nodes=200", "dataset.options.num_labels=3", *SMALL, *WHOLE, *MANY]
    with pytest.raises(TrainingError, match=r"the stream holds .* try a lower optimizer.lr"):
        train([*words, "optimizer.lr=1e5", "epochs=40", "measure.enabled=false", f"run_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["objective=iwrm"], "needs objective=mean or multitask"),
        (["training.edge_dropout=0.1"], "takes no notice of the edges' weights"),
        (["model.disable=true"], r"needs model\.disable=false"),
        (["model=pna"], r"needs model\.options\.batch_norm=false"),
        (["model=gin", "model.options.noise=0.1"], r"needs model\.options\.noise=0"),
    ],
)
def test_what_does_not_go_part_by_part(options, message):
    with pytest.raises(UsageError, match=message):
        parse([*SMALL, *WHOLE, *options])


def test_learnt_features_are_refused(graph):
    family = family_of(parse([*SMALL, *WHOLE]))
    with pytest.raises(UsageError, match=r"dataset.features=embedding needs .* training=full"):
        family.prepare(replace(graph, learnt_features=True))


def test_masks_of_dropout_are_among_what_tables_take(graph):
    step = make(graph, [*WHOLE, "model.dropout=0.3"])
    found = step.family.summarize(step.network, [], CPU)["tables"]
    assert found["bytes"] == 4 * 12 * 16 + 2 * 12  # a bit for each of 8 channels, twice
    assert step.family.expect(step.graph, CPU) == f"tables: {tables_text(found)}"


class OfEdges(ScalableGNN):
    """Sums over edges with weights that are made of what the edges have."""

    inputs = ("edge_attr",)

    def __init__(self):
        super().__init__(12, hidden_channels=8, num_layers=2)
        self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 3)])
        self.gate = nn.Linear(3, 1)

    def forward_layer(self, layer, x, adj_t, state):
        return propagate(with_weights(adj_t, self.gate(state["edge_attr"]).squeeze(1)), self.layers[layer](x))


GIVEN = {
    "RevGNN": lambda: RevGNN(5, 8, 3, num_layers=3),
    "RevGNN of a graph": lambda: RevGNN(5, 8, 3, num_layers=3, num_nodes=12),
    "RevGNN with weights": lambda: RevGNN(5, 8, 3, 3, conv="graphconv", num_nodes=12, inputs=("edge_weight",)),
    "GCN": lambda: GCN(12, 5, 8, 3, num_layers=3),
    "of edges": OfEdges,
}
NAMED = ["gcn", "gat", "gcn2", "appnp", "pna", "pna_jk", "gin"]


def by_the_whole_graph(step):
    """The gradient of the mean loss, in the step's other mode, which takes the whole graph at once."""
    step.switch(second=True)
    loss = step.train()
    gradient = gradient_of(step)
    step.switch(second=False)
    return loss, gradient


@pytest.mark.parametrize("kind", [*GIVEN, *NAMED])
def test_a_step_of_any_network_with_layers_is_that_on_the_whole_graph(graph_maker, kind):
    graph = graph_maker("multiclass", "accuracy", 3, edge_attr=True)
    if kind == "RevGNN with weights":
        graph.data.edge_weight = torch.rand(graph.data.num_edges)
    if kind in GIVEN:
        family = own_family(parse(["model=import", "optimizer=sgd", "optimizer.lr=0", *WHOLE]), GIVEN[kind]())
    else:
        words = [f"model={kind}", "model.num_layers=3", "model.hidden_channels=8", "model.dropout=0"]
        words += ["model.options.batch_norm=false"] if kind.startswith("pna") else []
        family = family_of(parse([*words, "optimizer=sgd", "optimizer.lr=0", *WHOLE]))
    step = step_of(family, graph)
    step.family.rehearse(step.evaluate)
    loss, expected = by_the_whole_graph(step)
    assert step.train() == pytest.approx(loss, rel=1e-3)
    torch.testing.assert_close(gradient_of(step), expected, rtol=1e-2, atol=1e-3)
    logits = step.family.call(step.network, step.family.inputs(step.network, step.graph)).detach()
    torch.testing.assert_close(step.evaluate(), logits, rtol=1e-2, atol=1e-3)
    most, about = step.plain_bytes(1000)
    assert most == about > 1000 + 4 * 12 * 8 * 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(5, 3), "needs a model whose layers can be computed one by one.*this is a Linear"),
        (lambda: GCN(12, 5, 8, 3, 2, batch_norm=True), "training=wholegraph: .* BatchNorm1d"),
        (lambda: RevGNN(5, 8, 3, 2, norm="batch"), "training=wholegraph: .* BatchNorm1d"),
        (lambda: GCN(12, 5, 8, 4, 2), r"returned logits \[12, 4\], and the graph has 12 nodes and 3 classes"),
    ],
)
def test_a_network_that_does_not_go_part_by_part_is_refused_before_the_first_step(graph_maker, model, message):
    family = own_family(parse(["model=import", *WHOLE]), model())

    def begin():
        step = step_of(family, graph_maker("multiclass", "accuracy", 3))
        family.rehearse(step.evaluate)

    with pytest.raises(UsageError, match=message):
        begin()


def test_a_model_that_is_given_is_trained_part_by_part(tmp_path):
    words = ["threads=1", "measure.repeats=1"]
    training = {"name": "wholegraph", "num_parts": 3, "store": str(tmp_path / "tables")}
    result = fit(
        RevGNN(34, 8, 4, num_layers=4),
        load("karate"),
        epochs=2,
        training=training,
        out=tmp_path / "run",
        overrides=words,
    )
    assert result.summary["modes"] == ["part by part", "everything kept"]
    assert result.summary["largest_drift"] == 0.0
    assert result.summary["tables"]["place"] == str(tmp_path / "tables")
    with pytest.raises(UsageError, match="call= says how a model is called with the whole graph"):
        fit(RevGNN(34, 8, 4, num_layers=4), load("karate"), training="wholegraph", call=lambda model, data: data.x)
