"""Layers whose mini-batch gradients are sent back with those of nodes outside, without a graph of their input."""

import copy

import pytest
import torch
from compensation_zoo import (
    DOUBLE,
    NODES,
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

from recollect.autoscale import SubgraphLoader, propagate
from recollect.autoscale._separable import Form


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
