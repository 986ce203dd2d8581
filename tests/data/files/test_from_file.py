"""One's own graph, in every format; the oracle is the graph that was written."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
import torch

from recollect.data import GraphDataset, InvalidFileError, describe, from_data, from_file, load
from recollect.data._foreign import require

Data = require("torch_geometric.data", extra="graph").Data

N = 40
RNG = np.random.default_rng(0)
EDGES = RNG.integers(N, size=(2, 150))
X = RNG.normal(size=(N, 3)).round(3)
CLASSES = RNG.permutation(np.arange(N) % 4)
LABELS = RNG.integers(2, size=(N, 5))
PARTS = RNG.permutation(np.arange(N) % 3)


def pairs(graph: GraphDataset) -> list[list[int]]:
    return sorted(graph.data.edge_index.T.tolist())


def same(graph: GraphDataset, *, labels: bool = False, split: bool = True) -> None:
    """It is the graph above."""
    assert pairs(graph) == sorted(EDGES.T.tolist())
    assert torch.equal(graph.data.x, torch.tensor(X, dtype=torch.float32))
    assert graph.data.y.tolist() == (LABELS if labels else CLASSES).tolist()
    assert (graph.task, graph.num_classes) == (("multilabel", 5) if labels else ("multiclass", 4))
    masks = torch.stack([graph.data[f"{part}_mask"] for part in ("train", "val", "test")])
    assert masks.sum(0).tolist() == [1] * N
    if split:
        assert masks.long().argmax(0).tolist() == PARTS.tolist()


def masks() -> dict[str, Any]:
    return {f"{part}_mask": k == PARTS for k, part in enumerate(("train", "val", "test"))}


def write_pt(folder: Path, y: Any) -> Path:
    tensors = {"x": X, "edge_index": EDGES, "y": y, **masks()}
    torch.save(Data(**{k: torch.tensor(v) for k, v in tensors.items()}), folder / "g.pt")
    return folder / "g.pt"


def write_dict(folder: Path, y: Any) -> Path:
    arrays = {"x": X, "edges": EDGES.T, "y": y, **masks()}
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, folder / "g.pth")
    return folder / "g.pth"


def write_npz(folder: Path, y: Any) -> Path:
    np.savez(folder / "g.npz", edge_index=EDGES, x=X, y=y, **masks())
    return folder / "g.npz"


def write_npz_of_the_literature(folder: Path, y: Any) -> Path:
    several: dict[str, Any] = {f"{name}s": np.stack([mask, mask[::-1]]) for name, mask in masks().items()}
    np.savez(folder / "g.npz", edges=EDGES.T, node_features=X, node_labels=y, **several)
    return folder / "g.npz"


def write_csv(folder: Path, y: Any) -> Path:
    np.savetxt(folder / "edges.csv", EDGES.T, delimiter=",", fmt="%d")
    np.savetxt(folder / "features.csv", X, delimiter=",", fmt="%.3f")
    np.savetxt(folder / "labels.csv", y, delimiter=",", fmt="%d")
    (folder / "split.csv").write_text("\n".join(np.array(["train", "val", "test"])[PARTS]))
    return folder


def write_headers(folder: Path, y: Any) -> Path:
    names = [f"n{number}" for number in range(N)]
    order = RNG.permutation(N)  # rows of the labels are in another order than those of the features
    (folder / "edges.tsv").write_text("target\tsource\n" + "".join(f"{names[b]}\t{names[a]}\n" for a, b in EDGES.T))
    rows = "".join(f"{names[i]},{','.join(map(str, X[i]))}\n" for i in range(N))
    (folder / "features.csv").write_text("id,a,b,c\n" + rows)
    columns = [f"l{k}" for k in range(y.shape[1])] if y.ndim == 2 else ["label"]
    cells = "".join(f"{names[i]},{','.join(map(str, np.ravel(y[i])))}\n" for i in order)
    (folder / "labels.csv").write_text(f"id,{','.join(columns)}\n" + cells)
    parts = "".join(f"{names[i]},{('train', 'valid', 'test')[PARTS[i]]}\n" for i in order)
    (folder / "split.csv").write_text("node,split\n" + parts)
    return folder


def write_nodes(folder: Path, y: Any) -> Path:
    columns = [f"label_{k}" for k in range(y.shape[1])] if y.ndim == 2 else ["class"]
    (folder / "edges.txt").write_text("# a comment\n" + "".join(f"{a} {b}\n" for a, b in EDGES.T))
    rows = [",".join(map(str, [*np.ravel(y[i]), ("train", "val", "test")[PARTS[i]], *X[i]])) for i in range(N)]
    (folder / "nodes.csv").write_text(",".join([*columns, "split", "a", "b", "c"]) + "\n" + "\n".join(rows))
    return folder


WRITERS = (
    *(write_pt, write_dict, write_npz, write_npz_of_the_literature),
    *(write_csv, write_headers, write_nodes),
)


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("write", WRITERS)
def test_a_written_graph_comes_back(write: Callable[[Path, Any], Path], labels: bool, tmp_path: Path) -> None:
    graph = from_file(write(tmp_path, LABELS if labels else CLASSES))
    same(graph, labels=labels)
    assert graph.metric == ("average_precision" if labels else "accuracy")


def test_names_of_nodes_and_classes_are_kept(tmp_path: Path) -> None:
    graph = from_file(write_headers(tmp_path, np.array(["d", "b", "a", "c"])[CLASSES]))
    assert graph.node_ids == tuple(f"n{number}" for number in range(N))
    assert graph.class_names == ("a", "b", "c", "d")
    assert [graph.class_names[k] for k in graph.data.y] == [("d", "b", "a", "c")[k] for k in CLASSES]


@pytest.mark.parametrize("header", ["", "red,blue\n", "id,red,blue\n"])
def test_labels_may_be_true_and_false(header: str, tmp_path: Path) -> None:
    names = [f"{name}," if header.startswith("id") else "" for name in "abcd"]
    cells = ["True,False", "false,TRUE", "True,", "False,nan"]
    (tmp_path / "edges.csv").write_text("a,b\nc,d\n" if header.startswith("id") else "0,1\n2,3\n")
    (tmp_path / "labels.csv").write_text(header + "".join(f"{n}{c}\n" for n, c in zip(names, cells, strict=True)))
    y = from_file(tmp_path).data.y
    assert torch.equal(y.nan_to_num(nan=-1), torch.tensor([[1.0, 0], [0, 1], [1, -1], [0, -1]]))


def test_a_split_of_several_is_chosen_by_its_number(tmp_path: Path) -> None:
    path = write_npz_of_the_literature(tmp_path, CLASSES)
    graph = from_file(path, split=1)
    assert graph.num_splits == 2
    assert any("there are 2 splits: number 1 is taken" in note for note in graph.notes)
    assert graph.data.val_mask.tolist() == (PARTS == 1)[::-1].tolist()
    with pytest.raises(ValueError, match="split is 2, but must be between 0 and 1"):
        from_file(path, split=2)


def test_sparse_matrices(tmp_path: Path) -> None:
    adjacency = sp.coo_matrix((np.arange(1.0, 151), EDGES), shape=(N, N)).tocsr()
    features = sp.csr_matrix(X)
    parts = {
        f"{name}_{part}": getattr(matrix, part)
        for name, matrix in (("adj", adjacency), ("attr", features))
        for part in ("data", "indices", "indptr", "shape")
    }
    np.savez(tmp_path / "g.npz", y=CLASSES, **parts)
    graph = from_file(tmp_path / "g.npz")
    dense = torch.zeros(N, N)
    dense[tuple(graph.data.edge_index)] = graph.data.edge_weight
    assert torch.equal(dense, torch.tensor(adjacency.toarray(), dtype=torch.float32))
    assert torch.equal(graph.data.edge_attr, graph.data.edge_weight[:, None])
    assert torch.equal(graph.data.x, torch.tensor(X, dtype=torch.float32))


def test_matlab(tmp_path: Path) -> None:
    network = sp.coo_matrix((np.ones(150), EDGES), shape=(N, N)).tocsr().minimum(1)
    scipy.io.savemat(tmp_path / "g.mat", {"network": network, "group": sp.csr_matrix(LABELS.astype(float)), "X": X})
    graph = from_file(tmp_path / "g.mat")
    assert pairs(graph) == sorted(map(list, set(map(tuple, EDGES.T.tolist()))))
    assert graph.data.y.tolist() == LABELS.tolist()
    assert "edge_weight" not in graph.data
    scipy.io.savemat(tmp_path / "g.mat", {"edge_index": EDGES.astype(float), "y": CLASSES[:, None], "x": X})
    same(from_file(tmp_path / "g.mat"), split=False)


def test_numbers_of_nodes_in_matlab_may_count_from_one(tmp_path: Path) -> None:
    file, inner = tmp_path / "g.mat", EDGES[:, (EDGES > 0).all(0)]
    split = {f"{part}_idx": np.flatnonzero(k == PARTS) for k, part in enumerate(("train", "val", "test"))}
    scipy.io.savemat(file, {"edges": EDGES.T.astype(float), "y": CLASSES, "x": X, **split})
    same(from_file(file))
    scipy.io.savemat(file, {"edges": inner.T, "y": CLASSES, "x": X, **split})  # the split names the node 0
    assert pairs(from_file(file)) == sorted(inner.T.tolist())
    ones = {name: nodes + 1.0 for name, nodes in split.items()}
    for arrays in ({"edges": inner.T}, {"edge_index": EDGES + 1.0}, {"adj": sp.eye(N).tocsc(), **ones}):
        scipy.io.savemat(file, {"y": CLASSES, "x": X, **arrays})
        with pytest.raises(InvalidFileError, match=r"names no node 0, .*write the edges as a sparse matrix adj"):
            from_file(file)


@pytest.mark.parametrize("name", ["labels", "features", "split"])
def test_an_empty_line_in_one_column_may_be_a_row(name: str, tmp_path: Path) -> None:
    tables = {"edges": "0,1\n\n1,0\n", "labels": "a\nb\na\n", "features": "1\n2\n3\n", "split": "train\nval\ntest\n"}
    for table, text in tables.items():
        (tmp_path / f"{table}.csv").write_text("\n" + text + "\n\n")
    assert from_file(tmp_path).data.num_nodes == 3
    first, *rest = tables[name].splitlines()
    (tmp_path / f"{name}.csv").write_text("\n".join([first, "", *rest[1:], rest[0]]))
    with pytest.raises(InvalidFileError, match=rf"{name}.csv, line 2: is empty, .*write nan for what is unknown"):
        from_file(tmp_path)


@pytest.mark.parametrize("directed", [True, False])
def test_graphml(directed: bool, tmp_path: Path) -> None:
    written = nx.DiGraph() if directed else nx.Graph()
    for i in range(N):
        written.add_node(f"n{i}", y=f"c{CLASSES[i]}", split=("train", "val", "test")[PARTS[i]], a=X[i, 0], b=X[i, 1])
    written.add_weighted_edges_from((f"n{a}", f"n{b}", float(a + b + 1)) for a, b in EDGES.T)
    nx.write_graphml(written, tmp_path / "g.graphml")
    graph = from_file(tmp_path / "g.graphml")
    both = {(a, b) for a, b in EDGES.T.tolist()} | (set() if directed else {(b, a) for a, b in EDGES.T.tolist()})
    assert pairs(graph) == sorted(map(list, both))
    assert graph.data.edge_weight.tolist() == (graph.data.edge_index.sum(0) + 1).tolist()
    assert torch.equal(graph.data.x, torch.tensor(X[:, :2], dtype=torch.float32))
    assert graph.data.y.tolist() == CLASSES.tolist()
    assert graph.data.val_mask.tolist() == (PARTS == 1).tolist()


def test_weights_in_a_third_column(tmp_path: Path) -> None:
    write_csv(tmp_path, CLASSES)
    np.savetxt(
        tmp_path / "edges.csv", np.concatenate([EDGES.T, EDGES.sum(0)[:, None]], axis=1), delimiter=",", fmt="%d"
    )
    graph = from_file(tmp_path)
    assert graph.data.edge_weight.tolist() == EDGES.sum(0).tolist()


def test_a_split_that_is_made_has_the_same_share_of_each_class(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", edge_index=EDGES, x=X, y=CLASSES)
    graph, again, other = (from_file(tmp_path / "g.npz", seed=seed) for seed in (0, 0, 1))
    same(graph, split=False)
    assert torch.equal(graph.data.train_mask, again.data.train_mask)
    assert not torch.equal(graph.data.train_mask, other.data.train_mask)
    for part, share in (("train", 6), ("val", 2), ("test", 2)):
        assert torch.bincount(graph.data.y[graph.data[f"{part}_mask"]]).tolist() == [share] * 4
    assert any("no split" in note and "seed 0" in note for note in graph.notes)


def test_nodes_without_a_known_label_are_in_no_part(tmp_path: Path) -> None:
    for y in (np.where(PARTS == 0, np.nan, CLASSES), np.where((PARTS == 0)[:, None], np.nan, LABELS)):
        np.savez(tmp_path / "g.npz", edge_index=EDGES, x=X, y=y, **masks())
        graph = from_file(tmp_path / "g.npz")
        assert not graph.data.train_mask.any()
        assert graph.data.val_mask.tolist() == (PARTS == 1).tolist()
        assert any(f"{int((PARTS == 0).sum())} nodes of the split have no known label" in note for note in graph.notes)
        np.savez(tmp_path / "g.npz", edge_index=EDGES, x=X, y=y)
        made = from_file(tmp_path / "g.npz").data
        assert (made.train_mask | made.val_mask | made.test_mask).tolist() == (PARTS != 0).tolist()


def test_features_that_are_made(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", edge_index=EDGES, y=CLASSES)
    degrees = np.stack([np.bincount(end, minlength=N) for end in (EDGES[1], EDGES[0])], axis=1)
    for features in (None, "degree"):
        graph = from_file(tmp_path / "g.npz", features=features)
        assert np.allclose(graph.data.x, np.log1p(degrees))
    learnt = from_file(tmp_path / "g.npz", features="embedding")
    assert learnt.learnt_features
    assert learnt.data.x.shape == (N, 64)
    with pytest.raises(ValueError, match="features is 'random', but must be degree, embedding"):
        from_file(tmp_path / "g.npz", features="random")  # type: ignore[arg-type]


def test_edges_are_joined_in_both_directions_where_that_is_asked(tmp_path: Path) -> None:
    graph = from_file(write_npz(tmp_path, CLASSES), undirected=True)
    simple = {(a, b) for a, b in EDGES.T.tolist()}
    assert {tuple(pair) for pair in pairs(graph)} == simple | {(b, a) for a, b in simple}
    assert ("edges", "undirected") in describe(graph)


def test_description_counts(tmp_path: Path) -> None:
    edges = [[0, 1, 1, 2], [1, 0, 0, 2]]  # repeated once, a self-loop; nodes 2 and 3 have no neighbours
    np.savez(tmp_path / "g.npz", edge_index=edges, x=np.eye(4), y=[0, 1, 0, 1], foo=3)
    rows = describe(from_file(tmp_path / "g.npz"))
    assert dict(rows) | {"note": ""} == {
        **{"graph": "g.npz: 4 nodes, 4 edges", "edges": "undirected", "self-loops": "1", "repeated edges": "1"},
        **{"isolated nodes": "2", "features": "4 a node", "task": "multiclass: 2 classes, one a node"},
        **{"split": "2 train, 2 val, 0 test", "note": ""},
    }
    assert ("note", "not used: foo") in rows


def test_a_mapping_of_tables_and_a_graph_in_memory(tmp_path: Path) -> None:
    write_csv(tmp_path, CLASSES)
    (tmp_path / "edges.csv").rename(tmp_path / "e.csv")
    paths = {role: tmp_path / f"{role}.csv" for role in ("features", "labels", "split")}
    paths["edges"] = tmp_path / "e.csv"
    same(from_file(paths))
    same(load("file", path=paths))
    data = Data(x=torch.tensor(X), edge_index=torch.tensor(EDGES), y=torch.tensor(CLASSES))
    same(from_data(data), split=False)
    same(from_data(type("Mesh", (Data,), {})(**data.to_dict())), split=False)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_no_file_runs_code(tmp_path: Path) -> None:
    evil, pt, npz = Evil(tmp_path / "ran"), tmp_path / "g.pt", tmp_path / "g.npz"
    objects = np.array([evil], dtype=object)
    for path, write in (
        (pt, lambda: torch.save(evil, pt)),
        (pt, lambda: torch.save({"x": evil}, pt)),
        (pt, lambda: pt.write_bytes(pickle.dumps(evil))),
        (npz, lambda: npz.write_bytes(pickle.dumps(evil))),
        (npz, lambda: np.savez(npz, edge_index=EDGES, y=objects)),
    ):
        write()
        with pytest.raises(InvalidFileError, match=r"could run code|cannot be read as tensors|is no file of"):
            from_file(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["multilabel/pcg", "multilabel/blogcatalog.npz"])
def test_real_graphs_with_many_labels(name: str, real_files: Path) -> None:
    graph = from_file(real_files / name)
    facts = {"multilabel/pcg": (3233, 74702, 15), "multilabel/blogcatalog.npz": (10312, 667966, 39)}[name]
    assert (graph.data.num_nodes, graph.data.num_edges, graph.num_classes) == facts
    assert ("edges", "undirected") in describe(graph)
