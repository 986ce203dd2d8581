from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import recollect.data
from recollect.data import MissingRawFilesError, UnknownDatasetError, load, names

WITHOUT_FILES = ("digits", "karate", "sbm")
WITH_FILES = tuple(name for name in names() if name not in WITHOUT_FILES)
RAW_FOLDERS = {
    "actor": "HeterophilousGraphDataset/actor/raw: actor.npz",
    "amazon-computers": "Amazon/Computers/raw: amazon_electronics_computers.npz",
    "amazon-photo": "Amazon/Photo/raw: amazon_electronics_photo.npz",
    "amazon-ratings": "HeterophilousGraphDataset/amazon_ratings/raw: amazon_ratings.npz",
    "chameleon": "HeterophilousGraphDataset/chameleon_filtered/raw: chameleon_filtered.npz",
    "citeseer": "Planetoid/CiteSeer/raw: ind.citeseer.x, ind.citeseer.tx, ",
    "coauthor-cs": "Coauthor/CS/raw: ms_academic_cs.npz",
    "coauthor-physics": "Coauthor/Physics/raw: ms_academic_phy.npz",
    "cora": "Planetoid/Cora/raw: ind.cora.x, ind.cora.tx, ",
    "flickr": "Flickr/raw: adj_full.npz, feats.npy, class_map.json, role.json",
    "minesweeper": "HeterophilousGraphDataset/minesweeper/raw: minesweeper.npz",
    "ogbn-arxiv": "ogbn_arxiv/split/time: train.csv.gz, valid.csv.gz, test.csv.gz",
    "ogbn-products": "ogbn_products/split/sales_ranking: train.csv.gz, valid.csv.gz, test.csv.gz",
    "ogbn-proteins": "ogbn_proteins/split/species: train.csv.gz, valid.csv.gz, test.csv.gz",
    "ppi": "PPI/raw: train_feats.npy, train_graph_id.npy, train_graph.json, train_labels.npy, ",
    "pubmed": "Planetoid/PubMed/raw: ind.pubmed.x, ind.pubmed.tx, ",
    "questions": "HeterophilousGraphDataset/questions/raw: questions.npz",
    "reddit": "Reddit/raw: reddit_data.npz, reddit_graph.npz",
    "roman-empire": "HeterophilousGraphDataset/roman_empire/raw: roman_empire.npz",
    "squirrel": "HeterophilousGraphDataset/squirrel_filtered/raw: squirrel_filtered.npz",
    "tolokers": "HeterophilousGraphDataset/tolokers/raw: tolokers.npz",
    "wikics": "WikiCS/raw: data.json",
    "yelp": "Yelp/raw: adj_full.npz, feats.npy, class_map.json, role.json",
}


def test_names_are_sorted_and_complete() -> None:
    assert names() == sorted([*RAW_FOLDERS, *WITHOUT_FILES])


def test_all_public_names_resolve() -> None:
    assert all(hasattr(recollect.data, name) for name in recollect.data.__all__)


def test_unknown_name_lists_the_right_ones_and_the_nearest() -> None:
    with pytest.raises(
        UnknownDatasetError,
        match=r"'Cora'.*chameleon, citeseer, coauthor-cs, coauthor-physics, cora, digits.*did you mean 'cora'\?",
    ):
        load("Cora")
    with pytest.raises(ValueError, match=r"did you mean 'ogbn-arxiv'\?"):
        load("ogbn_arxiv")
    with pytest.raises(UnknownDatasetError, match=r"yelp$"):
        load("zzzzzz")


@pytest.mark.parametrize("name", names())
def test_unknown_option_lists_the_right_ones(name: str) -> None:
    own = {"digits": "k$", "karate": "none$", "sbm": "average_degree, homophily, "}.get(name, "download")
    with pytest.raises(TypeError, match=f"{name!r} has no option 'bogus'; its options are: {own}"):
        load(name, bogus=1)


@pytest.mark.parametrize("name", WITH_FILES)
def test_missing_files_are_named_with_their_folder_and_origin(name: str, tmp_path: Path) -> None:
    root = tmp_path / "nothing"
    with pytest.raises(MissingRawFilesError) as info:
        load(name, root)
    text = str(info.value)
    assert repr(name) in text
    assert f"{root}/{RAW_FOLDERS[name]}" in text
    assert "They come from " in text
    assert "download=True" in text
    assert not root.exists()


def test_only_the_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "Flickr" / "raw").mkdir(parents=True)
    (tmp_path / "Flickr" / "raw" / "feats.npy").touch()
    with pytest.raises(MissingRawFilesError, match=r"raw: adj_full.npz, class_map.json, role.json\n"):
        load("flickr", tmp_path)


def test_root_is_taken_from_the_environment_or_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/data/Reddit"):
        load("reddit")
    monkeypatch.setenv("RECOLLECT_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/elsewhere/Reddit"):
        load("reddit")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/given/Reddit"):
        load("reddit", tmp_path / "given")


def test_home_in_root_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/graphs/Reddit"):
        load("reddit", "~/graphs")


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_graphs_without_files_keep_the_contract(name: str) -> None:
    dataset = load(name)
    data = dataset.data
    n = data.num_nodes
    assert dataset.name == name
    assert (dataset.task, dataset.metric) == ("multiclass", "accuracy")
    assert data.x.dtype == torch.float32
    assert data.x.size(0) == n
    assert data.edge_index.dtype == torch.int64
    assert data.edge_index.is_contiguous()
    assert data.y.dtype == torch.int64
    assert data.y.shape == (n,)
    assert data.y.unique().tolist() == list(range(dataset.num_classes))
    masks = torch.stack([data.train_mask, data.val_mask, data.test_mask])
    assert masks.dtype == torch.bool
    assert masks.sum(0).tolist() == [1] * n
    for mask in masks:
        assert data.y[mask].unique().numel() == dataset.num_classes
    assert data.is_undirected()
    assert not data.has_self_loops()
    assert data.is_coalesced()


@pytest.mark.parametrize("name", ["digits", "karate"])
def test_seed_changes_nothing_where_nothing_is_generated(name: str) -> None:
    first, second = load(name, seed=0).data, load(name, seed=1).data
    assert all(torch.equal(first[key], second[key]) for key in first.keys())  # noqa: SIM118 (Data is no dict)


def test_dataset_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load("karate").name = "other"  # type: ignore[misc]


def test_import_brings_in_no_optional_library() -> None:
    code = "import sys, recollect.data; print({'torch_geometric', 'sklearn', 'ogb', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
