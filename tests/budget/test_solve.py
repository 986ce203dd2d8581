"""The dynamic programme beside all choices tried one by one."""

import random
from dataclasses import replace

import pytest
import torch

from recollect.budget._cost import Cost, Sparing
from recollect.budget._measure import Call, Measured
from recollect.budget._problem import problem_of, timed
from recollect.budget._solve import Problem, Region, least, lengths_of, room_of, solve


def brute(problem, at=0, kept=0):
    if at == len(problem.alone):
        return 0.0 if kept <= problem.end else float("inf")
    ways = [(1, region) for region in problem.alone[at]]
    for length in range(2, len(problem.alone) - at + 1):
        region = problem.row(at, length)
        if region is None:
            break
        ways.append((length, region))
    fit = [(n, r) for n, r in ways if kept + r.keeps + r.moment <= problem.limits[at]]
    return min((r.seconds + brute(problem, at + n, kept + r.keeps) for n, r in fit), default=float("inf"))


@pytest.mark.parametrize("seed", range(60))
def test_optimal_among_all_choices(seed):
    draw = random.Random(seed)
    number = draw.randint(1, 10 if seed % 6 == 0 else 7)
    saved, taken = ([draw.randint(low, high) for _ in range(number)] for low, high in ((5, 40), (1, 5)))
    times = [draw.random() for _ in range(number)]
    budget = draw.randint(40, 40 * number + 20)

    def row(start, length):
        return Region(
            "checkpoint", taken[start], sum(saved[start : start + length]), sum(times[start : start + length])
        )

    alone = [
        [Region("store", s, 3, 0.0), Region("checkpoint", t, s + 3, c)]
        for s, t, c in zip(saved, taken, times, strict=True)
    ]
    problem = Problem(alone, [budget - draw.randint(0, 5) for _ in range(number)], budget, row)
    found, least = solve(problem), brute(problem)
    assert (found is None) == (least == float("inf"))
    if found is not None:
        assert found.seconds == pytest.approx(least)
        assert sum(length for length, _ in found.regions) == number


# Calls as they are measured: transient bytes of forward and backward, what comes from the unit before, gradients that
# are there already, units that cannot be run again or whose output cannot.


def cost(draw):
    forward, backward = draw.randint(0, 9), draw.randint(0, 25)
    seconds = draw.random()
    selective = None
    if draw.random() < 0.6:
        selective = Sparing(draw.randint(1, 15), draw.randint(0, 20), seconds * draw.random(), draw.randint(0, 6))
    offloaded = seconds + draw.random() if draw.random() < 0.3 else None
    inverted = seconds * (1 + draw.random()) if draw.random() < 0.3 else None
    return Cost(forward, backward, seconds, draw.random() < 0.8, selective, offloaded, inverted)


def calls(draw, number):
    found, rest = [], draw.randint(0, 20)
    for index in range(number):
        taken = {index: draw.randint(1, 12)}
        saved = dict(taken) if draw.random() < 0.5 else {100 + index: 5}
        call = Call(
            f"{index}", None, cost(draw) if draw.random() < 0.9 else None, saved, taken, {index + 1: 4},
            chained=index > 0 and draw.random() < 0.85, outside=index * draw.randint(0, 2),
        )  # fmt: skip
        call.kept = draw.randint(5, 40)
        call.input = sum(taken.values())
        call.gradients = rest + (number - index) * 3
        found.append(call)
    return found


def peak_of(measured, regions):
    """The largest number of bytes at any moment of a step, moment by moment."""
    calls, at, kept, moments = measured.calls, 0, 0, [0]
    for length, region in regions:
        call = calls[at]
        moments.append(kept + region.keeps + region.moment + call.outside + call.gradients)
        kept += region.keeps
        at += length
    return max(*moments, kept + measured.outside)


def ways(calls, at):
    """All that may be done from one call on: by name, what it keeps, its moment, its seconds, and how many calls."""
    call = calls[at]
    own = max(0, call.kept - (call.input if set(call.taken) & set(call.saved) else 0))
    worst = 0 if call.cost is None else max(call.cost.forward, call.cost.backward)
    yield 1, Region("store", call.kept, worst, 0.0)
    if call.cost is None:
        return
    yield 1, Region("checkpoint", call.input, own + worst, call.cost.seconds)
    yield from sparing(calls, at)
    if call.cost.offloaded is not None:
        yield 1, Region("offload", 0, call.input + own + worst, call.cost.offloaded)
    if call.cost.inverted is not None:
        yield 1, Region("invert", 0, 2 * call.input + own + worst, call.cost.inverted)
    built, moment, seconds = own, own + worst, 0.0
    for last in range(at + 1, len(calls)):
        before, one = calls[last - 1], calls[last]
        if one.cost is None or not one.chained or not before.cost.repeats:
            return
        built += one.kept
        moment = max(moment, built + max(one.cost.forward, one.cost.backward))
        seconds += before.cost.seconds
        yield last - at + 1, Region("checkpoint", call.input, moment, seconds + one.cost.seconds)


