"""Sequentials and chains of tuple modules against plain autograd, inputs that are passed on among them."""

import copy
import io
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import recollect
import recollect.invertible as inn
from recollect.memory import peak_memory
from recollect.testing._zoo import ZOO

WIDTH = 4


def leaf(seed=2):
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()


class Scale(inn.Module):
    """One input, one output."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.randn(WIDTH) / 4)

    def function(self, x):
        return x * self.s.exp()

    def inverse(self, y):
        return y * (-self.s).exp()

    def function_and_log_det(self, x):
        return self.function(x), self.s.sum().expand(x.shape[:1])

    @property
    def reversible(self):
        return True


class Cubed(inn.Module):
    """Elementwise and monotone, so that the order of a chain matters; hides what its inverse needs."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.rand(()) + 0.5)

    @property
    def num_outputs(self):
        return 1

    def function(self, x):
        return (self.w * x).square() * 0.5 + 0.1, x.sign()

    def inverse(self, y, sign):
        return ((y - 0.1) * 2).sqrt() / self.w * sign

    def function_and_log_det(self, x):
        return *self.function(x), (self.w.square() * x.abs()).log().sum(-1)


class Beside(inn.Module):
    """(h, a) -> (h + f(a), a): the second input is passed on in its place."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def function(self, h, a):
        return h + self.block(a), a

    def inverse(self, e, a):
        return e - self.block(a), a


def zoo(name):
    module: inn.Module = ZOO[name](WIDTH)[0]
    return module


def double(*modules):
    return nn.ModuleList(modules).double()


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def through(modules, *args):
    for module in modules:
        args = as_tuple(module(*args))
    return args


def mixed(tensors):
    """A loss whose gradient with respect to each output depends on all of them."""
    return sum((t.sin() * (i + 1)).sum() for i, t in enumerate(tensors)) * tensors[0].cos().mean()


def set_plain(modules, off):
    for module in modules:
        for part in module.modules():
            if isinstance(part, inn.Module):
                part.checkpoint, part.invertible = not off, not off


def assert_same(found, expected, tolerance=1e-10):
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None:
            assert float((f - e).detach().norm()) <= tolerance * (1e-6 + float(e.detach().norm()))


def compare(run, modules, wanted):
    """Assert that the loss and the gradients of ``run()`` equal plain autograd's; return the gradients."""
    results = []
    for off in (True, False):
        set_plain(modules, off)
        torch.manual_seed(3)
        loss = run()
        results.append((loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)))
    assert torch.equal(results[0][0], results[1][0])
    assert any(g is not None and float(g.abs().max()) > 0 for g in results[0][1:])
    assert_same(results[1], results[0])
    return results[0][1:]


@pytest.fixture
def bounded(monkeypatch):
    """Make a search for values that would never end an error."""
    from recollect.frames.sources import _inverse

    missing, count = _inverse._InverseStage.missing, []

    def counted(stage):
        count.append(1)
        assert len(count) < 2000, "the stages ask one another in a circle"
        return missing(stage)

    monkeypatch.setattr(_inverse._InverseStage, "missing", counted)


# Sequential.


def nested():
    torch.manual_seed(0)
    return inn.Sequential(
        Scale(), inn.Sequential(Cubed(), Scale(), inn.Sequential(Cubed(), inn.Identity())), Cubed(), Scale()
    ).double()


@pytest.mark.parametrize("flags", [{}, {"invertible": False}, {"checkpoint": False}])
def test_nested_with_hidden_outputs_in_the_middle(flags):
    flow, x = nested(), leaf()
    expected = torch.autograd.grad(mixed(as_tuple(nn.Sequential.forward(flow, x))), [x, *flow.parameters()])
    set_plain([flow], False)
    with flow.temp_mode(**flags):
        y = flow(x * 1.0)
        assert torch.is_tensor(y)
        assert_same(torch.autograd.grad(mixed([y]), [x, *flow.parameters()]), expected)
        assert flow.check(x.detach(), rtol=1e-9, atol=1e-9)


