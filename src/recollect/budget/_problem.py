"""The problem that a measured step poses, for a budget."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from recollect.budget._measure import Call, Measured
from recollect.budget._solve import Choice, Problem, Region

__all__ = ["problem_of", "storing", "timed"]


def problem_of(measured: Measured, budget: int, timed: bool = True) -> Problem:
    """Return the problem to solve; see :class:`Problem`.

    Args:
        measured: what is known of each call.
        budget: in bytes.
        timed: whether what is to be small is the time, which is another in each measurement; else the moments' bytes.
    """
    calls = measured.calls
    alone = [_undominated(_alone(call) if timed else [_untimed(way) for way in _alone(call)]) for call in calls]
    limits = [budget - call.outside - call.gradients for call in calls]

    def together(rows: _Rows | _Sparing) -> Callable[[int, int], Region | None]:
        def row(start: int, length: int) -> Region | None:
            found = rows.region(start, length)
            return found if timed or found is None else _untimed(found)

        return row

    return Problem(alone, limits, budget - measured.outside, together(_Rows(calls, budget)), together(_Sparing(calls)))


def storing(measured: Measured) -> Choice:
    """Return the choice that stores everything."""
    regions = [_alone(call)[0] for call in measured.calls]
    return Choice(tuple((1, region) for region in regions), 0.0, sum(region.keeps for region in regions))


def timed(measured: Measured, choice: Choice) -> Choice:
    """Return a choice that was made without times, with those of its regions."""
    calls, regions = measured.calls, list[tuple[int, Region]]()
    rows: dict[str, _Rows | _Sparing] = {"checkpoint": _Rows(calls, sys.maxsize), "selective": _Sparing(calls)}
    unit = 0
    for length, region in choice.regions:
        alone = {way.strategy: way for way in _alone(calls[unit])}
        found = alone[region.strategy] if length == 1 else rows[region.strategy].region(unit, length)
        assert found is not None
        regions.append((length, found))
        unit += length
    return Choice(tuple(regions), sum(region.seconds for _, region in regions), choice.kept)


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
        found = cost.selective
        ways.append(Region("selective", call.input + found.kept, found.moment, found.seconds))
    if cost.offloaded is not None:
        ways.append(Region("offload", 0, call.input + own + worst, cost.offloaded))
    if cost.inverted is not None:
        ways.append(Region("invert", 0, 2 * call.input + own + worst, cost.inverted))
    return ways


def _untimed(way: Region) -> Region:
    return replace(way, seconds=float(max(0, way.moment)))


def _undominated(ways: list[Region]) -> list[Region]:
    """Return the ways that no other one beats in all respects."""
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


class _Rows:
    """Rows of checkpoints, each of which keeps the first one's input and is rebuilt together."""

    def __init__(self, calls: list[Call], budget: int) -> None:
        self._calls = calls
        self._budget = budget
        self._end = list(range(len(calls)))  # for each call, the last of the longest row that begins with it
        for index in reversed(range(len(calls) - 1)):
            cost, after = calls[index].cost, calls[index + 1]
            if cost is not None and cost.repeats and after.cost is not None and after.chained:
                self._end[index] = self._end[index + 1]
        costs = [call.cost for call in calls]
        self._seconds = [0.0, *itertools.accumulate(0.0 if cost is None else cost.seconds for cost in costs)]
        self._kept = torch.tensor([call.kept for call in calls])
        self._worst = torch.tensor([0 if cost is None else max(cost.forward, cost.backward) for cost in costs])
        self._start = -1
        self._moments: list[int] = []  # of rows that begin at the start, by length

    def region(self, start: int, length: int) -> Region | None:
        """Return the row of so many calls; ``None`` if there is none, or it does not fit, and no longer one does."""
        last = start + length - 1
        cost = self._calls[last].cost
        if cost is None or last > self._end[start]:
            return None
        if start != self._start:
            end = self._end[start] + 1
            built = self._kept[start:end].cumsum(0)
            built += _own(self._calls[start]) - self._calls[start].kept
            self._moments = (built + self._worst[start:end]).cummax(0).values.tolist()
            self._start = start
        moment = self._moments[length - 1]
        if self._calls[start].input + moment > self._budget:
            return None
        seconds = self._seconds[last + 1] - self._seconds[start]
        return Region("checkpoint", self._calls[start].input, moment, seconds)


class _Sparing:
    """Rows of units whose cheap functions run again, and what is made again is the input of the next one too."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        self._start = -1
        self._found: list[Region] = []  # those that begin at the start, by length

    def region(self, start: int, length: int) -> Region | None:
        """Return the row of so many calls; ``None`` if there is none, and no longer one."""
        if start != self._start:
            self._start, self._found = start, list(self._regions(start))
        return self._found[length - 1] if length <= len(self._found) else None

    def _regions(self, start: int) -> Iterator[Region]:
        first, kept, most, seconds, spared = self._calls[start], 0, -sys.maxsize, 0.0, 0
        for index in range(start, len(self._calls)):
            call = self._calls[index]
            found = None if call.cost is None else call.cost.selective
            if found is None or (index > start and not (call.chained and spared)):
                return
            kept += found.kept + call.input - min(call.input, spared)
            # Less of the row is there when backward comes to an earlier unit, and other bytes outside of it.
            most = max(most, kept + found.moment + call.outside + call.gradients - first.outside - first.gradients)
            seconds, spared = seconds + found.seconds, found.spared
            yield Region("selective", kept, most - kept, seconds)
