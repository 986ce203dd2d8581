"""Plans: the peak is a measurement within the budget, gradients are plain, and the model is what it was."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import recollect
from recollect.budget import BudgetError, _treatment
from recollect.budget._plan import Plan
from recollect.budget._treatment import Applied, Treated
from recollect.frames import Kept
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


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_layers_that_are_one_and_the_same_are_units(container):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.blocks = nn.Linear(16, 32), container([block] * 6) if lists else container(*[block] * 6)
            self.last = nn.Linear(32, 4)

        def forward(self, x):
            x = self.first(x)
            for part in self.blocks:
                x = part(x)
            return self.last(x)

    block, lists = Block(32), container is nn.ModuleList
    model, x = Tied().double(), torch.randn(256, 16, dtype=torch.float64)
    expected, budget = gradients(model, x), peak_of(model, x) // 2
    plan = recollect.plan(model, x, budget=budget)
    assert [row.unit for row in plan.rows] == ["blocks.0"] * 6
    with plan:
        assert peak_of(model, x) <= budget
        for found, plain in zip(gradients(model, x), expected, strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)


def test_an_impossible_budget_is_an_error_with_the_least_peak():
    model, x = network(), torch.randn(256, 16, dtype=torch.float64)
    with pytest.raises(BudgetError, match="the least peak that was measured") as caught:
        recollect.plan(model, x, budget="50 kB")
    plan = recollect.plan(model, x, budget=caught.value.least)
    assert plan.peak <= caught.value.least
    assert plan.seconds < 1000  # and not the bytes that were made small for it


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


def test_planning_takes_five_steps_at_most_and_alike_units_are_measured_once():
    runs = 0

    class Counted(Block):
        def forward(self, x):
            nonlocal runs
            runs += 1
            return super().forward(x)

    model, x = nn.Sequential(*[Counted(8) for _ in range(100)]), torch.randn(256, 8)
    budget = int(peak_of(model, x) * 0.4)
    runs = 0
    plan = recollect.plan(model, x, budget=budget, loss=torch.sum)
    assert plan.peak <= budget
    assert plan.steps <= 5
    assert runs <= 100 + 40 + 4 * 2 * 100  # one forward pass, one unit in every way, four steps with all rebuilds


@pytest.mark.parametrize("more", [0.02, 0.1, 0.2])
def test_peaks_above_the_estimates_leave_little_of_the_budget(monkeypatch, more):
    """A step takes more than was estimated, by so much of the budget: the choice is near it, and not the least."""
    model, x = nn.Sequential(*[Block(32) for _ in range(24)]), torch.randn(256, 32)
    budget, measured = int(peak_of(model, x) * 0.7), Plan._verify

    def verify(plan, rows):
        return measured(plan, rows) + int(more * budget)

    monkeypatch.setattr(Plan, "_verify", verify)
    plan = recollect.plan(model, x, budget=budget, loss=torch.sum)
    assert 0.85 * budget <= plan.peak <= budget
    assert plan.steps <= 5


def test_what_adds_time_says_so_also_where_bytes_alone_decide():
    model, x = network(), torch.randn(256, 16, dtype=torch.float64)
    with pytest.raises(BudgetError) as error:
        recollect.plan(model, x, budget=1)
    plan = recollect.plan(model, x, budget=error.value.least)
    assert plan.peak <= error.value.least
    assert plan.seconds < 10.0
    assert all((row.seconds > 0.0) == (row.strategy != "store") for row in plan.rows)


def test_products_that_were_written_to_are_computed_again():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.out(self.lin(x).sigmoid_() * x).tanh_()

    torch.manual_seed(0)
    model, x = nn.Sequential(*[Unit() for _ in range(3)]).double(), torch.randn(4, 6, dtype=torch.float64)
    expected = gradients(model, x)
    with Applied([Treated(unit, Kept(), selective=True) for unit in model]):
        found = gradients(model, x)
        loss = model(x).square().sum()
        for _ in range(2):
            again = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, again, expected))


def test_kept_products_are_not_computed_again(monkeypatch):
    monkeypatch.setattr(_treatment, "compiled_blocks_exist", lambda: False)  # other tests may have made some
    computed = 0

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal computed
            computed += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
            return func(*args, **(kwargs or {}))

    model, x = nn.Sequential(*[Block(8) for _ in range(3)]), torch.randn(4, 8)
    numbers = []
    for selective in (None, True, False):
        fronts = [] if selective is None else [Treated(unit, Kept(), selective=selective) for unit in model]
        with Applied(fronts), Products():
            computed = 0
            model(x).sum().backward()
        numbers.append(computed)
    assert numbers[0] == numbers[1] < numbers[2]


def test_a_unit_that_does_not_repeat_is_stored_and_alike_ones_are_told_apart():
    class Unit(nn.Module):
        def __init__(self, noisy):
            super().__init__()
            self.lin, self.out, self.noisy = nn.Linear(16, 64), nn.Linear(64, 16), noisy

        def forward(self, x):
            return self.out((self.lin(x) + (random.random() if self.noisy else 0.5)).tanh().exp())

    model, x = nn.Sequential(*[Unit(i == 3) for i in range(6)]), torch.randn(64, 16)
    plan = recollect.plan(model, x, budget=int(0.8 * peak_of(model, x)))
    assert plan.rows[3].strategy == "store"
    assert {row.strategy for row in plan.rows} > {"store"}
    with plan:
        model(x).sum().backward()


def test_what_a_chain_of_inverses_takes_is_the_least_peak():
    """What inverses need is estimated from above: without a try the least peak would be that of other choices."""
    torch.manual_seed(0)

    def block():
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))

    model = nn.Sequential(*(recollect.invertible.AdditiveCoupling(block(), block()) for _ in range(6)))
    x = torch.randn(256, 16)
    budget = peak_of(model, x) * 51 // 50
    plan = recollect.plan(model, x, budget=budget)
    assert plan.peak <= budget
    with pytest.raises(BudgetError) as caught:
        recollect.plan(model, x, budget="20 kB")
    assert caught.value.least <= budget


def test_rows_are_taken_again_where_the_first_step_makes_what_later_ones_find():
    cache: list = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = network()[1]

        def forward(self, x):
            if not cache:
                cache.append(torch.ones(1 << 16))
            return self.blocks(x)

    model, x = Net(), torch.randn(256, 32, dtype=torch.float64)
    model(x)
    plan = recollect.plan(model, x, budget=peak_of(model, x) // 2)
    cache.clear()
    again = recollect.plan(model, x, budget=plan.peak, rows=plan.rows)
    assert (again.rows, again.peak, again.steps) == (plan.rows, plan.peak, 2)


def test_a_stored_unit_has_nothing_in_front_of_it():
    model, x = network(), torch.randn(256, 16, dtype=torch.float64)
    with recollect.plan(model, x, budget=int(0.7 * peak_of(model, x))) as plan:
        stored = {row.unit for row in plan.rows if row.strategy == "store"}
        assert stored
        for row in plan.rows:
            assert ("forward" in vars(model.get_submodule(row.unit))) == (row.unit not in stored)


class Criterion(nn.Module):
    """A head and its statistics, which only the loss runs."""

    def __init__(self):
        super().__init__()
        self.norm, self.head, self.calls = nn.BatchNorm1d(4).double(), nn.Linear(4, 3).double(), 0

    def forward(self, out, y=None):
        self.calls += 1
        found = self.head(self.norm(out))
        return found.square().mean() if y is None else nn.functional.cross_entropy(found, y)


def held(*modules):
    return [(t.detach().clone(), t.grad) for module in modules for t in (*module.parameters(), *module.buffers())]


def assert_held(before, *modules):
    for (value, gradient), (now, then) in zip(held(*modules), before, strict=True):
        assert torch.equal(value, now)
        assert gradient is then


def test_what_only_the_loss_runs_is_left_as_it_was():
    model, criterion, x = network(), Criterion(), torch.randn(64, 16, dtype=torch.float64)
    criterion(model(x)).backward()
    before = held(model, criterion)
    plan = recollect.plan(model, x, budget="1 GB", loss=criterion)
    assert_held(before, model, criterion)
    assert criterion.calls == 1
    with plan:
        model(torch.randn(96, 16, dtype=torch.float64))  # a larger step is tried
    assert_held(before, model, criterion)


def test_hooks_that_move_parameters_are_not_called_in_steps_that_are_tried():
    model, x = network(), torch.randn(64, 16, dtype=torch.float64)
    moved = []

    def move(parameter):
        moved.append(parameter)
        with torch.no_grad():
            parameter.sub_(parameter.grad)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(move)
        parameter.register_hook(lambda grad: moved.append(grad))
    before = held(model)
    plan = recollect.plan(model, x, budget="1 GB")
    assert not moved
    assert_held(before, model)
    with plan:
        model(x).sum().backward()
    assert len(moved) == 2 * len(list(model.parameters()))


class Pops(nn.Module):
    """Takes its input out of a mapping, and writes to it."""

    def __init__(self):
        super().__init__()
        self.blocks = network()

    def forward(self, inputs):
        return self.blocks(inputs.pop("x").mul_(2.0))


def test_inputs_stay_what_they_were():
    model, x = Pops(), torch.randn(64, 16, dtype=torch.float64)
    inputs = {"x": x.clone()}
    recollect.plan(model, (inputs,), budget="1 GB")
    assert list(inputs) == ["x"]
    assert torch.equal(inputs["x"], x)


def test_a_larger_step_that_cannot_be_tried_is_told():
    model, y = network(), torch.zeros(64, dtype=torch.int64)
    small, large = (torch.randn(n, 16, dtype=torch.float64) for n in (64, 96))
    options = {"budget": "1 GB", "loss": lambda out: nn.functional.cross_entropy(out, y)}
    with (
        recollect.plan(model, small, **options),
        pytest.warns(recollect.budget.BudgetWarning, match=r"could not be tried \(ValueError.*loss="),
    ):
        model(large)
    with (
        recollect.plan(model, small, on_exceed="raise", **options),
        pytest.raises(BudgetError, match="could not be tried"),
    ):
        model(large)


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(32) for _ in range(3)]).double()

    def forward(self, x, times=1, step=0):
        for _ in range(times):
            x = self.blocks(x)
        return x


def test_what_changes_the_peak_is_looked_at():
    x = torch.randn(64, 32, dtype=torch.float64)
    model = Times()
    with recollect.plan(model, (x, 1), budget="1.5 MB", on_exceed="raise"), pytest.raises(BudgetError):
        model(x, 9)
    model.requires_grad_(False)
    model.blocks[2].requires_grad_(True)
    plan = recollect.plan(model, x, budget=peak_of(model, x), on_exceed="raise")
    plan.apply()
    model.requires_grad_(True)
    with plan, pytest.raises(BudgetError):
        model(x)
    half = Times().float()
    plan = recollect.plan(half, x.float(), budget=peak_of(half, x.float()), on_exceed="raise")
    plan.apply()
    half.double()
    with plan, pytest.raises(BudgetError):
        half(x)


def test_a_number_that_grows_and_takes_nothing_is_soon_not_looked_at(monkeypatch):
    model, x = Times(), torch.randn(64, 32, dtype=torch.float64)
    plan = recollect.plan(model, (x, 1, 0), budget="1 GB")
    looks, real = [], type(plan._step).peak
    monkeypatch.setattr(type(plan._step), "peak", lambda step: looks.append(step) or real(step))
    with plan:
        for step in range(1, 12):
            model(x, 1, step)
    assert len(looks) == 3


def test_units_with_weights_that_hooks_compute():
    model, x = network(), torch.randn(64, 16, dtype=torch.float64)
    for block in model[1]:
        prune.l1_unstructured(block.first, "weight", 0.5)
    expected = gradients(model, x)
    for units in (None, nn.Linear):
        with recollect.plan(model, x, budget="2 MB", units=units):
            for found, plain in zip(gradients(model, x), expected, strict=True):
                torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)


def test_a_unit_that_is_copied_in_the_forward_pass():
    class Teaching(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = network()

        def forward(self, x):
            teacher = copy.deepcopy(self.blocks)
            return self.blocks(x) - teacher(x).detach()

    model, x = Teaching(), torch.randn(64, 16, dtype=torch.float64)
    model.eval()
    expected = gradients(model, x)
    with recollect.plan(model, x, budget="1 GB"):
        for found, plain in zip(gradients(model, x), expected, strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)


class Scaled(nn.Module):
    """Multiplies by a tensor of its own that is no parameter and no buffer; autograd saves it."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.lin, self.table = nn.Linear(16, 16), table

    def forward(self, x):
        return self.lin(x) * self.table


def test_what_layers_hold_anyway_does_not_count():
    model = nn.Sequential(*[Scaled(torch.randn(256, 16)) for _ in range(6)])
    x = torch.randn(256, 16)
    plan = recollect.plan(model, x, budget=peak_of(model, x), units=Scaled)
    assert [row.keeps for row in plan.rows] == [
        0,
        *5 * [256 * 16 * 4],
    ]  # inputs; the first is there anyway
    assert {row.strategy for row in plan.rows} == {"store"}
    assert plan.steps == 2  # the one that is measured, and one that shows that everything fits


@pytest.mark.parametrize("holder", [nn.ModuleList, list, tuple])
def test_units_that_are_given_as_modules(holder):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Block(4) for _ in range(3)), nn.Linear(4, 2)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    gradients = []
    for framed in (False, True):
        torch.manual_seed(0)
        net = Net()
        if framed:
            recollect.apply(net, net.blocks if holder is nn.ModuleList else holder(net.blocks))
        net(torch.randn(5, 4)).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert torch.equal(expected, found)
    with pytest.raises(ValueError, match="matches none of its modules"):
        recollect.apply(net, nn.Linear(4, 4))
