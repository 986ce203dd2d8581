from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from recollect.data import load
from recollect.data._digits import nearest_neighbours


def slow_neighbours(points: list[list[int]], k: int) -> set[tuple[int, int]]:
    edges = set()
    for i, p in enumerate(points):
        others = [(sum((a - b) ** 2 for a, b in zip(p, q, strict=True)), j) for j, q in enumerate(points) if j != i]
        for _, j in sorted(others)[:k]:
            edges |= {(i, j), (j, i)}
    return edges


@pytest.mark.parametrize("k", [1, 4, 39])
def test_neighbours_with_many_ties_equal_a_slow_search(k: int) -> None:
    points = torch.randint(3, (40, 3), generator=torch.Generator().manual_seed(0))
    edge_index = nearest_neighbours(points.double(), k)
    edges = list(map(tuple, edge_index.T.tolist()))
    assert edges == sorted(slow_neighbours(points.tolist(), k))


def test_features_and_labels_are_scikit_learns() -> None:
    data = load("digits").data
    bunch = load_digits()
    assert torch.equal(data.x, torch.from_numpy(bunch.data / 16).float())
    assert (float(data.x.min()), float(data.x.max())) == (0.0, 1.0)
    assert data.y.tolist() == bunch.target.tolist()


def test_split_is_60_20_20() -> None:
    data = load("digits").data
    counts = [int(mask.sum()) for mask in (data.train_mask, data.val_mask, data.test_mask)]
    assert counts == pytest.approx([0.6 * 1797, 0.2 * 1797, 0.2 * 1797], abs=5)


def test_k_is_the_least_degree() -> None:
    for k in (3, 10):
        data = load("digits", k=k).data
        degree = torch.bincount(data.edge_index[0], minlength=1797)
        assert int(degree.min()) == k


@pytest.mark.parametrize("k", [0, 1797])
def test_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"digits: k is {k}, but must be between 1 and 1796"):
        load("digits", k=k)
