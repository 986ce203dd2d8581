"""A graph as arrays with names: what each is for is told by its name alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recollect.data._errors import InvalidFileError
from recollect.data._foreign import require
from recollect.data._limits import fits_in_memory
from recollect.data.files._found import PARTS, Array, Found, as_float32, check_edges, masks_of_words

# Role -> the names that an array of it can have.
NAMES: dict[str, tuple[str, ...]] = {
    "edge_index": ("edge_index",),
    "edges": ("edges",),
    "adjacency": ("adj", "adjacency", "A", "network"),
    "adj_t": ("adj_t",),
    "x": ("x", "X", "features", "node_features", "attr", "attrb", "feat"),
    "y": ("y", "Y", "label", "labels", "node_labels", "group"),
    "split": ("split",),
    "edge_weight": ("edge_weight",),
    "edge_attr": ("edge_attr", "edge_features"),
    "num_nodes": ("num_nodes",),
    **{f"{part}_mask": (f"{part}_mask",) for part in PARTS},
    **{f"{part}_masks": (f"{part}_masks",) for part in PARTS},
    **{f"{part}_idx": (f"{part}_idx", f"{part}_index") for part in PARTS},
}
_SAID = "edge_index [2, E] (or edges [E, 2], or a sparse adj), x [N, F], y, train_mask, val_mask, test_mask"
_EDGES = ("edge_index", "edges", "adjacency", "adj_t")


def from_arrays(arrays: Mapping[str, Any], source: str) -> Found:
    """Read arrays by their names.

    Args:
        arrays: NumPy arrays, numbers, or sparse matrices of SciPy.
        source: Where they are from, for messages.

    Raises:
        InvalidFileError: Something is missing, there twice, of the wrong shape or type.
    """
    given, unused = _by_role(arrays, source)
    edges = [role for role in _EDGES if role in given]
    if len(edges) != 1:
        what = f"has the edges more than once ({', '.join(edges)}); keep one" if edges else "has no edges"
        raise InvalidFileError(f"{source} {what}. Found: {_listed(arrays)}. Known names: {_SAID}")
    if "y" not in given:
        raise InvalidFileError(f"{source} has no labels y. Found: {_listed(arrays)}. Known names: {_SAID}")
    labels = _dense(given["y"], source, "y")
    x = _dense(given["x"], source, "x") if "x" in given else None
    size = _num_nodes(given, labels, x, source)
    edge_index, weight = _READ_EDGES[edges[0]](given[edges[0]], size, source)
    found = Found(source, edge_index, size, x=x, labels=labels, edge_weight=weight)
    found.masks = _masks(given, size, source)
    count = edge_index.shape[1]
    for role in ("edge_weight", "edge_attr"):
        if role in given:
            setattr(found, role, _of_edges(given[role], role, count, source))
    if unused:
        found.notes.append(f"not used: {', '.join(unused)}")
    return found


def _by_role(arrays: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    roles = {name: role for role, names in NAMES.items() for name in names}
    given: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, value in arrays.items():
        role = roles.get(name)
        if role is None or value is None:
            continue
        if role in given:
            raise InvalidFileError(f"{source} has both {names[role]!r} and {name!r}, which mean the same; keep one")
        given[role], names[role] = value, name
    return given, [str(name)[:40] for name in arrays if name not in roles]


def _listed(arrays: Mapping[str, Any]) -> str:
    return ", ".join(str(name)[:40] for name in list(arrays)[:20]) or "nothing"


def is_sparse(value: Any) -> bool:
    """Whether it is a sparse matrix of SciPy."""
    return hasattr(value, "tocoo") and not isinstance(value, np.ndarray)


def _dense(value: Any, source: str, name: str) -> Array:
    if is_sparse(value) and not fits_in_memory(value.shape):
        raise InvalidFileError(f"{source}: {name} has the shape {list(value.shape)}, more than this machine's memory")
    array = value.toarray() if is_sparse(value) else np.asarray(value)
    if array.dtype.kind not in "biufOSU" or (array.dtype.kind == "O" and name != "y"):
        raise InvalidFileError(f"{source}: {name} is of type {array.dtype}, but must hold real numbers")
    if name == "x" and array.ndim != 2:
        raise InvalidFileError(f"{source}: x has the shape {list(array.shape)}, but must be [N, F]; reshape it")
    return array


def _num_nodes(given: Mapping[str, Any], labels: Array, x: Array | None, source: str) -> int:
    """N, in which all that are there must agree."""
    sizes = {"y": labels.shape[0] if labels.ndim else 0}
    if x is not None:
        sizes["x"] = x.shape[0]
    for role in ("adjacency", "adj_t"):
        if role in given:
            shape = given[role].shape
            if len(shape) != 2 or shape[0] != shape[1]:
                raise InvalidFileError(f"{source}: the adjacency has the shape {list(shape)}, but must be [N, N]")
            sizes["adjacency"] = shape[0]
    if "num_nodes" in given and np.ndim(given["num_nodes"]) == 0:
        sizes["num_nodes"] = int(given["num_nodes"])
    if len(set(sizes.values())) != 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InvalidFileError(f"{source}: the number of nodes differs: {told}; each node needs a row in all of them")
    if not sizes["y"]:
        raise InvalidFileError(f"{source}: there are no nodes")
    return sizes["y"]


def _edge_index(value: Any, size: int, source: str) -> tuple[Array, None]:
    return check_edges(np.asarray(value), size, f"{source}: edge_index"), None


def _edge_rows(value: Any, size: int, source: str) -> tuple[Array, None]:
    array = np.asarray(value)
    if array.ndim != 2 or array.shape[1] != 2:
        raise InvalidFileError(f"{source}: edges has the shape {list(array.shape)}, but must be [E, 2]: source, target")
    return check_edges(np.ascontiguousarray(array.T), size, f"{source}: edges"), None


def _adjacency(value: Any, size: int, source: str) -> tuple[Array, Array | None]:
    """Entry (i, j) is the edge from node i to node j, and its weight; weights that are all 1 are none."""
    sparse = require("scipy.sparse", extra="graph")
    if not is_sparse(value) and np.asarray(value).dtype.kind not in "biuf":
        raise InvalidFileError(f"{source}: the adjacency is of type {np.asarray(value).dtype}, but must hold numbers")
    matrix = sparse.coo_matrix(value)
    row, col, data = matrix.row, matrix.col, matrix.data
    there = data != 0
    edge_index = check_edges(np.stack([row[there], col[there]]), size, f"{source}: the adjacency")
    weight = as_float32(data[there], f"{source}: the adjacency")
    return edge_index, None if bool((weight == 1).all()) else weight


def _adj_t(value: Any, size: int, source: str) -> tuple[Array, Array | None]:
    edge_index, weight = _adjacency(value, size, source)
    return np.ascontiguousarray(edge_index[::-1]), weight


_READ_EDGES: dict[str, Any] = {
    **{"edge_index": _edge_index, "edges": _edge_rows},
    **{"adjacency": _adjacency, "adj_t": _adj_t},
}


def _of_edges(value: Any, role: str, count: int, source: str) -> Array:
    array = np.asarray(value)
    wanted = (count,) if role == "edge_weight" else (count, *array.shape[1:2])
    if array.shape != wanted or array.dtype.kind not in "biuf" or (role == "edge_attr" and array.ndim != 2):
        form = f"[{count}]" if role == "edge_weight" else f"[{count}, D]"
        raise InvalidFileError(
            f"{source}: {role} is of type {array.dtype} and shape {list(array.shape)}, but must hold numbers {form}: a "
            f"row for each edge, in their order"
        )
    return as_float32(array, f"{source}: {role}")


def _masks(given: Mapping[str, Any], size: int, source: str) -> tuple[Array, Array, Array] | None:
    forms = {kind: [part for part in PARTS if f"{part}_{kind}" in given] for kind in ("mask", "masks", "idx")}
    having = [kind for kind, parts in forms.items() if parts]
    if "split" in given:
        having.append("split")
    if not having:
        return None
    if len(having) > 1:
        raise InvalidFileError(f"{source} tells the split in several ways ({', '.join(having)}); keep one")
    if having == ["split"]:
        words = np.asarray(given["split"])
        if words.shape != (size,) or words.dtype.kind not in "SUO":
            raise InvalidFileError(f"{source}: split must hold a word for each of the {size} nodes: train, val or test")
        return masks_of_words([w.decode() if isinstance(w, bytes) else str(w) for w in words.tolist()], source)
    kind = having[0]
    if missing := [part for part in PARTS if part not in forms[kind]]:
        raise InvalidFileError(
            f"{source} has {forms[kind][0]}_{kind} and no {missing[0]}_{kind}: give all of train, val and test, or "
            f"none of them, and a split is made"
        )
    read = {"mask": _mask, "masks": lambda *rest: _mask(*rest).T, "idx": _indices}[kind]
    train, val, test = (read(np.asarray(given[f"{part}_{kind}"]), size, f"{source}: {part}_{kind}") for part in PARTS)
    if not train.shape == val.shape == test.shape:
        raise InvalidFileError(f"{source}: the masks of train, val and test differ in their shapes")
    if train.shape[0] != size:
        form = "[N], or [N, S] for S splits" if kind == "mask" else "[S, N] for S splits"
        raise InvalidFileError(
            f"{source}: the masks are of {train.shape[0]} nodes, and there are {size}; they are {form}"
        )
    return train, val, test


def _mask(array: Array, size: int, where: str) -> Array:
    if array.ndim not in (1, 2) or array.dtype.kind not in "biu" or not np.isin(array, (0, 1)).all():
        raise InvalidFileError(
            f"{where} is of type {array.dtype} and shape {list(array.shape)}, but must hold true or false for each node"
        )
    return array.astype(bool).reshape(len(array), -1) if array.ndim == 1 else array.astype(bool)


def _indices(array: Array, size: int, where: str) -> Array:
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and (array.min() < 0 or array.max() >= size)):
        raise InvalidFileError(f"{where} must hold numbers of nodes, from 0 to {size - 1}")
    mask = np.zeros((size, 1), dtype=bool)
    mask[array] = True
    return mask
