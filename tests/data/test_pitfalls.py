from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.data import load

FOLDERS = {
    "amazon-computers": "Amazon/Computers",
    "amazon-photo": "Amazon/Photo",
    "coauthor-cs": "Coauthor/CS",
    "coauthor-physics": "Coauthor/Physics",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_written_file_comes_back(name: str, tmp_path: Path, write_pitfalls: Callable[[str], dict[str, Any]]) -> None:
    written = write_pitfalls(FOLDERS[name])
    dataset = load(name, tmp_path / "root")
    data = dataset.data
    assert data.x.tolist() == written["x"].tolist()
    assert data.y.tolist() == written["y"].tolist()
    edges = {(a, b) for a, b in written["edges"].tolist()}
    assert list(map(tuple, data.edge_index.T.tolist())) == sorted(edges | {(b, a) for a, b in edges})
    assert (dataset.task, dataset.num_classes, dataset.metric) == ("multiclass", 3, "accuracy")


def test_each_class_has_twenty_nodes_for_training_and_thirty_for_validation(
    tmp_path: Path, write_pitfalls: Callable[[str], dict[str, Any]]
) -> None:
    write_pitfalls("Amazon/Photo")
    data = load("amazon-photo", tmp_path / "root").data
    masks = torch.stack([data.train_mask, data.val_mask, data.test_mask])
    assert masks.sum(0).tolist() == [1] * data.num_nodes
    counts = [torch.bincount(data.y[mask], minlength=3).tolist() for mask in masks]
    assert counts == [[20, 20, 20], [30, 30, 20], [20, 2, 0]]  # of 70, 52 and 40


def test_splits_differ_and_stay_what_they_are(tmp_path: Path, write_pitfalls: Callable[[str], dict[str, Any]]) -> None:
    write_pitfalls("Coauthor/CS")
    first, again, other = (load("coauthor-cs", tmp_path / "root", split=split) for split in (0, 0, 19))
    assert first.num_splits == 20
    assert torch.equal(first.data.train_mask, again.data.train_mask)
    assert not torch.equal(first.data.train_mask, other.data.train_mask)
    assert first.data.train_mask.nonzero().flatten()[:4].tolist() == FIRST_TRAINING_NODES


FIRST_TRAINING_NODES = [1, 4, 7, 14]  # of split 0 of the written graph: a split must be the same for everybody


@pytest.mark.parametrize("split", [-1, 20])
def test_impossible_split_is_refused(split: int) -> None:
    with pytest.raises(ValueError, match=f"coauthor-cs: split is {split}, but must be between 0 and 19"):
        load("coauthor-cs", split=split)