def test_function_inverse_and_process_compose():
    flow, x = nested(), leaf().detach()
    outputs = flow.function(x)
    assert len(outputs) == 1 + 3 + 3  # y; three signs; the counts of the inner two, and of the outer one
    assert torch.equal(flow.process(outputs), flow(x))
    assert_same([flow.inverse(*outputs)], [x])
    with pytest.raises(TypeError):
        flow.inverse(outputs[0])  # the signs are missing
    assert_same([inn.Sequential(Scale(), Scale()).double().inverse(x)], [x], tolerance=10)


def test_log_determinants_add_up():
    flow, x = nested(), leaf()
    row = x.detach()[0]
    jacobian = torch.autograd.functional.jacobian(lambda r: flow(r[None])[0], row)
    for flags in ({}, {"invertible": False}, {"checkpoint": False}):
        with flow.temp_mode(**flags):
            y, log_det = flow.forward_and_log_det(x * 1.0)
            assert torch.equal(y, flow(x))
            assert torch.allclose(log_det[0], torch.linalg.slogdet(jacobian)[1], atol=1e-10)
    compare(
        lambda: (lambda y, log_det: y.sin().sum() + log_det.sin().sum())(*flow.forward_and_log_det(x * 1.0)),
        [flow],
        [x, *flow.parameters()],
    )
    outputs = flow.function_and_log_det(x)
    back = flow.inverse_and_log_det(*outputs[:-1])
    assert_same(back, (x, -outputs[-1]))


def test_empty_and_lone():
    x = leaf()
    for flags in ({}, {"invertible": False}, {"checkpoint": False}):
        empty = inn.Sequential()
        with empty.temp_mode(**flags):
            assert empty(x) is x
            assert torch.equal(empty.forward_and_log_det(x)[1], torch.zeros(5).double())
    assert empty.inverse(x) is x
    assert empty.check(x)
    lone = inn.Sequential(Scale()).double()
    compare(lambda: lone(x * 1.0).sin().sum(), [lone], [x, lone[0].s])


def test_other_modules_are_refused_wherever_they_come_in():
    message = r"layer 1 of an invertible Sequential is Linear\(.*which has no inverse"
    with pytest.raises(TypeError, match=message):
        inn.Sequential(Scale(), nn.Linear(4, 4))
    with pytest.raises(TypeError, match="layer b of an invertible Sequential is ReLU"):
        inn.Sequential(OrderedDict(a=Scale(), b=nn.ReLU()))
    flow = inn.Sequential(Scale(), Scale())
    before = list(flow)
    with pytest.raises(TypeError, match="layer 1"):
        flow[1] = nn.ReLU()
    with pytest.raises(TypeError, match="layer 0"):
        flow.insert(0, nn.ReLU())
    with pytest.raises(TypeError, match="layer 2"):
        flow.append(nn.ReLU())
    with pytest.raises(TypeError, match="layer extra"):
        flow.extra = nn.ReLU()
    with pytest.raises(TypeError, match="layer 0"):
        flow.add_module("0", None)
    assert list(flow) == before


def test_list_operations():
    a, b, c, d = (Scale() for _ in range(4))
    flow = inn.Sequential(a, c)
    assert list(flow.insert(1, b)) == [a, b, c]
    assert list(flow.append(d)) == [a, b, c, d]
    part: Any = flow[1:3]
    assert list(part) == [b, c]
    assert type(part) is inn.Sequential
    del flow[0]
    assert list(flow) == [b, c, d]
    assert list(flow.insert(-1, a)) == [b, c, a, d]
    assert list(flow.reverse().insert(1, flow[0])) == [d, d, a, c, b]
    assert list(flow.reverse()) == [b, c, a, d, d]
    with pytest.raises(IndexError, match="index 9 is out of range for 5 layers"):
        flow.insert(9, a)


@pytest.mark.parametrize("turned", [False, True])
def test_sums_and_multiples_are_invertible(turned):
    torch.manual_seed(0)
    flow, other = inn.Sequential(Scale(), inn.Linear(4, 4)).double(), inn.Sequential(Scale()).double()
    flow.reverse(turned)
    x = torch.randn(5, 4, dtype=torch.float64)
    for made, expected in ((flow + other, other(flow(x))), (flow * 2, flow(flow(x))), (2 * flow, flow(flow(x)))):
        assert type(made) is inn.Sequential
        assert torch.equal(made(x), expected)
        assert made.check(x)
    with pytest.raises(TypeError, match="layer 2"):
        flow + nn.Sequential(nn.ReLU())


