from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.data import load


@pytest.mark.parametrize(
    ("name", "folder", "gap"), [("cora", "Cora", False), ("citeseer", "CiteSeer", True), ("pubmed", "PubMed", False)]
)
def test_written_files_come_back(
    name: str, folder: str, gap: bool, tmp_path: Path, write_planetoid: Callable[..., dict[str, Any]]
) -> None:
    written = write_planetoid(name, folder, gap=gap)
    dataset = load(name, tmp_path / "root")
    data = dataset.data
    assert data.x.tolist() == written["x"].tolist()
    assert data.y.tolist() == written["y"].tolist()
    edges = {(a, b) for a, b in data.edge_index.T.tolist()}
    assert edges == {pair for a, b in written["edges"].tolist() for pair in ((a, b), (b, a))}
    assert data.edge_index.size(1) == len(edges)
    assert data.train_mask.nonzero().flatten().tolist() == list(range(6))
    assert data.val_mask.nonzero().flatten().tolist() == list(range(6, 506))
    assert data.test_mask.nonzero().flatten().tolist() == written["test"]
    assert (dataset.task, dataset.metric, dataset.num_classes) == ("multiclass", "accuracy", 3)


def test_full_split_trains_on_all_other_nodes(tmp_path: Path, write_planetoid: Callable[..., dict[str, Any]]) -> None:
    write_planetoid("cora", "Cora")
    public, full = load("cora", tmp_path / "root").data, load("cora", tmp_path / "root", split="full").data
    assert torch.equal(full.train_mask, ~(public.val_mask | public.test_mask))
    assert torch.equal(full.val_mask, public.val_mask)
    assert torch.equal(full.test_mask, public.test_mask)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="cora: split is 'random', but must be one of public, full"):
        load("cora", split="random")


def test_cora_has_its_published_numbers(real_root: Path) -> None:
    dataset = load("cora", real_root)
    data = dataset.data
    assert data.x.shape == (2708, 1433)
    assert data.edge_index.shape == (2, 10_556)
    assert data.is_undirected()
    assert dataset.num_classes == 7
    assert [int(m.sum()) for m in (data.train_mask, data.val_mask, data.test_mask)] == [140, 500, 1000]
    assert torch.bincount(data.y[data.train_mask]).tolist() == [20] * 7
