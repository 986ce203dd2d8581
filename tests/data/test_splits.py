from __future__ import annotations

import pytest
import torch

from recollect.data._splits import balanced_masks, stratified_masks


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("train", "val"), [(0.6, 0.2), (0.0, 0.5), (1.0, 0.0), (0.3, 0.3)])
def test_every_class_has_its_shares(train: float, val: float, seed: int) -> None:
    y = torch.randint(4, (203,), generator=torch.Generator().manual_seed(9))
    masks = stratified_masks(y, train=train, val=val, seed=seed)
    assert torch.stack(masks).sum(0).tolist() == [1] * 203
    for c in range(4):
        size = int((y == c).sum())
        first, second = round(train * size), round((train + val) * size)
        assert [int((mask & (y == c)).sum()) for mask in masks] == [first, second - first, size - second]


def test_seed_decides_the_split() -> None:
    y = torch.arange(100) % 5
    first, again, other = (stratified_masks(y, train=0.5, val=0.2, seed=s)[0] for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_classes_without_nodes_are_allowed() -> None:
    train, val, test = stratified_masks(torch.tensor([0, 2, 2, 2, 2, 0]), train=0.5, val=0.25, seed=0)
    assert (int(train.sum()), int((val | test).sum())) == (3, 3)


@pytest.mark.parametrize(("train", "val"), [(20, 30), (0, 3), (45, 10), (100, 5)])
def test_every_class_has_its_numbers(train: int, val: int) -> None:
    y = torch.randint(4, (203,), generator=torch.Generator().manual_seed(9))
    masks = balanced_masks(y, train=train, val=val, seed=2)
    assert torch.stack(masks).sum(0).tolist() == [1] * 203
    for c in range(4):
        size = int((y == c).sum())
        first = min(train, size)
        second = min(val, size - first)
        assert [int((mask & (y == c)).sum()) for mask in masks] == [first, second, size - first - second]