# Reversing.


def reversible():
    torch.manual_seed(0)
    shared = zoo("plain")
    return inn.Sequential(shared, inn.Sequential(zoo("plain"), inn.Identity()), zoo("plain").reverse(), shared).double()


def test_reversing_turns_layers_and_their_order():
    flow, x, z = reversible(), leaf(), leaf(3)
    y = flow(x, z)
    layers, directions = list(flow), [layer.reversed for layer in flow]
    assert flow.reverse() is flow
    assert list(flow) == layers[::-1]
    assert [layer.reversed for layer in flow] == [not d for d in directions[::-1]]
    assert_same(flow(*y), (x, z))
    compare(lambda: mixed(flow(x * 1.0, z * 2.0)), [flow], [x, z, *flow.parameters()])
    assert flow.check(x.detach(), z.detach(), rtol=1e-9, atol=1e-9)
    assert flow.reverse(True).reversed
    assert_same(flow.reverse(False)(x, z), y, 0.0)
    assert list(flow) == layers


def test_reversing_a_sequential_that_cannot_be():
    flow = inn.Sequential(Scale(), Cubed())
    with pytest.raises(RuntimeError, match="Sequential is not reversible"):
        flow.reverse()
    assert not any(layer.reversed for layer in flow)


def test_names_stay_with_their_layers():
    flow = inn.Sequential(OrderedDict(first=Scale(), last=Scale()))
    first, keys = flow.first, dict(flow.state_dict())
    flow.reverse()
    assert flow.first is first
    assert flow[1] is first
    assert all(torch.equal(flow.state_dict()[key], value) for key, value in keys.items())


@pytest.mark.parametrize("turned", [False, True])
def test_state_dict_of_a_reversed_sequential(turned):
    flow, x, z = reversible().reverse(), leaf(), leaf(3)
    flow.seed = flow[0].invertible = False
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    torch.manual_seed(9)
    other = reversible()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.reverse(turned).load_state_dict(torch.load(file, weights_only=True))
    assert other.reversed == turned  # a setting, not state
    other.reverse(True)
    assert [layer.reversed for layer in other] == [layer.reversed for layer in flow]
    assert_same(other(x, z), flow(x, z), 0.0)
    assert_same(copy.deepcopy(flow)(x, z), flow(x, z), 0.0)


@pytest.mark.parametrize("drifts", [[float("nan"), 1.0, None], [None, 1.0, float("nan")]], ids=str)
def test_a_drift_without_a_number_is_the_largest(drifts):
    flow = inn.Sequential(*(inn.Asinh() for _ in drifts))
    for layer, drift in zip(flow, drifts, strict=True):
        layer._gauge.last = drift
    assert math.isnan(flow.last_drift)


def test_last_drift_is_that_of_the_layers():
    flow, x = nested(), leaf()
    assert flow.last_drift is None
    flow(x * 1.0).sum().backward()
    assert 0 <= flow.last_drift < 1e-12
    with flow.temp_mode(checkpoint=False):
        flow(x * 1.0).sum().backward()


# Chains of modules that pass inputs on.

PASSING = ["plain", "output is the input", "beside"]


def passing(kind, depth, **options):
    torch.manual_seed(0)
    modules = double(*(Beside() if kind == "beside" else zoo(kind) for _ in range(depth)))
    for module in modules:
        for name, value in options.items():
            setattr(module, name, value)
    return modules


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("anchor_every", [None, 1, 2, 3, 7])
def test_passed_through_a_chain(kind, anchor_every, bounded):
    modules, x, z = passing(kind, 6, anchor_every=anchor_every), leaf(), leaf(3)
    compare(lambda: mixed(through(modules, x * 1.0, z * 2.0)), modules, [x, z, *modules.parameters()])


