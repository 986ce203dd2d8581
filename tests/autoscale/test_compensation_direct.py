"""Layers whose mini-batch gradients are sent back with those of nodes outside, without a graph of their input."""

import copy

import pytest
import torch
from compensation_zoo import (
    DOUBLE,
    HIDDEN,
    IN,
    NODES,
    OUT,
    PTR,
    SUMS,
    Layers,
    epoch,
    error,
    fill,
    gradients_of,
    loss_of,
    make,
    make_data,
    run,
    whole,
)
from torch import nn
from torch.nn import functional as F

from recollect._devices import OTHERS
from recollect.autoscale import SubgraphLoader, propagate
from recollect.autoscale._separable import Form
from recollect.autoscale.histories._gradients import GradientHistories
from recollect.models import GCN
from recollect.models._layers import GCNLayer


def batches(data):
    return list(SubgraphLoader(data, PTR, 2, log=False, outward=True))


def steps(model, data, seed=0, rounds=2):
    """Gradients of some epochs' mini-batches."""
    torch.manual_seed(seed)
    found = []
    for batch in [*batches(data)] * rounds:
        loss_of(run(model, batch), batch.data.node_share[: batch.batch_size]).backward()
        found.append(gradients_of(model))
    return torch.stack(found)


def never(model):
    """The same, whose layers all have a graph of their input."""
    twin = copy.deepcopy(model)
    twin._steady = _Never()
    return twin


class _Never(dict):
    def __contains__(self, key):
        return True

    def __getitem__(self, key):
        return False


def is_steady(model, layer):
    return [value for (number, _), value in model._steady.items() if number == layer]


@pytest.mark.parametrize("outside", [True, False], ids=["histories", "none yet"])
@pytest.mark.parametrize("name", SUMS)
def test_gradients_are_the_same(name, outside):
    data, model = make_data(), make(name, 4, compensate=True)
    if outside:
        fill(model, *whole(model, data)[1:])
    other = never(model)
    torch.testing.assert_close(steps(model, data), steps(other, data), rtol=1e-10, atol=1e-12)
    sums = [layer for layer, way in model._ways.items() if way.form == Form.SUM]
    assert [is_steady(model, layer) for layer in range(1, 4)] == [[True] if k in sums else [] for k in range(1, 4)]


def test_exact_histories_give_the_whole_graphs_gradient_when_layers_are_known():
    data, model = make_data(), make("gcn", 4, compensate=True)
    steps(model, data)
    model.gradients.believe()
    expected, *tables = whole(model, data)
    fill(model, *tables)
    model.gradients.believe()
    assert all(model._steady.values())
    assert error(epoch(model, data, True), expected) < 1e-12


def test_only_batch_rows_are_sent_back():
    data, model = make_data(), make("gcn", 3, compensate=True)
    sizes = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            sizes.append(grad.size(0))
            return grad

    model.activation = lambda x: Seen.apply(x).tanh()
    (batch, *_) = batches(data)
    for _ in range(2):
        sizes.clear()
        loss_of(run(model, batch), batch.data.node_share[: batch.batch_size]).backward()
    assert sizes == [batch.batch_size] * 2
    sizes.clear()
    other = never(model)
    loss_of(run(other, batch), batch.data.node_share[: batch.batch_size]).backward()
    assert batch.n_id.numel() in sizes


@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"batch_norm": True}], ids=["dropout", "batch norm"])
def test_what_training_does_is_not_left_out(options):
    data, model = make_data(), make("gcn", 3, compensate=True, **options)
    other = never(model)
    torch.testing.assert_close(steps(model, data), steps(other, data), rtol=1e-10, atol=1e-12)
    assert is_steady(model, 1) == [False]
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    model.eval(), other.eval()
    torch.testing.assert_close(steps(model, data), steps(other, data), rtol=1e-10, atol=1e-12)
    assert is_steady(model, 1) == [False, True]


class Doubling(Layers):
    """In training mode it does something else, for which nothing is drawn."""

    def convolve(self, layer, x, adj_t, state):
        return propagate(adj_t, self.layers[layer](2 * x if self.training else x))


