"""Tensors in containers: the one tree map.

Opened are tuples, lists, dicts and what extends them (named tuples, OrderedDict, model outputs), dataclasses,
:func:`functools.partial`, torch_geometric's ``Data`` and ``HeteroData``, and whatever was registered with torch's
pytree. Anything else is a value by reference.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recollect._torch import opened_by_pytree

__all__ = ["Tree", "others_of", "tensors_among", "tensors_of"]

# Without tensors, and immutable.
ATOMS = frozenset(
    [type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.layout, torch.Size]
)

Opened = tuple[list[Any], Callable[[list[Any]], Any]]


class _Place:
    """Where a tensor stands."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class _Node:
    """A container, and how it is made of its items."""

    __slots__ = ("items", "make")

    def __init__(self, items: list[Any], make: Callable[[list[Any]], Any]) -> None:
        self.items = items
        self.make = make


class Tree:
    """A value whose tensors were taken out; containers on the way to them are made anew by :meth:`build`.

    Tensors that are the same object have one place. Containers without tensors are copied too: whoever gets a built
    value may change it.

    Args:
        value: any value.

    Attributes:
        tensors: what was taken out, in order; may be replaced by as many other values, or dropped.
    """

    __slots__ = ("_spec", "tensors")

    def __init__(self, value: Any) -> None:
        self.tensors: list[Any] = []
        self._spec = self._take(value, {})

    def _take(self, value: Any, places: dict[int, _Place]) -> Any:
        kind = type(value)
        if kind in ATOMS:
            return value
        if isinstance(value, Tensor):
            place = places.get(id(value))
            if place is None:
                place = places[id(value)] = _Place(len(self.tensors))
                self.tensors.append(value)
            return place
        if kind is tuple:
            return _Node([self._take(item, places) for item in value], tuple)
        if kind is list:
            return _Node([self._take(item, places) for item in value], list)
        opened = _open(value)
        if opened is None:
            return value
        items, make = opened
        return _Node([self._take(item, places) for item in items], make)

    def build(self, tensors: list[Any]) -> Any:
        """Return the value again, with these in the places of its tensors."""
        return _build(self._spec, tensors)


def _build(spec: Any, tensors: list[Any]) -> Any:
    if type(spec) is _Place:
        return tensors[spec.index]
    if type(spec) is _Node:
        return spec.make([_build(item, tensors) for item in spec.items])
    return spec


def others_of(value: Any) -> Iterator[Any]:
    """Yield what is in a value beside tensors and containers, but for ``None``."""
    waiting = [Tree(value)._spec]
    while waiting:
        spec = waiting.pop()
        if type(spec) is _Node:
            waiting.extend(spec.items)
        elif type(spec) is not _Place and spec is not None:
            yield spec


def tensors_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of a call, as :func:`tensors_of` yields them."""
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) not in ATOMS:
            found.extend(tensors_of(value))
    if kwargs:
        found.extend(tensors_of(kwargs))
    return found


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a value, each as often as it stands there."""
    if isinstance(value, Tensor):
        yield value
        return
    if type(value) in ATOMS:
        return
    if type(value) in (tuple, list):
        for item in value:
            yield from tensors_of(item)
        return
    opened = _open(value)
    if opened is not None:
        for item in opened[0]:
            yield from tensors_of(item)


def _open(value: Any) -> Opened | None:
    """Return the items of a container and how it is made of them; ``None`` for what is no container."""
    kind = type(value)
    if isinstance(value, dict):
        return _open_dict(value)
    if isinstance(value, (nn.Module, type)):
        return None
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            return list(value), lambda items: kind(*items)
        return list(value), kind  # torch.return_types and other subclasses
    if isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
        return parts, lambda items: kind(items[0], *items[1], **items[2])
    if dataclasses.is_dataclass(value):
        return _open_dataclass(value)
    if isinstance(value, (list, deque)) and kind is not list:
        opened = opened_by_pytree(value)
        return opened or (list(value), lambda items, value=value: _refilled(value, items))  # type: ignore[misc]
    if kind is list:
        return list(value), list
    if isinstance(value, set) and kind is set:
        return list(value), set
    if _is_graph(value):
        return _open_graph(value)
    return opened_by_pytree(value)


def _open_dict(value: dict[Any, Any]) -> Opened:
    kind, keys = type(value), list(value)
    if kind in (dict, OrderedDict):
        return list(value.values()), lambda items: kind(zip(keys, items, strict=True))
    if kind is defaultdict:
        factory = getattr(value, "default_factory")  # noqa: B009  (mypy sees a dict)
        return list(value.values()), lambda items: defaultdict(factory, zip(keys, items, strict=True))
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    # Attributes of its own come along; those of model outputs are the items once more.
    named = {key: item for key, item in getattr(value, "__dict__", {}).items() if key not in value}
    mirrored = [key for key in keys if key in getattr(value, "__dict__", {})]

    def make(items: list[Any]) -> Any:
        filled = kind.__new__(kind)
        for key, item in zip(keys, items, strict=True):
            base.__setitem__(filled, key, item)
        if named or mirrored:
            vars(filled).update(named, **{key: base.__getitem__(filled, key) for key in mirrored})
        return filled

    return list(value.values()), make


def _open_dataclass(value: Any) -> Opened:
    names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    empty = copy.copy(value)
    for name in names:
        object.__setattr__(empty, name, None)

    def make(items: list[Any]) -> Any:
        filled = copy.copy(empty)
        for name, item in zip(names, items, strict=True):
            object.__setattr__(filled, name, item)
        return filled

    return [getattr(value, name) for name in names], make


def _is_graph(value: Any) -> bool:
    """Whether this is torch_geometric's ``Data`` or ``HeteroData``, or extends them."""
    module = sys.modules.get("torch_geometric.data.data")  # not imported: then nothing is
    return module is not None and isinstance(value, module.BaseData) and hasattr(value, "stores")


def _open_graph(value: Any) -> Opened:
    """A graph of torch_geometric: its stores are mappings."""
    items = [item for store in value.stores for item in list(store.values())]
    names = [list(store.keys()) for store in value.stores]
    empty = copy.copy(value)
    for store, keys in zip(empty.stores, names, strict=True):
        for key in keys:
            del store[key]

    def make(items: list[Any]) -> Any:
        filled, rest = copy.copy(empty), iter(items)
        for store, keys in zip(filled.stores, names, strict=True):
            for key in keys:
                store[key] = next(rest)
        return filled

    return items, make


def _refilled(value: Any, items: list[Any]) -> Any:
    filled = copy.copy(value)
    filled.clear()
    filled.extend(items)
    return filled
