"""Where results are kept, and what stays untouched; on the smallest of the formats."""

from __future__ import annotations

import shutil
import stat
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.datasets import HeterophilousGraphDataset, Planetoid

from recollect.data import InvalidRawFilesError, MissingDependencyError, MissingRawFilesError, load

Write = Callable[[str], dict[str, Any]]


@pytest.fixture
def home(tmp_path: Path, write_heterophilous: Write) -> Path:
    write_heterophilous("tolokers")
    return tmp_path / "root" / "HeterophilousGraphDataset" / "tolokers"


@pytest.fixture
def read_only_home(home: Path, tmp_path: Path) -> Iterator[Path]:
    folders = [path for path in (tmp_path / "root", *(tmp_path / "root").rglob("*")) if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    yield home
    for folder in folders:
        folder.chmod(0o755)


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below, with its time of change and its content."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (root, *root.rglob("*"))
    }


def x_of(root: Path, **options: bool) -> list[list[float]]:
    values: list[list[float]] = load("tolokers", root, **options).data.x.tolist()
    return values


def test_results_are_kept_beside_writable_raw_files(home: Path, tmp_path: Path, own_places: Path) -> None:
    first = x_of(tmp_path / "root")
    assert sorted(path.name for path in home.iterdir()) == ["processed", "raw"]
    assert not own_places.exists()
    before = snapshot(tmp_path / "root")
    assert x_of(tmp_path / "root") == first
    assert HeterophilousGraphDataset(str(home.parent), "tolokers")[0].x.tolist() == first
    assert snapshot(tmp_path / "root") == before


def test_read_only_folder_stays_untouched_and_the_cache_is_used(read_only_home: Path, own_places: Path) -> None:
    root = read_only_home.parents[1]
    before = snapshot(root)
    first = x_of(root)
    assert snapshot(root) == before
    (kept,) = own_places.iterdir()
    assert kept.name.startswith("tolokers-")
    # The second call reads what was kept: put something else there and see it.
    stored = torch.load(kept / "data.pt", weights_only=False)
    stored[0]["x"] += 1
    torch.save(stored, kept / "data.pt")
    assert np.allclose(x_of(root), np.array(first) + 1)
    assert snapshot(root) == before


def test_changed_raw_files_are_read_again(read_only_home: Path, own_places: Path) -> None:
    root = read_only_home.parents[1]
    first = x_of(root)
    raw = read_only_home / "raw" / "tolokers.npz"
    arrays = dict(np.load(raw))
    arrays["node_features"] = arrays["node_features"] + 1
    np.savez_compressed(raw, **arrays)
    assert np.allclose(x_of(root), np.array(first) + 1)
    assert len(list(own_places.iterdir())) == 2


def test_broken_cache_is_replaced(read_only_home: Path, own_places: Path) -> None:
    root = read_only_home.parents[1]
    first = x_of(root)
    (kept,) = own_places.iterdir()
    for content in (b"", b"not a file of torch", (kept / "data.pt").read_bytes()[:500]):
        (kept / "data.pt").write_bytes(content)
        assert x_of(root) == first
        assert torch.load(kept / "data.pt", weights_only=False)[0]["x"].tolist() == first
        assert list(own_places.iterdir()) == [kept]


@pytest.mark.parametrize("content", [None, b"half of it"])
def test_broken_results_of_others_are_left_alone(content: bytes | None, home: Path, own_places: Path) -> None:
    (home / "processed").mkdir()
    if content is not None:
        (home / "processed" / "data.pt").write_bytes(content)
    before = snapshot(home)
    first = x_of(home.parents[1])
    assert snapshot(home) == before
    assert len(list(own_places.iterdir())) == 1
    shutil.rmtree(home / "processed")
    assert x_of(home.parents[1]) == first


def test_no_place_to_keep_anything_is_no_error(
    read_only_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sealed").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "sealed"))
    assert x_of(read_only_home.parents[1]) == x_of(read_only_home.parents[1])
    assert list((tmp_path / "sealed").iterdir()) == []


def test_relative_root(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert x_of(Path("root")) == x_of(tmp_path / "root")


@pytest.mark.parametrize("content", [b"", b"<html>quota exceeded</html>"])
def test_unreadable_raw_file_is_a_clear_error_and_leaves_nothing(
    content: bytes, home: Path, tmp_path: Path, own_places: Path
) -> None:
    (home / "raw" / "tolokers.npz").write_bytes(content)
    before = snapshot(home)
    with pytest.raises(InvalidRawFilesError, match=r"'tolokers' in .* cannot be read \(.*raw/tolokers.npz"):
        load("tolokers", tmp_path / "root")
    assert {path: value[1] for path, value in snapshot(home).items()} == {p: v[1] for p, v in before.items()}
    assert not own_places.exists()


def test_unreadable_results_need_the_raw_files(
    tmp_path: Path, write_reddit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("scipy.sparse", "scipy.sparse._csr"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDependencyError, match=r'scipy.*pip install "torch-recollect\[graph\]"'):
        load("reddit", tmp_path / "root")


def test_offline_download_is_the_same_clear_error(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(MissingRawFilesError) as info:
        load("cora", tmp_path / "root", download=True)
    text = "".join(traceback.format_exception(info.value))
    assert "root/Planetoid/Cora/raw: ind.cora.x, " in text
    assert "Fetching them was tried and failed: URLError: " in text
    assert "kimiyoung/planetoid" in text
    assert "The above exception" not in text  # no chain of urllib's errors
    assert "During handling" not in text
    assert not (tmp_path / "root").exists()


def test_download_puts_raw_files_and_results_into_place(
    home: Path, tmp_path: Path, serve: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = serve
    shutil.copy(home / "raw" / "tolokers.npz", folder)
    monkeypatch.setattr(HeterophilousGraphDataset, "url", address)
    first = x_of(tmp_path / "root")
    target = tmp_path / "new" / "root"
    assert x_of(target, download=True) == first
    new_home = target / "HeterophilousGraphDataset" / "tolokers"
    assert (new_home / "raw" / "tolokers.npz").read_bytes() == (folder / "tolokers.npz").read_bytes()
    assert sorted(path.name for path in target.iterdir()) == ["HeterophilousGraphDataset"]
    (folder / "tolokers.npz").unlink()
    assert x_of(target, download=True) == first  # all is there: nothing is fetched


def test_planetoid_downloads(
    tmp_path: Path,
    write_planetoid: Callable[..., dict[str, Any]],
    serve: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, address = serve
    written = write_planetoid("pubmed", "PubMed")
    shutil.copytree(tmp_path / "root" / "Planetoid" / "PubMed" / "raw", folder, dirs_exist_ok=True)
    monkeypatch.setattr(Planetoid, "url", address)
    assert load("pubmed", tmp_path / "new", download=True).data.y.tolist() == written["y"].tolist()


def test_a_page_instead_of_the_file_is_not_kept(
    tmp_path: Path, serve: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = serve
    (folder / "tolokers.npz").write_text("<html>please log in</html>")
    monkeypatch.setattr(HeterophilousGraphDataset, "url", address)
    with pytest.raises(InvalidRawFilesError, match="cannot be read"):
        load("tolokers", tmp_path / "root", download=True)
    assert list((tmp_path / "root").iterdir()) == []


def test_nothing_is_downloaded_into_a_read_only_folder(read_only_home: Path) -> None:
    root = read_only_home.parents[1]
    before = snapshot(root)
    with pytest.raises(MissingRawFilesError, match=f"PermissionError: {root} must not be written"):
        load("cora", root, download=True)
    assert snapshot(root) == before
