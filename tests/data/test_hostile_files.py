"""Files that nobody trusts: damaged and hostile ones. Each is refused with a name, runs nothing, and ends soon."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from recollect.data import InvalidFileError, InvalidRawFilesError, from_file, load
from recollect.data._foreign import require
from recollect.data._pickles import read_pickle

Data = require("torch_geometric.data", extra="graph").Data

N = 12
EDGES = np.stack([np.arange(N), np.roll(np.arange(N), 1)])
Y = np.arange(N) % 3


class Evil:
    """Its pickle creates a file."""

    def __init__(self, path: Path, call: str = "open") -> None:
        self.path = path
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        text = f"open({str(self.path)!r}, 'w').close()"
        return {
            "open": (open, (str(self.path), "w")),
            "system": (os.system, (f"touch {self.path}",)),
            "eval": (eval, (text,)),
            "exec": (exec, (text,)),
        }[self.call]


@pytest.mark.parametrize("call", ["open", "system", "eval", "exec"])
@pytest.mark.parametrize("part", ["x", "allx", "graph"])
def test_raw_pickles_run_nothing(
    part: str, call: str, tmp_path: Path, write_planetoid: Callable[..., dict[str, Any]]
) -> None:
    write_planetoid("cora", "Cora")
    file = tmp_path / "root/Planetoid/Cora/raw" / f"ind.cora.{part}"
    file.write_bytes(pickle.dumps(Evil(tmp_path / "ran", call)))
    if part == "x":  # nobody needs it
        load("cora", tmp_path / "root")
    else:
        with pytest.raises(
            InvalidRawFilesError, match="only arrays and CSR matrices of numbers, dictionaries and lists"
        ):
            load("cora", tmp_path / "root")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["tolokers", "cora", "ogbn-arxiv"])
def test_processed_files_run_nothing(
    name: str,
    tmp_path: Path,
    write_heterophilous: Callable[..., Any],
    write_planetoid: Callable[..., Any],
    write_ogb: Callable[..., Any],
) -> None:
    folder, file = {
        "tolokers": ("HeterophilousGraphDataset/tolokers", "data.pt"),
        "cora": ("Planetoid/Cora", "data.pt"),
        "ogbn-arxiv": ("ogbn_arxiv", "geometric_data_processed.pt"),
    }[name]
    {"tolokers": lambda: write_heterophilous("tolokers"), "cora": lambda: write_planetoid("cora", "Cora")}.get(
        name, lambda: write_ogb(name)
    )()
    first = load(name, tmp_path / "root")
    processed = tmp_path / "root" / folder / "processed"
    for content in (Evil(tmp_path / "ran"), ({"x": Evil(tmp_path / "ran")}, None, dict)):
        torch.save(content, processed / file)
        torch.save(content, processed / "pre_transform.pt")
        torch.save(content, processed / "pre_filter.pt")
        again = load(name, tmp_path / "root")
        assert torch.equal(again.data.x, first.data.x)  # from the raw files
        assert not (tmp_path / "ran").exists()


def global_call(module: str, name: str, arguments: bytes = b"(") -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n" + arguments + b"tR."


PICKLES = {
    "empty": b"",
    "text": b"hello",
    "stop": b".",
    "no stop": b"(l",
    "os.system": global_call("os", "system", b"(S'true'\n"),
    "builtins.eval": global_call("builtins", "eval", b"(S'1'\n"),
    "getattr": global_call("builtins", "getattr", b"(S'a'\nS'b'\n"),
    "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0ccore.os.path\x93.",
    "f2py": global_call("numpy.f2py.crackfortran", "getlincoef", b"(S'1'\n"),
    "numpy.load": global_call("numpy", "load", b"(S'/etc/passwd'\n"),
    "fromfile": global_call("numpy", "fromfile", b"(S'/etc/passwd'\n"),
    "torch": global_call("torch", "load", b"(S'x'\n"),
    "scipy": global_call("scipy.sparse", "load_npz", b"(S'x'\n"),
    "extension": b"\x82\x01.",
    "extension 4": b"\x84\x01\x00\x00\x00.",
    "persistent": b"Pid\n.",
    "persistent binary": b"K\x01Q.",
    "missing memo": b"h\x07.",
    "huge bytes": b"\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "huge text": b"X" + struct.pack("<I", 2**31) + b"x.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
    "huge number": b"\x8b" + struct.pack("<i", 2**30) + b"x.",
    "negative": b"\x8b" + struct.pack("<i", -5) + b"x.",
    "protocol": b"\x80\xff.",
    "out of band": b"\x97.",
    "set of a class": b"cnumpy\nndarray\n}S'a'\nI1\nsb.",
    "slots of a class": b"cnumpy\nndarray\n(N}S'build'\nI1\nsS'x'\nt\x86b.",
    "state of a list": b"(l}S'a'\nI1\nsb.",
    "array of nothing": b"cnumpy.core.multiarray\n_reconstruct\n(tR.",
    "dtype of objects": b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
    "dtype of commas": b"cnumpy\ndtype\n(S'i4,i4'\nI0\nI1\ntR.",
    "build without array": b"cnumpy\ndtype\n)\x81}b.",
    "object": global_call("builtins", "object"),
    "reconstruct a list": b"ccopy_reg\n_reconstructor\n(c__builtin__\nlist\nc__builtin__\nobject\nNtR.",
    "codec": b"c_codecs\nencode\n(S'a'\nS'bz2'\ntR.",
    "nested": b"(l" * 2 + b"]" * 1 + b"".join(b"]" for _ in range(3000)) + b"a" * 2999 + b".",
    "laughs": b"]q\x00" + b"".join(b"(" + b"h%c" % i * 20 + b"lq%c" % (i + 1) for i in range(9)) + b".",
    "set": b"\x80\x04\x8f.",
    "complex": global_call("builtins", "complex", b"(F1.0\nF1.0\n"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_bad_pickles(name: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(PICKLES[name])
    with pytest.raises((pickle.UnpicklingError, MemoryError)):
        read_pickle(tmp_path / "p")


def test_a_memo_of_four_billion_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"K\x01r\xff\xff\xff\xff.")
    assert read_pickle(tmp_path / "p") == 1


@pytest.mark.parametrize(
    "broken",
    [
        {"indices": [0, 9]},
        {"indices": [0, -1]},
        {"indptr": [0, 1, 5]},
        {"indptr": [0, 2, 1]},
        {"indptr": [1, 1, 2]},
        {"indptr": [0, 2]},
        {"data": [1.0]},
        {"_shape": (2**40, 2**40)},
        {"_shape": (-2, 3)},
        {"_shape": None},
    ],
)
def test_sparse_matrices_whose_parts_do_not_fit(broken: dict[str, Any], tmp_path: Path) -> None:
    matrix = sp.csr_matrix(np.array([[1.0, 0, 0], [0, 0, 2.0]]))
    assert read_pickle(_written(tmp_path, pickle.dumps(matrix))).tolist() == [[1, 0, 0], [0, 0, 2]]
    for name, value in broken.items():
        setattr(matrix, name, np.array(value) if isinstance(value, list) else value)
    with pytest.raises(pickle.UnpicklingError):
        read_pickle(_written(tmp_path, pickle.dumps(matrix)))


def _written(folder: Path, content: bytes) -> Path:
    (folder / "file").write_bytes(content)
    return folder / "file"


def good_files(folder: Path) -> dict[str, bytes]:
    """A file of each format that can be read."""
    x = np.eye(N)
    buffer = io.BytesIO()
    np.savez(buffer, edge_index=EDGES, x=x, y=Y)
    pt = io.BytesIO()
    torch.save(Data(x=torch.tensor(x), edge_index=torch.tensor(EDGES), y=torch.tensor(Y)), pt)
    mat = io.BytesIO()
    __import__("scipy.io").io.savemat(mat, {"edge_index": EDGES, "x": x, "y": Y})
    nodes = "".join(f'<node id="n{i}"><data key="d0">c{Y[i]}</data></node>' for i in range(N))
    edges = "".join(f'<edge source="n{a}" target="n{b}"/>' for a, b in EDGES.T)
    graphml = (
        '<graphml xmlns="http://graphml.graphdrawing.org/xmlns"><key id="d0" for="node" attr.name="y" '
        f'attr.type="string"/><graph edgedefault="directed">{nodes}{edges}</graph></graphml>'
    )
    return {
        **{"g.npz": buffer.getvalue(), "g.pt": pt.getvalue(), "g.mat": mat.getvalue()},
        "g.graphml": graphml.encode(),
    }


@pytest.mark.parametrize("name", ["g.npz", "g.pt", "g.mat", "g.graphml"])
def test_damaged_files_are_refused_or_read_and_nothing_else(name: str, tmp_path: Path) -> None:
    """Cut at 12 places, and with 3 bytes changed in 12 ways: 96 files."""
    good = good_files(tmp_path)[name]
    path = tmp_path / name
    path.write_bytes(good)
    assert from_file(path).num_classes == 3
    rng, refused = np.random.default_rng(0), 0
    contents = [good[: len(good) * k // 12] for k in range(12)]
    for _ in range(12):
        changed = np.frombuffer(good, dtype=np.uint8).copy()
        changed[rng.integers(len(good), size=3)] = rng.integers(256, size=3)
        contents.append(changed.tobytes())
    for content in contents:
        path.write_bytes(content)
        error = _error(path)
        refused += error is not None
        assert error is None or str(path) in error
    assert refused >= 12


def _error(path: Path) -> str | None:
    try:
        from_file(path)
    except InvalidFileError as error:
        return str(error)
    return None


def _with_edges(edges: str) -> str:
    """A document of three nodes."""
    nodes = "".join(f'<node id="n{i}"><data key="y">{i}</data></node>' for i in range(3))
    key = '<key id="y" for="node" attr.name="y" attr.type="int"/>'
    space = 'xmlns="http://graphml.graphdrawing.org/xmlns"'
    return f"<graphml {space}>{key}<graph>{nodes}{edges}</graph></graphml>"


ENTITIES = "".join(f'<!ENTITY a{k + 1} "{f"&a{k};" * 10}">' for k in range(9))
TEXTS: dict[str, tuple[str, str | bytes]] = {
    "laughs in XML": ("g.graphml", f'<!DOCTYPE g [<!ENTITY a0 "a">{ENTITIES}]><graphml>&a9;</graphml>'),
    "entity of a file": ("g.graphml", '<!DOCTYPE g [<!ENTITY a SYSTEM "file:///etc/passwd">]><graphml>&a;</graphml>'),
    "deep XML": ("g.graphml", "<graphml>" + "<graph>" * 20000),
    "no XML": ("g.graphml", "hello"),
    "no encoding": ("g.graphml", "<?xml version='1.0' encoding='x-evil'?><graphml/>"),
    "edge to nowhere": ("g.graphml", _with_edges('<edge source="n0" target="elsewhere"/>')),
    "edge from nowhere": ("g.graphml", _with_edges('<edge target="n0"/>')),
    "text as npz": ("g.npz", "edge_index"),
    "text as pt": ("g.pt", "x"),
    "text as mat": ("g.mat", "x" * 500),
    "other suffix": ("g.pkl", "x"),
    "no suffix": ("graph", "x"),
    "one table": ("edges.csv", "0,1\n"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_texts(name: str, tmp_path: Path) -> None:
    file, content = TEXTS[name]
    (tmp_path / file).write_text(str(content))
    with pytest.raises(InvalidFileError, match=file):
        from_file(tmp_path / file)


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(N, 3, device="meta"),
        torch.zeros(N, 3).to(torch.float8_e4m3fn),
        torch.zeros(1).expand(N, 10**12),
    ],
    ids=["meta", "float8", "expanded"],
)
def test_tensors_that_numpy_has_not_or_that_are_larger_than_their_file(x: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"edge_index": torch.tensor(EDGES), "x": x, "y": torch.tensor(Y)}, tmp_path / "g.pt")
    with pytest.raises(InvalidFileError, match=r"g.pt: x (is a tensor on|has the shape \[12, 1000000000000\])"):
        from_file(tmp_path / "g.pt")


def test_masks_without_a_column_and_names_that_no_file_can_have(tmp_path: Path) -> None:
    masks: Any = {f"{part}_mask": np.ones((N, 0), bool) for part in ("train", "val", "test")}
    np.savez(tmp_path / "g.npz", edge_index=EDGES, y=Y, **masks)
    with pytest.raises(InvalidFileError, match="the masks have no column"):
        from_file(tmp_path / "g.npz")
    with pytest.raises(InvalidFileError, match="cannot be looked for: File name too long"):
        from_file("a" * 5000)


def test_an_archive_that_unpacks_to_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recollect.data.files._formats.physical_memory", lambda: 2**20)
    with zipfile.ZipFile(tmp_path / "g.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(2**22))
    assert (tmp_path / "g.npz").stat().st_size < 2**14
    with pytest.raises(InvalidFileError, match=r"unpacks to 0\.0 GiB, more than"):
        from_file(tmp_path / "g.npz")


GOOD: dict[str, Any] = {"edge_index": EDGES, "x": np.eye(N), "y": Y}
ONE = np.ones(N, dtype=bool)
ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no edges": ({"edge_index": None}, "has no edges"),
    "no labels": ({"y": None}, "has no labels"),
    "edges twice": ({"edges": EDGES.T}, "edges more than once"),
    "features twice": ({"features": np.eye(N)}, "both 'x' and 'features'"),
    "edges turned": ({"edge_index": EDGES.T}, r"\[12, 2\], but must be \[2, E\]"),
    "edges of one row": ({"edge_index": EDGES[0]}, "but must be"),
    "edges of fractions": ({"edge_index": EDGES + 0.5}, "must hold whole numbers"),
    "a node too many": ({"edge_index": EDGES + 1}, "names the node 12, and the 12 nodes"),
    "a node below": ({"edge_index": EDGES - 1}, "names the node -1"),
    "fewer labels": ({"y": Y[:-1]}, "number of nodes differs"),
    "flat features": ({"x": np.ones(N)}, r"must be \[N, F\]"),
    "features of words": ({"x": np.full((N, 2), "a")}, "must hold numbers"),
    "features of times": ({"x": np.full((N, 2), 1, dtype="datetime64[s]")}, "must hold real numbers"),
    "complex features": ({"x": np.ones((N, 2), dtype=complex)}, "must hold real numbers"),
    "too large": ({"x": np.full((N, 2), 1e300)}, r"x holds 1e\+300 at \[0, 0\]"),
    "infinite weights": ({"edge_weight": np.full(N, np.inf)}, r"edge_weight holds inf at \[0\]"),
    "no feature": ({"x": np.ones((N, 0))}, "no column"),
    "NaN in features": ({"x": np.full((N, 2), np.nan)}, r"x holds nan at \[0, 0\]"),
    "fractions as classes": ({"y": Y + 0.5}, "the class of node 0 is 0.5"),
    "negative classes": ({"y": Y - 1}, "the class of node 0 is -1"),
    "one class": ({"y": Y * 0}, "1 classes are known"),
    "no class": ({"y": np.full(N, np.nan)}, "0 classes are known"),
    "labels of 3 dimensions": ({"y": np.ones((N, 2, 2))}, "have the shape"),
    "labels that are no labels": ({"y": np.full((N, 2), 7)}, "label 0 of node 0 is 7"),
    "one each": ({"y": np.eye(3)[Y]}, "write task=multiclass or task=multilabel"),
    "one column": ({"y": (Y[:, None] > 0).astype(int)}, "write task=multiclass or task=multilabel"),
    "a number": ({"y": np.array(3)}, "number of nodes differs|must be"),
    "one mask": ({"train_mask": ONE}, "has train_mask and no val_mask"),
    "overlapping masks": (dict.fromkeys(("train_mask", "val_mask", "test_mask"), ONE), "in train and val and test"),
    "masks of numbers": (dict.fromkeys(("train_mask", "val_mask", "test_mask"), Y), "must hold true or false"),
    "short masks": (dict.fromkeys(("train_mask", "val_mask", "test_mask"), ONE[:5]), "masks are of 5 nodes"),
    "indices": (dict.fromkeys(("train_idx", "val_idx", "test_idx"), np.array([99])), "from 0 to 11"),
    "masks and words": ({"train_mask": ONE, "split": np.full(N, "train")}, "in several ways"),
    "unknown part": ({"split": np.full(N, "holdout")}, "'holdout' is no part of a split"),
    "numbers as split": ({"split": Y}, "must hold a word"),
    "weights of another number": ({"edge_weight": np.ones(3)}, r"must hold numbers \[12\]"),
    "edge features of another number": ({"edge_attr": np.ones((3, 2))}, r"must hold numbers \[12, D\]"),
    "half a sparse matrix": ({"adj_indptr": Y, "edge_index": None}, "has adj_indptr and no adj_data"),
    "a sparse matrix out of bounds": (
        {
            **{"edge_index": None, "adj_data": np.ones(1), "adj_indices": np.array([99])},
            **{"adj_indptr": np.array([0] + [1] * N), "adj_shape": np.array([N, N])},
        },
        "no sparse matrix in CSR form",
    ),
    "a rectangle": ({"edge_index": None, "adj": np.ones((N, 3))}, r"must be \[N, N\]"),
    "an adjacency of words": ({"edge_index": None, "adj": np.full((N, N), "a")}, "must hold numbers"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_graph(name: str, tmp_path: Path) -> None:
    changed, message = ARRAYS[name]
    np.savez(tmp_path / "g.npz", **{key: value for key, value in {**GOOD, **changed}.items() if value is not None})
    with pytest.raises(InvalidFileError, match=message):
        from_file(tmp_path / "g.npz")


TABLES: dict[str, tuple[dict[str, str | None], str]] = {
    "no edges": ({"edges": None}, r"no edges\.csv"),
    "no labels": ({"labels": None}, r"no labels\.csv"),
    "empty": ({"edges": ""}, "is empty"),
    "unknown header": ({"edges": "u,v\n0,1\n"}, "line 1: 'u, v' is neither two numbers"),
    "unknown column": ({"edges": "source,target,colour\n0,1,2\n"}, "the column 'colour' is unknown"),
    "four cells": ({"edges": "0,1,2,3\n"}, "line 1: has 4 cells"),
    "ragged": ({"edges": "0,1\n1\n"}, "line 2: has 1 cells, and line 1 has 2"),
    "a node too many": ({"edges": "0,1\n1,4\n"}, "line 2: there is no node '4'"),
    "a node below": ({"edges": "0,1\n-1,0\n1,0\n"}, "line 2: there is no node '-1'"),
    "a huge number": ({"edges": "0,1\n" + "9" * 5000 + ",0\n"}, "line 2: there is no node '999"),
    "a weight of words": ({"edges": "0,1,heavy\n"}, "line 1: 'heavy' in column 3 must be a finite number"),
    "an infinite weight": ({"edges": "0,1,inf\n"}, "must be a finite number"),
    "semicolons": ({"edges": "0;1\n"}, "between commas"),
    "an open quote": ({"edges": '"0,1\n'}, "cannot be read as text|cells"),
    "binary": ({"edges": "0,1\n\0,1\n"}, "line 2|cannot be read"),
    "words as features": ({"features": "1,2\n1,b\n1,2\n1,2\n"}, "line 2: 'b' in column 2"),
    "NaN as feature": ({"features": "1,nan\n1,1\n1,2\n1,2\n"}, "line 1: 'nan' in column 2"),
    "infinite in the first line": ({"features": "inf,2\n1,2\n1,2\n1,2\n"}, "line 1: 'inf' in column 1"),
    "hexadecimal in the first line": ({"features": "0x1,2\n1,2\n1,2\n1,2\n"}, "line 1: '0x1' in column 1"),
    "a column of row numbers": ({"features": ",a\n0,1\n1,2\n2,3\n3,4\n"}, "line 1: column 1 has no name, as numbers"),
    "labels with row numbers": ({"labels": ",a,b\n0,1,0\n1,0,1\n2,1,1\n3,0,0\n"}, "line 1: column 1 has no name"),
    "a later empty row of a split": ({"split": "train\n\nval\ntest\n"}, "line 2: is empty.* write nan"),
    "fewer features": ({"features": "1,2\n1,2\n"}, "has 2 rows, and|has 4 rows, and"),
    "ids in one table": ({"features": "id,a\nx,1\ny,1\nz,1\nw,1\n"}, "has a column of ids, and .* has none"),
    "a header unknown": ({"labels": "colour\n0\n1\n0\n1\n"}, "nor a known header; write label"),
    "labels out of range": ({"labels": "0,1\n2,1\n0,1\n1,1\n"}, "label 0 of node 1 is 2"),
    "a word among labels": ({"labels": "0,1\n1,x\n0,1\n1,1\n"}, "line 2: 'x' in column 2 must be a number, or empty"),
    "an unknown part": ({"split": "train\nval\ntest\nlater\n"}, "line 4: 'later' is no part"),
    "two words of a split": ({"split": "train,1\nval,1\ntest,1\ntest,1\n"}, "must be one word"),
    "ids twice": (
        {"labels": "id,label\na,0\na,1\n", "features": None, "edges": "a,a\n"},
        "line 3: the node 'a'",
    ),
    "columns twice": ({"labels": "id,label,Label\na,0,1\n", "features": None}, "two columns are called 'label'"),
    "ids alone": ({"labels": "id,node\na,0\n", "features": None}, "mean the same"),
    "nodes and labels": ({"nodes": "id,label\na,0\n"}, "which tell the same"),
    "nodes without label": ({"nodes": "id,a\na,0\n", "labels": None, "features": None}, "names no label"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_are_no_graph(name: str, tmp_path: Path) -> None:
    good = {"edges": "0,1\n1,2\n2,3\n", "features": "1,2\n3,4\n5,6\n7,8\n", "labels": "0\n1\n0\n1\n"}
    changed, message = TABLES[name]
    for role, text in {**good, **changed}.items():
        if text is not None:
            (tmp_path / f"{role}.csv").write_text(text)
    with pytest.raises(InvalidFileError, match=message):
        from_file(tmp_path)


def test_raw_files_that_name_nodes_which_are_not_there(
    tmp_path: Path, write_heterophilous: Callable[[str], dict[str, Any]]
) -> None:
    written = write_heterophilous("squirrel_filtered")
    file = tmp_path / "root/HeterophilousGraphDataset/squirrel_filtered/raw/squirrel_filtered.npz"
    for changed in ({"edges": written["edges"] + 30}, {"node_labels": written["node_labels"] - 1}, {"edges": None}):
        arrays = {key: value for key, value in {**written, **changed}.items() if value is not None}
        np.savez(file, **arrays)
        with pytest.raises(InvalidRawFilesError, match="squirrel"):
            load("squirrel", tmp_path / "root")


def test_a_file_of_json_in_place_of_a_graph(tmp_path: Path) -> None:
    (tmp_path / "g.npz").write_text(json.dumps({"edge_index": EDGES.tolist()}))
    with pytest.raises(InvalidFileError, match=r"is no file of numpy\.savez"):
        from_file(tmp_path / "g.npz")
