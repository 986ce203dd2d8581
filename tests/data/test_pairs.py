from __future__ import annotations

import collections
import itertools
import math

import pytest
import torch

from recollect.data import _pairs
from recollect.data._pairs import distinct_pairs, num_ordered_pairs, ordered_pairs

SIZES = [[4], [3, 3], [1, 5, 2], [2, 0, 3], [1, 1, 1, 1]]


def slow_ordered_pairs(sizes: list[int], *, same_block: bool) -> list[tuple[int, int]]:
    block = [b for b, size in enumerate(sizes) for _ in range(size)]
    pairs = itertools.permutations(range(len(block)), 2)
    return [(a, b) for a, b in pairs if (block[a] == block[b]) == same_block]


@pytest.mark.parametrize("same_block", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_numbering_runs_over_all_pairs_once(sizes: list[int], same_block: bool) -> None:
    expected = slow_ordered_pairs(sizes, same_block=same_block)
    total = num_ordered_pairs(torch.tensor(sizes), same_block=same_block)
    assert total == len(expected)
    first, second = ordered_pairs(torch.arange(total), torch.tensor(sizes), same_block=same_block)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == expected


@pytest.mark.parametrize("same_block", [True, False])
def test_every_set_of_pairs_is_equally_likely(same_block: bool) -> None:
    sizes = torch.tensor([3, 2])
    available = num_ordered_pairs(sizes, same_block=same_block) // 2
    generator = torch.Generator().manual_seed(0)
    draws = 6000
    seen = collections.Counter(
        tuple(
            distinct_pairs(torch.arange(5), sizes, 2, same_block=same_block, generator=generator).sort().values.tolist()
        )
        for _ in range(draws)
    )
    sets = math.comb(available, 2)
    expected = draws / sets
    chi_squared = sum((count - expected) ** 2 / expected for count in seen.values())
    assert len(seen) == sets
    assert chi_squared < sets + 5 * math.sqrt(2 * sets)  # mean and 5 standard deviations of the distribution


@pytest.mark.parametrize("same_block", [True, False])
def test_all_pairs_can_be_had(same_block: bool) -> None:
    order, sizes = torch.tensor([4, 0, 2, 5, 1, 3]), torch.tensor([1, 3, 2])
    expected = {
        min(u, v) * 6 + max(u, v)
        for a, b in slow_ordered_pairs(sizes.tolist(), same_block=same_block)
        for u, v in [(int(order[a]), int(order[b]))]
    }
    keys = distinct_pairs(order, sizes, len(expected), same_block=same_block, generator=torch.Generator())
    assert sorted(keys.tolist()) == sorted(expected)


def test_drawing_in_pieces_is_still_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pairs, "_DRAWS_AT_ONCE", 7)
    sizes = torch.tensor([20, 20])
    keys = distinct_pairs(torch.arange(40), sizes, 300, same_block=False, generator=torch.Generator())
    low, high = keys // 40, keys % 40
    assert keys.unique().numel() == 300
    assert bool(((low < 20) & (high >= 20)).all())


def test_too_many_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"7 edges between the classes are asked for, but only 6 are possible"):
        distinct_pairs(torch.arange(5), torch.tensor([3, 2]), 7, same_block=False, generator=torch.Generator())
