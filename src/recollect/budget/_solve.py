"""The least time in which a step stays below so many bytes: dynamic programming along the units.

Units are called one after the other; backward goes through them in the opposite order. When it comes to unit i, the
units before it still keep what they keep, those after it are freed. Whatever is decided for unit i must fit at that
moment::

    kept by units before i + kept by i + moment of i <= limit_i

and the sum that is kept at the end of the forward pass below the limit then. A *region* is one unit, or some in a row
that are rebuilt together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Choice", "Problem", "Region", "least", "room_of", "solve"]

_BUCKETS = 4096
_MANY = 500
"""With more units than these there are half as many buckets."""
_ALL_LENGTHS = 64
"""With more units than these, regions have lengths that grow by a quarter from one to the next."""


@dataclass(frozen=True)
class Region:
    """One way to treat some units in a row.

    Args:
        strategy: its name.
        keeps: bytes from its forward to its backward.
        moment: bytes beside these at the worst moment of its forward or backward.
        seconds: that it adds to a step.
    """

    strategy: str
    keeps: int
    moment: int
    seconds: float


@dataclass(frozen=True)
class Problem:
    """What is to be decided.

    Args:
        alone: for each unit the ways to treat it by itself.
        limits: for each unit, bytes that are there when backward comes to it.
        end: bytes that are there at the end of the forward pass.
        row: the way to treat units start..start + length - 1 as one region, for lengths from 2; ``None``: no way.
        other: another way to do that.
    """

    alone: Sequence[Sequence[Region]]
    limits: Sequence[int]
    end: int
    row: Callable[[int, int], Region | None] | None = None
    other: Callable[[int, int], Region | None] | None = None


@dataclass(frozen=True)
class Choice:
    """What was decided: regions in order with the number of units of each, and what they add and keep."""

    regions: tuple[tuple[int, Region], ...]
    seconds: float
    kept: int


def lengths_of(number: int) -> list[int]:
    """Return the lengths of regions that are looked at among so many units."""
    if number <= _ALL_LENGTHS:
        return list(range(2, number + 1))
    lengths = [2]
    while lengths[-1] < number:
        lengths.append(max(lengths[-1] + 1, lengths[-1] * 5 // 4))
    return lengths


def solve(problem: Problem, buckets: int = _BUCKETS) -> Choice | None:
    """Return the choice that adds the least time, or ``None`` if nothing fits.

    Bytes that are kept are rounded up to multiples of q, the largest limit over ``buckets``. So what is returned fits,
    and no choice that leaves n q bytes free, n the number of its regions that keep something, takes less time. Where
    all are multiples of q it is optimal.

    Args:
        problem: what is to be decided.
        buckets: into how many parts the largest limit is divided.
    """
    number = len(problem.alone)
    largest = max([problem.end, *problem.limits], default=0)
    if min([problem.end, *problem.limits], default=0) < 0:
        return None
    size = max(1, math.ceil(largest / (buckets if number <= _MANY else buckets // 2)))
    width = largest // size + 1
    costs = torch.full((number + 1, width), math.inf, dtype=torch.float64)
    costs[0, 0] = 0.0
    taken = torch.full((number + 1, width), -1, dtype=torch.int32)
    known: list[tuple[int, Region]] = []
    together = [row for row in (problem.row, problem.other) if row is not None]
    lengths = lengths_of(number) if together else []
    for i in range(number):
        ways = [(1, region) for region in problem.alone[i]]
        for row_of in together:
            for length in lengths:
                if i + length > number or (one := row_of(i, length)) is None:
                    break
                ways.append((length, one))
        for length, region in ways:
            room = problem.limits[i] - region.keeps - region.moment
            if room < 0:
                continue
            step = math.ceil(region.keeps / size)
            reach = min(room // size, width - 1 - step)
            if reach < 0:
                continue
            found = costs[i, : reach + 1] + region.seconds
            row, chosen = costs[i + length, step : step + reach + 1], taken[i + length, step : step + reach + 1]
            chosen.masked_fill_(found < row, len(known))
            torch.minimum(found, row, out=row)
            known.append((length, region))
    last = costs[number, : problem.end // size + 1]
    if number == 0 or not bool(last.isfinite().any()):
        return Choice((), 0.0, 0) if number == 0 else None
    place = int(last.argmin())
    regions: list[tuple[int, Region]] = []
    at = number
    while at > 0:
        length, region = known[int(taken[at, place])]
        regions.append((length, region))
        at, place = at - length, place - math.ceil(region.keeps / size)
    regions.reverse()
    return Choice(tuple(regions), sum(r.seconds for _, r in regions), sum(r.keeps for _, r in regions))


def room_of(problem: Problem, choice: Choice) -> int:
    """Return how many bytes more there could be at every moment."""
    room, kept, unit = problem.end - choice.kept, 0, 0
    for length, region in choice.regions:
        kept += region.keeps
        room = min(room, problem.limits[unit] - kept - region.moment)
        unit += length
    return room


def least(problem: Callable[[int], Problem], high: int) -> tuple[int, Choice] | None:
    """Return the smallest budget with which a problem can be solved, up to a hundredth, and the choice for it.

    Args:
        problem: for a budget in bytes; without measured seconds, or the choice would be another each time.
        high: a budget with which it can be solved.
    """
    best = solve(problem(high), 1024)
    if best is None:
        return None
    low = 0
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        found = solve(problem(middle), 1024)
        low, high, best = (middle, high, best) if found is None else (low, middle, found)
    return high, best
