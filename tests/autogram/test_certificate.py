"""wᵀ G w = ‖Jᵀ w‖² at every step: what is broken on purpose is found, and what is right is not."""

import pytest
import torch
from torch import nn

from recollect.aggregation import MeanWeighting
from recollect.autogram import Engine, GramianError, Rows
from recollect.autogram import _engine as engine_module
from recollect.autogram._certificate import Certificate, judge_gramian
from recollect.autogram._factors import form_rows
from recollect.autogram._registry import Entry, Registry
from recollect.autogram.rules import RULES

M = 6


class Steps(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0][:, -1]


NETS = {
    "linear": (lambda: nn.Linear(4, 5), (M, 4), nn.Linear),
    "linear over tokens": (lambda: nn.Linear(4, 5), (M, 3, 4), nn.Linear),
    "convolution": (lambda: nn.Conv1d(4, 3, 2), (M, 4, 5), nn.Conv1d),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 3, 2), (M, 4, 5), nn.ConvTranspose1d),
    "layer norm": (lambda: nn.LayerNorm(4), (M, 3, 4), nn.LayerNorm),
    "group norm": (lambda: nn.GroupNorm(2, 4), (M, 4, 5), nn.GroupNorm),
    "embedding": (lambda: nn.Embedding(7, 4), None, nn.Embedding),
    "lstm": (Steps, (M, 3, 4), nn.LSTM),
    "slope": (lambda: nn.PReLU(4), (M, 4), nn.PReLU),
    "bilinear": (lambda: Twice(nn.Bilinear(4, 4, 3)), (M, 4), nn.Bilinear),
}


