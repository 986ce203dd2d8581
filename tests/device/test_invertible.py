"""Invertible modules on another device: values, states, waits."""

import copy

import pytest
import torch
from torch import nn

from device.compare import assert_same, gradients, saved_and_loaded, there, waits
from device.emulation import watch
from recollect import invertible as inn
from recollect.frames import settle


def block(width=2):
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, width))


# For each public name: a module and the shape of an input.
MODULES = {
    "SELU": (lambda: inn.SELU(), (5, 4)),
    "ActNorm": (lambda: inn.ActNorm(4), (6, 4)),
    "AdditiveCoupling": (lambda: inn.AdditiveCoupling(block(), block()), (5, 4)),
    "AffineCoupling": (lambda: inn.AffineCoupling(nn.Linear(2, 4), nn.Linear(2, 4)), (5, 4)),
    "Asinh": (lambda: inn.Asinh(), (5, 4)),
    "BatchNorm1d": (lambda: inn.BatchNorm1d(4), (6, 4)),
    "BatchNorm1d average": (lambda: inn.BatchNorm1d(4, momentum=None), (6, 4)),
    "BatchNorm2d": (lambda: inn.BatchNorm2d(3), (2, 3, 2, 3)),
    "BatchNorm3d": (lambda: inn.BatchNorm3d(2), (2, 2, 2, 1, 3)),
    "ConstantPad": (lambda: inn.ConstantPad((1, 2)), (2, 3, 4)),
    "Conv1d": (lambda: inn.Conv1d(4, 4, 1), (2, 4, 3)),
    "Conv2d": (lambda: inn.Conv2d(4, 4, 1), (2, 4, 3, 3)),
    "Conv3d": (lambda: inn.Conv3d(2, 2, 1), (2, 2, 2, 3, 2)),
    "Flatten": (lambda: inn.Flatten(), (3, 2, 2)),
    "Identity": (lambda: inn.Identity(), (3, 2)),
    "LeakyReLU": (lambda: inn.LeakyReLU(), (5, 4)),
    "Linear": (lambda: inn.Linear(4, 4), (6, 4)),
    "Permute": (lambda: inn.Permute(0, 2, 1), (3, 4, 2)),
    "PixelShuffle": (lambda: inn.PixelShuffle(2), (2, 8, 1, 2)),
    "PixelUnshuffle": (lambda: inn.PixelUnshuffle(2), (2, 1, 4, 2)),
    "Sequential": (
        lambda: inn.Sequential(inn.ActNorm(4), inn.Linear(4, 4), inn.AdditiveCoupling(block(), block()), inn.SELU()),
        (6, 4),
    ),
    "Unflatten": (lambda: inn.Unflatten(-2, (2, -1)), (3, 6, 2)),
}
BASES = {"Measured", "Module"}
each = pytest.mark.parametrize("name", MODULES)


def make(name):
    torch.manual_seed(0)
    return MODULES[name][0]().double(), torch.randn(MODULES[name][1], dtype=torch.float64)


def test_every_public_module_is_tried():
    assert {name.split()[0] for name in MODULES} | BASES == set(inn.__all__)


@each
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_values_gradients_and_buffers(other, name, training):
    module, x = make(name)
    module.train(training)
    on_device = copy.deepcopy(module).to(other)
    for _ in range(2):  # the first step sets parameters of some
        expected = gradients(module, x)
        assert_same(gradients(on_device, there(x)), expected)
        assert_same(list(on_device.buffers()), list(module.buffers()))


@each
def test_states_come_back(other, name):
    module, x = make(name)
    module.to(other)
    module(there(x))
    again = saved_and_loaded(module, MODULES[name][0]().double()).eval()
    assert_same(gradients(again, there(x)), gradients(module.eval(), there(x)))


@each
def test_the_inverse(other, name):
    module, x = make(name)
    module.to(other)
    x = there(x)
    module(x)
    module.eval()
    outputs = module.function(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert_same([module.inverse(*outputs)], [x])
    assert module.check(x, rtol=1e-9, atol=1e-9)


@each
def test_nothing_waits_after_the_first_step(other, name):
    module, x = make(name)
    module.to(other)
    x = there(x).requires_grad_()

    def step():
        module(x * 1).square().sum().backward()

    assert waits(step) == []


@each
def test_nor_does_the_inverse(other, name):
    module, x = make(name)
    module.to(other)
    x = there(x)
    module(x)
    module.eval()
    with torch.no_grad():
        outputs = module.function(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert waits(lambda: module.inverse(*outputs)) == []


def test_a_lost_input_is_no_number_and_an_error_that_comes_later(other):
    norm, y = inn.BatchNorm1d(3).to(other), torch.randn(8, 3, device=other)
    with torch.no_grad():
        norm.weight[1] = 0.0
    with watch() as log:
        x = norm.eval().inverse(y)
    assert log.where == []
    with pytest.raises(ValueError, match=r"channel\(s\) \[1\] is 0"):
        settle()
    assert x[:, 1].isnan().all()
    assert not x[:, ::2].isnan().any()


def test_a_stack_does_not_wait_either(other):
    torch.manual_seed(0)
    layers = [
        inn.ActNorm(4),
        inn.Linear(4, 4),
        inn.BatchNorm1d(4),
        inn.AffineCoupling(nn.Linear(2, 4), nn.Linear(2, 4)),
    ]
    model = inn.Sequential(*layers, *copy.deepcopy(layers)).to(other)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(16, 4, device=other)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    assert waits(step, times=3) == []
    assert model.last_drift < 1e-4
    compared = [layer.certificate.equal + layer.certificate.rounded for layer in model]
    assert all(compared)


class TestTheFlagOfActNorm:
    """It is read again whenever the buffer may be another."""

    def test_a_loaded_state_is_read(self, other):
        x = torch.randn(8, 3, device=other)
        norm, fresh = inn.ActNorm(3).to(other), inn.ActNorm(3).to(other)
        norm(3 + 2 * x)
        empty = fresh.state_dict()
        fresh(x)
        before = fresh.loc.clone()
        fresh.load_state_dict(norm.state_dict())
        fresh(x)  # is initialised, by what was loaded
        assert_same([fresh.loc], [norm.loc])
        fresh.load_state_dict({name: torch.zeros_like(value) for name, value in empty.items()})
        fresh(x)  # is not
        assert_same([fresh.loc], [before])

    def test_a_buffer_that_others_write_to_is_read(self, other):
        x, norm = torch.randn(8, 3, device=other), inn.ActNorm(3).to(other)
        norm(x)
        norm.initialized.fill_(False)  # as a broadcast of another process's buffers would
        norm(5 + x)
        assert_same([norm.loc], [(5 + x).mean(0)], 1e-5)

    def test_copies_and_moves_keep_it(self, other):
        x, norm = torch.randn(8, 3, device=other), inn.ActNorm(3).to(other)
        norm(x)
        for same in (copy.deepcopy(norm), copy.deepcopy(norm).cpu().to(other), copy.deepcopy(norm).double().float()):
            same(5 + x)
            assert_same([same.loc], [norm.loc])
