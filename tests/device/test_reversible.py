"""Reversible layers on another device: values, random numbers, waits."""

import copy

import pytest
import torch
from torch import nn

from device.compare import assert_same, gradients, saved_and_loaded, there, waits
from recollect import reversible
from recollect.frames import LatticeError, settle
from recollect.reversible import BDIA, GroupAddRev, GroupRevRes, InvertibleModule, Midpoint


class Block(nn.Module):
    """Normalisation, a linear layer, and noise."""

    def __init__(self, width=4, dropout=0.3):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, *args):
        x = next(arg for arg in args if isinstance(arg, torch.Tensor))  # DGL's graph comes first, torch's features
        return self.dropout(self.linear(self.norm(x).relu()))


class Swap(InvertibleModule):
    """(a, b) -> (b + f(a), a)."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.block = Block(4, dropout)

    def _forward(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat([b + self.block(a), a], -1)

    def _inverse(self, y):
        b, a = y.chunk(2, -1)
        return torch.cat([a, b - self.block(a)], -1)


LAYERS = {
    "GroupAddRev": lambda **o: GroupAddRev(Block(**o), num_groups=2),
    "GroupRevRes": lambda **o: GroupRevRes(Block(**o), groups=2),
    "InvertibleModule": lambda **o: Swap(**o),
    "exact": lambda **o: GroupAddRev(Block(**o), num_groups=2, exact=True),
    "Midpoint": lambda **o: Midpoint(Block(8, **o) for _ in range(3)),
    "BDIA": lambda **o: BDIA(Block(8, **o) for _ in range(3)),
}
each = pytest.mark.parametrize("name", LAYERS)


def call(layer, x):
    if isinstance(layer, (Swap, Midpoint, BDIA)):
        return layer(x)
    return layer(None, x) if isinstance(layer, GroupRevRes) else layer(x, None)


class Stack(nn.Module):
    def __init__(self, name, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(LAYERS[name](**options) for _ in range(4)).double()

    def forward(self, x):
        for layer in self.layers:
            x = call(layer, x)
        return x

    def plain(self):
        same = copy.deepcopy(self)
        for layer in same.layers:
            layer.disable = True
        return same


def test_every_public_layer_is_tried():
    assert set(LAYERS) == {"exact", *reversible.__all__} - {"Beside"}  # which is rows, and no layer


@each
def test_values_and_states(other, name):
    stack, x = Stack(name, dropout=0.0), torch.randn(6, 8, dtype=torch.float64)
    if name == "BDIA":
        stack.eval()  # in training it draws, and another device other numbers
    expected = gradients(stack, x)
    stack.to(other)
    assert_same(gradients(stack, there(x)), expected)
    assert_same(gradients(saved_and_loaded(stack, Stack(name, dropout=0.0).train(stack.training)), there(x)), expected)


@each
def test_random_numbers_of_the_device_are_replayed(other, name):
    stack, x = Stack(name).to(other), torch.randn(6, 8, dtype=torch.float64).to(other)
    torch.manual_seed(5)
    expected, after = gradients(stack.plain(), x), torch.rand(3, device=other)
    torch.manual_seed(5)
    assert_same(gradients(stack, x), expected)
    assert_same([torch.rand(3, device=other)], [after])  # the generator goes on as if nothing had happened
    settle()


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(other, name, dtype):
    stack, x = Stack(name).float().to(other), torch.randn(6, 8, device=other)
    found = []
    for network in (stack.plain(), stack):
        torch.manual_seed(5)
        found.append(gradients(network, x, within=torch.autocast(other, dtype=dtype)))
    assert_same(found[1], found[0], 2e-2)
    settle()


@each
def test_a_step_does_not_wait(other, name):
    stack, x = Stack(name).to(other), torch.randn(6, 8, dtype=torch.float64).to(other).requires_grad_()

    def step():
        stack(x * 1).square().sum().backward()

    assert waits(step, times=3) == []
    assert stack.layers[0].last_drift < 1e-12
    assert all(layer.certificate.equal + layer.certificate.rounded for layer in stack.layers)


@pytest.mark.parametrize("value", [300.0, float("nan")])
def test_what_is_out_of_range_is_refused_when_it_has_arrived(other, value):
    class Grows(nn.Module):
        def forward(self, x, graph):
            return torch.full_like(x, value)

    layer, x = GroupAddRev(Grows(), num_groups=2, exact=True), torch.zeros(3, 8, device=other)

    def run():
        with torch.no_grad():
            layer(x, None)
        settle()

    with pytest.raises(LatticeError, match=r"^Grows\(\)"):
        run()
    settle()
    assert layer(x.new_empty(0, 8), None).shape == (0, 8)
