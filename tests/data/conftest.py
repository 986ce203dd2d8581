"""Raw files: real ones, and small ones written in the layouts that the libraries read."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import os
import pickle
import shutil
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp

REAL = os.environ.get("RECOLLECT_DATA")  # read before the fixture below hides it

PITFALLS = {
    "Amazon/Computers": "amazon_electronics_computers.npz",
    "Amazon/Photo": "amazon_electronics_photo.npz",
    "Coauthor/CS": "ms_academic_cs.npz",
    "Coauthor/Physics": "ms_academic_phy.npz",
}


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a cache of its own, and no default root."""
    monkeypatch.delenv("RECOLLECT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recollect"


@pytest.fixture
def real_root(tmp_path: Path) -> Path:
    """A copy of Cora's and Tolokers' raw files from the folder that RECOLLECT_DATA names."""
    if not REAL:
        pytest.skip("RECOLLECT_DATA is not set: no folder with raw files is known")
    for folder in ("Planetoid/Cora/raw", "HeterophilousGraphDataset/tolokers/raw"):
        (tmp_path / "real" / folder).mkdir(parents=True)
        for file in (Path(REAL) / folder).iterdir():
            shutil.copyfile(file, tmp_path / "real" / folder / file.name)
    return tmp_path / "real"


def random_graph(num_nodes: int, num_edges: int, seed: int) -> np.ndarray[Any, Any]:
    """Undirected edges without repetitions and self-loops, each once, as sorted pairs low < high."""
    pairs = np.stack(np.triu_indices(num_nodes, 1), axis=1)
    chosen = np.random.default_rng(seed).choice(len(pairs), num_edges, replace=False)
    return pairs[np.sort(chosen)]


@pytest.fixture
def write_planetoid(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Planetoid's eight files: 6 training nodes, 500 validation nodes, 10 others, 8 test nodes in shuffled order.

    With a gap, as in CiteSeer, one node between the test nodes is in no file but the graph's.
    """

    def write(name: str, folder: str, *, gap: bool = False) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        raw = tmp_path / "root" / "Planetoid" / folder / "raw"
        raw.mkdir(parents=True)
        known, num_test = 516, 8
        allx = sp.csr_matrix(rng.integers(0, 2, (known, 5)).astype(np.float32))
        tx = sp.csr_matrix(rng.integers(0, 2, (num_test, 5)).astype(np.float32))
        ally, ty = np.eye(3)[rng.integers(0, 3, known)], np.eye(3)[rng.integers(0, 3, num_test)]
        test = known + np.delete(np.arange(num_test + gap), [4] if gap else [])
        test = np.concatenate([test[-1:], rng.permutation(test[:-1])])
        n = known + num_test + gap
        edges = random_graph(n, 900, seed=1)
        graph: dict[int, list[int]] = {i: [i] if i == 3 else [] for i in range(n)}  # one self-loop, to be removed
        for a, b in edges.tolist():
            graph[a].append(b)
            graph[b].append(a)
        parts = {"x": allx[:6], "tx": tx, "allx": allx, "y": ally[:6], "ty": ty, "ally": ally, "graph": graph}
        for part, value in parts.items():
            (raw / f"ind.{name}.{part}").write_bytes(pickle.dumps(value))
        (raw / f"ind.{name}.test.index").write_text("".join(f"{i}\n" for i in test))
        x = np.zeros((n, 5), dtype=np.float32)
        y = np.zeros(n, dtype=np.int64)
        x[:known], y[:known] = allx.toarray(), ally.argmax(1)
        x[test], y[test] = tx.toarray(), ty.argmax(1)
        return {"x": x, "y": y, "edges": edges, "test": sorted(test.tolist())}

    return write


@pytest.fixture
def write_heterophilous(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """One npz file with ten splits."""

    def write(folder: str) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        part = np.stack([rng.permutation(np.arange(30) % 3) for _ in range(10)])
        arrays = {
            "node_features": rng.normal(size=(30, 4)).astype(np.float32),
            "node_labels": np.arange(30) % 2,
            "edges": random_graph(30, 50, seed=2),
            "train_masks": part == 0,
            "val_masks": part == 1,
            "test_masks": part == 2,
        }
        raw = tmp_path / "root" / "HeterophilousGraphDataset" / folder / "raw"
        raw.mkdir(parents=True)
        np.savez_compressed(raw / f"{folder}.npz", **arrays)
        return arrays

    return write


@pytest.fixture
def write_pitfalls(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """One npz file: sparse counts as features, each edge in one direction, and a self-loop, to be removed."""

    def write(file: str) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        raw = tmp_path / "root" / file / "raw"
        raw.mkdir(parents=True)
        y = rng.permutation(np.repeat(np.arange(3), (70, 52, 40)))
        n = len(y)
        edges, counts = random_graph(n, 300, seed=6), sp.csr_matrix(rng.integers(0, 3, (n, 4)).astype(np.float32))
        both = np.concatenate([edges, [[5, 5]]])
        adj = sp.csr_matrix((np.ones(len(both), dtype=np.float32), (both[:, 0], both[:, 1])), shape=(n, n))
        arrays: dict[str, Any] = {"labels": y}
        for name, matrix in (("attr", counts), ("adj", adj)):
            arrays |= {
                f"{name}_{part}": getattr(matrix, part) for part in ("data", "indices", "indptr", "shape")
            }  # fmt: skip
        np.savez(raw / PITFALLS[file], **arrays)
        return {"x": (counts.toarray() > 0).astype(np.float32), "y": y, "edges": edges}

    return write


@pytest.fixture
def write_wikics(tmp_path: Path) -> dict[str, Any]:
    """One JSON file: links in one direction, and twenty masks each for training, stopping and validation."""
    rng = np.random.default_rng(0)
    raw = tmp_path / "root" / "WikiCS" / "raw"
    raw.mkdir(parents=True)
    n, edges = 24, random_graph(24, 40, seed=7)
    part = np.stack([rng.permutation(np.arange(n - 6) % 3) for _ in range(20)])
    rest = np.zeros((20, 6), dtype=bool)
    written = {
        "features": rng.normal(size=(n, 3)).tolist(),
        "labels": (np.arange(n) % 4).tolist(),
        "links": [edges[edges[:, 0] == i, 1].tolist() for i in range(n)],
        **{
            f"{name}_masks": np.concatenate([part == k, rest], axis=1).tolist()
            for k, name in enumerate(("train", "stopping", "val"))
        },
        "test_mask": (np.arange(n) >= n - 6).tolist(),
    }
    (raw / "data.json").write_text(json.dumps(written))
    return {**written, "edges": edges}


@pytest.fixture
def write_reddit(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    raw = tmp_path / "root" / "Reddit" / "raw"
    raw.mkdir(parents=True)
    arrays: dict[str, Any] = {  # NumPy has a flag among the names
        "feature": rng.normal(size=(20, 6)),
        "label": np.arange(20) % 4,
        "node_types": rng.permutation(1 + np.arange(20) % 3),
    }
    np.savez(raw / "reddit_data.npz", **arrays)
    edges = random_graph(20, 40, seed=3)
    sp.save_npz(raw / "reddit_graph.npz", _symmetric(edges, 20).tocoo())
    return {**arrays, "edges": edges}


@pytest.fixture
def write_saint(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """GraphSAINT's four files; Yelp's labels are lists of zeros and ones."""

    def write(folder: str) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        raw = tmp_path / "root" / folder / "raw"
        raw.mkdir(parents=True)
        edges, feats = random_graph(18, 30, seed=4), rng.normal(size=(18, 3))
        labels = rng.integers(0, 2, (18, 5)) if folder == "Yelp" else np.arange(18) % 3
        adj = _symmetric(edges, 18).tocsr()
        np.savez(raw / "adj_full.npz", data=adj.data, indices=adj.indices, indptr=adj.indptr, shape=adj.shape)
        np.save(raw / "feats.npy", feats)
        (raw / "class_map.json").write_text(json.dumps({str(i): v for i, v in enumerate(labels.tolist())}))
        nodes = rng.permutation(18).tolist()
        role = {"tr": nodes[:9], "va": nodes[9:13], "te": nodes[13:]}
        (raw / "role.json").write_text(json.dumps(role))
        return {"x": feats, "y": labels, "edges": edges, "role": role}

    return write


@pytest.fixture
def write_ppi(tmp_path: Path) -> list[dict[str, Any]]:
    """Two graphs for training, one each for validation and testing; node 0 and the last have edges in each."""
    raw = tmp_path / "root" / "PPI" / "raw"
    raw.mkdir(parents=True)
    graphs = []
    rng = np.random.default_rng(0)
    for part, sizes in (("train", (7, 5)), ("valid", (6,)), ("test", (4,))):
        start, everything, ids = 0, nx.DiGraph(), []
        everything.add_nodes_from(range(sum(sizes)))
        features, labels = rng.normal(size=(sum(sizes), 3)), rng.integers(0, 2, (sum(sizes), 4))
        for graph_id, size in enumerate(sizes):
            edges = [(i, i + 1) for i in range(size - 1)] + [(i + 1, i) for i in range(size - 1)]
            everything.add_edges_from((start + a, start + b) for a, b in edges)
            everything.add_edge(start, start)  # a self-loop, to be removed
            ids += [graph_id + 1] * size
            rows = slice(start, start + size)
            graphs.append({"part": part, "edges": edges, "x": features[rows], "y": labels[rows]})
            start += size
        (raw / f"{part}_graph.json").write_text(json.dumps(nx.node_link_data(everything, edges="links")))
        np.save(raw / f"{part}_feats.npy", features)
        np.save(raw / f"{part}_labels.npy", labels)
        np.save(raw / f"{part}_graph_id.npy", np.array(ids))
    return graphs


@pytest.fixture
def write_ogb(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """ogb's compressed tables; `species` is the name of the file that ogb renames to node_species."""

    def write(name: str, *, base: Path | None = None, species: str = "node_species") -> dict[str, Any]:
        rng = np.random.default_rng(0)
        home = (base or tmp_path / "root") / name.replace("-", "_")
        raw = home / "raw"
        raw.mkdir(parents=True)
        n, edges = 25, random_graph(24, 40, seed=5)  # the last node has no edge
        tables: dict[str, Any] = {"edge": edges, "num-node-list": [[n]], "num-edge-list": [[len(edges)]]}
        if name == "ogbn-proteins":
            tables["edge-feat"] = rng.random((len(edges), 8)).round(3)
            tables["node-label"] = rng.integers(0, 2, (n, 112))
            tables[species] = rng.integers(0, 9, (n, 1))
        else:
            tables["node-feat"] = rng.normal(size=(n, 7)).round(4)
            tables["node-label"] = rng.integers(0, 40, (n, 1))
        if name == "ogbn-arxiv":
            tables["node_year"] = rng.integers(2000, 2020, (n, 1))
        kind = {"ogbn-arxiv": "time", "ogbn-products": "sales_ranking", "ogbn-proteins": "species"}[name]
        nodes = rng.permutation(n)
        parts = {"train": nodes[:12], "valid": nodes[12:18], "test": nodes[18:]}
        for table, rows in tables.items():
            _write_table(raw / f"{table}.csv.gz", rows)
        (home / "split" / kind).mkdir(parents=True)
        for part, rows in parts.items():
            _write_table(home / "split" / kind / f"{part}.csv.gz", rows[:, None])
        return {**tables, **parts}

    return write


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Keep requests out of the test's output."""


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A web server on this machine: its folder and its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request goes to a proxy that does not exist, and is refused at once."""
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen looks for proxies at its first call only
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


def _symmetric(edges: np.ndarray[Any, Any], n: int) -> Any:
    both = np.concatenate([edges, edges[:, ::-1]])
    return sp.csr_matrix((np.ones(len(both)), (both[:, 0], both[:, 1])), shape=(n, n))


def _write_table(path: Path, rows: Any) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(str(value) for value in row) + "\n" for row in rows)


with warnings.catch_warnings():
    # torch_geometric warns on its own import; the tests import it to compare with it.
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    import torch_geometric.datasets  # noqa: F401
