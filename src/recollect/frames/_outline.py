"""What is known of trees of modules: which names, types and containers they hold, and what a call has taught.

A :class:`~recollect.frames._snapshot.Snapshot` notes what a tree holds in one go. Where its values are, and which of
them are containers that are looked into as well, is learned here, once for a tree, and compared in each call: names,
types and sizes. What does not say all in this way is noted part by part.

A module whose parts are all of torch's types, and whose attributes are plain values, runs nothing but its parts. Once a
call has been observed that taught nothing new, the snapshot is all that is needed.
"""

from __future__ import annotations

import itertools
import sys
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn

from recollect._torch import STANDARD_ATTRIBUTES, default_device, has_global_hooks
from recollect._util._tree import ATOMS
from recollect.frames._forward import Forward
from recollect.frames._snapshot import Opening, Snapshot
from recollect.frames._state import DEPTH, MANY, is_open

__all__ = ["held_by", "snapshot_of"]

_PARTS = 64
"""So many modules are noted where a function names them: it may run few of them."""
_PARTS_RUN = 1024
"""So many modules are noted where the module that holds them runs."""
_RENEWALS = 16  # of an outline: a module that changes all the time is observed
_OVERRIDES = frozenset(["forward", "_compiled_call_impl"])
_PARAMETERS = frozenset([nn.Parameter, type(None)])
_BUFFERS = frozenset([Tensor, type(None)])
_INERT = ATOMS | {Tensor, nn.Parameter}

# Modules that draw no random numbers, whatever their settings are.
_STILL: frozenset[type] = frozenset(
    getattr(nn, name)
    for name in (
        "Sequential", "ModuleList", "ModuleDict", "Identity", "Flatten", "Unflatten", "Linear", "Bilinear", "Embedding",
        "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "BatchNorm1d",
        "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "GroupNorm", "LayerNorm",
        "RMSNorm", "CELU", "ELU", "GELU", "GLU", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid",
        "LogSoftmax", "Mish", "PReLU", "ReLU", "ReLU6", "SELU", "Sigmoid", "SiLU", "Softmax", "Softplus", "Softsign",
        "Tanh", "AvgPool1d", "AvgPool2d", "AvgPool3d", "MaxPool1d", "MaxPool2d", "MaxPool3d", "AdaptiveAvgPool1d",
        "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "ConstantPad1d", "ConstantPad2d", "ZeroPad2d", "PixelShuffle",
        "Upsample",
    )
)  # fmt: skip

_forward_of = attrgetter("forward")


def snapshot_of(module: nn.Module, arguments: Iterable[Any]) -> Snapshot | None:
    """Return what a module holds if it can be noted in one go and sees nothing but tensors; ``None`` if not.

    Args:
        module: about to run.
        arguments: what it is called with.
    """
    if not _INERT.issuperset(map(type, arguments)) or has_global_hooks():
        return None
    if default_device() is not None:  # or another mode that sees all functions
        return None
    return held_by([module], _PARTS_RUN)


def held_by(modules: Sequence[nn.Module], most: int = _PARTS) -> Snapshot | None:
    """Return what modules and their parts hold; ``None`` if that cannot be noted in one go.

    Args:
        modules: with their parts.
        most: so many parts are noted.
    """
    first = modules[0]
    outlines = _outlines.of_one if len(modules) == 1 else _outlines.of_several
    outline = outlines.get(first)
    if outline is None:
        outline = outlines[first] = _Outline()
    return outline.fill(modules, most)


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


class _Kind(Enum):
    """What is to be done about a value."""

    ATOM = auto()  # nothing: it cannot change
    PLAIN = auto()  # its type does not say so
    TENSOR = auto()
    MAPPING = auto()
    OBJECT = auto()
    SEQUENCE = auto()
    UNSURE = auto()


_OPEN = {True: _Kind.OBJECT, False: _Kind.ATOM, None: _Kind.UNSURE}


