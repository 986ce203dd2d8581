from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recollect.data import load

METRICS = {
    "amazon-ratings": "accuracy",
    "minesweeper": "rocauc",
    "questions": "rocauc",
    "roman-empire": "accuracy",
    "tolokers": "rocauc",
}


@pytest.mark.parametrize("name", METRICS)
def test_written_file_comes_back(
    name: str, tmp_path: Path, write_heterophilous: Callable[[str], dict[str, Any]]
) -> None:
    written = write_heterophilous(name.replace("-", "_"))
    for split in (0, 9):
        dataset = load(name, tmp_path / "root", split=split)
        data = dataset.data
        assert np.array_equal(data.x.numpy(), written["node_features"])
        assert data.y.tolist() == written["node_labels"].tolist()
        assert data.edge_index.T.tolist() == sorted(
            pair for a, b in written["edges"].tolist() for pair in ([a, b], [b, a])
        )
        for part in ("train", "val", "test"):
            mask = data[f"{part}_mask"]
            assert mask.is_contiguous()
            assert mask.tolist() == written[f"{part}_masks"][split].tolist()
        assert (dataset.task, dataset.num_classes, dataset.metric) == ("multiclass", 2, METRICS[name])


@pytest.mark.parametrize("split", [-1, 10])
def test_impossible_split_is_refused(
    split: int, tmp_path: Path, write_heterophilous: Callable[[str], dict[str, Any]]
) -> None:
    write_heterophilous("tolokers")
    with pytest.raises(ValueError, match=f"tolokers: split is {split}, but must be between 0 and 9"):
        load("tolokers", tmp_path / "root", split=split)


def test_tolokers_has_its_published_numbers(real_root: Path) -> None:
    splits = [load("tolokers", real_root, split=split) for split in range(10)]
    data = splits[0].data
    assert data.x.shape == (11_758, 10)
    assert data.edge_index.shape == (2, 2 * 519_000)
    assert splits[0].num_classes == 2
    assert len({tuple(s.data.train_mask.nonzero().flatten().tolist()) for s in splits}) == 10
    for s in splits:
        masks = torch.stack([s.data.train_mask, s.data.val_mask, s.data.test_mask])
        assert masks.sum(0).tolist() == [1] * 11_758
