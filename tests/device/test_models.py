"""Every model on another device: the whole graph, and mini-batches with histories wherever those are."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from device.compare import assert_same, saved_and_loaded, there, waits
from recollect import models
from recollect._devices import FORMS
from recollect.autoscale import (
    EvalSubgraphLoader,
    SubgraphLoader,
    add_self_loops,
    normalize,
    permute,
    to_adj_t,
    with_weights,
)
from recollect.frames import settle
from recollect.models import APPNP, GAT, GCN, GCN2, GIN, PNA, PNA_JK, RevGNN

Data = pytest.importorskip("torch_geometric.data").Data

NODES, IN, OUT = 24, 5, 3
PTR = torch.tensor([0, 7, 15, NODES])
AGGREGATION = {"aggregators": ["max", "mean", "min", "std", "sum", "var"], "scalers": ["attenuation"]}

# For each public model: how it is made, and how its graph is prepared.
SCALABLE = {
    "APPNP": (APPNP, {}, normalize),
    "GAT": (GAT, {"hidden_heads": 2, "out_heads": 2}, add_self_loops),
    "GCN": (GCN, {"batch_norm": True, "residual": True, "linear": True}, normalize),
    "GCN2": (GCN2, {}, normalize),
    "GIN": (GIN, {"noise": 0.1}, None),
    "PNA": (PNA, AGGREGATION, None),
    "PNA_JK": (PNA_JK, AGGREGATION, None),
}
each = pytest.mark.parametrize("name", SCALABLE)


def make_graph(prepare=None):
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(NODES - 1, (2, 4 * NODES), generator=generator).unique(dim=1)
    x = torch.randn(NODES, IN, dtype=torch.float64, generator=generator)
    data = Data(x=x, y=torch.arange(NODES) % OUT, edge_index=edge_index)
    data.edge_weight = torch.ones(edge_index.size(1), dtype=torch.float64)
    data = to_adj_t(permute(data, torch.randperm(NODES, generator=generator), log=False))
    if prepare is not None:
        data.adj_t = prepare(data.adj_t)
    return data


def make(name, **options):
    kind, own, prepare = SCALABLE[name]
    data = make_graph(prepare)
    options = {"num_nodes": NODES, "in_channels": IN, "hidden_channels": 6, "out_channels": OUT, "num_layers": 3} | (
        {"history_dtype": torch.float64} | own | options
    )
    if "aggregators" in options:
        options["deg"] = data.adj_t.crow_indices().diff()
    torch.manual_seed(0)
    return kind(**options).double(), data


def step(model, out, y):
    loss = F.cross_entropy(out, y)
    return [out, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


def test_every_public_model_is_tried():
    beside = {"PygasReport", "load_pygas_state_dict"}
    assert set(SCALABLE) | {"RevGNN"} == set(models.__all__) - beside


@each
def test_the_whole_graph(other, name):
    model, data = make(name)
    model.eval() if name == "GIN" else model.train()  # its noise in training is of the device
    expected = step(model, model(data.x, data.adj_t), data.y)
    on_device, graph = copy.deepcopy(model).to(other), copy.copy(data).to(other)
    assert_same(step(on_device, on_device(graph.x, graph.adj_t), graph.y), expected)
    again = saved_and_loaded(on_device, make(name)[0])
    again.train(model.training)
    on_device.eval(), again.eval()
    assert_same([again(graph.x, graph.adj_t)], [on_device(graph.x, graph.adj_t)])


@each
@pytest.mark.parametrize("place", ["host", "device", "file"])
def test_mini_batches_with_histories(other, name, place, tmp_path):
    options = {"host": {}, "device": {"device": other}, "file": {"history_path": tmp_path}}[place]
    model, data = make(name)
    on_device = make(name, **options)[0].to(other)
    if name == "GIN":
        model.eval(), on_device.eval()
    for _ in range(2):  # in the second round there are histories
        for batch in SubgraphLoader(data, PTR):
            expected = step(model, model(batch.data.x, batch.data.adj_t, *batch[1:]), batch.data.y[: batch.batch_size])
            moved = batch.to(other)
            out = on_device(moved.data.x, moved.data.adj_t, *moved[1:])
            assert_same(step(on_device, out, moved.data.y[: moved.batch_size]), expected)
    for one, two in zip(on_device.histories, model.histories, strict=True):
        rows = one.pull().cpu()
        torch.testing.assert_close(rows, two.pull(), rtol=1e-9, atol=1e-9)
    model.eval(), on_device.eval()
    found = on_device(loader=EvalSubgraphLoader(data, PTR))
    expected = model(loader=EvalSubgraphLoader(data, PTR))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)


@each
def test_histories_on_the_device_do_not_wait(other, name):
    model, data = make(name, device=other)
    model.to(other)
    batches = [batch.to(other) for batch in SubgraphLoader(data, PTR)]

    def epoch():
        for batch in batches:
            F.cross_entropy(
                model(batch.data.x, batch.data.adj_t, *batch[1:]), batch.data.y[: batch.batch_size]
            ).backward()

    assert waits(epoch) == []


@each
def test_histories_on_the_host_wait_for_their_copies_alone(other, name):
    model, data = make(name)
    model.to(other)
    batches = [batch.to(other) for batch in SubgraphLoader(data, PTR)]

    def epoch():
        for batch in batches:
            F.cross_entropy(
                model(batch.data.x, batch.data.adj_t, *batch[1:]), batch.data.y[: batch.batch_size]
            ).backward()

    found = waits(epoch, times=1)
    assert all(where.startswith("copy_ at") for where in found)
    assert len(found) == len(batches) * len(model.histories)


CONVS = ["gat", "gcn", "gen", "gin", "graphconv", "sage"]
each_conv = pytest.mark.parametrize("conv", CONVS)


def rev(conv, **options):
    torch.manual_seed(0)
    return RevGNN(IN, 16, OUT, 4, conv=conv, **options).double()


def edges():
    return torch.randint(NODES - 1, (2, 80), generator=torch.Generator().manual_seed(1))


def features():
    return torch.randn(NODES, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def gradients_of(model, x, edge_index):
    out = model(x, edge_index)
    loss = model.loss(out, torch.arange(NODES, device=x.device) % OUT)
    return [out, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


@pytest.fixture(params=["others", "cuda"])
def forms(other, request, monkeypatch):
    """The forms that a device gets of which nothing is known, and those that CUDA gets."""
    if request.param == "cuda":
        monkeypatch.setitem(FORMS, other, FORMS["cuda"])
    return request.param


@each_conv
def test_revgnn(other, conv, forms):
    model, x, edge_index = rev(conv), features(), edges()
    expected = gradients_of(model, x, edge_index)
    on_device = copy.deepcopy(model).to(other)
    assert_same(gradients_of(on_device, there(x), there(edge_index)), expected)
    again = saved_and_loaded(on_device, rev(conv))
    assert_same(gradients_of(again, there(x), there(edge_index)), expected)
    settle()


def on_parts(other, scale=1.0, conv="sage", **options):
    """A training step of a RevGNN with histories on a device, on one mini-batch."""
    data = make_graph()
    data.adj_t = with_weights(data.adj_t, torch.full((data.adj_t.values().numel(),), scale, dtype=torch.float64))
    batch = next(iter(SubgraphLoader(data, PTR)))
    model = rev(conv, num_nodes=NODES, history_dtype=torch.float64, **options).to(other)
    optimizer = torch.optim.Adam(model.parameters())
    x, adj_t, y = (there(each) for each in (batch.data.x, batch.data.adj_t, batch.data.y[: batch.batch_size]))

    def step():
        optimizer.zero_grad()
        model.loss(model(x, adj_t, *batch[1:]), y).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(("conv", "options"), [("sage", {}), ("gat", {}), ("gat", {"conv_kwargs": {"dropout": 0.3}})])
def test_a_step_of_revgnn_on_a_mini_batch_waits_for_copies_alone(other, forms, conv, options):
    step = on_parts(other, conv=conv, **options)
    assert [line for line in waits(step, times=3) if not line.startswith("copy_")] == []
    settle()


def test_weights_that_nobody_takes_are_refused_when_the_verdict_is_there(other):
    step = on_parts(other, scale=2.0)

    def steps():
        step()
        settle()

    with pytest.raises(ValueError, match="weights other than 1"):
        steps()


@each_conv
@pytest.mark.parametrize("shared", [True, False], ids=["one mask", "own masks"])
def test_revgnn_replays_dropout_of_the_device(other, conv, shared, forms):
    model, x, edge_index = rev(conv, dropout=0.3, shared_dropout=shared).to(other), there(features()), there(edges())
    found = []
    for model.disable in (True, False):
        torch.manual_seed(5)
        found.append(gradients_of(model, x, edge_index))
    assert_same(found[1], found[0])
    settle()


@each_conv
def test_a_step_of_revgnn_does_not_wait(other, conv, forms):
    model, x, edge_index = rev(conv, dropout=0.3).to(other), there(features()), there(edges())
    y = torch.arange(NODES, device=other) % OUT
    optimizer = torch.optim.Adam(model.parameters())

    def training_step():
        optimizer.zero_grad()
        model.loss(model(x, edge_index), y).backward()
        optimizer.step()

    assert waits(training_step, times=3) == []
    assert model.last_drift < 1e-10


def test_a_step_of_revgnn_under_autocast(other):
    model, x, edge_index = rev("sage", dropout=0.3).float().to(other), there(features()).float(), there(edges())
    found = []
    for model.disable in (True, False):
        torch.manual_seed(5)
        with torch.autocast(other, dtype=torch.bfloat16):
            out = model(x, edge_index)
        loss = model.loss(out.float(), torch.arange(NODES, device=x.device) % OUT)
        found.append([out, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    assert isinstance(model, nn.Module)
    assert_same(found[1], found[0], 5e-2)
    settle()


def test_losses_and_predictions_of_labels(other):
    torch.manual_seed(0)
    model, y = RevGNN(IN, 16, OUT, 2, task="multilabel").double(), torch.randint(2, (NODES, OUT)).double()
    out = model(features(), edges())
    on_device = copy.deepcopy(model).to(other)
    found = on_device(there(features()), there(edges()))
    assert_same([on_device.loss(found, there(y)), on_device.predict(found)], [model.loss(out, y), model.predict(out)])


def test_the_smoothness_of_gin(other):
    model, data = make("GIN")
    on_device, graph = copy.deepcopy(model).to(other), copy.copy(data).to(other)
    torch.manual_seed(5)
    on_device(graph.x, graph.adj_t)
    loss = on_device.lipschitz_loss()
    torch.manual_seed(5)
    on_device(graph.x, graph.adj_t)
    assert_same([on_device.lipschitz_loss()], [loss])
    gradients = torch.autograd.grad(loss, list(on_device.parameters()), allow_unused=True)
    assert any(grad is not None and bool(grad.any()) for grad in gradients)
    on_device.reset_parameters()
    assert {parameter.device.type for parameter in on_device.parameters()} == {other}
