"""Where the batch is, where few entries of a gradient tell: no rows of a layer are taken along another axis."""

import pytest
import torch
from autogram_zoo import explicit_gramian, relative_error
from torch import nn

from recollect.autogram import Engine

RECURRENT = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
STEPS = BATCH = 4


def assert_right(engine, layer, losses):
    expected = explicit_gramian(losses, list(layer.parameters()))
    assert relative_error(engine.compute_gramian(losses), expected) <= 1e-10


def run(kind):
    """A recurrent layer, its engine, and what it gives for a sequence as long as the batch is large."""
    torch.manual_seed(0)
    layer = kind(3, 5).double()
    engine = Engine(layer, batch_dim=0)  # before the layer runs: it records
    return layer, engine, *layer(torch.randn(STEPS, BATCH, 3, dtype=torch.float64))


@RECURRENT
def test_only_the_last_loss_reaches_only_the_last_step(kind):
    layer, engine, output, _ = run(kind)
    losses = output[-1].sin().sum(-1) * torch.tensor([0.0, 0, 0, 1])
    assert_right(engine, layer, losses)


@RECURRENT
def test_an_output_has_a_gradient_of_zeros_and_another_has_not(kind):
    layer, engine, output, last = run(kind)
    last = last[0] if isinstance(last, tuple) else last
    losses = 0 * output.sum((0, 2)) + last.sin().sum((0, 2))
    assert_right(engine, layer, losses)


@pytest.mark.parametrize("chosen", [[], [0]], ids=["no row", "a row whose loss is constant"])
def test_an_expert_that_no_loss_depends_on(chosen):
    torch.manual_seed(0)
    experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    engine = Engine(experts, batch_dim=0)
    x, here = torch.randn(4, 4, dtype=torch.float64), torch.tensor(chosen, dtype=torch.long)
    y = experts[0](x).index_add(0, here, experts[1](x[here]))
    losses = y.sin().sum(1) * torch.tensor([0.0, 1, 1, 1])
    assert_right(engine, experts, losses)


class Scaled(torch.autograd.Function):
    """x · w, whose backward cannot do without a gradient."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


def test_a_function_is_not_asked_for_the_rows_of_zeros():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    layer.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))
    engine = Engine(layer, batch_dim=0)
    y = layer(torch.randn(4, 3, dtype=torch.float64))
    losses = y.sin().sum(1) + 0 * Scaled.apply(y, layer.scale).sum(1)
    assert_right(engine, layer, losses)


@pytest.mark.parametrize("way", [lambda bags: bags.view(2, 2, 5).sum(1), lambda bags: bags.view(2, 2, 5).sum(0)])
def test_several_bags_with_offsets_for_each_element(way):
    torch.manual_seed(0)
    layer = nn.EmbeddingBag(7, 5).double()
    engine = Engine(layer, batch_dim=0)
    bags = layer(torch.tensor([0, 1, 2, 3, 4, 5, 6, 1]), torch.tensor([0, 3, 4, 6]))
    assert_right(engine, layer, way(bags).sin().sum(1))
