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
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn

from recollect._torch import STANDARD_ATTRIBUTES, default_device, has_global_hooks
from recollect._util._tree import ATOMS
from recollect.frames._forward import Forward
from recollect.frames._state import PythonState

__all__ = ["HOOKS", "Registered", "Roster", "Snapshot", "held_by", "snapshot_of"]

_PARTS = 64
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

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
"""Registries of a module's hooks of the forward pass."""

Dicts = list[dict[str, Any]]
Registered = tuple[dict[str, Any], str, Tensor]
"""A registry of parameters, a name in it, and the parameter."""
Roster = tuple[dict[str, Any], dict[str, bool]]
"""A registry of parameters, with its names, and which of them stood for none."""

_forward_of = attrgetter("forward")
_parameters_of, _buffers_of, _modules_of, _training_of = map(
    itemgetter, ("_parameters", "_buffers", "_modules", "training")
)


def snapshot_of(module: nn.Module, arguments: Iterable[Any]) -> Snapshot | None:
    """Return what a module holds if it runs nothing but its parts; ``None`` if that is not sure.

    Args:
        module: about to run.
        arguments: what it is called with.
    """
    if not _INERT.issuperset(map(type, arguments)) or has_global_hooks():
        return None
    if default_device() is not None:  # or another mode that sees all functions
        return None
    return held_by([module])


def held_by(modules: Sequence[nn.Module]) -> Snapshot | None:
    """Return what modules hold if they and their parts are torch's own and hold plain values; ``None`` if not."""
    first = modules[0]
    if not _is_own(type(first)):
        return None
    outlines = _outlines if len(modules) == 1 else _outlines_of_several
    outline = outlines.get(first)
    if outline is None:
        outline = outlines[first] = _Outline()
    return outline.fill(modules)


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
    """Names and types in the dictionaries of trees of modules, as they were found to be plain.

    Attributes:
        known: the training flags of all parts with which a call was observed that taught nothing.
        hooks: where among a snapshot's values the hooks of the forward pass are.
        is_still: whether none of the parts draws random numbers.
    """

    __slots__ = (
        "_children", "_forwards", "_keys", "_kinds", "_others", "_parts", "_renewals", "_roots", "_sizes", "_types",
        "hooks", "is_still", "known",
    )  # fmt: skip

    def __init__(self) -> None:
        self.known: set[tuple[bool, ...]] = set()
        self._renewals = _RENEWALS
        self._parts: list[weakref.ref[nn.Module]] | None = None
        self._roots: list[int] = []  # which of them the trees begin with
        self._kinds: list[type] = []
        self._forwards: list[Any] = []  # of these, as long as nobody gives them others
        self._sizes: list[int] = []
        self._keys: list[str] = []
        self._types: list[type] = []
        self._others: list[tuple[int, str]] = []  # attributes whose type does not say all
        self._children: list[int] = []
        self.hooks: list[int] = []
        self.is_still = False

    def fill(self, roots: Sequence[nn.Module]) -> Snapshot | None:
        """Return what trees hold now, if they are plain."""
        snapshot = self._matched(roots)
        while snapshot is None and self._renewals > 0:
            self._renewals -= 1
            self.known.clear()
            if not self._draw(roots):
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
        snapshot = Snapshot(self, parts)
        values = snapshot.values
        if snapshot.sizes != self._sizes or snapshot.keys != self._keys or [*map(type, values)] != self._types:
            return None
        if any(map(values.__getitem__, self.hooks)):
            return None
        if self._others and not all(_is_plain(snapshot.names[i][name]) for i, name in self._others):
            return None
        # The submodules come last.
        expected = [None if i < 0 else parts[i] for i in self._children]
        if expected and not all(map(is_, values[-len(expected) :], expected)):
            return None
        return snapshot

    def _draw(self, roots: Sequence[nn.Module]) -> bool:
        """Look at trees; return whether they are plain."""
        self._parts = None
        parts: list[nn.Module] = []
        for root in roots:
            parts.extend(itertools.islice(root.modules(), _PARTS + 1))
        parts = list({id(part): part for part in parts}.values())
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
        self._kinds = [*map(type, parts)]
        self.is_still = _STILL.issuperset(self._kinds)
        self._forwards = [*map(_forward_of, self._kinds)]
        own = snapshot.keys[: sum(snapshot.sizes[: len(parts)])]
        self.hooks = [i for i, name in enumerate(own) if name in ("_forward_hooks", "_forward_pre_hooks")]
        self._parts = [weakref.ref(part) for part in parts]
        self._roots = [places[id(root)] for root in roots]
        return True