@pytest.mark.parametrize("kind", PASSING)
def test_passed_through_with_subsets_and_several_passes(kind, bounded):
    modules, x, z = passing(kind, 5), leaf(), leaf(3)
    wanted = [x, z, *modules.parameters()]
    expected = compare(lambda: mixed(through(modules, x * 1.0, z * 2.0)), modules, wanted)
    loss = mixed(through(modules, x * 1.0, z * 2.0))
    for i in (*range(len(wanted)), 0, -1, 5, 3):
        assert_same(torch.autograd.grad(loss, wanted[i], retain_graph=True), expected[i : i + 1 or None])
    assert_same(torch.autograd.grad(loss, wanted, create_graph=True), expected)
    assert_same(torch.autograd.grad(loss, wanted), expected)
    fresh = mixed(through(modules, x * 1.0, z * 2.0))  # from the beginning of the chain alone
    assert_same(torch.autograd.grad(fresh, wanted[2:3]), expected[2:3])


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize("before", [True, False])
def test_passed_through_with_branches(kind, before, bounded):
    modules, heads, x, z = passing(kind, 4), double(Scale(), zoo("plain")), leaf(), leaf(3)

    def run():
        h, total = (x * 1.0, z * 2.0), 0.0
        for module in modules:
            h = h if before else module(*h)
            total = total + heads[0](h[0]).sin().sum() + heads[0](h[1]).cos().sum() + mixed(heads[1](h[1], h[0]))
            h = module(*h) if before else h
        return total + mixed(h)

    compare(run, [*modules, *heads], [x, z, *modules.parameters(), *heads.parameters()])


@pytest.mark.parametrize("kind", PASSING)
def test_passed_through_while_somebody_holds_everything(kind, bounded):
    modules, x, z = passing(kind, 5), leaf(), leaf(3)
    held = []

    def run():
        h = (x * 1.0, z * 2.0)
        for module in modules:
            h = module(*h)
            held.append(h)
        return mixed(h)

    compare(run, modules, [x, z, *modules.parameters()])


@pytest.mark.parametrize("kind", PASSING)
def test_passed_through_under_eager_release(kind, bounded):
    modules, x, z = passing(kind, 5), leaf(), leaf(3)

    def run():
        with recollect.eager_release():
            return mixed(through(modules, x * 1.0, z * 2.0))

    compare(run, modules, [x, z, *modules.parameters()])


def test_passed_next_to_a_tensor_given_twice(bounded):
    module, x = double(Beside(), Beside()), leaf()

    def run():
        h = x * 1.0
        return mixed(through(module, h, h))

    compare(run, module, [x, *module.parameters()])


def test_held_and_changed_in_place_afterwards(bounded):
    modules, x, z = passing("beside", 3), leaf(), leaf(3)

    def run():
        middle = z * 2.0
        a, b = through(modules, x * 1.0, middle)
        loss = a.sin().sum() + b.sum()
        with torch.no_grad():
            middle.add_(1.0)
        return loss

    for off in (True, False):  # the blocks save it
        set_plain(modules, off)
        with pytest.raises(RuntimeError, match=r"in.?place"):
            torch.autograd.grad(run(), [x, *modules.parameters()])


@pytest.mark.parametrize("kind", PASSING)
def test_kept_bytes_are_flat_in_depth(kind):
    def kept(depth):
        modules, x = passing(kind, depth), torch.randn(512, WIDTH, dtype=torch.float64, requires_grad=True)
        with peak_memory("cpu") as memory:
            outputs = through(modules, x * 1.0, x * 2.0)
            size = memory.current_bytes
            mixed(outputs)
        return size

    assert kept(12) - kept(4) < 512 * WIDTH * 8


def test_an_anchored_chain_keeps_every_sth_activation():
    def kept(anchor_every):
        torch.manual_seed(0)
        modules = double(*(Scale() for _ in range(12)))
        for module in modules:
            module.anchor_every = anchor_every
        x = torch.randn(512, WIDTH, dtype=torch.float64, requires_grad=True)
        with peak_memory("cpu") as memory:
            (y,) = through(modules, x * 1.0)
            size = memory.current_bytes
        y.sum().backward()
        return size

    activation, sample = 512 * WIDTH * 8, 256 * (8 + 8)  # a sample is values and where they are
    assert kept(3) - kept(None) == 3 * (activation + sample)


def test_passed_on_after_it_was_consumed(bounded):
    first, second, third, x = *double(Scale(), Scale(), Beside()), leaf()

    def run():
        a = first(x * 1.0)
        h = second(a)  # links a to this stage
        return third(h, a)[0].sin().sum()  # and passes it on, beside what depends on it

    compare(run, [first, second, third], [x, first.s, second.s, *third.parameters()])


