"""Layers that are not the same any more when the Gramian is computed: their rules would speak of others."""

import pytest
import torch
from torch import nn

from recollect.autogram import Engine, _sites, _sweep


def evaluate(layer):
    layer.eval()


def train(layer):
    layer.train()


def see_other_data(layer):
    layer.training = True
    layer(torch.randn(7, 3, 4, dtype=torch.float64) * 3 + 5)
    layer.training = False


@pytest.mark.parametrize(
    ("make", "training", "change"),
    [
        (lambda: nn.BatchNorm1d(3), True, evaluate),
        (lambda: nn.BatchNorm1d(3), False, train),
        (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), True, evaluate),
        (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), False, see_other_data),
        (lambda: nn.GRU(4, 3, 2, batch_first=True, dropout=0.5), True, evaluate),
    ],
)
def test_the_layer_counts_as_it_was_called(make, training, change):
    layer = make().double().train(training)
    engine = Engine(layer, batch_dim=0)
    output = layer(torch.randn(4, 3, 4, dtype=torch.float64))
    output = (output[0] if isinstance(output, tuple) else output).flatten(1)
    losses = (output * torch.linspace(1, 2, output.shape[1], dtype=output.dtype)).square().sum(1)
    rows = [torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    change(layer)
    torch.testing.assert_close(engine.compute_gramian(losses), jacobian @ jacobian.T, rtol=1e-10, atol=1e-10)


def test_a_layer_that_changed_once_has_its_rule_again(monkeypatch):
    sites = []
    original = _sites.rows_at
    monkeypatch.setattr(_sweep, "rows_at", lambda *args: sites.append(1) or original(*args))
    layer = nn.Linear(4, 3).double()
    engine = Engine(layer, batch_dim=0)
    x = torch.randn(5, 4, dtype=torch.float64)
    for changes, fallback in ((False, False), (True, True), (False, False)):
        losses = layer(x).square().sum(1)
        if changes:
            with torch.no_grad():
                layer.weight.mul_(2)
        sites.clear()
        engine.compute_gramian(losses, retain_graph=False)
        assert bool(sites) == fallback