def _kind_of(value: Any, depth: int) -> _Kind:
    """Return what is to be done about a value, as :meth:`PythonState._add` does it.

    Args:
        value: of an attribute, or in a container.
        depth: how many containers deeper is looked; -1 for a value that is noted, and not looked into.
    """
    kind = type(value)
    if kind in ATOMS or kind is nn.Parameter:
        return _Kind.ATOM
    if kind is Tensor:
        return _Kind.TENSOR
    if depth < 0:
        return _Kind.UNSURE if isinstance(value, Tensor) else _Kind.ATOM
    if _is_plain(value):
        return _Kind.PLAIN
    if kind is list or isinstance(value, tuple):
        return _Kind.SEQUENCE if len(value) <= MANY else _Kind.UNSURE
    if kind is dict or kind is OrderedDict:
        return _Kind.MAPPING if len(value) <= MANY and ATOMS.issuperset(map(type, value)) else _Kind.UNSURE
    return _OPEN[is_open(value, depth)]


class _Outline:
    """Names and types in the dictionaries of trees of modules, and in the containers behind them.

    Attributes:
        known: the training flags of all parts with which a call was observed that taught nothing.
    """

    __slots__ = (
        "_children", "_foreign", "_forwards", "_hooks", "_is_own", "_is_still", "_kinds", "_openings", "_parts",
        "_plain", "_renewals", "_roots", "_shapes", "_tensors", "known",
    )  # fmt: skip

    def __init__(self) -> None:
        self.known: set[tuple[bool, ...]] = set()
        self._renewals = _RENEWALS
        self._parts: list[weakref.ref[nn.Module]] | None = None
        self._roots: list[int] = []  # which of them the trees begin with
        self._kinds: list[type] = []
        self._forwards: list[Any] = []  # of these, as long as nobody gives them others
        self._foreign: list[int] = []  # which parts are not of torch's types
        self._is_own = self._is_still = False
        self._children: list[int] = []
        self._hooks: list[int] = []  # where among the values the hooks of the forward pass are
        self._openings: list[Opening] = []
        self._shapes: list[Any] = []  # level by level: sizes, keys and types
        self._plain: list[int] = []  # values whose type does not say all
        self._tensors: list[tuple[int, int]] = []  # and of which part they are

    def fill(self, roots: Sequence[nn.Module], most: int) -> Snapshot | None:
        """Return what trees hold now, if that can be noted in one go, and they have so many parts at most."""
        if self._parts is not None and len(self._parts) > most:
            return None
        snapshot = self._matched(roots)
        while snapshot is None and self._renewals > 0:
            self._renewals -= 1
            self.known.clear()
            if not self._draw(roots, most):
                return None
            snapshot = self._matched(roots)
        return snapshot

    def _matched(self, roots: Sequence[nn.Module]) -> Snapshot | None:
        if self._parts is None:
            return None
        parts: list[Any] = [reference() for reference in self._parts]
        if len(roots) != len(self._roots) or not all(map(is_, roots, map(parts.__getitem__, self._roots))):
            return None
        kinds = [*map(type, parts)]
        if kinds != self._kinds or not all(map(is_, map(_forward_of, kinds), self._forwards)):
            return None
        snapshot = Snapshot(parts, self._hooks, self.known, self._is_own, self._is_still)
        if snapshot.shape() != self._shapes[0]:
            return None
        values = snapshot.values
        if any(map(values.__getitem__, self._hooks)):
            return None
        # The submodules come last.
        expected = [None if i < 0 else parts[i] for i in self._children]
        if expected and not all(map(is_, values[-len(expected) :], expected)):
            return None
        for opening, shape in zip(self._openings, self._shapes[1:], strict=True):
            if snapshot.open(opening) != shape:
                return None
        values = snapshot.values
        if self._plain and not all(map(_is_plain, map(values.__getitem__, self._plain))):
            return None
        for i, owner in self._tensors:
            tensor = values[i]
            if not tensor.is_leaf:  # its history is not to be kept
                return None
            snapshot.tensors.append((parts[owner], tensor))
        snapshot.foreign.extend(map(parts.__getitem__, self._foreign))
        return snapshot

    def _draw(self, roots: Sequence[nn.Module], most: int) -> bool:
        """Look at trees; return whether what they hold can be noted in one go."""
        self._parts = None
        parts: list[nn.Module] = []
        for root in roots:
            parts.extend(itertools.islice(root.modules(), most + 1))
        parts = list({id(part): part for part in parts}.values())
        if len(parts) > most:
            return False
        places = {id(part): i for i, part in enumerate(parts)}
        looked: list[tuple[int, int]] = []  # for each value: how deep is looked behind it, and of which part it is
        children: list[int] = []
        for i, part in enumerate(parts):
            names = vars(part).copy()
            if not all(type(names.get(name)) is dict for name in ("_parameters", "_buffers", "_modules")):
                return False
            for name, value in names.items():
                front = name == "forward" and isinstance(value, Forward) and value.before is None
                if name in _OVERRIDES and value is not None and not front:
                    return False
                looked.append((-1 if front or name in STANDARD_ATTRIBUTES else DEPTH, i))
            if not _PARAMETERS.issuperset(map(type, names["_parameters"].values())):
                return False
            if not _BUFFERS.issuperset(map(type, names["_buffers"].values())):
                return False
            children.extend(-1 if child is None else places[id(child)] for child in names["_modules"].values())
        self._children = children
        self._kinds = [*map(type, parts)]
        self._forwards = [*map(_forward_of, self._kinds)]
        self._foreign = [i for i, kind in enumerate(self._kinds) if not _is_own(kind)]
        snapshot = Snapshot(parts, [], self.known, False, False)
        self._shapes = [snapshot.shape()]
        if not self._look(snapshot, looked):
            return False
        self._is_own = not (self._foreign or self._openings or self._tensors)
        self._is_still = _STILL.issuperset(self._kinds)
        own = snapshot.keys[: len(looked)]
        self._hooks = [i for i, name in enumerate(own) if name in ("_forward_hooks", "_forward_pre_hooks")]
        self._parts = [weakref.ref(part) for part in parts]
        self._roots = [places[id(root)] for root in roots]
        return True

    def _look(self, snapshot: Snapshot, looked: list[tuple[int, int]]) -> bool:
        """Find the containers behind the values, level by level; return whether all of them can be opened.

        Args:
            snapshot: what the modules' own dictionaries hold; it is opened.
            looked: for the values of these, how deep is looked behind each, and of which part it is.
        """
        self._openings, self._plain, self._tensors = [], [], []
        start = 0
        while True:
            found: dict[_Kind, list[int]] = {_Kind.MAPPING: [], _Kind.OBJECT: [], _Kind.SEQUENCE: []}
            for i, (depth, owner) in enumerate(looked, start):
                kind = _kind_of(snapshot.values[i], depth)
                if kind is _Kind.UNSURE:
                    return False
                if kind is _Kind.PLAIN:
                    self._plain.append(i)
                elif kind is _Kind.TENSOR:
                    self._tensors.append((i, owner))
                elif kind in found:
                    found[kind].append(i)
            order = [*found[_Kind.MAPPING], *found[_Kind.OBJECT], *found[_Kind.SEQUENCE]]
            if not order:
                return True
            opening = Opening(*map(tuple, found.values()))
            self._openings.append(opening)
            behind = [looked[i - start] for i in order]
            start = len(snapshot.values)
            shape = snapshot.open(opening)
            self._shapes.append(shape)
            looked = [of for (depth, i), size in zip(behind, shape[0], strict=True) for of in [(depth - 1, i)] * size]


class _Outlines(threading.local):
    """What this thread has learned: an outline is drawn anew while another thread may read its own.

    Attributes:
        of_one: by the module.
        of_several: by the first of them.
    """

    def __init__(self) -> None:
        self.of_one: weakref.WeakKeyDictionary[nn.Module, _Outline] = weakref.WeakKeyDictionary()
        self.of_several: weakref.WeakKeyDictionary[nn.Module, _Outline] = weakref.WeakKeyDictionary()


_outlines = _Outlines()
_forwards: dict[type, Any] = {}