class Late(Layers):
    """Begins to drop out when it is told to."""

    rate = 0.0

    def convolve(self, layer, x, adj_t, state):
        return propagate(adj_t, self.layers[layer](F.dropout(x, self.rate, self.training)))


def test_a_layer_that_is_another_in_training_keeps_its_graph():
    data = make_data()
    torch.manual_seed(0)
    model = Doubling(nn.Linear, 3, compensate=True, **DOUBLE).double()
    other = never(model)
    torch.testing.assert_close(steps(model, data), steps(other, data), rtol=1e-10, atol=1e-12)
    assert not any(model._steady.values())


def test_dropout_that_begins_later_is_noticed():
    data = make_data()
    torch.manual_seed(0)
    model = Late(nn.Linear, 3, compensate=True, **DOUBLE).double()
    other = never(model)
    torch.testing.assert_close(steps(model, data), steps(other, data), rtol=1e-10, atol=1e-12)
    assert all(model._steady.values())
    model.rate = other.rate = 0.5
    found, expected = steps(model, data, seed=1), steps(other, data, seed=1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert not any(model._steady.values())


class Hoarder(Layers):
    """Leaves the rows that it got, once it is told to."""

    hoards = False

    def convolve(self, layer, x, adj_t, state):
        if self.hoards:
            state["more"] = x[: adj_t.size(0)]
        return propagate(adj_t, self.layers[layer](x))


def test_rows_that_are_left_in_the_state_are_refused_as_ever():
    data = make_data()
    torch.manual_seed(0)
    model = Hoarder(nn.Linear, 3, compensate=True, **DOUBLE).double()
    steps(model, data)
    model.hoards = True
    with pytest.raises(NotImplementedError, match="may leave there what they return, and nothing else"):
        steps(model, data)


def test_layers_without_parameters_to_train_pass_gradients_on():
    data, model = make_data(), make("gcn", 4, compensate=True)
    for parameter in model.convs[2].parameters():
        parameter.requires_grad_(False)
    other = never(model)
    torch.testing.assert_close(steps(model, data), steps(other, data), rtol=1e-10, atol=1e-12)
    assert other.gradients.table(1).pull().any()


def test_histories_have_the_gradients_of_the_whole_graph():
    data, model = make_data(), make("appnp", 4, compensate=True)
    _, rows, gradients = whole(model, data)
    steps(model, data)
    fill(model, rows, gradients)
    model.gradients.believe()
    (batch, *_) = batches(data)
    loss_of(run(model, batch), batch.data.node_share[: batch.batch_size]).backward()
    own = batch.n_id[: batch.batch_size]
    assert own.numel() < NODES
    for layer in range(1, 4):
        torch.testing.assert_close(
            model.gradients.table(layer).pull(own), gradients[layer][own], rtol=1e-11, atol=1e-12
        )


class Counted(GCN):
    """Notes how many targets each run of a layer has."""

    def run_layer(self, layer, x, adj_t, state):
        self.targets.append(adj_t.size(0))
        return super().run_layer(layer, x, adj_t, state)


def counted(**options):
    torch.manual_seed(0)
    model = Counted(NODES, IN, HIDDEN, OUT, 4, compensate=True, **DOUBLE, **options).double()
    model.targets = []
    return model


@pytest.mark.parametrize("activation", [torch.relu, torch.tanh], ids=["relu", "tanh"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_what_a_network_says_of_its_layers_takes_the_place_of_running_them(activation, training, dropout):
    data, model = make_data(), counted(dropout=dropout, activation=activation).train(training)
    found = steps(model, data)
    assert [way.written for way in model._ways.values()] == [True] * 3
    other = counted(dropout=dropout, activation=activation).train(training)
    other.send_back = lambda *arguments: None
    assert torch.equal(found, steps(other, data))
    for each, runs in ((model, 4), (other, 7)):  # each layer once, and all but the first again
        each.targets.clear()
        steps(each, data, rounds=1)
        assert len(each.targets) == runs * len(batches(data))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_rows_that_are_pulled_in_another_type_than_the_network_has(dropout):
    data, found = make_data(), []
    for says in (True, False):
        torch.manual_seed(0)
        model = GCN(NODES, IN, HIDDEN, OUT, 3, compensate=True, dropout=dropout)
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
        if not says:
            model.send_back = lambda *arguments: None
        found.append(steps(model, data))
        assert model.gradients.table(1).out_dtype == torch.float32
        assert model._ways[1].written == says
    assert torch.equal(*found)


def test_what_a_network_says_wrongly_of_its_layers_is_not_used():
    data, model, other = make_data(), counted(), counted()
    model.send_back = lambda layer, x, given: 2 * GCN.send_back(model, layer, x, given)
    assert torch.equal(steps(model, data), steps(other, data))
    assert not any(way.written for way in model._ways.values())


def hung(model):
    model.convs[1].register_forward_hook(lambda conv, args, out: 3 * out)


def set_anew(model):
    usual = model.forward_layer
    model.forward_layer = lambda layer, *rest: 3 * usual(layer, *rest)


def of_another_kind(model):
    conv = model.convs[1]
    conv.forward = lambda x, adj_t: 3 * GCNLayer.forward(conv, x, adj_t)


@pytest.mark.parametrize("change", [hung, set_anew, of_another_kind])
def test_layers_that_became_others_are_run(change):
    data, model, other = make_data(), counted(), counted()
    other.send_back = lambda *arguments: None
    before = steps(model, data)
    assert torch.equal(before, steps(other, data))
    change(model), change(other)
    after = steps(model, data)
    assert torch.equal(after, steps(other, data))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("options", [{"residual": True}, {"batch_norm": True}], ids=str)
def test_layers_with_more_than_a_convolution_are_run(options):
    model, rows = counted(**options).eval(), torch.randn(3, HIDDEN, dtype=torch.float64)
    assert model.send_back(1, rows, rows) is None
    assert counted().send_back(1, rows, rows) is not None


def test_rows_are_read_where_they_lie_or_pulled_for_the_same_gradient(monkeypatch):
    data, pulled = make_data(), []
    model, other = counted(dropout=0.4), counted(dropout=0.4)
    found = steps(model, data)
    pull = GradientHistories.pull
    monkeypatch.setattr(GradientHistories, "pull", lambda *given: pulled.append(0) or pull(*given))
    steps(model, data, rounds=1)
    assert not pulled
    monkeypatch.setattr(GradientHistories, "in_memory", lambda *given: None)
    assert torch.equal(steps(other, data), found)
    assert pulled


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_another_type_than_is_pulled_are_pulled(kept):
    model = GCN(NODES, IN, HIDDEN, OUT, 3, compensate=True, history_dtype=kept)
    gradients = model.gradients
    assert gradients.in_memory(1) is None  # nothing was pushed
    gradients.table(1).push(torch.ones(NODES, HIDDEN))
    table = gradients.in_memory(1)
    if kept == torch.bfloat16:
        assert table is None
    else:
        assert table.data_ptr() == gradients.table(1).emb.data_ptr()
    assert gradients.in_memory(1, torch.float16) is None


@pytest.mark.parametrize("sums", [(2.0, 3.0, 4.0), (-1.0, 3.0, 4.0), (5.0, 3.0, 9.0), (3.0, 9.0, 1.0), (0.0, 0.0, 0.0),
    (1.0, 1e-200, 1e-200), (float("nan"), 1.0, 1.0), (1e300, 1e300, 1e-300), (1.0, float("nan"), 1.0)])  # fmt: skip
def test_trust_is_the_same_where_the_host_has_the_numbers(sums, monkeypatch):
    gradients = GradientHistories(NODES, [HIDDEN])
    gradients._sums[1] = torch.tensor(sums, dtype=torch.float64)
    found = gradients.trust(1)
    monkeypatch.setattr("recollect.autoscale.histories._gradients.forms_of", lambda device: OTHERS)
    assert torch.equal(found.nan_to_num(-1.0), gradients.trust(1).nan_to_num(-1.0))
