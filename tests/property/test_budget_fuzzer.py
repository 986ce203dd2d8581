"""Random networks under random memory budgets: plain gradients, a peak within the budget, and the model as it was.

``RECOLLECT_FUZZ=2000 pytest tests/property/test_budget_fuzzer.py`` tries that many networks;
``python tests/property/budget_programs.py SEED`` shows one.
"""

import os
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import budget_programs
import pytest
import torch
from budget_programs import STRATEGIES, Program
from budget_units import UNITS, ZOO

from recollect.budget import _cost, _problem, _treatment

PROGRAMS = int(os.environ.get("RECOLLECT_FUZZ", "120"))
PARTS = 6


def told(failures):
    return f"{len(failures)} networks fail:\n" + "\n".join(str(one)[:1500] for one in failures[:4])


@pytest.mark.parametrize("part", range(PARTS))
def test_networks(part):
    verdicts = [budget_programs.run(seed) for seed in range(part, PROGRAMS, PARTS)]
    failures = [one for one in verdicts if one.faults]
    assert not failures, told(failures)
    kinds = Counter(one.kind for one in verdicts)
    assert kinds["planned"] > 0.5 * len(verdicts), kinds
    assert kinds["void"] <= max(3, 0.1 * len(verdicts)), kinds


@pytest.mark.parametrize("name", [*UNITS, *ZOO])
def test_each_unit_alone(name):
    verdict = budget_programs.run(len(name), name)
    assert not verdict.faults, told([verdict])


def test_all_units_and_strategies_are_drawn():
    programs = [Program(seed) for seed in range(600)]
    assert {kind for program in programs for kind in program.kinds} >= {*UNITS, *ZOO}
    assert {program.strategy for program in programs} == {None, *STRATEGIES}


def found(programs, of_use):
    """Return whether a fault shows in any of these networks, of those in which it could."""
    return any(budget_programs.run(seed).faults for seed in range(programs) if of_use(Program(seed)))


def test_units_that_do_not_repeat_are_found(monkeypatch):
    real = _cost.Cost

    def repeating(*args: Any) -> Any:
        return real(*args[:4], True, *args[5:])  # type: ignore[call-arg]

    monkeypatch.setattr(_cost, "Cost", repeating)
    assert any(budget_programs.run(seed, "random_of_python").faults for seed in range(40))


def test_casts_that_are_not_counted_are_found(monkeypatch):
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    assert found(60, lambda program: program.autocast)


def test_a_least_budget_that_is_another_each_time_is_found(monkeypatch):
    """Times that are another in each measurement must not move the least budget."""
    draw, real = random.Random(0), _cost.Cost

    def noisy(forward: int, backward: int, *times: Any) -> Any:
        seconds, repeats, sparing, *rest = times
        if sparing is not None:
            sparing = replace(sparing, seconds=sparing.seconds * draw.uniform(0.1, 10))
        return real(forward, backward, seconds * draw.uniform(0.1, 10), repeats, sparing, *rest)

    def solved(program):
        return program.strategy is None

    monkeypatch.setattr(_cost, "Cost", noisy)
    for part in (_cost, _treatment):  # other tests may have made some
        monkeypatch.setattr(part, "compiled_blocks_exist", lambda: False)
    assert not found(40, solved)
    draw.seed(0)
    monkeypatch.setattr(_problem, "_untimed", lambda way: way)
    assert found(150, solved)
