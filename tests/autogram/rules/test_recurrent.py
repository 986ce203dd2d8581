"""Recurrent layers and cells, over layers, directions, projections, states, and which outputs are used."""

import pytest
import torch
from factor_oracle import dense
from rule_oracle import apply, batch_form, check, rows_form, split
from torch import nn
from torch.profiler import ProfilerActivity, profile

from recollect.autogram import Engine
from recollect.autogram._factors import NotCovered
from recollect.autogram.rules._recurrent import keeps_output, recurrent

LAYERS = {
    "rnn": lambda **o: nn.RNN(3, 4, **o),
    "relu rnn": lambda **o: nn.RNN(3, 4, nonlinearity="relu", **o),
    "gru": lambda **o: nn.GRU(3, 4, **o),
    "lstm": lambda **o: nn.LSTM(3, 4, **o),
    "projecting lstm": lambda **o: nn.LSTM(3, 4, proj_size=2, **o),
}
OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "layers": {"num_layers": 3},
    "both ways": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.0},
}
STEPS, BATCH = 5, 3


def made(name, option):
    return LAYERS[name](**OPTIONS[option]).double()


def sequence(layer, batch=BATCH):
    shape = (batch, STEPS, 3) if layer.batch_first else (STEPS, batch, 3)
    return torch.randn(shape, dtype=torch.float64)


def first_state(layer, batch=BATCH):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    state = tuple(torch.randn(count, batch, size, dtype=torch.float64) for size in (layer.proj_size or 4, 4))
    return state if isinstance(layer, nn.LSTM) else state[0]


def batch_axes(layer):
    return (0 if layer.batch_first else 1, 1, 1)[: 3 if isinstance(layer, nn.LSTM) else 2]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_that_share_the_inputs(name, option):
    layer = made(name, option)
    check(layer, sequence(layer))
    check(layer, sequence(layer), first_state(layer))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_rows_with_inputs_of_their_own(name, option):
    layer = made(name, option)
    check(layer, sequence(layer), axes=batch_axes(layer))
    check(layer, sequence(layer), first_state(layer), axes=batch_axes(layer))


@pytest.mark.parametrize("name", LAYERS)
def test_without_an_axis_for_the_batch(name):
    layer = made(name, "all")
    state = first_state(layer)
    state = tuple(h[:, 0] for h in state) if isinstance(state, tuple) else state[:, 0]
    check(layer, sequence(layer)[0])
    check(layer, sequence(layer)[0], state)


@pytest.mark.parametrize("name", LAYERS)
def test_one_element_and_one_step(name):
    layer = made(name, "batch first")
    check(layer, sequence(layer, 1), axes=batch_axes(layer))
    check(layer, sequence(layer)[:, :1])


@pytest.mark.parametrize("name", LAYERS)
def test_strides_do_not_matter(name):
    layer = made(name, "layers")
    check(layer, sequence(layer).mT.contiguous().mT, axes=batch_axes(layer))


@pytest.mark.parametrize("name", LAYERS)
def test_strides_of_gradients_do_not_matter(name):
    layer = made(name, "layers")
    _, views, grads = rows_form(layer, (sequence(layer), first_state(layer)))
    found = apply(layer, views, [grad.transpose(0, 2).contiguous().transpose(0, 2) for grad in grads])
    expected = apply(layer, views, grads)
    for key, factor in found.items():
        torch.testing.assert_close(dense(factor), dense(expected[key]))


@pytest.mark.parametrize("used", [0, 1, 2])
@pytest.mark.parametrize("make", [rows_form, batch_form], ids=["shared", "own"])
def test_only_one_output_is_used(make, used):
    layer = made("lstm", "all")
    call = (layer, (sequence(layer),), *([batch_axes(layer)] if make is batch_form else []))
    _, views, grads = make(*call)
    missing = [grad if k == used else None for k, grad in enumerate(grads)]
    zeros = [grad if k == used else torch.zeros_like(grad) for k, grad in enumerate(grads)]
    found, expected = apply(layer, views, missing), apply(layer, views, zeros)
    for name, factor in found.items():
        assert factor.num_rows == len(grads[0])
        for field in ("values", "left", "right"):
            if hasattr(factor, field):
                torch.testing.assert_close(getattr(factor, field), getattr(expected[name], field))
    assert apply(layer, views, [None] * 3) == {}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch's own forward has products by step too")
