from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.data import load


@pytest.mark.parametrize("split", [0, 19])
def test_written_file_comes_back(split: int, tmp_path: Path, write_wikics: dict[str, Any]) -> None:
    dataset = load("wikics", tmp_path / "root", split=split)
    data = dataset.data
    assert data.x.tolist() == torch.tensor(write_wikics["features"]).tolist()
    assert data.y.tolist() == write_wikics["labels"]
    edges = {(a, b) for a, b in write_wikics["edges"].tolist()}
    assert list(map(tuple, data.edge_index.T.tolist())) == sorted(edges | {(b, a) for a, b in edges})
    assert data.train_mask.tolist() == write_wikics["train_masks"][split]
    assert data.val_mask.tolist() == write_wikics["stopping_masks"][split]
    assert data.test_mask.tolist() == write_wikics["test_mask"]
    assert (dataset.task, dataset.num_classes, dataset.metric) == ("multiclass", 4, "accuracy")
    assert dataset.num_splits == 20


def test_impossible_split_is_refused(tmp_path: Path, write_wikics: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wikics: split is 20, but must be between 0 and 19"):
        load("wikics", tmp_path / "root", split=20)