class Twice(nn.Module):
    """A layer of two inputs that are the same."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x.sin())


def noise(values, share):
    generator = torch.Generator().manual_seed(3)
    return values + share * values.norm() * torch.randn(values.shape, generator=generator, dtype=values.dtype)


def with_row(values, change):
    changed = values.clone()
    changed[1] = change(values[1])
    return changed


BREAKS = {
    "all too large": lambda v: 1.001 * v,
    "all too small": lambda v: 0.99 * v,
    "nothing": lambda v: 0 * v,
    "a row too large": lambda v: with_row(v, lambda row: 1.01 * row),
    "a row too small": lambda v: with_row(v, lambda row: 0.5 * row),
    "a row of zeros": lambda v: with_row(v, lambda row: 0 * row),
    "a row turned": lambda v: with_row(v, lambda row: -row),
    "a row doubled": lambda v: with_row(v, lambda row: 2 * row),
    "another's row": lambda v: v.roll(1, 0),
    "rows in reverse": lambda v: v.flip(0),
    "a row for all": lambda v: v[:1].expand_as(v).clone(),
    "the rows' mean": lambda v: v.mean(0, keepdim=True).expand_as(v).clone(),
    "a little of others": lambda v: v + 0.01 * v.roll(1, 0),
    "off by a constant": lambda v: v + 0.1 * v.abs().max(),
    "noise": lambda v: noise(v, 0.01),
    "much noise": lambda v: noise(v, 0.5),
    "without signs": lambda v: v.abs() + v.abs().max(),
    "squares": lambda v: v.square() + v.abs().max(),
    "first half": lambda v: torch.cat([v[: M // 2], 0 * v[M // 2 :]]),
    "in single precision, rounded": lambda v: (v * 100).round() / 100 + 0.003,
}


def test_there_are_two_hundred():
    assert len(NETS) * len(BREAKS) == 200


def parts(name):
    make, shape, layer_type = NETS[name]
    torch.manual_seed(0)
    body = make().double()
    head = nn.Linear(4, 4).double()
    if shape is None:
        index = torch.arange(M) % 3

        return [body], lambda: body(index).tanh().square().sum(1), layer_type
    x = torch.randn(shape, dtype=torch.float64)

    def losses():
        hidden = head(x.movedim(1, -1)).movedim(-1, 1) if "conv" in name or name == "group norm" else head(x)
        return body(hidden).sin().add(0.5).square().flatten(1).sum(1)

    return [head, body], losses, layer_type


def broken(layer_type, change, monkeypatch):
    entry = RULES[layer_type]

    def rule(layer, inputs, grads):
        found = {}
        for name, factor in entry.rule(layer, inputs, grads).items():
            dense = form_rows([factor], slice(0, factor.num_rows)).view(factor.num_rows, *factor.shape)
            found[name] = Rows(change(dense))
        return found

    monkeypatch.setattr(engine_module, "_REGISTRY", Registry({**RULES, layer_type: Entry(rule, entry.sharing)}))


@pytest.mark.parametrize("change", BREAKS)
@pytest.mark.parametrize("name", NETS)
def test_a_broken_rule_is_found(name, change, monkeypatch):
    modules, losses, layer_type = parts(name)
    broken(layer_type, BREAKS[change], monkeypatch)
    engine = Engine(*modules)
    with pytest.raises(GramianError, match="does not fit the gradient"):
        engine.compute_gramian(losses())
    weights = torch.rand(M, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    with pytest.raises(GramianError, match=layer_type.__name__):
        engine.backward(losses(), lambda gramian: weights)
    assert engine.certificate.largest > 1e-8


@pytest.mark.parametrize("name", NETS)
def test_what_is_right_is_certified(name):
    modules, losses, _ = parts(name)
    engine = Engine(*modules)
    for _ in range(3):
        engine.compute_gramian(losses())
        engine.backward(losses(), MeanWeighting())
    assert engine.certificate.checks == 4  # the first of compute_gramian, and each of backward
    assert engine.certificate.skipped == 0
    assert engine.certificate.last <= engine.certificate.largest < 1e-12


def test_gradients_that_were_there_do_not_count():
    modules, losses, _ = parts("linear")
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, 1e3)
    engine = Engine(*modules)
    engine.backward(losses(), MeanWeighting())
    assert engine.certificate.checks == 1


def test_how_often_compute_gramian_checks():
    modules, losses, _ = parts("linear")
    engine = Engine(*modules, certify_every=3)
    counts = []
    for _ in range(7):
        engine.compute_gramian(losses())
        counts.append(engine.certificate.checks)
    assert counts == [1, 1, 1, 2, 2, 2, 3]
    engine.compute_gramian(losses().sin())  # another form
    assert engine.certificate.checks == 4
    never = Engine(*modules, certify_every=0)
    never.compute_gramian(losses())
    assert never.certificate.checks == 0
    assert never.certificate.last is None


def test_what_cannot_be_compared_is_counted():
    modules, losses, _ = parts("linear")
    engine = Engine(*modules)
    modules[0].weight.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    engine.backward(losses(), MeanWeighting())
    assert (engine.certificate.checks, engine.certificate.skipped) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_rounding_alone_are_no_error(dtype):
    """A softmax sums to one, whatever its parameters: what is left of the gradient is noise."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 7).to(dtype)
    engine = Engine(layer, certify_every=1)
    for _ in range(20):
        losses = layer(torch.randn(M, 4, dtype=dtype)).softmax(1).sum(1)
        engine.compute_gramian(losses)
        engine.compute_norms(losses)
        engine.compute_gramian(losses, losses.detach() * losses)
        engine.backward(losses, MeanWeighting())
    assert engine.certificate.checks + engine.certificate.skipped == 80
    assert engine.certificate.skipped >= 60  # that noise fits noise shows nothing; exact zeros are compared


