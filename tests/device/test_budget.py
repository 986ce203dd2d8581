"""Memory measured, planned and kept within on another device."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import recollect
from device.compare import assert_same, gradients, there, waits
from recollect.budget import Applied, BudgetError, BudgetWarning, Plan, Row, find_units
from recollect.frames import Kept, Offload, Previous, settle
from recollect.invertible import AdditiveCoupling
from recollect.memory import peak_memory, tensor_bytes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(self.first(x).tanh().sin())


def network():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(6))).double()


def inputs():
    return torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss(y):
    return y.square().sum()


def step_of(model, x):
    return lambda: loss(model(x)).backward()


def peak_of(model, x):
    with peak_memory(x.device) as memory:
        step_of(model, x)()
    model.zero_grad()
    return memory.peak_bytes


class TestMemory:
    def test_what_lies_on_the_device_counts(self, other):
        with peak_memory(other) as memory:
            kept = torch.zeros(1000, device=other)
            beside = [torch.ones(1000, device=other) * 2, torch.zeros(500)]
            del beside
        assert (memory.peak_bytes, memory.current_bytes) == (12_000, 4_000)
        assert tensor_bytes(kept) == 4_000

    def test_all_devices_together(self, other):
        with peak_memory() as memory:
            kept = torch.zeros(1000, device=other), torch.zeros(10)
        assert memory.by_device["cpu"] == 40
        assert memory.by_device[other] == 4_000
        assert memory.peak_bytes == 4_040
        del kept

    def test_a_step_takes_what_it_takes_on_the_cpu(self, other):
        model, x = network(), inputs()
        expected = peak_of(model, x)
        assert peak_of(model.to(other), there(x)) == expected


@pytest.mark.parametrize("share", [0.95, 0.7])
def test_plans_are_those_of_the_cpu(other, share):
    model, x = network(), inputs()
    most, expected = peak_of(model, x), gradients(model, x)
    on_device, moved = copy.deepcopy(model).to(other), there(x)
    made = recollect.plan(on_device, moved, budget=int(share * most), on_exceed="raise", loss=loss)
    assert isinstance(made, Plan)
    assert made.peak <= share * most < most
    assert {row.strategy for row in made.rows} != {"store"}
    assert all(isinstance(row, Row) for row in made.rows)
    before = [parameter.grad for parameter in on_device.parameters()]
    assert before == [None] * len(before)  # as before the steps that were tried
    with made:
        assert_same(gradients(on_device, moved), expected)
        assert peak_of(on_device, moved) <= share * most
        assert waits(step_of(on_device, moved), times=3) == []
    assert peak_of(on_device, moved) == most
    settle()


def test_random_numbers_and_the_generator_stay(other):
    class Drops(Block):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.3)

    torch.manual_seed(0)
    model, x = nn.Sequential(*(Drops() for _ in range(4))).to(other), torch.randn(64, 16, device=other)
    torch.manual_seed(5)
    expected = [*gradients(model, x), torch.rand(3, device=other)]
    torch.manual_seed(5)
    made = recollect.plan(model, x, budget=int(0.8 * peak_of(model, x)), on_exceed="raise", loss=loss)
    with made:
        torch.manual_seed(5)
        assert_same([*gradients(model, x), torch.rand(3, device=other)], expected, 1e-5)
    settle()


def test_host_memory_may_be_offloaded_to(other):
    """Which waits for the copies alone, where a device has no streams."""
    model, x = network().to(other), there(inputs())
    expected = gradients(model, x)
    made = recollect.plan(model, x, budget=int(0.6 * peak_of(model, x)), offload=True, on_exceed="raise", loss=loss)
    with made:
        assert_same(gradients(model, x), expected)
        found = waits(step_of(model, x))
    offloaded = sum(row.strategy == "offload" for row in made.rows)
    assert len(found) == 2 * offloaded
    assert all(where.startswith("copy_ at") and "_host_store.py" in where for where in found)


def test_a_budget_that_cannot_be_met_says_what_can(other):
    model, x = network().to(other), there(inputs())
    with pytest.raises(BudgetError, match="the least peak that was measured") as caught:
        recollect.plan(model, x, budget="10 kB")
    assert recollect.plan(model, x, budget=caught.value.least).peak <= caught.value.least
    with pytest.raises(ValueError, match="torch does not say how much memory other"):
        recollect.plan(model, x, budget="50%")


def test_a_larger_batch_is_told_of(other):
    model, x = network().to(other), there(inputs())
    made = recollect.plan(model, x, budget=peak_of(model, x), loss=loss)
    with made, pytest.warns(BudgetWarning):
        step_of(model, torch.cat([x, x]))()


@pytest.mark.parametrize("source", [None, Kept(), Previous(), Offload()], ids=lambda source: type(source).__name__)
def test_units_run_in_frames(other, source):
    model, x = network(), inputs()
    expected = gradients(model, x)
    model.to(other)
    applied = recollect.apply(model, list(find_units(model)), source or Kept())
    assert isinstance(applied, Applied)
    assert_same(gradients(model, there(x)), expected)
    found = waits(step_of(model, there(x)))
    assert [where for where in found if "_host_store.py" not in where] == []
    settle()


def test_couplings_are_inverted(other):
    torch.manual_seed(0)
    model = nn.Sequential(*(AdditiveCoupling(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4))).double()
    x = inputs()
    expected = gradients(model, x)
    model.to(other)
    made = recollect.plan(model, there(x), budget=peak_of(model, there(x)), loss=loss)
    with made:
        assert_same(gradients(model, there(x)), expected)
        assert waits(step_of(model, there(x))) == []
    settle()
