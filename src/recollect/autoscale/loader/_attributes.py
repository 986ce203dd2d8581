"""The tensors among a graph's attributes, which may lie in dictionaries, lists and tuples."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Path", "found_at", "leaves", "put", "spelled", "whole_numbers"]

Path = tuple[str | int, ...]
"""The name of an attribute, then keys and positions in the containers that it is made of."""


def leaves(attributes: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Each attribute, and in the place of containers with tensors in them all that they hold."""
    for name, value in attributes.items():
        yield from _within((name,), value)


def _within(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    if not _holds_tensors(value):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _within((*path, key), item)


def _holds_tensors(value: Any) -> bool:
    if not isinstance(value, (Mapping, list, tuple)):
        return False
    items = value.values() if isinstance(value, Mapping) else value
    return any(isinstance(item, Tensor) or _holds_tensors(item) for item in items)


def whole_numbers(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The whole numbers, and lists and arrays of them, that something which holds no tensor is made of, by path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from whole_numbers(item, (*path, str(key)))
    elif isinstance(value, (list, tuple, Set)):
        if any(True for item in value for _ in whole_numbers(item)):
            yield path, value
    elif _is_whole(value):
        yield path, value


def _is_whole(value: Any) -> bool:
    if isinstance(value, (bool, Tensor)):
        return False
    return isinstance(value, numbers.Integral) or getattr(getattr(value, "dtype", None), "kind", None) in ("i", "u")


def _replaced(value: Any, path: Path, new: Any) -> Any:
    """A copy of the containers of ``value`` with ``new`` at ``path``; all else in them is the same."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        items = {k: _replaced(item, rest, new) if k == key else item for k, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    changed = [_replaced(item, rest, new) if k == key else item for k, item in enumerate(value)]
    return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)


def spelled(path: Path) -> str:
    """A path as messages and ``kinds`` write it: ``name``, or ``name.key`` of what lies in a container."""
    return ".".join(map(str, path))


def found_at(data: Data, path: Path) -> Any:
    """What lies at a path."""
    value: Any = data
    for key in path:
        value = value[key]
    return value


def put(data: Data, new: Mapping[Path, Tensor]) -> None:
    """Give a graph other tensors at some paths; containers on the way are copied."""
    for path, value in new.items():
        data[path[0]] = _replaced(data[path[0]], path[1:], value) if len(path) > 1 else value