def test_a_single_loss_is_certified(monkeypatch):
    def half(factor):
        return Rows(0.5 * form_rows([factor], slice(0, factor.num_rows)).view(factor.num_rows, *factor.shape))

    def rule(layer, inputs, grads):
        return {name: half(factor) for name, factor in RULES[nn.Linear].rule(layer, inputs, grads).items()}

    monkeypatch.setattr(engine_module, "_REGISTRY", Registry({**RULES, nn.Linear: Entry(rule)}))
    layer = nn.Linear(200, 100).double()
    engine = Engine(layer)
    loss = layer(torch.randn(2, 200, dtype=torch.float64)).square().mean()
    with pytest.raises(GramianError):
        engine.compute_gramian(loss)
    with pytest.raises(GramianError):
        engine.backward([loss], lambda gramian: torch.ones(1, dtype=torch.float64))


def test_a_model_of_another_precision_has_another_tolerance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
    engine = Engine(model, certify_every=1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        engine.compute_gramian(model(torch.randn(32, 8, dtype=dtype)).square().sum(1))
        if dtype == torch.float64:
            assert engine.certificate.last < 1e-12
    assert engine.certificate.checks == 4


def test_a_hook_that_mixes_losses_is_found():
    """It is in no graph: only the gradient shows it."""
    modules, _, _ = parts("linear")
    hidden = modules[0](torch.randn(M, 4, dtype=torch.float64))
    hidden.register_hook(lambda grad: grad - grad.mean(0))
    engine = Engine(*modules)
    with pytest.raises(GramianError, match="hooks that change gradients"):
        engine.compute_gramian(modules[1](hidden).sin().sum(1))


@pytest.mark.parametrize("ask", ["compute_gramian", "compute_norms"])
def test_after_an_error_every_call_is_compared(ask):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    engine = Engine(model, batch_dim=0)
    x = torch.randn(5, 4, dtype=torch.float64)

    def found(mixes):
        h = model[0](x)
        if mixes:
            h.register_hook(lambda grad: grad - grad.mean(0))
        return getattr(engine, ask)(model[2](model[1](h)).square().sum(1))

    for _ in range(2):
        with pytest.raises(GramianError):
            found(mixes=True)
    right = found(mixes=False)
    with pytest.raises(GramianError):
        found(mixes=True)
    assert torch.equal(found(mixes=False), right)


def test_an_element_that_comes_in_single_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
    engine = Engine(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(torch.randn(32, 8)).float().square().sum(1)
    engine.backward(losses, MeanWeighting())
    assert engine.certificate.checks == 1
    assert engine.certificate.last < 5e-2


@pytest.mark.parametrize(("settings", "message"), [
    ({"batch_dim": "none"}, "'auto', a dimension of the losses, and None"),
    ({"batch_dim": True}, "'auto', a dimension of the losses, and None"),
    ({"certify_every": -1}, "0, for never"),
    ({"certify_every": 1.5}, "0, for never"),
])  # fmt: skip
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(nn.Linear(2, 2), **settings)


@pytest.mark.parametrize("count", [2, 1000])
@pytest.mark.parametrize("cancels", [True, False])
def test_what_a_difference_is_relative_to(cancels, count):
    gramian = torch.eye(count, dtype=torch.float64)
    gramian[0, 1] = gramian[1, 0] = -0.999
    weights, losses = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    weights[:2] = torch.tensor([1.0, 1.0 if cancels else 0.0])
    form = 0.002 if cancels else 1.0
    certificate = Certificate()
    judge_gramian(certificate, gramian, weights, losses, form + 3e-9, (1e-8, 2e-16, "nobody"))
    assert (certificate.checks, certificate.skipped) == (1, 0)
    assert certificate.last == pytest.approx(3e-9 / (4 if cancels else 1), rel=1e-3)
    with pytest.raises(GramianError, match="nobody"):
        judge_gramian(certificate, gramian, weights, losses, form + 3e-7, (1e-8, 2e-16, "nobody"))
    judge_gramian(certificate, gramian, weights, losses, float("inf"), (1e-8, 2e-16, "nobody"))
    assert (certificate.checks, certificate.skipped) == (2, 1)
