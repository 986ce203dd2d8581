from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recollect.data import MissingRawFilesError, _ogb, load

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ogb") is None, reason="ogb is not installed")

Write = Callable[..., dict[str, Any]]


def masks_of(data: Any) -> list[list[int]]:
    return [data[f"{part}_mask"].nonzero().flatten().tolist() for part in ("train", "val", "test")]


@pytest.mark.parametrize(("name", "num_classes"), [("ogbn-arxiv", 40), ("ogbn-products", 47)])
def test_written_files_come_back(name: str, num_classes: int, tmp_path: Path, write_ogb: Write) -> None:
    written = write_ogb(name)
    for _ in range(2):  # from the raw files, then from what was kept
        dataset = load(name, tmp_path / "root")
        data = dataset.data
        assert np.array_equal(data.x.numpy(), written["node-feat"].astype(np.float32))
        assert data.y.tolist() == written["node-label"].flatten().tolist()
        edges = sorted(pair for a, b in written["edge"].tolist() for pair in ([a, b], [b, a]))
        assert sorted(data.edge_index.T.tolist()) == edges
        assert masks_of(data) == [sorted(written[part].tolist()) for part in ("train", "valid", "test")]
        assert (dataset.task, dataset.num_classes, dataset.metric) == ("multiclass", num_classes, "accuracy")


def test_the_classes_that_torch_load_allows_stay_the_same(tmp_path: Path, write_ogb: Write) -> None:
    write_ogb("ogbn-arxiv")
    before = set(torch.serialization.get_safe_globals())
    load("ogbn-arxiv", tmp_path / "root")
    assert set(torch.serialization.get_safe_globals()) == before


def test_arxiv_can_keep_its_directions(tmp_path: Path, write_ogb: Write) -> None:
    written = write_ogb("ogbn-arxiv")
    data = load("ogbn-arxiv", tmp_path / "root", undirected=False).data
    assert data.edge_index.T.tolist() == written["edge"].tolist()


@pytest.mark.parametrize("species", ["node_species", "species"])
def test_proteins_features_are_means_of_their_edges(species: str, tmp_path: Path, write_ogb: Write) -> None:
    written = write_ogb("ogbn-proteins", species=species)
    before = sorted(path.name for path in (tmp_path / "root" / "ogbn_proteins" / "raw").iterdir())
    dataset = load("ogbn-proteins", tmp_path / "root")
    data = dataset.data
    for node in range(25):
        rows = written["edge-feat"][(written["edge"] == node).any(axis=1)]
        expected = rows.mean(axis=0) if len(rows) else np.zeros(8)
        assert np.allclose(data.x[node].numpy(), expected, atol=1e-6)
    assert data.edge_attr.shape == (data.edge_index.size(1), 8)
    features = {tuple(sorted(e)): f for e, f in zip(written["edge"].tolist(), written["edge-feat"], strict=True)}
    for edge, feature in zip(data.edge_index.T.tolist(), data.edge_attr.numpy(), strict=True):
        assert np.allclose(feature, features[tuple(sorted(edge))])
    assert data.y.tolist() == written["node-label"].tolist()
    assert masks_of(data) == [sorted(written[part].tolist()) for part in ("train", "valid", "test")]
    assert (dataset.task, dataset.num_classes, dataset.metric) == ("multilabel", 112, "rocauc")
    assert sorted(path.name for path in (tmp_path / "root" / "ogbn_proteins" / "raw").iterdir()) == before


def test_download_asks_no_question(
    tmp_path: Path, write_ogb: Write, serve: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = serve
    monkeypatch.setattr(_ogb, "_SERVER", address)
    written = write_ogb("ogbn-arxiv", base=tmp_path / "upstream")
    (tmp_path / "upstream" / "ogbn_arxiv").rename(tmp_path / "upstream" / "arxiv")
    shutil.make_archive(str(folder / "arxiv"), "zip", tmp_path / "upstream", "arxiv")
    data = load("ogbn-arxiv", tmp_path / "root", download=True).data
    assert data.y.tolist() == written["node-label"].flatten().tolist()
    assert sorted(path.name for path in (tmp_path / "root").iterdir()) == ["ogbn_arxiv"]
    again = load("ogbn-arxiv", tmp_path / "root").data
    assert again.y.tolist() == data.y.tolist()


def test_failed_download_is_a_clear_error(
    tmp_path: Path, serve: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ogb, "_SERVER", serve[1])
    with pytest.raises(MissingRawFilesError, match=r"tried and failed: HTTPError: HTTP Error 404"):
        load("ogbn-products", tmp_path / "root", download=True)
    assert list((tmp_path / "root").iterdir()) == []
