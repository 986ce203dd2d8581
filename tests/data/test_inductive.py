from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recollect.data import load


def both_directions(edges: np.ndarray[Any, Any]) -> list[list[int]]:
    return sorted(pair for a, b in edges.tolist() for pair in ([a, b], [b, a]))


def test_reddit_comes_back(tmp_path: Path, write_reddit: dict[str, Any]) -> None:
    dataset = load("reddit", tmp_path / "root")
    data = dataset.data
    assert np.array_equal(data.x.numpy(), write_reddit["feature"].astype(np.float32))
    assert data.y.tolist() == write_reddit["label"].tolist()
    assert data.edge_index.T.tolist() == both_directions(write_reddit["edges"])
    for number, part in enumerate(("train", "val", "test"), start=1):
        assert data[f"{part}_mask"].tolist() == (write_reddit["node_types"] == number).tolist()
    assert (dataset.task, dataset.num_classes, dataset.metric) == ("multiclass", 4, "accuracy")


@pytest.mark.parametrize(
    ("name", "task", "num_classes", "metric"),
    [("flickr", "multiclass", 3, "accuracy"), ("yelp", "multilabel", 5, "micro_f1")],
)
def test_saint_graphs_come_back(
    name: str,
    task: str,
    num_classes: int,
    metric: str,
    tmp_path: Path,
    write_saint: Callable[[str], dict[str, Any]],
) -> None:
    written = write_saint(name.capitalize())
    dataset = load(name, tmp_path / "root")
    data = dataset.data
    assert np.array_equal(data.x.numpy(), written["x"].astype(np.float32))
    assert data.y.tolist() == written["y"].tolist()
    assert data.y.is_floating_point() == (task == "multilabel")
    assert sorted(data.edge_index.T.tolist()) == both_directions(written["edges"])
    for part, key in (("train", "tr"), ("val", "va"), ("test", "te")):
        assert data[f"{part}_mask"].nonzero().flatten().tolist() == sorted(written["role"][key])
    assert (dataset.task, dataset.num_classes, dataset.metric) == (task, num_classes, metric)


def test_ppi_is_one_graph_of_separate_parts(tmp_path: Path, write_ppi: list[dict[str, Any]]) -> None:
    dataset = load("ppi", tmp_path / "root")
    data = dataset.data
    start, edges = 0, []
    for graph in write_ppi:
        rows = slice(start, start + len(graph["x"]))
        assert np.array_equal(data.x[rows].numpy(), graph["x"].astype(np.float32))
        assert data.y[rows].tolist() == graph["y"].tolist()
        for part, mask in (("train", data.train_mask), ("valid", data.val_mask), ("test", data.test_mask)):
            assert mask[rows].tolist() == [part == graph["part"]] * len(graph["x"])
        edges += [[start + a, start + b] for a, b in graph["edges"]]
        start = rows.stop
    assert data.num_nodes == start
    assert sorted(data.edge_index.T.tolist()) == sorted(edges)
    assert data.y.is_floating_point()
    assert (dataset.task, dataset.num_classes, dataset.metric) == ("multilabel", 4, "micro_f1")