def sparing(calls, at):
    """Rows of units that do not keep what cheap functions return, which the input of the next one may be."""
    keeps, moments, seconds = 0, [], 0.0
    for last in range(at, len(calls)):
        call, before = calls[last], calls[last - 1].cost if last > at else None
        if call.cost is None or call.cost.selective is None:
            return
        own = call.cost.selective
        given = 0 if before is None else before.selective.spared
        if last > at and (given == 0 or not call.chained):
            return
        keeps += own.kept + max(0, call.input - given)
        moments.append(keeps + own.moment + call.outside + call.gradients)
        seconds += own.seconds
        yield (
            last - at + 1,
            Region("selective", keeps, max(moments) - calls[at].outside - calls[at].gradients - keeps, seconds),
        )


def fastest(measured, budget, at=0, chosen=()):
    if at == len(measured.calls):
        return sum(r.seconds for _, r in chosen) if peak_of(measured, chosen) <= budget else float("inf")
    if peak_of(measured, chosen) > budget:
        return float("inf")
    return min(
        fastest(measured, budget, at + length, (*chosen, (length, region)))
        for length, region in ways(measured.calls, at)
    )


@pytest.mark.parametrize("seed", range(40))
def test_optimal_for_calls_with_transient_bytes_and_gradients(seed):
    draw = random.Random(seed)
    measured = Measured(calls(draw, 10 if seed % 10 == 0 else draw.randint(1, 6)), outside=draw.randint(0, 10))
    budget = draw.randint(30, 60 + 30 * len(measured.calls))
    found, expected = solve(problem_of(measured, budget)), fastest(measured, budget)
    assert (found is None) == (expected == float("inf"))
    if found is not None:
        assert found.seconds == pytest.approx(expected)
        assert budget - room_of(problem_of(measured, budget), found) == peak_of(measured, found.regions) <= budget


def test_the_least_budget_is_the_least_and_the_same_each_time():
    for seed in range(8):
        draw = random.Random(seed)
        measured = Measured(calls(draw, 5), outside=draw.randint(0, 10))
        high, choice = least(lambda budget, m=measured: problem_of(m, budget, timed=False), 1000)
        assert fastest(measured, high) < float("inf")
        assert fastest(measured, high - max(1, high // 50) - 1) == float("inf")
        slower = [replace(c, cost=c.cost and replace(c.cost, seconds=3 * draw.random())) for c in measured.calls]
        again = Measured(slower, measured.outside)
        assert least(lambda budget, m=again: problem_of(m, budget, timed=False), 1000) == (high, choice)


def test_a_choice_that_was_made_without_times_gets_those_of_its_regions():
    for seed in range(20):
        draw = random.Random(seed)
        measured = Measured(calls(draw, 6), outside=0)
        _, bytewise = least(lambda budget, m=measured: problem_of(m, budget, timed=False), 1000)
        choice, at = timed(measured, bytewise), 0
        for (length, region), (_, other) in zip(choice.regions, bytewise.regions, strict=True):
            known = [(n, replace(way, seconds=pytest.approx(way.seconds))) for n, way in ways(measured.calls, at)]
            assert (length, region) in known
            assert replace(region, seconds=other.seconds) == other
            at += length
        assert choice.seconds == pytest.approx(sum(region.seconds for _, region in choice.regions))


def test_a_thousand_units_take_few_steps(monkeypatch):
    """Each is one sum and one minimum over the buckets; what a unit alone has, and some rows that start at it."""
    draw, count = random.Random(0), 0
    measured = Measured(calls(draw, 1000), outside=0)
    for call in measured.calls:
        call.cost, call.chained = cost(draw), True
        call.cost = replace(call.cost, repeats=True)
    minimum = torch.minimum

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return minimum(*args, **kwargs)

    monkeypatch.setattr(torch, "minimum", counted)
    choice = solve(problem_of(measured, 12_000))
    assert choice is not None
    assert sum(length for length, _ in choice.regions) == 1000
    assert count <= 1000 * (5 + len(lengths_of(1000)))
