"""Weights of edges that are learnt, in every model that multiplies by them, against dense products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import AGGREGATORS, NODES, PTR, data_for, given, make, make_graph
from torch import Tensor, nn

from recollect.autoscale import SubgraphLoader, normalize, propagate, with_weights
from recollect.messages import values_of
from recollect.models import RevGNN, _aggregate, _appnp, _layers

NAMES = ["gcn", "gcn-all", "gcn2", "gcn2-all", "appnp", "gin-all", "pna", "pna-scalers", "pna-edges", "pna-jk-all"]


def dense_product(adj_t: Tensor, x: Tensor) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(adj_t.size(0)), adj_t.crow_indices().diff())
    zeros = torch.zeros(tuple(adj_t.shape), dtype=x.dtype)
    return zeros.index_put((rows, adj_t.col_indices()), values_of(adj_t).to(x.dtype), accumulate=True) @ x


def gradients(run: Callable[[Tensor], Tensor], number: int, model: nn.Module) -> list[Tensor]:
    """Return the output, and the gradients of the weights and of the parameters."""
    torch.manual_seed(3)
    w = (torch.rand(number, dtype=torch.float64) + 0.1).requires_grad_()
    out = run(w)
    found = torch.autograd.grad(out.sin().sum(), [w, *model.parameters()], allow_unused=True)
    assert found[0].abs().max() > 1e-3
    return [out, *(torch.zeros(()) if grad is None else grad for grad in found)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bipartite", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_on_mini_batches(name, bipartite, recompute, monkeypatch):
    """Whose columns are not sorted."""
    model = make(name, recompute=recompute)
    data = data_for(model)
    for history in model.histories:
        history.push(torch.rand(NODES, history.embedding_dim, dtype=torch.float64))
    (batch,) = SubgraphLoader(data, PTR, 2, bipartite, sampler=[3, 0])
    adj_t = batch.data.adj_t
    assert (adj_t.col_indices().diff() < 0).sum() >= batch.batch_size

    def run(w: Tensor) -> Tensor:
        return model(batch.data.x, with_weights(adj_t, w), *batch[1:], **given(model, batch.data))

    found = gradients(run, adj_t.values().numel(), model)
    for module in (_aggregate, _appnp, _layers):
        monkeypatch.setattr(module, "propagate", dense_product)
    model.recompute = False
    torch.testing.assert_close(found, gradients(run, adj_t.values().numel(), model), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["gcn-all", "appnp", "gcn2"])
def test_through_the_normalisation_of_the_whole_graph(name, recompute, monkeypatch):
    model = make(name, recompute=recompute)
    data = make_graph()

    def run(w: Tensor) -> Tensor:
        return model(data.x, normalize(with_weights(data.adj_t, w)))

    found = gradients(run, data.adj_t.values().numel(), model)
    for module in (_appnp, _layers):
        monkeypatch.setattr(module, "propagate", dense_product)
    model.recompute = False
    torch.testing.assert_close(found, gradients(run, data.adj_t.values().numel(), model), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_numerical_gradients_of_every_aggregation(aggregator):
    model = make("pna", aggregators=[aggregator], num_layers=1)
    data = data_for(model)
    layer = model.convs[0]
    w = (torch.rand(data.adj_t.values().numel(), dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: layer(data.x, with_weights(data.adj_t, w)), (w,))


class Summing(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lin = nn.Linear(channels, channels)

    def forward(self, x: Tensor, adj_t: Tensor, *_: Any) -> Tensor:
        return propagate(adj_t, self.lin(x)).tanh()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_reversible_layers(dropout):
    torch.manual_seed(0)
    model = RevGNN(5, 8, 3, num_layers=4, conv=Summing, dropout=dropout).double()
    data = make_graph()

    def run(w: Tensor) -> Tensor:
        torch.manual_seed(1)
        return model(data.x, with_weights(data.adj_t, w))

    found = gradients(run, data.adj_t.values().numel(), model)
    model.disable = True
    expected = gradients(run, data.adj_t.values().numel(), model)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
