"""Rows of a ``Sequential``'s units run as one frame where nobody can tell, and unit by unit where somebody could."""

import copy
import pickle

import pytest
import torch
from torch import nn

import recollect
from recollect.budget import Row, _treatment
from recollect.frames import run_frame
from recollect.memory import peak_memory

WIDTH = 16


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.last(nn.functional.dropout(self.first(x).tanh(), 0.2))


def network(container=nn.Sequential):
    torch.manual_seed(0)
    units = [Unit() for _ in range(6)]
    return (container(*units) if container is nn.Sequential else container(units)).double()


def rows(*words, names=None):
    strategies = {"c": "checkpoint", "l": "link", ".": "store", "s": "selective"}
    return [
        Row(name, 0, strategies[letter], 0, 0.0)
        for name, letter in zip(names or map(str, range(6)), "".join(words), strict=False)
    ]


def numbers():
    return torch.randn(8, WIDTH, dtype=torch.float64, requires_grad=True)


def gradients(model, x, run=None):
    torch.manual_seed(1)
    return torch.autograd.grad((run or model)(x).square().sum(), [x, *model.parameters()])


@pytest.fixture
def frames(monkeypatch):
    """The number of frames that stood around units."""
    found, real = [], run_frame

    def counted(*args, **kwargs):
        found.append(args[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(_treatment, "run_frame", counted)
    return found


def planned(model, x, *words, **options):
    plan = recollect.plan(model, x, budget="1 GB", rows=rows(*words), **options)
    assert [row.strategy[0] for row in plan.rows] == ["s" if w in ".s" else w for w in "".join(words)]
    return plan


@pytest.mark.parametrize(
    ("words", "number"), [("clllll", 1), ("clcll.", 2), ("cl.clc", 3), ("scllcl", 2), ("cccccc", 6), ("......", 0)]
)
def test_a_row_is_one_frame_and_gradients_are_plain(frames, words, number):
    model, x = network(), numbers()
    expected, names = gradients(model, x), list(model.state_dict())
    with planned(model, x, words):
        frames.clear()
        assert all(map(torch.equal, gradients(model, x), expected))
        assert len(frames) == number
        assert list(model.state_dict()) == names
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            frames.clear()
            assert all(map(torch.equal, gradients(twin, x), expected))
            assert len(frames) == number
            assert "forward" in vars(twin) or number in (0, 6)
    assert "forward" not in vars(model)
    frames.clear()
    assert all(map(torch.equal, gradients(model, x), expected))
    assert not frames


def test_a_row_keeps_its_input_alone():
    model, x = network(), torch.randn(256, WIDTH, dtype=torch.float64, requires_grad=True)
    with planned(model, x, "clllll"), peak_memory("cpu") as memory:
        y = model(x)
    assert memory.current_bytes < 2 * y.nbytes


def test_a_row_over_two_containers_is_two_frames_the_second_of_which_keeps_nothing(frames):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*[Unit() for _ in range(3)]), nn.Sequential(*[Unit() for _ in range(3)]))
    model, x = model.double(), torch.randn(256, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = gradients(model, x)
    given = rows("clllll", names=[f"{i}.{j}" for i in range(2) for j in range(3)])
    with recollect.plan(model, x, budget="1 GB", rows=given):
        frames.clear()
        with peak_memory("cpu") as memory:
            y = model(x)
        assert len(frames) == 2
        assert memory.current_bytes < 2 * y.nbytes
        assert all(map(torch.equal, gradients(model, x), expected))


def test_hooks_of_units_are_called_once_in_a_step(frames):
    model, x = network(), numbers()
    expected, seen = gradients(model, x), []
    with planned(model, x, "clllcl"):
        handle = model[2].register_forward_hook(lambda *_: seen.append(recollect.in_backward()))
        frames.clear()
        assert all(map(torch.equal, gradients(model, x), expected))
        assert seen == [False]
        assert len(frames) == 4 + 1  # the other row is none the wiser
        handle.remove()
        frames.clear()
        gradients(model, x)
        assert len(frames) == 2


def test_units_that_are_called_in_another_way_are_in_frames_of_their_own(frames):
    model, x = network(), numbers()
    ways = {
        "out of order": lambda x: model[1](model[3](model[0](x))),
        "what is in between is used": lambda x: model[1](h := model[0](x)) + h,
        "a part of them": lambda x: model[1:4](x),
    }
    for run in ways.values():
        expected = torch.autograd.grad(_seeded(run, x), [x, *model.parameters()], allow_unused=True)
        with planned(model, x, "clllll"):
            frames.clear()
            found = torch.autograd.grad(_seeded(run, x), [x, *model.parameters()], allow_unused=True)
        assert len(frames) >= 2
        for ours, plain in zip(found, expected, strict=True):
            assert (ours is None) == (plain is None)
            assert ours is None or torch.equal(ours, plain)


def _seeded(run, x):
    torch.manual_seed(1)
    return run(x).square().sum()


def test_a_container_that_has_changed_runs_unit_by_unit(frames):
    model, x = network(), numbers()
    with planned(model, x, "clllll"):
        model.append(Unit().double())
        expected = gradients(model, x)  # parameters that were not there are tried
        frames.clear()
        found = gradients(model, x)
        assert len(frames) == 6
    assert all(map(torch.equal, found, gradients(model, x)))
    assert all(map(torch.equal, found, expected))


def test_a_unit_that_is_called_twice_is_in_no_row(frames):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = network()

        def forward(self, x):
            return self.units(self.units[0](x))

    model, x = Twice(), numbers()
    expected = gradients(model, x)
    given = rows("cclllll", names=[f"units.{i}" for i in (0, *range(6))])
    with recollect.plan(model, x, budget="1 GB", rows=given):
        frames.clear()
        assert all(map(torch.equal, gradients(model, x), expected))
        assert len(frames) == 3  # of the first unit both times, and of the others together


def test_a_list_is_called_by_others(frames):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = network(nn.ModuleList)

        def forward(self, x):
            for one in self.units:
                x = one(x)
            return x

    model, x = Loop(), numbers()
    expected = gradients(model, x)
    with recollect.plan(model, x, budget="1 GB", rows=rows("clllll", names=[f"units.{i}" for i in range(6)])):
        frames.clear()
        assert all(map(torch.equal, gradients(model, x), expected))
        assert len(frames) == 6
