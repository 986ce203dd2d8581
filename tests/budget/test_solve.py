"""The dynamic programme beside all choices tried one by one."""

import random

import pytest

from recollect.budget._solve import Problem, Region, solve


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


@pytest.mark.parametrize("seed", range(30))
def test_optimal_among_all_choices(seed):
    draw = random.Random(seed)
    number = draw.randint(1, 8)
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
