"""Every source of frames on another device: values, random numbers, autocast, waits."""

import copy
import tempfile

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import recollect
from device.compare import assert_same, gradients, there, waits
from device.emulation import watch
from recollect import frames
from recollect.frames import (
    Add,
    DriftGauge,
    Inverse,
    Kept,
    Lattice,
    Mark,
    Offload,
    Others,
    Previous,
    RandomState,
    RebuildError,
    Source,
    bits_of,
    certificate_of_process,
    couple,
    couple_by,
    devices_of,
    frames_apply,
    gradients_of,
    keep_everything,
    run_frame,
    run_invertible,
    settle,
    trial,
    uncouple,
    uncouple_by,
)
from recollect.frames._fingerprint import fingerprint


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x):
        return self.last(F.dropout(self.norm(self.first(x)).tanh(), self.dropout))


class Swap(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.block = Block(width // 2, dropout)

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat([b + self.block(a), a], -1)

    def inverse(self, y):
        b, a = y.chunk(2, -1)
        return torch.cat([a, b - self.block(a)], -1)


# For each source: one layer, and how it is called.
SOURCES = {
    "Kept": (Block, lambda layer, x: recollect.checkpoint(layer, x, source=Kept())),
    "Inverse": (Swap, lambda layer, x: recollect.checkpoint(layer, x, inverse=layer.inverse)),
    "coupling": (Swap, lambda layer, x: couple([layer.block, layer.block], x, [(), ()])),
    "Previous": (Block, lambda layer, x: recollect.checkpoint(layer, x, source=Previous())),
    "Offload": (Block, lambda layer, x: recollect.checkpoint(layer, x, source=Offload())),
    "Offload in a file": (Block, lambda layer, x: recollect.checkpoint(layer, x, source=OF_FILE)),
}
OF_FILE = Offload(path=tempfile.gettempdir())
PLAIN = {"coupling": lambda layer, x: couple([layer.block, layer.block], x, [(), ()], enabled=False)}
each = pytest.mark.parametrize("source", SOURCES)


class Net(nn.Module):
    def __init__(self, source, dropout=0.0, plain=False):
        super().__init__()
        torch.manual_seed(0)
        kind, self.call = SOURCES[source]
        if plain:
            self.call = PLAIN.get(source, lambda layer, x: layer(x))
        self.layers = nn.ModuleList(kind(8, dropout) for _ in range(3)).double()

    def forward(self, x):
        for layer in self.layers:
            x = self.call(layer, x)
        return x


def test_every_public_source_is_tried():
    public = {name for name in frames.__all__ if isinstance(getattr(frames, name), type)}
    sources = {name for name in public if issubclass(getattr(frames, name), Source)} - {"Source"}
    assert {name.split()[0] for name in SOURCES} == sources | {"coupling"}
    assert Inverse.__name__ in sources


@each
def test_values_are_those_of_the_cpu(other, source):
    net, x = Net(source), torch.randn(6, 8, dtype=torch.float64)
    expected = gradients(net, x)
    assert_same(gradients(net.to(other), there(x)), expected)
    settle()


@each
def test_random_numbers_of_the_device_are_replayed(other, source):
    x = torch.randn(6, 8, dtype=torch.float64).to(other)
    found = []
    for plain in (True, False):
        net = Net(source, 0.4, plain).to(other)
        torch.manual_seed(5)
        found.append([*gradients(net, x), torch.rand(3, device=other)])
    assert_same(found[1], found[0])
    settle()


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(other, source, dtype):
    x, found = torch.randn(6, 8, device=other), []
    for plain in (True, False):
        net = Net(source, 0.4, plain).float().to(other)
        torch.manual_seed(5)
        found.append(gradients(net, x, within=torch.autocast(other, dtype=dtype)))
    assert_same(found[1], found[0], 2e-2)
    settle()


@each
def test_a_step_does_not_wait(other, source):
    net, x = Net(source, 0.4).to(other), torch.randn(6, 8, dtype=torch.float64).to(other).requires_grad_()

    def step():
        net(x * 1).square().sum().backward()

    found = waits(step, times=3)
    if source.startswith("Offload"):  # copies wait where a device has no streams, and those to files always
        found = [where for where in found if not where.startswith("copy_ at") or "_store.py" not in where]
    assert found == []
    settle()


def test_sequences_and_selective_checkpoints(other):
    net = nn.Sequential(*(Block(8, 0.4) for _ in range(4))).to(other)
    x, found = torch.randn(6, 8, device=other), []
    for call in (net, lambda h: recollect.checkpoint_sequential(net, 2, h)):
        torch.manual_seed(5)
        found.append(gradients(net, x, call=call))
    assert_same(found[1], found[0])


def test_nested_regions(other):
    inner, outer = Block(8, 0.4).to(other), Block(8, 0.4).to(other)
    both, x, found = nn.ModuleList([inner, outer]), torch.randn(6, 8, device=other), []
    for call in (
        lambda h: outer(inner(h)),
        lambda h: recollect.checkpoint(lambda g: outer(recollect.checkpoint(inner, g)), h),
    ):
        torch.manual_seed(5)
        found.append(gradients(both, x, call=call))
    assert_same(found[1], found[0])


def test_equal_bits_are_proved_there_too(other):
    net, x = Block(8, 0.4).to(other), torch.randn(6, 8, device=other, requires_grad=True)
    certificate_of_process.reset()
    recollect.checkpoint(net, x * 1, certify="exact").sum().backward()
    assert certificate_of_process.equal > 0
    assert certificate_of_process.rounded == 0
    state = {"calls": 0}

    def other_each_time(h):
        state["calls"] += 1
        return (h * (1 + 1e-6 * state["calls"])).exp()

    recollect.checkpoint(other_each_time, x * 1, certify="exact").sum().backward()
    with pytest.raises(RebuildError, match="exact"):
        settle()


def test_double_backward(other):
    net, x = Block(8, 0.0).double(), torch.randn(3, 8, dtype=torch.float64)

    def second(network, h, run):
        h = h.requires_grad_()
        (first,) = torch.autograd.grad(run(network, h * 1).square().sum(), h, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [h, *network.parameters()], allow_unused=True)

    expected = second(copy.deepcopy(net), x.clone(), lambda network, h: network(h))
    assert_same(second(net.to(other), there(x), recollect.checkpoint), expected)


def test_modes(other):
    linear, x, calls = nn.Linear(8, 8).to(other), torch.randn(6, 8, device=other, requires_grad=True), []

    def net(h):
        calls.append(h.device.type)
        return linear(h).sin()

    with recollect.dry_mode():
        assert recollect.in_dry_mode()
        assert_same([recollect.checkpoint(net, x)], [net(x)])
    with keep_everything():
        assert not frames_apply()
        recollect.checkpoint(net, x).sum().backward()
    assert calls == [other] * 3
    with recollect.backward_mode():
        assert recollect.in_backward()
    y = recollect.checkpoint(net, x)
    y.sum().backward()
    assert calls == [other] * 5


def test_regions_called_directly(other):
    net, x = Block(8, 0.0).double().to(other), torch.randn(6, 8, dtype=torch.float64).to(other)
    expected = gradients(net, x)
    assert_same(gradients(net, x, call=lambda h: run_frame(net, (h,), {}, Kept())), expected)
    swap, gauge = Swap(8, 0.0).double().to(other), DriftGauge("Swap")
    expected = gradients(swap, x)
    found = gradients(swap, x, call=lambda h: run_invertible(swap, swap.inverse, (h,), gauge=gauge))
    assert_same(found, expected)
    settle()
    assert gauge.last < 1e-12


@pytest.mark.parametrize("transform", [Add(), Lattice(20)], ids=["Add", "Lattice"])
def test_couplings_and_back(other, transform):
    blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    x = (torch.randn(6, 8, dtype=torch.float64) * 2**20).round() / 2**20
    expected = gradients(blocks, x, call=lambda h: couple_by(transform, blocks, h, [(), ()])[0])
    blocks.to(other)
    assert_same(gradients(blocks, there(x), call=lambda h: couple_by(transform, blocks, h, [(), ()])[0]), expected)
    y, _ = couple_by(transform, blocks, there(x), [(), ()])
    assert_same([uncouple_by(transform, blocks, y, [(), ()])[0]], [x])
    assert_same([uncouple(blocks, couple(blocks, there(x), [(), ()]), [(), ()])], [x])
    settle()


def test_steps_that_are_tried_leave_nothing(other):
    norm = nn.BatchNorm1d(8).to(other)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).to(other), torch.randn(6, 8, device=other)
    before = [value.clone() for value in norm.state_dict().values()]
    state = torch.get_device_module(other).get_rng_state()
    others = Others(net)
    with trial(net, [torch.device(other)]), others.noted():
        loss = norm(net(x)).square().sum()
        with gradients_of(loss):
            loss.backward()
    others.put_back()
    assert [parameter.grad for parameter in net.parameters()] == [None, None]
    assert torch.equal(torch.get_device_module(other).get_rng_state(), state)
    assert_same(list(norm.state_dict().values()), before)


def test_random_state(other):
    x = torch.ones(3, device=other)
    assert devices_of([x]) == {x.device}
    state = RandomState(devices_of([x]))
    first, host = torch.rand(3, device=other), torch.rand(3)
    with state.replayed():
        assert_same([torch.rand(3, device=other)], [first])
        assert torch.equal(torch.rand(3), host)


def test_sums_of_bits(other):
    x = torch.randn(6, 8).to(other)
    with watch() as log:
        bits = bits_of(x)
    assert log.where == []
    assert int(bits) == bits_of(x.cpu()) != int(bits_of(x + 1))


def test_marks_are_compared_when_their_numbers_have_come(other):
    x = torch.randn(6, 800).to(other)
    certificate_of_process.reset()
    with watch() as log:
        mark = Mark(torch.exp, x.exp())
        mark.check(x.exp())
        mark.check(x.sin())
    assert log.where == []
    with pytest.raises(RebuildError, match=r"exp: .* what a function returned"):
        settle()
    assert certificate_of_process.equal == 1


@pytest.mark.parametrize("size", [100, 10_000])
def test_fingerprints_are_in_full_precision_under_autocast(other, size):
    x = torch.randn(size).to(other)
    plain = fingerprint(x).projections
    with torch.autocast(other, dtype=torch.bfloat16):
        found = fingerprint(x).projections
    assert found.dtype is torch.float32
    assert torch.equal(found.cpu(), plain.cpu())