_outlines: weakref.WeakKeyDictionary[nn.Module, _Outline] = weakref.WeakKeyDictionary()
_outlines_of_several: weakref.WeakKeyDictionary[nn.Module, _Outline] = weakref.WeakKeyDictionary()  # by the first
_forwards: dict[type, Any] = {}


class Snapshot:
    """What the dictionaries of trees of modules hold at one moment.

    Attributes:
        parts: the modules.
        parameters: all of them, each as often as it is registered.
        buffered: the modules that have buffers.
    """

    __slots__ = (
        "_dicts", "_flags", "_hooks", "_outline", "buffered", "keys", "names", "parameters", "parts", "sizes", "values",
    )  # fmt: skip

    def __init__(self, outline: _Outline, parts: list[nn.Module]) -> None:
        self._outline = outline
        self._hooks = outline.hooks  # the outline may be drawn anew
        self.parts = parts
        names: Dicts = [*map(vars, parts)]
        self.names = names
        buffers = [*map(_buffers_of, names)]
        dicts = [*names, *map(_parameters_of, names), *buffers, *map(_modules_of, names)]
        self._dicts = dicts
        sizes = [*map(len, dicts)]
        self.sizes = sizes
        self.keys: list[str] = [*chain.from_iterable(dicts)]
        values: list[Any] = [*chain.from_iterable(map(dict.values, dicts))]
        self.values = values
        number = len(parts)
        start = sum(sizes[:number])
        registered = values[start : start + sum(sizes[number : 2 * number])]
        self.parameters: list[Tensor] = [p for p in registered if p is not None]
        self.buffered = [part for part, d in zip(parts, buffers, strict=True) if d] if any(buffers) else []
        self._flags: tuple[bool, ...] = tuple(map(_training_of, names))

    @property
    def is_known(self) -> bool:
        """Whether nothing is to be learned from a call."""
        return self._flags in self._outline.known

    @property
    def is_still(self) -> bool:
        """Whether a call draws no random numbers."""
        return self._outline.is_still

    def learn(self) -> None:
        """Note that a call has taught nothing."""
        self._outline.known.add(self._flags)

    def holds(self) -> bool:
        """Whether all is as it was."""
        # Where all values are the same objects, the registries are the same dictionaries.
        dicts, values = self._dicts, self.values
        now = [*chain.from_iterable(map(dict.values, dicts))]
        return (
            len(now) == len(values)
            and all(map(is_, now, values))
            and not any(map(values.__getitem__, self._hooks))
            and [*map(len, dicts)] == self.sizes
            and [*chain.from_iterable(dicts)] == self.keys
        )

    def has_new_tensors(self) -> bool:
        """Whether an attribute or a buffer is a tensor that was none."""
        if self.holds():
            return False
        number = len(self.parts)
        held = self._held()
        return any(
            isinstance(value, Tensor) and not isinstance(then.get(name), Tensor)
            for i, then in enumerate(held)
            if not number <= i < 2 * number
            for name, value in self._dicts[i].items()
        )

    def _held(self) -> Dicts:
        """Return the dictionaries as they were."""
        at, held = 0, []
        for size in self.sizes:
            held.append(dict(zip(self.keys[at : at + size], self.values[at : at + size], strict=True)))
            at += size
        return held

    def spread(self, state: PythonState) -> tuple[list[Registered], list[tuple[Any, Any]], list[Roster]]:
        """Return the parameters with where they are registered, the other registries with what they held, and rosters.

        Args:
            state: is given the attributes.
        """
        number = len(self.names)
        held = self._held()
        wholes, registered, buffers, children = (held[i : i + number] for i in range(0, 4 * number, number))
        parameters: list[Registered] = []
        registries: list[tuple[Any, Any]] = []
        rosters: list[Roster] = []
        for i, whole in enumerate(wholes):
            state.add_noted(self.names[i], whole, STANDARD_ATTRIBUTES)
            registry = whole["_parameters"]
            parameters.extend([(registry, name, p) for name, p in registered[i].items() if p is not None])
            rosters.append((registry, {name: p is None for name, p in registered[i].items()}))
            registries.append((whole["_buffers"], buffers[i]))
            registries.append((whole["_modules"], children[i]))
            registries.extend([(whole[kind], {}) for kind in HOOKS])
        return parameters, registries, rosters
