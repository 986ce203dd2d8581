"""Readers of single files, by their suffix: .npz, .pt, .mat, .graphml."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recollect.data._errors import InvalidFileError
from recollect.data._foreign import foreign_code, require
from recollect.data._limits import fits_in_memory, physical_memory
from recollect.data._stored import load_stored
from recollect.data.files._arrays import NAMES, from_arrays
from recollect.data.files._found import Found
from recollect.data.files._graphml import read_graphml


def check_unpacked_size(path: Path) -> None:
    """Refuse an archive that would unpack to more than the machine's memory.

    Raises:
        InvalidFileError: It would, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise InvalidFileError(f"{path} is damaged: {error}; write it anew") from error
    if size > physical_memory():
        raise InvalidFileError(f"{path} unpacks to {size / 2**30:.1f} GiB, more than this machine's memory")


def read_npz(path: Path) -> Found:
    """Arrays of `numpy.savez`; sparse matrices are ``name_data``, ``name_indices``, ``name_indptr``, ``name_shape``."""
    if not zipfile.is_zipfile(path):
        raise InvalidFileError(
            f"{path} is no file of numpy.savez; write numpy.savez(path, edge_index=..., x=..., y=...)"
        )
    check_unpacked_size(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive raises half a dozen unrelated types
        if "allow_pickle" in str(error):
            raise InvalidFileError(
                f"{path} holds an array of Python objects, which could run code: write arrays of numbers or words, and "
                f"a sparse matrix as adj_data, adj_indices, adj_indptr, adj_shape"
            ) from error
        raise InvalidFileError(f"{path} cannot be read ({type(error).__name__}: {error}); write it anew") from error
    return from_arrays(_join_sparse(arrays, str(path)), str(path))


def _join_sparse(arrays: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Put the parts of sparse matrices together."""
    joined = dict(arrays)
    if {"format", "shape", "data"} <= set(arrays):
        raise InvalidFileError(
            f"{source} holds one sparse matrix of scipy.sparse.save_npz, and no labels: write numpy.savez(path, "
            f"adj_data=A.data, adj_indices=A.indices, adj_indptr=A.indptr, adj_shape=A.shape, y=...)"
        )
    for name in [key.removesuffix("_indptr") for key in arrays if key.endswith("_indptr")]:
        parts = [f"{name}_{part}" for part in ("data", "indices", "indptr", "shape")]
        if missing := [part for part in parts if part not in arrays]:
            raise InvalidFileError(f"{source} has {name}_indptr and no {missing[0]}: a sparse matrix is all four parts")
        data, indices, indptr, shape = (joined.pop(part) for part in parts)
        joined[name] = checked_csr(data, indices, indptr, shape, f"{source}: {name}")
    return joined


def checked_csr(data: Any, indices: Any, indptr: Any, shape: Any, where: str) -> Any:
    """A CSR matrix whose parts are known to fit: SciPy's compiled code trusts them.

    Raises:
        InvalidFileError: They do not.
    """
    sparse = require("scipy.sparse", extra="graph")
    try:
        matrix = sparse.csr_matrix((data, indices, indptr), shape=tuple(int(size) for size in np.ravel(shape)))
        matrix.check_format(full_check=True)
    except Exception as error:  # whatever SciPy raises on parts that do not fit
        raise InvalidFileError(f"{where} is no sparse matrix in CSR form: {error}") from error
    return matrix


def read_pt(path: Path) -> Found:
    """A ``torch_geometric.data.Data``, or a dictionary of tensors, of `torch.save`."""
    return from_mapping(load_stored(path, f"torch.save(Data(x=..., edge_index=..., y=...), {str(path)!r})"), str(path))


def from_mapping(value: Any, source: str) -> Found:
    """Read a ``Data`` or a dictionary.

    Raises:
        InvalidFileError: It is neither, or see `from_arrays`.
    """
    kind = type(value).__name__
    if isinstance(value, require("torch_geometric.data", extra="graph").Data):
        value = value.to_dict()
    if not isinstance(value, Mapping):
        raise InvalidFileError(
            f"{source} holds a {kind}, but must hold a torch_geometric.data.Data with one kind of nodes, or a "
            f"dictionary of tensors"
        )
    known = {name for names in NAMES.values() for name in names}
    arrays = {name: _to_numpy(item, f"{source}: {name}") if name in known else None for name, item in value.items()}
    return from_arrays(arrays, source)


def _to_numpy(value: Any, what: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not fits_in_memory(value.shape if value.layout == torch.strided else (), item_bytes=value.element_size()):
        raise InvalidFileError(
            f"{what} has the shape {list(value.shape)}, which takes more than this machine's memory; write it without "
            "what is repeated"
        )
    try:
        return _as_array(value.detach().cpu())
    except (TypeError, NotImplementedError) as error:
        raise InvalidFileError(f"{what} is a tensor on {value.device} of {value.dtype}: {error}") from error


def _as_array(value: Any) -> Any:
    if value.layout != torch.strided:
        coo = value.to_sparse_coo().coalesce()
        entries = (coo.values().float().numpy(), tuple(coo.indices().numpy()))
        return require("scipy.sparse", extra="graph").coo_matrix(entries, shape=tuple(value.shape))
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value.as_subclass(Tensor)).numpy()


def read_mat(path: Path) -> Found:
    """Variables of a Matlab file up to version 7; a vector is a list, whichever way it lies."""
    io = require("scipy.io", extra="graph")
    try:
        with foreign_code():
            variables = io.loadmat(str(path), variable_names=[name for names in NAMES.values() for name in names])
    except NotImplementedError as error:
        raise InvalidFileError(f"{path} is a Matlab file of version 7.3; write it by save(..., '-v7')") from error
    except Exception as error:  # whatever SciPy raises on a damaged file
        raise InvalidFileError(f"{path} cannot be read as a Matlab file ({type(error).__name__}: {error})") from error
    arrays = {name: _matlab(name, value) for name, value in variables.items() if not name.startswith("__")}
    _check_first_number(arrays, str(path))
    return from_arrays(arrays, str(path))


def _check_first_number(arrays: Mapping[str, Any], source: str) -> None:
    """Refuse numbers of nodes without a 0: Matlab counts from 1, others write its files too, and nothing says which."""
    given = {name: array for name, array in arrays.items() if _numbers_nodes(name) and np.size(array)}
    if given and all(array.dtype.kind in "iu" and int(array.min()) > 0 for array in given.values()):
        name = next(iter(given))
        raise InvalidFileError(
            f"{source}: {name} names no node 0, so that nodes may be numbered from 0 or, as in Matlab, from 1; write "
            f"the edges as a sparse matrix adj, and the split as train_mask, val_mask and test_mask"
        )


def _numbers_nodes(name: str) -> bool:
    return name in (*NAMES["edges"], *NAMES["edge_index"]) or name.endswith(("idx", "_index"))


def _matlab(name: str, value: Any) -> Any:
    """Matlab knows neither lists nor, by default, whole numbers."""
    if not isinstance(value, np.ndarray):
        return value
    is_list = name not in (*NAMES["x"], *NAMES["edges"], *NAMES["edge_index"], *NAMES["adjacency"])
    if is_list and value.ndim == 2 and 1 in value.shape:
        value = value.reshape(-1)
    is_number = _numbers_nodes(name) or name.endswith(("mask", "masks"))
    if is_number and value.dtype.kind == "f" and bool((value == np.floor(value)).all()):
        return value.astype(np.int64)
    if value.dtype.kind == "O":  # a cell array of words
        return np.array([str(np.ravel(item)[0]) if np.size(item) else "" for item in value.reshape(-1)], dtype=object)
    return value


READERS: dict[str, Callable[[Path], Found]] = {
    **{".npz": read_npz, ".pt": read_pt, ".pth": read_pt},
    **{".mat": read_mat, ".graphml": read_graphml},
}

__all__ = ["READERS", "check_unpacked_size", "checked_csr", "from_mapping"]
