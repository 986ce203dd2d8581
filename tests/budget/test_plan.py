"""Plans: the peak is a measurement within the budget, gradients are plain, and the model is what it was."""

import copy
import pickle

import pytest
import torch
from torch import nn

import recollect
from recollect.budget import BudgetError
from recollect.memory import peak_memory


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + nn.functional.dropout(self.last(nn.functional.gelu(self.first(self.norm(x)))), 0.2, self.training)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Sequential(*[Block(32) for _ in range(8)]), nn.Linear(32, 4)).double()


def gradients(model, x):
    torch.manual_seed(1)
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def peak_of(model, x):
    with peak_memory("cpu") as memory:
        model(x).sum().backward()
    model.zero_grad()
    return memory.peak_bytes


@pytest.mark.parametrize("share", [1.0, 0.7, 0.5, 0.4])
def test_the_measured_peak_is_within_the_budget_and_gradients_are_plain(share):
    model, x = network(), torch.randn(256, 16, dtype=torch.float64)
    budget = int(peak_of(model, x) * share)
    expected, names = gradients(model, x), list(model.state_dict())
    plan = recollect.plan(model, x, budget=budget)
    assert all("forward" not in vars(part) for part in model.modules())
    with plan:
        assert plan.peak <= budget
        assert peak_of(model, x) <= budget
        assert list(model.state_dict()) == names
        for found, plain in zip(gradients(model, x), expected, strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)
        duplicate = pickle.loads(pickle.dumps(copy.deepcopy(model[1])))
        assert type(duplicate[0]) is Block
    assert all("forward" not in vars(part) for part in model.modules())


def test_an_impossible_budget_is_an_error_with_the_least_peak():
    model, x = network(), torch.randn(256, 16, dtype=torch.float64)
    with pytest.raises(BudgetError, match="the least peak that was measured") as caught:
        recollect.plan(model, x, budget="50 kB")
    assert recollect.plan(model, x, budget=caught.value.least).peak <= caught.value.least


def test_planning_leaves_the_model_as_it_was():
    model, x = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4)]), torch.randn(32, 8)
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    before, generator = [p.grad for p in model.parameters()], torch.get_rng_state()
    recollect.plan(model, x, budget="1 MB")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_apply_by_type():
    model, x = network(), torch.randn(256, 16, dtype=torch.float64)
    plain, expected = peak_of(model, x), gradients(model, x)
    with recollect.apply(model, Block):
        assert peak_of(model, x) < plain / 2
        assert all(map(torch.equal, gradients(model, x), expected))


def test_the_rows_of_an_earlier_plan_are_taken_again_within_the_budget():
    model, x = network(), torch.randn(256, 16, dtype=torch.float64)
    tight = recollect.plan(model, x, budget=peak_of(model, x) // 2)
    again = recollect.plan(model, x, budget="1 GB", rows=tight.rows)
    assert (again.rows, again.peak, again.steps) == (tight.rows, tight.peak, 1)
    everything = recollect.plan(model, x, budget="1 GB").rows
    assert recollect.plan(model, x, budget=tight.budget, rows=everything).peak <= tight.budget
    with pytest.raises(ValueError, match="'3' with the strategy 'store' is of another plan"):
        recollect.plan(model, x, budget="1 GB", rows=[recollect.budget.Row("3", 1, "store", 1, 0.0)])
