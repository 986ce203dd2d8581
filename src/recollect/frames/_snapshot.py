"""Modules of torch's own types: what they run and write follows from their structure, and need not be observed.

A module whose parts are all of torch's types, and whose attributes are plain values, runs nothing but its parts. Once a
call has been observed that taught nothing new, it is enough to note what its dictionaries hold, and to look in a
rebuild whether they still do.
"""

from __future__ import annotations

import itertools
import sys
import types
import weakref
from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from recollect._torch import STANDARD_ATTRIBUTES, default_device, has_global_hooks
from recollect._util._tree import ATOMS
from recollect.frames._forward import Forward
from recollect.frames._state import PythonState

__all__ = ["Snapshot", "snapshot_of"]

_PARTS = 64
_RENEWALS = 16  # of an outline: a module that changes all the time is observed
_OVERRIDES = frozenset(["forward", "_compiled_call_impl"])
_PARAMETERS = frozenset([nn.Parameter, type(None)])
_BUFFERS = frozenset([Tensor, type(None)])
_INERT = ATOMS | {Tensor, nn.Parameter}

Dicts = list[dict[str, Any]]


def snapshot_of(module: nn.Module, arguments: Iterable[Any]) -> Snapshot | None:
    """Return what a module holds if it runs nothing but its parts; ``None`` if that is not sure.

    Args:
        module: about to run.
        arguments: what it is called with.
    """
    if not _is_own(type(module)) or not _INERT.issuperset(map(type, arguments)) or has_global_hooks():
        return None
    if default_device() is not None:  # or another mode that sees all functions
        return None
    outline = _outlines.get(module)
    if outline is None:
        outline = _outlines[module] = _Outline()
    return outline.fill(module)


def _is_own(kind: type) -> bool:
    """Whether a type is one of torch's modules, with its forward."""
    forward = getattr(kind, "forward", None)
    if kind in _forwards:
        return _forwards[kind] is forward
    home = kind.__module__
    if not home.startswith("torch.nn.modules.") or getattr(sys.modules.get(home), kind.__name__, None) is not kind:
        return False
    if not _is_torchs(forward):
        return False
    _forwards[kind] = forward
    return True


def _is_torchs(function: Any) -> bool:
    """Whether a function is written in torch, whatever its name says."""
    if type(function) is types.FunctionType:
        home = function.__globals__.get("__name__")
    else:
        home = function.__module__ if type(function) is types.BuiltinFunctionType else None
    return isinstance(home, str) and home.partition(".")[0] == "torch"


def _is_plain(value: Any) -> bool:
    """Whether an attribute's value cannot change in itself, or run code that is not torch's."""
    kind = type(value)
    if kind is tuple:
        return ATOMS.issuperset(map(type, value))
    return kind in ATOMS or _is_torchs(value)


class _Outline:
    """Names and types in the dictionaries of a tree of modules, as they were found to be plain.

    Attributes:
        known: the training flags of all parts with which a call was observed that taught nothing.
    """

    __slots__ = ("_children", "_keys", "_others", "_parts", "_renewals", "_sizes", "_types", "known")

    def __init__(self) -> None:
        self.known: set[tuple[bool, ...]] = set()
        self._renewals = _RENEWALS
        self._parts: list[weakref.ref[nn.Module]] | None = None  # but the root
        self._sizes: list[int] = []
        self._keys: list[str] = []
        self._types: list[type] = []
        self._others: list[tuple[int, str]] = []  # attributes whose type does not say all
        self._children: list[int] = []

    def fill(self, root: nn.Module) -> Snapshot | None:
        """Return what a tree holds now, if it is plain."""
        snapshot = self._matched(root)
        while snapshot is None and self._renewals > 0:
            self._renewals -= 1
            self.known.clear()
            if not self._draw(root):
                return None
            snapshot = self._matched(root)
        return snapshot

    def _matched(self, root: nn.Module) -> Snapshot | None:
        if self._parts is None:
            return None
        parts: list[Any] = [root, *[reference() for reference in self._parts]]
        if not all(map(_is_own, map(type, parts))):
            return None
        snapshot = Snapshot(self, parts)
        names = snapshot.names
        if snapshot.sizes != self._sizes or snapshot.keys != self._keys:
            return None
        if [*map(type, snapshot.values)] != self._types:
            return None
        if any(n["_forward_hooks"] or n["_forward_pre_hooks"] for n in names):
            return None
        if not all(_is_plain(names[i][name]) for i, name in self._others):
            return None
        # The submodules come last.
        expected = [None if i < 0 else parts[i] for i in self._children]
        if expected and not all(map(is_, snapshot.values[-len(expected) :], expected)):
            return None
        return snapshot

    def _draw(self, root: nn.Module) -> bool:
        """Look at a tree; return whether it is plain."""
        self._parts = None
        parts = list(itertools.islice(root.modules(), _PARTS + 1))
        if len(parts) > _PARTS or not all(map(_is_own, map(type, parts))):
            return False
        places = {id(part): i for i, part in enumerate(parts)}
        others: list[tuple[int, str]] = []
        children: list[int] = []
        for i, part in enumerate(parts):
            names = vars(part)
            if not all(type(names.get(name)) is dict for name in ("_parameters", "_buffers", "_modules")):
                return False
            for name, value in names.items():
                if name == "forward" and isinstance(value, Forward) and value.before is None:
                    continue  # it runs the module's own
                if name in _OVERRIDES and value is not None:
                    return False
                if name in STANDARD_ATTRIBUTES or type(value) in ATOMS:
                    continue
                if not _is_plain(value):
                    return False
                others.append((i, name))
            if not _PARAMETERS.issuperset(map(type, names["_parameters"].values())):
                return False
            if not _BUFFERS.issuperset(map(type, names["_buffers"].values())):
                return False
            children.extend(-1 if child is None else places[id(child)] for child in names["_modules"].values())
        self._others, self._children = others, children
        snapshot = Snapshot(self, parts)
        self._sizes, self._keys, self._types = snapshot.sizes, snapshot.keys, [*map(type, snapshot.values)]
        self._parts = [weakref.ref(part) for part in parts[1:]]
        return True


