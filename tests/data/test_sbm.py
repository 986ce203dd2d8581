from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from recollect.data import load


@pytest.mark.parametrize(
    ("num_nodes", "num_classes", "average_degree", "homophily"),
    [(100, 3, 4.0, 0.8), (101, 7, 5.5, 0.0), (64, 2, 10.0, 1.0), (50, 1, 6.0, 1.0), (100_000, 10, 20.0, 0.3)],
)
def test_edges_are_as_many_as_asked_and_as_homophilous(
    num_nodes: int, num_classes: int, average_degree: float, homophily: float
) -> None:
    data = load(
        "sbm", num_nodes=num_nodes, num_classes=num_classes, average_degree=average_degree, homophily=homophily
    ).data
    edges = round(num_nodes * average_degree / 2)
    source, target = data.edge_index
    assert source.numel() == 2 * edges
    assert int((data.y[source] == data.y[target]).sum()) == 2 * round(homophily * edges)
    assert data.num_nodes == num_nodes
    assert data.is_undirected()
    assert not data.has_self_loops()
    keys = source * num_nodes + target
    assert bool((keys[1:] > keys[:-1]).all())  # sorted, and no edge twice
    sizes = torch.bincount(data.y, minlength=num_classes)
    assert int(sizes.max() - sizes.min()) <= 1


def test_no_edges_at_all() -> None:
    assert load("sbm", num_nodes=20, num_classes=2, average_degree=0).data.edge_index.shape == (2, 0)


def test_complete_graph() -> None:
    # Of the 45 pairs of 10 nodes in two classes of 5, 20 are inside the classes.
    data = load("sbm", num_nodes=10, num_classes=2, average_degree=9, homophily=20 / 45).data
    assert data.edge_index.T.tolist() == [[i, j] for i in range(10) for j in range(10) if i != j]


def test_seed_decides_everything_and_nothing_else_does() -> None:
    state = torch.get_rng_state()
    first, again, other = (load("sbm", num_nodes=300, seed=s).data for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    for key in ("x", "edge_index", "y", "train_mask", "val_mask", "test_mask"):
        assert torch.equal(first[key], again[key])
        assert not torch.equal(first[key], other[key])


def test_features_without_noise_are_unit_means_of_the_classes() -> None:
    data = load("sbm", num_nodes=70_000, num_classes=3, num_features=5, noise=0.0).data
    assert data.x.shape == (70_000, 5)
    assert torch.allclose(data.x.norm(dim=1), torch.ones(70_000))
    assert data.x.unique(dim=0).size(0) == 3
    assert all(data.x[data.y == c].unique(dim=0).size(0) == 1 for c in range(3))


def test_labels_can_be_learnt_and_the_graph_helps() -> None:
    data = load("sbm", num_nodes=4_000).data
    source, target = data.edge_index
    summed = data.x.index_add(0, target, data.x[source])
    alone, together = _nearest_mean_accuracy(data.x, data), _nearest_mean_accuracy(summed, data)
    assert alone > 0.2  # one in ten by chance
    assert alone < together - 0.2
    assert together < 0.99  # and there is something left to learn


def _nearest_mean_accuracy(x: Tensor, data: object) -> float:
    y, train, test = data.y, data.train_mask, data.test_mask  # type: ignore[attr-defined]
    means = torch.stack([x[train & (y == c)].mean(0) for c in range(10)])
    return float((torch.cdist(x[test], means).argmin(1) == y[test]).float().mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0, but must be at least 1"),
        ({"num_nodes": 49}, "num_nodes is 49, but must be at least 5 for each of the 10 classes"),
        ({"average_degree": -1.0}, "average_degree is -1.0, but must not be negative"),
        ({"average_degree": float("nan")}, "average_degree is nan"),
        ({"homophily": 1.5}, "homophily is 1.5, but must be between 0 and 1"),
        ({"num_features": 0}, "num_features is 0, but must be at least 1"),
        ({"num_nodes": 10**14}, r"take 31,664,968 GiB, more than this machine's memory"),
        ({"num_features": 10**14}, "more than this machine's memory"),
        ({"average_degree": 1e300}, r"take 7e\+295 GiB, more than this machine's memory"),
        ({"num_labels": 10**10}, r"num_labels=10000000000 take 93,\d{3} GiB, more than this machine's memory"),
        ({"noise": -0.1}, "noise is -0.1, but must not be negative"),
        (
            {"num_nodes": 50, "average_degree": 49.0},
            "edges inside the classes are asked for, but only 100 are possible",
        ),
        ({"num_nodes": 50, "num_classes": 1}, "edges between the classes are asked for, but only 0 are possible"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("sbm", **options)


def test_labels_are_on_half_of_the_blocks() -> None:
    classes = load("sbm", num_nodes=300, num_classes=7, seed=3)
    graph = load("sbm", num_nodes=300, num_classes=7, num_labels=4, seed=3)
    assert (graph.task, graph.num_classes) == ("multilabel", 4)
    assert torch.equal(graph.data.x, classes.data.x)
    assert torch.equal(graph.data.edge_index, classes.data.edge_index)
    for label in graph.data.y.T:
        on = [set(label[classes.data.y == block].tolist()) for block in range(7)]
        assert sorted(on, key=sum) == [{0.0}] * 4 + [{1.0}] * 3


@pytest.mark.parametrize("options", [{"num_labels": -1}, {"num_labels": 2, "num_classes": 1}])
def test_labels_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_labels is"):
        load("sbm", num_nodes=50, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_changes_nothing(dtype: torch.dtype) -> None:
    expected = load("sbm", num_nodes=100, num_labels=3).data
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = load("sbm", num_nodes=100, num_labels=3).data
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.y, expected.y)
