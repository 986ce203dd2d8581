"""A rebuild ends with the last tensor that is needed: what the region does for a while is over all the same."""

from collections import OrderedDict

import pytest
import torch
from seam_oracle import Wrap, assert_right, float64, results
from torch import nn
from torch.nn.utils import prune

import recollect
from recollect._torch import TorchDispatchMode

assert float64 is not None  # a fixture of every test here


class Passing(nn.Module):
    """Changes something, computes, and changes it back, with operations behind the last tensor that autograd saves."""

    def __init__(self, begin, end):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.rand(4) + 1)
        self.begin, self.end = begin, end

    def forward(self, x):
        held = self.begin(self)
        y = self.b(self.a(x).tanh() * self.scale).sin()
        self.end(self, held)
        return y


def _hook(cell):
    return cell.a.register_forward_hook(lambda module, args, output: output * 2)


def _hook_with_keywords(cell):
    return cell.a.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)


def _other_memory(name):
    def begin(cell):
        tensor = cell.get_parameter(name) if name != "scale" else cell.scale
        held, tensor.data = tensor.data, tensor.data.sign()
        return tensor, held

    return begin


def _give_memory(cell, held):
    tensor, data = held
    tensor.data = data


def _other_weight(cell):
    held, cell.a.weight = cell.a.weight, cell.b.weight
    return held


def _plain_weight(cell):
    held = cell.a.weight
    del cell.a.weight
    cell.a.weight = held * 2
    return held


def _give_weight(cell, held):
    if "weight" in vars(cell.a):
        del cell.a.weight
    cell.a.weight = held


def _other_layer(cell):
    held, cell.a = cell.a, cell.b
    return held


def _half(cell):
    torch.set_default_dtype(torch.float32)


CHANGES = {
    "hook": (_hook, lambda cell, hook: hook.remove()),
    "hook with keywords": (_hook_with_keywords, lambda cell, hook: hook.remove()),
    "data of a parameter": (_other_memory("a.weight"), _give_memory),
    "data of a buffer": (_other_memory("scale"), _give_memory),
    "frozen": (lambda cell: cell.a.requires_grad_(False), lambda cell, _: cell.a.requires_grad_(True)),
    "parameter": (_other_weight, _give_weight),
    "parameter as an attribute": (_plain_weight, _give_weight),
    "submodule": (_other_layer, lambda cell, held: setattr(cell, "a", held)),
    "default dtype": (_half, lambda cell, _: torch.set_default_dtype(torch.float64)),
    "mode": (lambda cell: cell.eval(), lambda cell, _: cell.train()),
}


def _standing(cell):
    """Return what must be as it was: the memory's values, flags, names and hooks."""
    named = dict(cell.named_parameters())
    names = "".join(sorted(named)) + str(torch.get_default_dtype())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in cell.modules())
    shared = sum(m is n for m in (cell.a, cell.b) for n in (cell.a, cell.b))
    flags = [float(named[name].requires_grad) for name in sorted(named)]
    numbers = torch.tensor([hooks, shared, len(names), *flags, *names.encode()], dtype=torch.float64)
    return [*(named[name] for name in sorted(named)), cell.scale, numbers]


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_region_changes_for_a_while_is_changed_back(change, early_stop):
    def step(wrap):
        if wrap.framed:
            wrap = Wrap(True, early_stop=early_stop)
        cell = Passing(*CHANGES[change])
        for _ in range(3):
            wrap(cell, torch.randn(3, 4)).square().sum().backward()
        return [*results(cell), *_standing(cell)]

    assert_right(step)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_function_that_changes_modules_for_a_while(change, plain):
    """Also modules of torch's types alone."""

    def step(wrap):
        cell = Passing(lambda cell: None, lambda cell, held: None)
        if plain:
            net = nn.Sequential(OrderedDict(a=cell.a, b=cell.b))
            net.register_buffer("scale", cell.scale)
            cell = net
        begin, end = CHANGES[change]

        def region(x):
            held = begin(cell)
            y = cell.b(cell.a(x).tanh() * cell.scale).sin()
            end(cell, held)
            return y

        for _ in range(3):
            wrap(region, torch.randn(3, 4)).square().sum().backward()
        return [*results(cell), *_standing(cell)]

    assert_right(step)


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_buffer_that_has_other_memory_for_a_while_among_many_small_tensors(early_stop):
    """Fingerprints of small tensors are taken together, later: of the memory that was saved."""

    def step(wrap):
        if wrap.framed:
            wrap = Wrap(True, early_stop=early_stop)
        cell = Passing(lambda cell: None, lambda cell, held: None)
        begin, end = CHANGES["data of a buffer"]

        def region(x):
            held = begin(cell)
            for _ in range(12):
                x = x.sin() * cell.scale
            end(cell, held)
            return x

        x = torch.randn(3, 4, requires_grad=True)
        for _ in range(3):
            wrap(region, x * 1).square().sum().backward()
        return [x.grad, *_standing(cell)]

    assert_right(step)


def test_a_hook_that_is_taken_away_between_forward_and_backward():
    def step(wrap):
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        hook = net[1].register_forward_hook(lambda module, args, output: output * output)
        y = wrap(net, torch.randn(3, 4))
        hook.remove()
        y.sum().backward()
        assert not net[1]._forward_hooks
        return results(net)

    assert_right(step)


def test_a_hook_that_takes_itself_away():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def once(module, args, output):
                hook.remove()
                return output * 3

            hook = self.a.register_forward_hook(once)

        def forward(self, x):
            return self.b(self.a(x).tanh()).sin()

    def step(wrap):
        net = Net()
        for _ in range(2):
            wrap(net, torch.randn(3, 4)).square().sum().backward()
            assert not net.a._forward_hooks
        return results(net)

    assert_right(step)


def test_a_weight_that_is_pruned_between_forward_and_backward():
    def step(wrap):
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        y = wrap(net, torch.randn(3, 4))
        prune.l1_unstructured(net[0], "weight", 0.5)
        z = wrap(net, torch.randn(3, 4))
        y.sum().backward()
        z.square().sum().backward()
        assert list(net[0]._parameters) == ["bias", "weight_orig"]
        return results(net)

    assert_right(step)


def test_an_early_stop_leaves_the_order_of_parameters():
    net = Passing(_plain_weight, _give_weight)
    recollect.checkpoint(net, torch.randn(3, 4)).sum().backward()
    assert list(net.a._parameters) == ["bias", "weight"]


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wrapped", "width", "run_again"),
    [
        (False, 4, 2),  # torch's own modules, and so little is left that to stop takes longer
        (False, 64, 1),
        (True, 4, 1),  # what a function does behind its last product is not known
        (True, 64, 1),
    ],
)
def test_a_run_stops_before_the_operation_that_saves_the_last_tensor_unless_that_is_small(wrapped, width, run_again):
    layers = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    x = torch.randn(8, width, requires_grad=True)
    region = (lambda x: layers(x)) if wrapped else layers
    for _ in range(3):  # the first calls teach what runs
        loss = recollect.checkpoint(region, x).sum()
        with Products() as products:
            (found,) = torch.autograd.grad(loss, x)
    assert products.count == run_again
    torch.testing.assert_close(found, torch.autograd.grad(layers(x).sum(), x)[0], rtol=0, atol=0)