_outlines: weakref.WeakKeyDictionary[nn.Module, _Outline] = weakref.WeakKeyDictionary()
_forwards: dict[type, Any] = {}


class Snapshot:
    """What the dictionaries of a tree of modules hold at one moment.

    Attributes:
        parameters: all of them, each as often as it is registered.
        buffered: the modules that have buffers.
    """

    __slots__ = ("_flags", "_outline", "buffered", "keys", "names", "parameters", "sizes", "values")

    def __init__(self, outline: _Outline, parts: list[nn.Module]) -> None:
        self._outline = outline
        self.names: Dicts = [*map(vars, parts)]
        registered = [n["_parameters"] for n in self.names]
        buffers = [n["_buffers"] for n in self.names]
        dicts = [*self.names, *registered, *buffers, *[n["_modules"] for n in self.names]]
        self.sizes = [*map(len, dicts)]
        self.keys: list[str] = [*chain.from_iterable(dicts)]
        self.values: list[Any] = [*chain.from_iterable(map(dict.values, dicts))]
        self.parameters: list[Tensor] = [p for d in registered for p in d.values() if p is not None]
        self.buffered = [part for part, d in zip(parts, buffers, strict=True) if d]
        self._flags: tuple[bool, ...] = tuple([n["training"] for n in self.names])

    @property
    def is_known(self) -> bool:
        """Whether nothing is to be learned from a call."""
        return self._flags in self._outline.known

    def learn(self) -> None:
        """Note that a call has taught nothing."""
        self._outline.known.add(self._flags)

    def holds(self) -> bool:
        """Whether all is as it was."""
        names = self.names
        dicts = [*names]
        for kind in _REGISTRIES:
            dicts.extend([n[kind] for n in names])
        now = [*chain.from_iterable(map(dict.values, dicts))]
        return (
            len(now) == len(self.values)
            and all(map(is_, now, self.values))
            and [*map(len, dicts)] == self.sizes
            and [*chain.from_iterable(dicts)] == self.keys
        )

    def spread(self, state: PythonState) -> tuple[list[tuple[dict[str, Any], str, Tensor]], list[tuple[Any, Any]]]:
        """Return the parameters with where they are registered, and the other registries with what they held.

        Args:
            state: is given the attributes.
        """
        at, held = 0, []
        for size in self.sizes:
            held.append(dict(zip(self.keys[at : at + size], self.values[at : at + size], strict=True)))
            at += size
        number = len(self.names)
        wholes, registered, buffers, children = (held[i : i + number] for i in range(0, 4 * number, number))
        parameters, registries = [], []
        for i, whole in enumerate(wholes):
            state.add_noted(self.names[i], whole, STANDARD_ATTRIBUTES)
            registry = whole["_parameters"]
            parameters.extend([(registry, name, p) for name, p in registered[i].items() if p is not None])
            registries.append((whole["_buffers"], buffers[i]))
            if children[i]:
                registries.append((whole["_modules"], children[i]))
        return parameters, registries


_REGISTRIES = ("_parameters", "_buffers", "_modules")
