"""Which backward passes run: one after another, at once, or in groups; all give the same Gramian."""

import pytest
import torch
from forms import set_form
from torch import nn

from recollect.autogram import Engine, _passes
from recollect.memory import peak_memory


def model():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(9, 3)).double()


class Mixed(nn.Module):
    """Has layers with rules, a parameter of its own, and an embedding larger than what is looked up."""

    def __init__(self):
        super().__init__()
        self.body, self.scale, self.table = model(), nn.Parameter(torch.rand(4)), nn.Embedding(500, 4)
        self.double()

    def forward(self, x):
        return self.body(x * self.scale + self.table(torch.arange(len(x))))


def losses_of(net):
    return net(torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).square()


def expected(net):
    losses, rows = losses_of(net), []
    for loss in losses.flatten():
        grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    jacobian = torch.stack(rows)
    return (jacobian @ jacobian.T).view(6, 3, 6, 3).transpose(2, 3)


@pytest.fixture
def passes(monkeypatch):
    """How many cotangents each backward pass has."""
    cotangents = []
    grad = torch.autograd.grad

    def note(outputs, inputs, cotangent=None, **settings):
        if cotangent is not None:
            cotangents.append(len(cotangent) if settings.get("is_grads_batched") else 1)
        return grad(outputs, inputs, cotangent, **settings)

    monkeypatch.setattr(torch.autograd, "grad", note)
    return cotangents


def refuse(*_):
    raise RuntimeError("not at once")


def test_one_after_another(passes):
    net = Mixed()
    engine, losses = Engine(net, batch_dim=None, certify_every=0), losses_of(net)
    found = engine.compute_gramian(losses)
    assert passes == [1] * 18
    torch.testing.assert_close(found, expected(net))


def test_in_groups(passes, monkeypatch):
    net = Mixed()
    engine, losses = Engine(net, batch_dim=None, row_bytes=5_000), losses_of(net)
    monkeypatch.setattr(_passes, "_rows_at_once", refuse)
    found = engine.compute_gramian(losses)
    assert passes == [1] * len(passes)
    assert len(passes) > 18
    torch.testing.assert_close(found, expected(net))


def test_at_once(passes, monkeypatch):
    net = Mixed()
    engine, losses = Engine(net, batch_dim=None, certify_every=0), losses_of(net)
    set_form(monkeypatch, small_layer=2**20)
    found = engine.compute_gramian(losses)
    assert passes == [18]
    torch.testing.assert_close(found, expected(net))


class OnlyOne(torch.autograd.Function):
    """Does not stand several gradients at once."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad if grad.sum().item() else grad


class Once(nn.Module):
    def forward(self, x):
        return OnlyOne.apply(x)


def test_what_does_not_run_at_once_runs_in_turn(passes, monkeypatch):
    set_form(monkeypatch, small_layer=2**20)
    net = nn.Sequential(model(), Once())
    engine = Engine(net, certify_every=0)
    found = [engine.compute_gramian(losses_of(net)) for _ in range(2)]
    # One comes by the function first, to see whether it goes backward by itself.
    assert passes == [1, 18, *[1] * 36]
    for gramian in found:
        torch.testing.assert_close(gramian, expected(net))


@pytest.mark.parametrize("row_bytes", [1, 2**20])
def test_several_losses_for_each_element(passes, row_bytes):
    net = model()
    engine, losses = Engine(net, batch_dim=0, row_bytes=row_bytes), losses_of(net)
    engine.compute_gramian(losses)
    passes.clear()
    found = engine.compute_gramian(losses)
    assert len(passes) > 3 if row_bytes == 1 else len(passes) == 3
    torch.testing.assert_close(found, expected(net))


def test_the_bound_bounds():
    """128 rows of 66,560 elements are 34 MB: with a bound of 16 MB, the losses go at once, layer by layer."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(16)))

    def measure(row_bytes):
        engine = Engine(net, row_bytes=row_bytes)
        losses = net(torch.ones(64, 64)).sum(0).repeat(2) * torch.linspace(1, 2, 128)
        with peak_memory("cpu") as memory:
            gramian = engine.compute_gramian(losses)
        return memory.peak_bytes, gramian

    (held, first), (streamed, second) = measure(2**28), measure(2**24)
    assert held > 34e6
    assert streamed < 18e6
    norms = first.diagonal().sqrt()
    assert ((first - second).abs() / (norms[:, None] * norms)).max() < 1e-5


class Inner(torch.autograd.Function):
    """A layer whose backward has a pass of its own, down to the same parameter."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(x @ weight, [x, weight], gradient)


class Wide(nn.Module):
    """Large weights, of which one comes from a pass within the pass, one is used twice, and one has a hook."""

    def __init__(self, depth=4):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList([torch.randn(60, 60, dtype=torch.float64) / 8 for _ in range(depth)])

    def forward(self, x):
        x = Inner.apply(x, self.weights[0]).tanh()
        for weight in [*self.weights[1:], self.weights[1]]:
            x = (x @ weight).tanh()
        return x[:, :5].square().sum(0)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("row_bytes", [2**28, 4 * 8 * 4 * 60**2])
def test_gradients_are_taken_one_by_one(hooked, row_bytes, monkeypatch):
    monkeypatch.setattr(_passes, "_ROW", 0)
    net, x = Wide(), torch.randn(3, 60, dtype=torch.float64)
    if hooked:
        net.weights[2].register_hook(lambda grad: 2 * grad)
    losses = net(x)
    rows = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    found = Engine(net, batch_dim=None, row_bytes=row_bytes).compute_gramian(losses)
    torch.testing.assert_close(found, jacobian @ jacobian.T, rtol=1e-10, atol=1e-10)
    hooks = [weight._backward_hooks or {} for weight in net.weights]
    assert [len(each) for each in hooks] == [0, 0, int(hooked), 0]


def test_another_backward_pass_keeps_its_gradients(monkeypatch):
    """While gradients are taken from a pass, hooks are on the parameters."""
    monkeypatch.setattr(_passes, "_ROW", 0)
    net, x, found = Wide(), torch.randn(3, 60, dtype=torch.float64), []
    true = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    losses = net(x)
    take = _passes._take_row

    def between(total, turn, parameter, grad):
        with torch.enable_grad():
            found.append(torch.autograd.grad(net(x).sum(), list(net.parameters())))
        take(total, turn, parameter, grad)

    monkeypatch.setattr(_passes, "_take_row", between)
    Engine(net, batch_dim=None, certify_every=0).compute_gramian(losses)
    assert len(found) == 5 * 4
    for gradients in found:
        torch.testing.assert_close(gradients, true, rtol=0, atol=0)


def test_memory_has_one_row_of_each_loss():
    """The gradients of a pass are not held beside the rows; 40 layers of 14.4 kB each take one more of them, or two."""
    net, x = Wide(40).float(), torch.randn(3, 60)
    losses = net(x)
    engine, row = Engine(net, batch_dim=None, certify_every=0), 4 * 40 * 60**2
    engine.compute_gramian(losses)
    with peak_memory("cpu") as memory:
        engine.compute_gramian(losses)
    assert len(losses) * row <= memory.peak_bytes < (len(losses) + 0.25) * row
