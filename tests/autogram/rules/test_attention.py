"""Attention has no rule: its projections are matrix products in the graph, whose inputs and gradients stand there."""

import pytest
import torch
from torch import nn

from recollect.autogram import Engine, _sites

WIDTH, BATCH, QUERIES, KEYS = 8, 4, 5, 3


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def losses(output, batch_first):
    factors = torch.linspace(0.5, 2, WIDTH, dtype=output.dtype)  # sums of what a norm returns are fixed
    return (factors * output.square() + output).sum((1, 2) if batch_first else (0, 2))


def explicit(loss, parameters):
    rows = [
        torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for one in loss
    ]
    jacobian = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    return jacobian @ jacobian.T


def check(module, call, batch_first=True):
    engine = Engine(module, batch_dim=0)
    loss = losses(call(module), batch_first)
    expected = explicit(loss, list(module.parameters()))
    torch.testing.assert_close(engine.compute_gramian(loss), expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.fixture
def no_single_rows(monkeypatch):
    """Fails where the rows of something are found one after another."""

    def refuse(node, *_):
        pytest.fail(f"rows one by one at {node}")

    monkeypatch.setattr(_sites, "_one_by_one", refuse)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoder_layer(batch_first, norm_first, dropout, no_single_rows):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout, batch_first=batch_first, norm_first=norm_first).double()
    x = drawn(BATCH, QUERIES, WIDTH) if batch_first else drawn(QUERIES, BATCH, WIDTH)
    check(layer, lambda module: module(x), batch_first)


def test_encoder_layer_in_evaluation(no_single_rows):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True).double().eval()
    check(layer, lambda module: module(drawn(BATCH, QUERIES, WIDTH)))


def test_causal_encoder_with_padding(no_single_rows):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES, dtype=torch.float64)
    padding = torch.zeros(BATCH, QUERIES, dtype=torch.float64)
    padding[0, 3:] = -torch.inf
    x = drawn(BATCH, QUERIES, WIDTH)
    check(encoder, lambda module: module(x, mask=mask, src_key_padding_mask=padding, is_causal=True))


def test_decoder_layer(no_single_rows):
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, 0.1, batch_first=True).double()
    x, memory = drawn(BATCH, QUERIES, WIDTH), drawn(BATCH, KEYS, WIDTH)
    check(layer, lambda module: module(x, memory))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 6, "vdim": 4}, {"bias": False}, {"add_zero_attn": True}, {"dropout": 0.2}], ids=str
)
def test_cross_attention(options, need_weights, no_single_rows):
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options).double()
    query = drawn(BATCH, QUERIES, WIDTH)
    key, value = (drawn(BATCH, KEYS, options.get(name, WIDTH)) for name in ("kdim", "vdim"))
    check(attention, lambda module: module(query, key, value, need_weights=need_weights)[0])


def test_attention_with_biases_of_keys_and_values():
    attention = nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True, batch_first=True).double()
    x = drawn(BATCH, QUERIES, WIDTH)
    check(attention, lambda module: module(x, x, x)[0])
