"""The engine on another device, with each kind of layer that has a rule."""

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from device.compare import there, waits
from device.emulation import watch
from recollect.aggregation import UPGrad
from recollect.autogram import (
    Blocks,
    Certificate,
    Engine,
    GramianError,
    NoiseScale,
    NotCovered,
    Outer,
    Picked,
    Rows,
    clip_weights,
    gradient_noise_scale,
    register_rule,
)
from recollect.autogram import _engine as engine_module
from recollect.autogram._factors import form_rows, held_elements
from recollect.autogram._registry import Entry, Registry
from recollect.autogram.rules import RULES
from recollect.frames import settle


class Recurrent(nn.Module):
    """A recurrent layer, of whose outputs the first is the output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        output = self.layer(x)
        return output if isinstance(output, torch.Tensor) else output[0]


def floats(*shape):
    return lambda: torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def numbers(high, *shape):
    return lambda: torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Bilinear(3, 3, 2)

    def forward(self, x):
        return self.layer(x, x.sin())


# For each kind of layer: a network around one, and an input of a batch of four.
LAYERS = {
    nn.Linear: (lambda: nn.Linear(3, 2), floats(4, 3)),
    nn.Bilinear: (Pairs, floats(4, 3)),
    nn.Conv1d: (lambda: nn.Conv1d(2, 3, 3), floats(4, 2, 6)),
    nn.Conv2d: (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), floats(4, 2, 5, 5)),
    nn.Conv3d: (lambda: nn.Conv3d(2, 2, 2), floats(4, 2, 3, 3, 3)),
    nn.ConvTranspose1d: (lambda: nn.ConvTranspose1d(2, 3, 3), floats(4, 2, 4)),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), floats(4, 2, 3, 3)),
    nn.ConvTranspose3d: (lambda: nn.ConvTranspose3d(2, 2, 2), floats(4, 2, 2, 2, 2)),
    nn.LayerNorm: (lambda: nn.LayerNorm(3), floats(4, 5, 3)),
    nn.RMSNorm: (lambda: nn.RMSNorm(3), floats(4, 5, 3)),
    nn.GroupNorm: (lambda: nn.GroupNorm(2, 4), floats(4, 4, 3)),
    nn.InstanceNorm1d: (lambda: nn.InstanceNorm1d(3, affine=True), floats(4, 3, 5)),
    nn.InstanceNorm2d: (lambda: nn.InstanceNorm2d(3, affine=True), floats(4, 3, 2, 3)),
    nn.InstanceNorm3d: (lambda: nn.InstanceNorm3d(2, affine=True), floats(4, 2, 2, 2, 3)),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(3).eval(), floats(4, 3)),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(3).eval(), floats(4, 3, 2, 2)),
    nn.BatchNorm3d: (lambda: nn.BatchNorm3d(2).eval(), floats(4, 2, 2, 2, 2)),
    nn.SyncBatchNorm: (lambda: nn.SyncBatchNorm(3).eval(), floats(4, 3)),
    nn.PReLU: (lambda: nn.PReLU(3), floats(4, 3)),
    nn.Embedding: (lambda: nn.Embedding(6, 3), numbers(6, 4, 2)),
    nn.EmbeddingBag: (lambda: nn.EmbeddingBag(6, 3, mode="sum"), numbers(6, 4, 2)),
    nn.RNN: (lambda: Recurrent(nn.RNN(3, 2, batch_first=True)), floats(4, 5, 3)),
    nn.LSTM: (lambda: Recurrent(nn.LSTM(3, 2, batch_first=True)), floats(4, 5, 3)),
    nn.GRU: (lambda: Recurrent(nn.GRU(3, 2, batch_first=True)), floats(4, 5, 3)),
    nn.RNNCell: (lambda: Recurrent(nn.RNNCell(3, 2)), floats(4, 3)),
    nn.LSTMCell: (lambda: Recurrent(nn.LSTMCell(3, 2)), floats(4, 3)),
    nn.GRUCell: (lambda: Recurrent(nn.GRUCell(3, 2)), floats(4, 3)),
}
each = pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)


def make(kind):
    torch.manual_seed(0)
    network, draw = LAYERS[kind]
    return network().double(), draw()


def losses(network, x):
    return network(x).flatten(1).sin().square().sum(1)


def jacobian_gramian(network, x):
    """By plain autograd, a backward pass for each loss."""
    rows = []
    for loss in losses(network, x):
        grads = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(
            network.parameters(), grads, strict=True)]))  # fmt: skip
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def test_every_kind_with_a_rule_is_tried():
    assert set(LAYERS) == {kind for kind in RULES if not isinstance(kind, str)}


@each
@pytest.mark.parametrize("batch_dim", [0, None])
def test_gramians(other, kind, batch_dim):
    network, x = make(kind)
    expected = jacobian_gramian(network, x)
    network.to(other)
    engine = Engine(network, batch_dim=batch_dim)
    for _ in range(2):
        found = engine.compute_gramian(losses(network, there(x)))
        assert found.device.type == other
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)
    settle()
    assert engine.certificate.checks > 0


@each
def test_gradients_and_norms(other, kind):
    network, x = make(kind)
    gramian = jacobian_gramian(network, x)
    weights = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    expected = torch.autograd.grad((losses(network, x) * weights).sum(), list(network.parameters()))
    network.to(other)
    engine = Engine(network, batch_dim=0)
    engine.backward(losses(network, there(x)), lambda _: there(weights))
    for parameter, one in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), one, rtol=1e-9, atol=1e-9)
    norms = engine.compute_norms(losses(network, there(x)))
    torch.testing.assert_close(norms.cpu(), gramian.diag().sqrt(), rtol=1e-9, atol=1e-9)
    settle()


@each
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("what", ["gramian", "norms", "backward", "cross"])
def test_nothing_waits_after_the_first_call(other, kind, batch_dim, what):
    network, x = make(kind)
    network, x = network.to(other), there(x)
    engine = Engine(network, batch_dim=batch_dim)

    def call():
        found = losses(network, x)
        if what == "backward":
            engine.backward(found, lambda gramian: torch.ones_like(gramian[0]))
        elif what == "cross":
            engine.compute_gramian(found[:2], found[2:])
        else:
            getattr(engine, f"compute_{what}")(found)

    assert waits(call, times=3) == []
    settle()


class TestAnIndex:
    """Whether an index is 0, 1, 2 and so on is the one thing that is read of values."""

    def network(self, other):
        torch.manual_seed(0)
        return nn.Linear(3, 4).double().to(other), torch.randn(6, 3, dtype=torch.float64).to(other)

    def picked(self, network, x, index, target):
        return -network(x).log_softmax(-1)[index, target]

    def expected(self, network, x, index, target):
        rows = []
        for loss in self.picked(network, x, index, target):
            grads = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(rows) @ torch.stack(rows).T

    @pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 2, 1, 3, 5, 4]], ids=["counting", "another"])
    def test_one_that_is_kept_is_read_once(self, other, order):
        network, x = self.network(other)
        index, target = torch.tensor(order, device=other), torch.tensor([0, 1, 2, 3, 0, 1], device=other)
        engine, expected = Engine(network), self.expected(network, x, index, target)
        counts = []
        for _ in range(4):
            with watch() as log:
                found = engine.compute_gramian(self.picked(network, x, index, target))
            counts.append(log.syncs)
            torch.testing.assert_close(found, expected)
        assert counts == [0, 1, 0, 0]
        index.copy_(index.flip(0))  # another version: another index
        expected = self.expected(network, x, index, target)
        for _ in range(3):
            torch.testing.assert_close(engine.compute_gramian(self.picked(network, x, index, target)), expected)

    def test_one_that_is_new_in_each_call_is_never_read(self, other):
        network, x = self.network(other)
        target = torch.tensor([0, 1, 2, 3, 0, 1], device=other)
        engine = Engine(network)
        expected = self.expected(network, x, torch.arange(6, device=other), target)
        for number in range(4):
            with watch() as log, warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = engine.compute_gramian(self.picked(network, x, torch.arange(6, device=other), target))
            torch.testing.assert_close(found, expected)
            assert log.where == []
            assert bool(told) == (number > 1)
        assert "Keep the index" in str(told[-1].message)

    def test_one_of_another_length_does_not_matter(self, other):
        network, x = self.network(other)
        engine, target = Engine(network), torch.tensor([0, 1, 2, 3, 0, 1], device=other)
        with watch() as log:
            for _ in range(3):
                engine.compute_gramian(network(x)[torch.tensor([0, 3], device=other)].sum(1))
                engine.compute_gramian(F.cross_entropy(network(x), target, reduction="none"))
        assert log.where == []


class Bags(nn.Module):
    """Bags of different lengths, two of them empty."""

    def __init__(self, last=False, weighted=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.EmbeddingBag(9, 3, include_last_offset=last, **options)
        ends = [0, 3, 3, 8, 11, 11] + [11] * last
        self.register_buffer("offsets", torch.tensor(ends))
        self.register_buffer("weights", torch.linspace(0.5, 1.5, 11) if weighted else None)

    def forward(self, index):
        return self.layer(index, self.offsets, self.weights)


class TestBagsAtOffsets:
    """How many lookups a bag has is a value of the device, which nobody reads."""

    INDEX = torch.tensor([1, 1, 2, 0, 4, 2, 2, 3, 8, 8, 2])

    @pytest.mark.parametrize("batch_dim", [0, None])
    @pytest.mark.parametrize(
        "options",
        [
            *({"mode": mode, "padding_idx": padding} for mode in ("sum", "mean", "max") for padding in (None, 2)),
            {"mode": "sum", "weighted": True, "padding_idx": 2},
            {"mode": "mean", "last": True},
            {"mode": "max", "last": True},
            {"mode": "sum", "last": True, "weighted": True},
        ],
        ids=str,
    )
    def test_values_and_waits(self, other, options, batch_dim):
        network, index = Bags(**options).double(), self.INDEX
        expected = jacobian_gramian(network, index)
        network, index = network.to(other), there(index)
        engine = Engine(network, batch_dim=batch_dim)
        torch.testing.assert_close(engine.compute_gramian(losses(network, index)).cpu(), expected)
        torch.testing.assert_close(engine.compute_norms(losses(network, index)).cpu(), expected.diag().sqrt())

        def calls():
            found = losses(network, index)
            engine.compute_gramian(found[:3], found[3:])
            engine.compute_gramian(losses(network, index))
            engine.compute_norms(losses(network, index))
            engine.backward(losses(network, index), lambda gramian: torch.ones_like(gramian[0]))

        assert waits(calls) == []
        settle()
        assert engine.certificate.checks > 0

    def test_no_lookups_at_all(self, other):
        layer, none = nn.EmbeddingBag(5, 3, mode="sum").double().to(other), torch.zeros(0, dtype=torch.long).to(other)
        engine, offsets = Engine(layer), torch.zeros(4, dtype=torch.long, device=other)
        for _ in range(2):
            assert not engine.compute_gramian(layer(none, offsets).sum(1)).any()
            assert not engine.compute_norms(layer(none, offsets).sum(1)).any()

    def test_memory_is_that_of_the_lookups(self, other):
        """And not that of as many for each bag as the longest has, or as there are."""
        layer = nn.EmbeddingBag(50, 4, mode="sum").to(other)
        index, grads = torch.arange(300, device=other) % 50, torch.randn(100, 1, 4, device=other)
        offsets = torch.arange(100, device=other) * 2
        factor = RULES[nn.EmbeddingBag].rule(layer, (index[None], offsets[None]), (grads,))["weight"]
        assert held_elements([factor]) == 300 * 5


def test_a_wrong_rule_is_found_late(other, monkeypatch):
    network, x = make(nn.Linear)
    network, x = network.to(other), there(x)
    entry = RULES[nn.Linear]

    def wrong(layer, inputs, grads):
        found = entry.rule(layer, inputs, grads)
        return {name: Rows(1.1 * form_rows([one], slice(0, 4)).view(4, *one.shape)) for name, one in found.items()}

    monkeypatch.setattr(engine_module, "_REGISTRY", Registry({**RULES, nn.Linear: Entry(wrong, entry.sharing)}))
    engine = Engine(network, batch_dim=0)
    with watch() as log:
        engine.compute_gramian(losses(network, x))
    assert log.where == []
    with pytest.raises(GramianError, match="does not fit"):
        settle()
    with watch() as log, pytest.raises(GramianError, match="does not fit"):  # noqa: PT012  (which call is not fixed)
        for _ in range(3):
            engine.backward(losses(network, x), lambda gramian: torch.ones_like(gramian[0]))
    assert log.where == []
    with contextlib.suppress(GramianError):  # of the last call
        settle()


def test_the_noise_scale(other):
    network, x = make(nn.Linear)
    gramian = jacobian_gramian(network, x)
    on_device = there(gramian)
    with watch() as log:
        scale = gradient_noise_scale(on_device)
    assert isinstance(scale, NoiseScale)
    assert scale == gradient_noise_scale(gramian)
    assert log.syncs == 1, log.where
    norms, mean = gramian.diag().sqrt(), gramian.mean().sqrt()
    on_device = there([norms, mean])
    with watch() as log:
        scale = gradient_noise_scale(norms=on_device[0], mean_norm=on_device[1])
    assert scale == gradient_noise_scale(norms=norms, mean_norm=mean)
    assert log.syncs == 1, log.where


def test_clipped_gradients(other):
    network, x = make(nn.Linear)
    norms = jacobian_gramian(network, x).diag().sqrt()
    bound = float(norms.median())
    network, x, expected = network.to(other), there(x), clip_weights(norms, bound)
    engine = Engine(network)
    with watch() as log:
        weights = clip_weights(engine.compute_norms(losses(network, x)), bound)
    torch.testing.assert_close(weights.cpu(), expected)
    assert log.syncs <= 1, log.where  # whether the norms are finite
    settle()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.heads = nn.Linear(4, 6), nn.ModuleList(nn.Linear(6, 1) for _ in range(3))
        self.double()

    def losses(self, x):
        z = self.first(x).tanh()
        return torch.stack([(head(z) - k).square().mean() for k, head in enumerate(self.heads)])


def test_tasks_with_heads_of_their_own(other):
    model, x = Encoder(), torch.randn(5, 4, dtype=torch.float64)
    Engine(model.first).mtl_backward(model.losses(x), list(model.heads), UPGrad())
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.to(other).zero_grad()
    engine, x = Engine(model.first), there(x)

    def step():
        model.zero_grad()
        engine.mtl_backward(model.losses(x), list(model.heads), UPGrad())

    assert len(waits(step, times=2)) == 2  # the weighting's
    for parameter, one in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), one, rtol=1e-9, atol=1e-9)
    settle()


def test_features_in_the_place_of_parameters(other):
    model, x = Encoder(), torch.randn(5, 4, dtype=torch.float64)
    found = []
    for place in ("cpu", other):
        model, x = model.to(place), x.to(place)
        z = model.first(x).tanh().detach().requires_grad_()
        each = torch.stack([(head(z) - k).square().mean() for k, head in enumerate(model.heads)])
        found.append(Engine(features=z).compute_gramian(each).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, 3))

    def forward(self, x):
        return x * self.weight


FACTORS = {
    "Rows": lambda x, grad: Rows((x * grad).flatten(1, -2).sum(1) if x.dim() > 2 else x * grad),
    "Outer": lambda x, grad: Outer((x * grad).view(len(x), 1, 1, 3), torch.ones_like(x[:, :1]).view(-1, 1, 1, 1),
                                   torch.Size((3,))),
    "Blocks": lambda x, grad: Blocks(len(x), torch.Size((3,)), lambda rows, part: (x * grad)[rows, part], 3),
    "NotCovered": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", FACTORS)
def test_a_rule_of_ones_own(other, kind, monkeypatch):
    def rule(layer, inputs, grads):
        if kind == "NotCovered":
            raise NotCovered
        return {"weight": FACTORS[kind](inputs[0].flatten(0, -2), grads[0].flatten(0, -2))}

    monkeypatch.setattr(engine_module, "_REGISTRY", Registry(dict(RULES)))
    register_rule(Scaled, rule, sharing=lambda layer, inputs, axes: axes)
    network, x = Scaled().double(), torch.randn(4, 3, dtype=torch.float64)
    expected = jacobian_gramian(network, x)
    network, x = network.to(other), there(x)
    engine = Engine(network)
    torch.testing.assert_close(engine.compute_gramian(losses(network, x)).cpu(), expected)
    if kind != "NotCovered":
        assert waits(lambda: engine.compute_gramian(losses(network, x))) == []
    settle()
    assert isinstance(engine.certificate, Certificate)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 3))

    def forward(self, index):
        return self.weight[index]


def test_a_rule_for_a_table_of_ones_own(other, monkeypatch):
    def rule(layer, inputs, grads):
        return {"weight": Picked(grads[0].flatten(1, -2), inputs[0].flatten(1), 7)}

    monkeypatch.setattr(engine_module, "_REGISTRY", Registry(dict(RULES)))
    register_rule(Table, rule, sharing=lambda layer, inputs, axes: axes)
    network, index = Table().double(), numbers(7, 4, 2)()
    expected = jacobian_gramian(network, index)
    network, index = network.to(other), there(index)
    engine = Engine(network)
    torch.testing.assert_close(engine.compute_gramian(losses(network, index)).cpu(), expected)
    assert waits(lambda: engine.compute_gramian(losses(network, index))) == []
    settle()
