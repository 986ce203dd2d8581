"""Pickles of arrays, sparse matrices, dictionaries and lists, read without running what they say.

A pickle is a program that may call any function of any module. Here it can name only what stands in the table at the
end, and those are stand-ins that build plain arrays from checked parts: neither NumPy's nor SciPy's own code sees what
the file says of their inside.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from recollect.data._limits import fits_in_memory

__all__ = ["read_pickle"]

Array = NDArray[Any]

_DEEPEST = 8


def read_pickle(path: Path) -> Any:
    """Read numbers, text, lists, dictionaries and arrays; a sparse matrix in CSR form becomes a dense array.

    Text and arrays of Python 2 are read too.

    Raises:
        pickle.UnpicklingError: The file holds something else, or is damaged; nothing of it was run.
    """
    try:
        content = path.read_bytes()
        return _plain(_Reader(io.BytesIO(content), encoding="latin1").load(), _Budget(len(content)))
    except (OSError, MemoryError, pickle.UnpicklingError):
        raise
    except Exception as error:  # what Python raises on a program that makes no sense: half a dozen unrelated types
        raise pickle.UnpicklingError(f"damaged: {type(error).__name__}: {error}") from error


class _Type:
    """Stands for a NumPy type of numbers."""

    def __init__(self, code: Any, *rest: Any) -> None:
        kind = np.dtype(code) if isinstance(code, str) and len(code) <= 3 and code[:1] in "?bhilqBHILQfdiuf" else None
        if kind is None or kind.kind not in "biuf":
            raise pickle.UnpicklingError(f"an array of type {str(code)[:20]!r}, which holds no numbers")
        self.type = kind

    def build(self, state: Any) -> None:
        """The byte order is the second of the state; all else follows from the code."""
        order = state[1]
        if order in ("<", ">"):
            self.type = self.type.newbyteorder(order)


class _Array:
    """Stands for a NumPy array, whose content comes after it."""

    value: Array | None = None

    def build(self, state: Any) -> None:
        """The state is a version, shape, type, order and bytes."""
        _, shape, kind, fortran, content = state
        self.fill(content, kind, shape, "F" if fortran else "C")

    def fill(self, content: Any, kind: Any, shape: Any, order: str) -> None:
        """Take the content."""
        if isinstance(content, str):  # of Python 2
            content = content.encode("latin1")
        if not isinstance(kind, _Type) or not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array that does not hold numbers")
        sizes = tuple(int(size) for size in shape)
        if any(size < 0 for size in sizes) or not fits_in_memory(sizes, 1):
            raise pickle.UnpicklingError(f"an array of shape {sizes}")
        flat = np.frombuffer(content, dtype=kind.type)
        self.value = flat.reshape(sizes, order="F" if order == "F" else "C").astype(kind.type.newbyteorder("="))


class _Sparse:
    """Stands for a sparse matrix in CSR form."""

    state: dict[str, Any] | None = None

    def build(self, state: Any) -> None:
        """The state is a dictionary, perhaps the first of a pair."""
        self.state = dict(state[0] if isinstance(state, tuple) else state)

    def dense(self) -> Array:
        """The matrix as an array [rows, columns]; entries at one place are summed up."""
        state = self.state or {}
        shape = state.get("_shape", state.get("shape"))
        rows, columns = (int(size) for size in shape or ())
        data, indices, indptr = (_content(state[part]) for part in ("data", "indices", "indptr"))
        fits = (
            rows >= 0 and columns >= 0 and indptr.shape == (rows + 1,) and data.shape == indices.shape == (indptr[-1],)
        )
        if not fits or indptr[0] != 0 or (np.diff(indptr) < 0).any() or ((indices < 0) | (indices >= columns)).any():
            raise pickle.UnpicklingError("a sparse matrix whose parts do not fit")
        if not fits_in_memory((rows, columns)):
            raise pickle.UnpicklingError(
                f"a sparse matrix of {rows} x {columns}, which is more than the machine's memory"
            )
        dense = np.zeros((rows, columns), dtype=data.dtype)
        np.add.at(dense, (np.repeat(np.arange(rows), np.diff(indptr)), indices), data)
        return dense


def _reconstruct(*rest: Any) -> _Array:
    return _Array()


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(content, kind, shape, str(order))
    return array


def _reconstructor(kind: Any, *rest: Any) -> Any:
    if kind is not _Sparse:
        raise pickle.UnpicklingError("an object that is no sparse matrix")
    return _Sparse()


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    if str(codec).lower() not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {str(codec)[:20]!r}")
    return str(text).encode("latin1")


def _dictionary(*rest: Any) -> dict[Any, Any]:
    return {}


def _scalar(kind: Any, content: Any) -> Any:
    array = _from_buffer(content, kind, (1,), "C")
    return np.asarray(array.value).item()


_NUMPY = {
    "ndarray": _Array,
    "dtype": _Type,
    "_reconstruct": _reconstruct,
    "scalar": _scalar,
    "_frombuffer": _from_buffer,
}
_KNOWN: dict[tuple[str, str], Any] = {
    **{(module, name): value for module in ("numpy", "numpy.core.multiarray") for name, value in _NUMPY.items()},
    **{
        (f"numpy._core.{module}", name): value for module in ("multiarray", "numeric") for name, value in _NUMPY.items()
    },
    **{("numpy.core.numeric", name): value for name, value in _NUMPY.items()},
    **{(f"scipy.sparse.{module}", "csr_matrix"): _Sparse for module in ("csr", "_csr")},
    **{(module, "_reconstructor"): _reconstructor for module in ("copy_reg", "copyreg")},
    **{(module, name): name for module in ("__builtin__", "builtins") for name in ("list", "object")},
    ("collections", "defaultdict"): _dictionary,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle._Unpickler):
    """Python's reader of pickles, in Python: its compiled twin believes the sizes that a file tells of its memory."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(
                f"{module}.{name}: only arrays and CSR matrices of numbers, dictionaries and lists are read, and "
                f"nothing is run"
            )
        return found

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("an object of copyreg's table of extensions")

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) not in (_Type, _Array, _Sparse):
            raise pickle.UnpicklingError(f"a state for a {type(target).__name__}")
        target.build(state)

    dispatch[pickle.BUILD[0]] = _build


class _Budget:
    """What containers may hold: no more than the file has bytes, however often they stand in one another."""

    def __init__(self, items: int) -> None:
        self.left = items

    def take(self, items: int) -> None:
        """Spend some of it."""
        self.left -= items
        if self.left < 0:
            raise pickle.UnpicklingError("containers that hold each other over and over")


def _content(value: Any) -> Array:
    if not isinstance(value, _Array) or value.value is None:
        raise pickle.UnpicklingError(f"a {type(value).__name__} in the place of an array")
    return value.value


def _plain(value: Any, budget: _Budget, depth: int = 0) -> Any:
    """Put arrays in the place of their stand-ins, in containers too."""
    if isinstance(value, _Array):
        return _content(value)
    if isinstance(value, _Sparse):
        return value.dense()
    if isinstance(value, (dict, list, tuple)):
        if depth > _DEEPEST:
            raise pickle.UnpicklingError(f"containers in containers, more than {_DEEPEST} deep")
        budget.take(len(value))
        if isinstance(value, dict):
            return {key: _plain(item, budget, depth + 1) for key, item in value.items()}
        return [_plain(item, budget, depth + 1) for item in value]
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__}, which is no array, dictionary or list")