def test_passed_on_after_it_was_consumed_in_a_longer_chain(bounded):
    modules, x, z = double(zoo("plain"), Scale(), Beside(), zoo("plain")), leaf(), leaf(3)

    def run():
        h = modules[0](x * 1.0, z * 2.0)
        h = modules[2](modules[1](h[0]), h[0])
        return mixed(modules[3](*h))

    compare(run, modules, [x, z, *modules.parameters()])


# Frames within frames.


class Outer(inn.Module):
    """Invertible modules in the function of another, run with frames of their own."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def function(self, *args):
        return through(self.layers, *args)

    def inverse(self, *outputs):
        for layer in reversed(self.layers):
            outputs = as_tuple(layer.inverse(*outputs))
        return outputs


@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
def test_an_invertible_module_in_a_checkpoint():
    first, second, x = *double(Scale(), Scale()), leaf()
    compare(
        lambda: recollect.checkpoint(lambda h: second(h), first(x * 1.0)).sin().sum(),
        [first, second],
        [x, first.s, second.s],
    )


@pytest.mark.parametrize("kind", ["plain", "beside"])
def test_a_chain_that_passes_on_in_a_checkpoint(kind):
    modules, inner, x, z = passing(kind, 2), passing(kind, 2), leaf(), leaf(3)

    def run():
        h = through(modules, x * 1.0, z * 2.0)
        return mixed(recollect.checkpoint(lambda a, b: through(inner, a, b), *h))

    compare(run, [*modules, *inner], [x, z, *modules.parameters(), *inner.parameters()])


@pytest.mark.parametrize("kind", ["plain", "beside"])
def test_invertible_modules_in_an_invertible_module(kind):
    modules, x, z = double(*(Outer(*passing(kind, 2)) for _ in range(3))), leaf(), leaf(3)
    compare(lambda: mixed(through(modules, x * 1.0, z * 2.0)), modules, [x, z, *modules.parameters()])


@pytest.mark.parametrize("kind", ["plain", "output is the input", "beside"])
def test_a_coupling_with_a_reversible_block(kind):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = zoo("plain")

        def forward(self, z):
            return self.inner(z * 1.0, z * 2.0)[0]

    modules, x = double(*(inn.AdditiveCoupling(Block(), Block(), dim=-1) for _ in range(3))), leaf()
    x = torch.cat([x, leaf(5)], -1)
    compare(lambda: mixed(through(modules, x * 1.0)), modules, list(modules.parameters()))


def test_evaluations_of_a_chain_in_a_checkpoint():
    calls = []

    class Counted(Beside):
        def function(self, h, a):
            calls.append("function")
            return super().function(h, a)

        def inverse(self, e, a):
            calls.append("inverse")
            return super().inverse(e, a)

    modules, x = double(*(Counted() for _ in range(3))), leaf()
    loss = mixed(recollect.checkpoint(lambda a, b: through(modules, a, b), x * 1.0, x * 2.0))
    calls.clear()
    loss.backward()
    assert sorted(calls) == ["function"] * 6 + ["inverse"] * 3  # the region, then each of its stages


@pytest.mark.xfail(
    strict=True,
    raises=torch.utils.checkpoint.CheckpointError,
    reason="torch runs it again on the same input tensors, whose slots of the first run are found then",
)
def test_a_module_that_passes_on_in_a_checkpoint_of_torch():
    modules, x = double(Beside()), leaf()

    def run():
        outputs = torch.utils.checkpoint.checkpoint(modules[0], x * 1.0, x * 2.0, use_reentrant=False)
        return mixed(outputs)

    compare(run, modules, [x, *modules.parameters()])


def test_anchors_and_threshold_are_given_to_the_layers():
    inner = inn.Sequential(inn.Identity())
    outer = inn.Sequential(inn.Identity(), inner, anchor_every=3, drift_threshold=0.5)
    for layer in (outer[0], inner, inner[0]):
        assert layer.anchor_every == 3
        assert layer.drift_threshold == 0.5
    inn.Sequential(outer)
    assert inner[0].anchor_every == 3
    assert inner[0].drift_threshold == 0.5