def test_an_lstm_has_one_product_a_step():
    layer = made("lstm", "plain").float()

    def count(steps):
        _, views, grads = rows_form(layer, (torch.randn(steps, BATCH, 3),))
        with profile(activities=[ProfilerActivity.CPU]) as record:
            apply(layer, views, grads)
        return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm") for event in record.events())

    assert count(9) - count(5) == 4


@pytest.mark.parametrize("option", ["plain", "batch first", "layers"])
def test_hidden_states_that_were_kept_are_not_computed_again(option):
    layer = LAYERS["lstm"](**OPTIONS[option])
    x = sequence(layer).float()
    output = layer(x)[0]
    assert keeps_output(output)
    _, views, grads = batch_form(layer, (x,), batch_axes(layer))
    kept = split(output, batch_axes(layer)[0])
    with profile(activities=[ProfilerActivity.CPU]) as record:
        found = recurrent(layer, views, tuple(grads), kept)
    assert sum(event.name == "aten::lstm" for event in record.events()) == layer.num_layers - 1
    for name, factor in recurrent(layer, views, tuple(grads)).items():
        torch.testing.assert_close(dense(found[name]), dense(factor))


def test_an_engine_runs_an_lstm_once():
    layer = nn.LSTM(3, 4, batch_first=True)
    engine = Engine(layer, certify_every=0)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        losses = layer(torch.randn(BATCH, STEPS, 3))[0].square().sum((1, 2))
        gramian = engine.compute_gramian(losses)
    assert sum(event.name == "aten::lstm" for event in record.events()) == 1
    rows = [torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows]).double()
    torch.testing.assert_close(gramian.double(), jacobian @ jacobian.T, rtol=1e-4, atol=1e-5)


def test_dropout_between_layers_is_not_covered():
    layer = nn.GRU(3, 4, num_layers=2, dropout=0.5).double()
    _, views, grads = rows_form(layer, (sequence(layer),))
    with pytest.raises(NotCovered, match="dropout"):
        apply(layer, views, grads)
    check(layer.eval(), sequence(layer))


@pytest.mark.parametrize("axes", [None, (0, 0)])
@pytest.mark.parametrize(
    "cell", [nn.RNNCell(3, 4), nn.RNNCell(3, 4, nonlinearity="relu"), nn.GRUCell(3, 4, bias=False), nn.LSTMCell(3, 4)]
)
def test_cells(cell, axes):
    cell = cell.double()
    x, h, c = (torch.randn(BATCH, size, dtype=torch.float64) for size in (3, 4, 4))
    lstm = isinstance(cell, nn.LSTMCell)
    axes = axes if axes is None or lstm else axes[:1]
    check(cell, x, axes=axes)
    check(cell, x, (h, c) if lstm else h, axes=axes)
    check(cell, x[0], (h[0], c[0]) if lstm else h[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", LAYERS)
def test_single_precision(name):
    layer = made(name, "all")
    check(layer.float(), sequence(layer).float(), axes=batch_axes(layer), tolerance=1e-4)


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_half_precision_is_summed_in_single(name):
    layer = made(name, "all")
    check(layer.bfloat16(), sequence(layer).bfloat16(), axes=batch_axes(layer), tolerance=5e-2)


def test_frozen_parameters_have_no_factor():
    layer = made("gru", "layers")
    layer.weight_hh_l1.requires_grad_(False)
    layer.bias_ih_l0.requires_grad_(False)
    check(layer, sequence(layer))
