"""Every model with histories, with every option: mini-batches against the whole graph, layer by layer."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
import torch
from model_zoo import IN, NODES, OUT, PTR, data_for, every_model, given, make
from torch import Tensor
from torch.nn import functional as F

from recollect.autoscale import EvalSubgraphLoader, ScalableGNN, SubgraphLoader
from recollect.models import GAT


def embeddings(model: ScalableGNN, data: Any) -> list[Tensor]:
    """The input of every layer, and the output of the last, of the whole graph."""
    x, state = data.x, given(model, data)
    found = [x]
    for layer in range(model.num_layers):
        x = model.forward_layer(layer, x, data.adj_t, state)
        found.append(x)
    return [*found[:-1], model.readout(x, state)]


def gradients(model: ScalableGNN, out: Tensor, target: Tensor) -> list[Tensor]:
    leaves = list(model.parameters())
    found = torch.autograd.grad(F.cross_entropy(out, target), leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def oracle(model: ScalableGNN, data: Any, rows: Tensor, true: list[Tensor]) -> Tensor:
    """The rows' outputs by plain autograd on the whole graph, all other rows of every layer's input being constants."""
    x, state = data.x, given(model, data)
    for layer in range(model.num_layers):
        out = model.forward_layer(layer, x, data.adj_t, state)
        if layer < model.num_layers - 1:
            x = true[layer + 1].detach().clone()
            x[rows] = out[rows]
    return model.readout(out, state)[rows]


@every_model
def test_one_part_gives_exactly_the_gradients_of_the_whole_graph(name):
    model = make(name, dropout=0.0 if name == "appnp" else 0.5)
    data = data_for(model)
    (batch,) = SubgraphLoader(data, torch.tensor([0, NODES]))
    torch.manual_seed(1)
    whole = model(data.x, data.adj_t, **given(model, data))
    expected = gradients(model, whole, data.y)
    torch.manual_seed(1)
    out = model(batch.data.x, batch.data.adj_t, *batch[1:], **given(model, batch.data))
    assert torch.equal(out, whole)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, out, data.y), expected, strict=True))
    assert max(float(g.abs().max()) for g in expected) > 1e-4


@every_model
@pytest.mark.parametrize("bipartite", [True, False], ids=["bipartite", "square"])
def test_with_true_histories_batches_give_the_whole_graphs_rows_and_the_gradients_of_constant_halos(name, bipartite):
    model = make(name).eval()
    data = data_for(model)
    true = embeddings(model, data)
    for parts in itertools.chain(itertools.combinations(range(5), 1), itertools.combinations(range(5), 3)):
        (batch,) = SubgraphLoader(data, PTR, len(parts), bipartite, sampler=parts)
        for history, rows in zip(model.histories, true[1:-1], strict=True):
            history.push(rows)
        rows = batch.n_id[: batch.batch_size]
        out = model(batch.data.x, batch.data.adj_t, *batch[1:], **given(model, batch.data))
        torch.testing.assert_close(out, true[-1][rows], rtol=1e-11, atol=1e-11)
        expected = gradients(model, oracle(model, data, rows, true), data.y[rows])
        found = gradients(model, out, batch.data.y[: batch.batch_size])
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@every_model
def test_layer_wise_inference_is_the_whole_graphs(name):
    model = make(name, dropout=0.0 if name == "appnp" else 0.5)  # in training mode
    data = data_for(model)
    loader = EvalSubgraphLoader(data, PTR, batch_size=2)
    out = model(loader=loader)
    assert model.training
    assert not out.requires_grad
    model.eval()
    true = embeddings(model, data)
    assert out.shape == (NODES, OUT)
    torch.testing.assert_close(out, true[-1], rtol=1e-11, atol=1e-11)
    for history, rows in zip(model.histories, true[1:-1], strict=True):
        torch.testing.assert_close(history.pull(), rows, rtol=1e-11, atol=1e-11)
        assert float(rows.detach().abs().max()) > 0.01
        assert int(history.age().max()) == len(loader) - 1


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_type_is_that_of_parameters_and_features_whatever_that_of_the_weights(name, dtype):
    model = make(name, history_dtype=dtype).to(dtype)
    data = data_for(model)  # whose adjacency is in float64
    data.x = data.x.to(dtype)
    if "edge_attr" in data:
        data.edge_attr = data.edge_attr.to(dtype)
    for batch in SubgraphLoader(data, PTR, batch_size=2):
        out = model(batch.data.x, batch.data.adj_t, *batch[1:], **given(model, batch.data))
        assert out.dtype == dtype
        F.cross_entropy(out, batch.data.y[: batch.batch_size]).backward()
    out = model(loader=EvalSubgraphLoader(data, PTR))
    assert out.dtype == dtype
    assert bool(out.isfinite().all())


@every_model
def test_features_of_another_width_are_refused_before_anything_is_written(name):
    model = make(name)
    data = data_for(model)
    data.x = data.x[:, 1:]
    batch = next(iter(SubgraphLoader(data, PTR, batch_size=2)))
    calls = (
        lambda: model(data.x, data.adj_t, **given(model, data)),
        lambda: model(batch.data.x, batch.data.adj_t, *batch[1:], **given(model, batch.data)),
        lambda: model(loader=EvalSubgraphLoader(data, PTR)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"x has shape \[\d+, {IN - 1}\], but .* in_channels={IN}"):
            call()
    assert model.never_pushed() == [NODES] * len(model.histories)


@every_model
def test_numbers_may_be_numpys(name):
    plain = make(name)
    numbers = {"num_nodes": NODES, "in_channels": IN, "out_channels": OUT, "num_layers": plain.num_layers}
    if isinstance(plain, GAT):
        numbers |= {"hidden_heads": plain.convs[0].heads, "out_heads": plain.convs[-1].heads}
    model = make(name, **{key: numpy.int64(value) for key, value in numbers.items()})
    data = data_for(model)
    torch.testing.assert_close(
        model.eval()(data.x, data.adj_t, **given(model, data)),
        plain.eval()(data.x, data.adj_t, **given(model, data)),
    )
