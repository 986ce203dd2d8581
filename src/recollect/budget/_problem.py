"""The problem that a measured step poses, for a budget."""

from __future__ import annotations

import functools

from recollect.budget._measure import Call, Measured
from recollect.budget._solve import Problem, Region

__all__ = ["problem_of"]


def problem_of(measured: Measured, budget: int) -> Problem:
    """Return the problem to solve; see :class:`Problem`."""
    calls = measured.calls
    alone = [_alone(call) for call in calls]
    limits = [budget - call.outside - call.gradients for call in calls]

    @functools.cache
    def row(start: int, length: int) -> Region | None:
        return _row(calls, start, length, budget)

    return Problem(alone, limits, budget - measured.outside, row)


def _alone(call: Call) -> list[Region]:
    cost, own = call.cost, _own(call)
    if cost is None:
        return [Region("store", call.kept, 0, 0.0)]
    worst = max(cost.forward, cost.backward)
    ways = [
        Region("store", call.kept, worst, 0.0),
        Region("checkpoint", call.input, own + worst, cost.seconds),
    ]
    if cost.selective is not None:
        kept, seconds = cost.selective
        ways.append(Region("selective", call.input + kept, own + worst, seconds))
    if cost.offloaded is not None:
        ways.append(Region("offload", 0, call.input + own + worst, cost.offloaded))
    if cost.inverted is not None:
        ways.append(Region("invert", 0, 2 * call.input + own + worst, cost.inverted))
    # What another way beats in all respects never comes into question.
    return [
        one
        for one in ways
        if not any(
            other is not one
            and other.keeps <= one.keeps
            and other.moment <= one.moment
            and other.seconds <= one.seconds
            and (other.keeps, other.moment, other.seconds) != (one.keeps, one.moment, one.seconds)
            for other in ways
        )
    ]


def _own(call: Call) -> int:
    """Bytes that a rebuild brings back beside the input."""
    return max(0, call.kept - (call.input if set(call.taken) & set(call.saved) else 0))


def _row(calls: list[Call], start: int, length: int, budget: int) -> Region | None:
    """A row of checkpoints that keeps the first one's input, and is rebuilt together."""
    first, last = calls[start], calls[start + length - 1]
    built = worst = 0
    seconds = 0.0
    for index in range(start, start + length):
        call = calls[index]
        if call.cost is None or (index > start and not call.chained):
            return None
        built += _own(call) if index == start else call.kept
        worst = max(worst, built + max(call.cost.forward, call.cost.backward))
        seconds += call.cost.again if index < start + length - 1 else call.cost.seconds
    if first.input + worst > budget or last.cost is None:
        return None
    return Region("checkpoint", first.input, worst, seconds)
