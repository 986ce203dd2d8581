"""Rows at single nodes of a graph, against a masked gradient for each."""

import pytest
import torch
from autogram_zoo import explicit_gramian, relative_error
from torch import nn
from torch.nn import functional as F

from recollect.autogram import Engine, _sites
from recollect.autogram._contract import gramian
from recollect.autogram._factors import Outer, Rows, form_rows
from recollect.autogram._layout import Axis, Layout
from recollect.autogram._sites import rows_at

B = 3
X = torch.randn(B, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def parameter(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


class Softmax(torch.autograd.Function):
    """Mixes the elements, and leaves it to autograd to sum its gradient over what was broadcast."""

    @staticmethod
    def forward(ctx, x, p):
        y = (x + p).softmax(0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        grad = y * (grad - (grad * y).sum(0))
        return grad, grad


SITES = {
    "a bias": (lambda p: X + p, (5,), 1),
    "a bias on the left": (lambda p: p + X, (5,), 0),
    "a bias with a factor": (lambda p: torch.add(X, p, alpha=3), (5,), 1),
    "positions": (lambda p: X + p, (4, 5), 1),
    "a kept axis": (lambda p: X + p, (4, 1), 1),
    "a scale": (lambda p: X * p, (5,), 1),
    "a scale on the left": (lambda p: p * X, (5,), 0),
    "a scale for an axis": (lambda p: X * p, (4, 1), 1),
    "a shift and a scale": (lambda p: torch.addcmul(X[0, 0], X, p), (5,), 2),
    "a shift of what is scaled": (lambda p: torch.addcmul(p, X, X[0, 0]), (5,), 0),
    "a scale with a factor": (lambda p: torch.addcmul(X[0, 0], p, X, value=3), (5,), 1),
    "a quotient": (lambda p: X / p, (1, 4, 5), 1),
    "a scalar": (lambda p: X * p, (), 1),
    "a power": (lambda p: X.abs() ** p, (5,), 1),
    "an expansion": (lambda p: p.expand(B, 2, 5), (1, 2, 5), 0),
    "a matrix product": (lambda p: X.flatten(0, 1) @ p, (5, 2), 1),
    "a linear function": (lambda p: torch.addmm(X[0, 0, :2], X.flatten(0, 1), p), (5, 2), 2),
    "a scaled product": (lambda p: torch.addmm(X[0, 0, :2], X.flatten(0, 1), p, alpha=2), (5, 2), 2),
    "the bias of a product": (lambda p: torch.addmm(p, X.flatten(0, 1), X[0, :2].T), (2,), 0),
    "a scaled bias of a product": (lambda p: torch.addmm(p, X.flatten(0, 1), X[0, :2].T, beta=2), (2,), 0),
    "a convolution": (lambda p: F.conv1d(X, p), (2, 4, 3), 1),
    "a parameter for each element": (lambda p: X * p, (B, 4, 5), 1),
    "a value for some elements": (lambda p: X.index_put((torch.tensor([2, 0, 1]),), p), (5,), 1),
    "a value for pairs": (lambda p: X.index_put((torch.tensor([2, 0, 1]), torch.tensor([0, 0, 3])), p), (5,), 1),
    "an unknown function": (lambda p: Softmax.apply(X, p), (5,), 1),
    "a vector product": (lambda p: X.flatten(0, 1).mv(p), (5,), 1),
}


@pytest.mark.parametrize("name", SITES)
def test_rows_at_a_node(name):
    function, shape, position = SITES[name]
    p = parameter(*shape)
    y = function(p)
    layout = Layout((Axis(0, B),))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (factor,) = rows_at(y.grad_fn, (grad,), (layout,), B, [(position, p.shape)])
    found = form_rows([factor], slice(0, B))
    masks = [layout.mask(grad, i) for i in range(B)]
    rows = torch.stack([torch.autograd.grad(y, p, mask, retain_graph=True)[0].flatten() for mask in masks])
    torch.testing.assert_close(found, rows)
    torch.testing.assert_close(gramian([factor]), rows @ rows.T)


@pytest.mark.parametrize("name", ["a bias", "a scale", "a matrix product", "an expansion", "the bias of a product"])
def test_common_nodes_are_not_asked(name, monkeypatch):
    calls = []
    original = _sites._call
    monkeypatch.setattr(_sites, "_call", lambda *args: calls.append(args) or original(*args))
    function, shape, position = SITES[name]
    p = parameter(*shape)
    y = function(p)
    (factor,) = rows_at(y.grad_fn, (torch.ones_like(y),), (Layout((Axis(0, B),)),), B, [(position, p.shape)])
    assert not calls
    assert isinstance(factor, Outer if name == "a matrix product" else Rows)


def test_a_factor_of_a_product_that_changes():
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    engine = Engine(model)
    for factor in (1, 2, 1, 3):
        losses = torch.addmm(model.bias, torch.rand(3, 5).double(), model.weight.t(), alpha=factor, beta=factor).sin()
        assert (
            relative_error(engine.compute_gramian(losses), explicit_gramian(losses, list(model.parameters()))) < 1e-12
        )


def test_several_outputs_of_which_one_has_no_gradient():
    p = parameter(B, 4, 5)
    first, _ = (p * 1).unbind(2)[:2]
    node = first.grad_fn
    grads = (torch.ones(B, 4, dtype=torch.float64), *[None] * 4)
    (factor,) = rows_at(node, grads, (Layout((Axis(0, B),)), *[None] * 4), B, [(0, p.shape)])
    rows = form_rows([factor], slice(0, B)).view(B, B, 4, 5)
    assert all(torch.equal(rows[i, i, :, 0], torch.ones(4, dtype=torch.float64)) for i in range(B))
    assert rows.sum() == B * 4


class Product(torch.autograd.Function):
    """A node that is written in Python."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x)
        return x * p

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return None, (grad * x).sum((0, 1))


def test_a_node_in_python():
    p = parameter(5)
    y = Product.apply(X, p)
    (factor,) = rows_at(y.grad_fn, (torch.ones_like(y),), (Layout((Axis(0, B),)),), B, [(1, p.shape)])
    torch.testing.assert_close(form_rows([factor], slice(0, B)), X.sum(1))


@pytest.mark.parametrize("shape", [(B, 5), (B, 1), (1, 5), (5,)])
@pytest.mark.parametrize("way", ["on the left", "on the right", "in a product"])
def test_what_autograd_is_not_asked_for_in_a_pass_down_to_layers(way, shape):
    torch.manual_seed(0)
    layer = nn.Linear(5, 5).double()
    layer.own = nn.Parameter(parameter(*shape).detach())
    engine = Engine(layer, batch_dim=0)
    y = layer(X[:, 0])
    added = {"on the left": lambda: layer.own + y, "on the right": lambda: y + layer.own}
    losses = added.get(way, lambda: torch.addmm(layer.own, y, X[0, 0].diag()))().sin().sum(1)
    assert relative_error(engine.compute_gramian(losses), explicit_gramian(losses, list(layer.parameters()))) <= 1e-10
