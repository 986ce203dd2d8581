"""RevGNN part by part: against loops written out, the whole graph, and what tables take."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from lightning_fabric import Fabric

from recollect.aggregation import UPGradWeighting
from recollect.train import TrainingError, UsageError, train
from recollect.train._config import parse
from recollect.train._metrics import losses
from recollect.train._step import Step
from recollect.train._text import tables_text
from recollect.train.families import WholeGraphFamily, family_of

SMALL = ["model=revgnn", "model.num_layers=3", "model.hidden_channels=8", "model.dropout=0", "optimizer.lr=0.05"]
WHOLE = ["training=wholegraph", "training.num_parts=3", "training.partition=contiguous"]
MANY = ["objective=multitask"]


def make(graph, overrides):
    family = family_of(parse([*SMALL, *overrides]))
    ready = family.prepare(graph)
    torch.manual_seed(0)
    return Step(Fabric(accelerator="cpu", devices=1), family, ready, family.build(ready, torch.device("cpu")))


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
    found = step.family.summarize(step.network, [], torch.device("cpu"))["tables"]
    names = [file.stem for file in tmp_path.glob("[xg][0-9]*.table")]  # of groups of 4 channels
    numbers = sum(4 * (3 if name.endswith("x3.0") else 1) for name in names)
    assert len(names) == (6 if several else 4)
    spare = 4 * 4 * int(step.graph.ptr.diff().max())
    assert found == {"rows": 12, "numbers": numbers, "bytes": 4 * (12 * numbers + spare), "place": str(tmp_path)}
    assert step.family.expect(step.graph, torch.device("cpu")) == f"tables: {tables_text(found)}"


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
    ],
)
def test_what_does_not_go_part_by_part(options, message):
    with pytest.raises(UsageError, match=message):
        parse([*SMALL, *WHOLE, *options])


def test_learnt_features_are_refused(graph):
    family = family_of(parse([*SMALL, *WHOLE]))
    with pytest.raises(UsageError, match=r"dataset.features=embedding needs .* training=full"):
        family.prepare(replace(graph, learnt_features=True))
