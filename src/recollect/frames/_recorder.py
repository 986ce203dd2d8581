"""What runs in a region, and what it reads and writes: observed, not searched for.

While a region runs for the first time, module hooks tell which modules run. Their buffers are compared with what they
held before: by version, and by value where no version is counted. The first call of each module and of each function
also runs under a dispatch mode, which sees every operation: it copies what exists outside of the region before the
first write to it. Modules and functions that write to more than buffers are watched in every call.
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recollect._torch import (
    STANDARD_ATTRIBUTES,
    compiled_blocks_exist,
    is_faked,
    modes_are_open,
    unwatch_leaving,
    unwatch_modules,
    watch_leaving,
    watch_modules,
)
from recollect.frames._forward import Own
from recollect.frames._modes import aside, local
from recollect.frames._outline import held_by, snapshot_of
from recollect.frames._record import Buffer, Known, Record
from recollect.frames._snapshot import HOOKS, Registered, Roster, Snapshot
from recollect.frames._state import PythonState, reached_by, tensors_named_by
from recollect.frames._transform import Transformed
from recollect.frames._watch import Copy, Watch, place_of, version_of

__all__ = ["Noted", "Recorder", "entering", "leaving", "recorder_of"]


_modules_known: weakref.WeakKeyDictionary[nn.Module, Known] = weakref.WeakKeyDictionary()
_functions_known: weakref.WeakKeyDictionary[types.CodeType, Known] = weakref.WeakKeyDictionary()


def _known_module(module: nn.Module) -> Known:
    known = _modules_known.get(module)
    if known is None:
        known = _modules_known[module] = Known()
    return known


def _code_of(function: Any) -> types.CodeType | None:
    """Return the code that a call of the function runs, if it is no module and written in Python."""
    while not isinstance(function, nn.Module):
        if isinstance(function, types.FunctionType):
            return function.__code__
        if isinstance(function, types.MethodType):
            function = function.__func__
        elif isinstance(function, functools.partial):
            function = function.func
        elif type(function).__module__.partition(".")[0] == "recollect" and hasattr(function, "owner"):
            function = function.owner  # what recollect puts around a block
        else:
            return getattr(vars(type(function)).get("__call__"), "__code__", None)
    return None


# Observation.


# So many modules are noted without having run, where a function names them.
_FEW = 64
# A tensor that is no buffer, with so many elements, is copied in case a later call is the first to write to it.
_SMALL = 1024
_NOTHING: dict[str, Any] = {}
_REGISTRIES = ("_modules", *HOOKS)


def recorder_of(function: Callable[..., Any], arguments: Iterable[Any]) -> Recorder | Noted:
    """Return what records the first run of a region: noted is enough where nothing is to be learned from a call.

    Args:
        function: what the region runs.
        arguments: what it is called with, for objects among them.
    """
    root = function
    if type(function) is Transformed:
        root = function.owner if function.runs_owner_alone else function
    elif type(function) is Own:
        root = function.module
    snapshot = snapshot_of(root, arguments) if isinstance(root, nn.Module) else None
    if snapshot is not None and snapshot.is_known:
        return Noted(snapshot)
    return Recorder(function, arguments, snapshot)


class Noted:
    """A module of torch's own of which a call teaches nothing; what a :class:`Recorder` does else.

    Args:
        snapshot: what it holds.

    Attributes:
        may_draw: whether a call may draw random numbers.
    """

    __slots__ = ("_buffers", "_snapshot", "_storages", "may_draw")

    has_watched = False
    unsettled: frozenset[int] = frozenset()

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self.may_draw = not snapshot.is_still or modes_are_open()
        self._buffers: list[Buffer] = []
        self._storages: set[int] = set()
        for module in snapshot.buffered:
            known = _known_module(module)
            buffers = vars(module)["_buffers"]
            for name, buffer in buffers.items():
                if buffer is not None:
                    self._buffers.append(Buffer(module, buffers, name, buffer, known))
                    self._storages.update(place_of(buffer))

    def __enter__(self) -> Noted:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return

    def is_lasting(self, tensor: Tensor) -> bool:
        """Whether a tensor that autograd saves is a part of a buffer, and lives on anyway."""
        return bool(self._storages) and not self._storages.isdisjoint(place_of(tensor))

    def so_far(self) -> Record:
        """Return what a rebuild must know while the region has not run to its end."""
        writes = [Copy(buffer.tensor, buffer.then) for buffer in self._buffers if buffer.then is not None]
        return Record(PythonState(), [], [], [], writes, [self._snapshot], plain=True)

    def settle(self) -> Record:
        """Return what a rebuild must know; to be called when the region has run."""
        constant: list[Buffer] = []
        writes: list[Copy] = []
        if self._buffers:
            constant, writes, _ = _settled(self._buffers, {})
        return Record(PythonState(), [], [], constant, writes, [self._snapshot], plain=True)


class Recorder:
    """Observes the first run of a region; :meth:`settle` returns what a rebuild must know.

    Args:
        function: what the region runs.
        arguments: what it is called with, for objects among them.
        snapshot: what the region's module holds, if it is one.
    """

    __slots__ = (
        "_brought", "_buffers", "_entered", "_found", "_graded_places", "_gradients", "_held", "_hidden", "_hooked",
        "_keys", "_known", "_lazy", "_leaves", "_named", "_parameters", "_parts", "_places", "_ran", "_registries",
        "_rosters", "_runs", "_snapshots", "_state", "_storages", "_unknown", "_watches", "_watching",
    )  # fmt: skip

    may_draw = True

    def __init__(
        self, function: Callable[..., Any], arguments: Iterable[Any], snapshot: Snapshot | None = None
    ) -> None:
        self._entered: set[int] = set()
        self._ran: set[int] = set()  # those that ran, and their parts
        # Modules whose parameters hooks may bring and take away, and the storages of what they brought: hooks do in a
        # rebuild what they do, and the parameters that are there are used.
        self._hooked: set[int] = set()
        self._brought: set[int] = set()
        self._hidden: set[int] = set()  # those that no module has registered, and have not run
        self._parts: tuple[int, list[int]] | None = None  # of the function, if it is a module
        self._state = PythonState()
        self._buffers: list[Buffer] = []
        self._storages: set[int] = set()  # of buffers
        self._held: dict[int, int] = {}  # storages of other tensors that modules hold, with their versions
        self._found: set[int] = set()  # storages of arguments, and of what the function names
        self._parameters: list[Registered] = []
        # Tensors that are no buffers, where their values are and the keys of that, their versions, and copies of small
        # ones that are no parameters.
        self._places: list[tuple[nn.Module | None, Tensor, Tensor, tuple[int, ...], int, Tensor | None]] = []
        self._registries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._rosters: list[Roster] = []
        # Of leaves, when the region first asked for gradients after it met them.
        self._gradients: dict[int, tuple[Tensor, Tensor | None, int]] = {}
        self._graded_places = 0
        self._watching: list[tuple[Any, Watch]] = []  # who opened the mode, and the mode
        self._watches: list[Watch] = []
        self._known: list[tuple[Known, Hashable]] = []  # entered while the mode was open, and in which state
        self._lazy: list[nn.Module] = []
        self._runs = self._leaves = False  # whether it observes, and also when modules have run
        self._keys: Known | None = None
        self._snapshots: list[Snapshot] = []  # of modules that a function names, if their dictionaries say all
        self._unknown = snapshot if snapshot is not None and snapshot.is_own else None
        if not isinstance(function, nn.Module):
            self._state.add_variables(function)
        code = _code_of(function)
        if code is not None:
            self._keys = _functions_known.get(code)
            if self._keys is None:
                self._keys = _functions_known[code] = Known()
        self._named: list[Any] = []  # objects that the function names, if it was not watched with them before
        modules: list[nn.Module] = []
        for found in reached_by(function, arguments):
            if self._keys is not None and not isinstance(found, Tensor) and not self._keys.knows(found):
                self._named.append(found)
            if isinstance(found, torch.Generator):
                self._state.add_generator(found)
            elif isinstance(found, Tensor):
                self._note_place(None, found)
            elif isinstance(found, nn.Module):
                modules.append(found)
        if not modules:
            return
        if snapshot is None or len(modules) > 1 or modules[0] is not snapshot.parts[0]:
            snapshot = held_by(modules)
        if snapshot is not None:
            self._note_together(snapshot)
        for module in modules:
            parts = snapshot.parts if snapshot is not None else self._enter_all(module)
            if module is function and parts:  # nothing runs before it that could give it others
                self._parts = (id(module), [id(part) for part in parts])

    def __enter__(self) -> Recorder:
        if self._keys is not None and (self._keys.watched or not self._keys.seen or self._named):
            self._open_watch(self)
        local.recorders.append(self)
        watch_modules(entering)
        self._runs = True
        if self._hooked or self._watching or compiled_blocks_exist():  # the latter depend on which hooks there are
            self._watch_leaving()
        return self

    def _watch_leaving(self) -> None:
        """Call :meth:`leave` from now on, which costs something at each module."""
        if self._runs and not self._leaves:
            self._leaves = True
            watch_leaving(leaving)

    def __exit__(self, *exc_info: object) -> None:
        unwatch_modules()
        self._runs = False
        if self._leaves:
            self._leaves = False
            unwatch_leaving()
        local.recorders.remove(self)
        while self._watching:
            self._close_watch()

    # Modules.

    def enter(self, module: nn.Module) -> None:
        """Note a module that is about to run, with all that it holds."""
        known = _known_module(module)
        state = _state_of(module)
        if not self._watching and (known.watched or state not in known.seen):
            self._open_watch(module)
            self._watch_leaving()
        if self._watching:
            self._known.append((known, state))
        if id(module) not in self._ran:
            if self._parts is not None and self._parts[0] == id(module):
                self._ran.update(self._parts[1])
                return
            for part in module.modules():
                self._ran.add(id(part))
                self._enter(part)

    def leave(self, module: nn.Module) -> None:
        """Note that a module has run; its own hooks have not yet taken anything away."""
        if id(module) in self._hooked:
            for parameter in vars(module)["_parameters"].values():
                if parameter is not None and not is_lazy(parameter):
                    self._brought.update(place_of(parameter))
        if self._watching and self._watching[-1][0] is module:
            self._close_watch()

    def _note_together(self, snapshot: Snapshot) -> None:
        """Note modules and their parts with all that they hold in one go."""
        self._entered.update(map(id, snapshot.parts))
        self._snapshots.append(snapshot)
        with aside():
            for part in snapshot.parts:
                for p in part._parameters.values():
                    if p is not None and p.is_leaf:
                        self._places.append((part, p, p.data, place_of(p), version_of(p), None))
        for part, tensor in snapshot.tensors:
            self._note_place(part, tensor)
        for part in snapshot.foreign:
            for tensor in tensors_named_by(part):
                self._note_place(part, tensor)
        for part in snapshot.buffered:
            self._note_buffers(part, part._buffers, part._buffers.items())

    def _enter_all(self, module: nn.Module, hidden: bool = False) -> list[nn.Module]:
        """Note a module that may be used without being called, with its parts, which it returns if they are few."""
        if id(module) in self._entered:
            return []
        parts = list(itertools.islice(module.modules(), _FEW + 1))
        if len(parts) > _FEW:  # not all of them: those that run are noted then
            self._enter(module, hidden)
            return []
        for part in parts:
            self._enter(part, hidden)
        return parts

    def _enter(self, module: nn.Module, hidden: bool = False) -> None:
        if id(module) in self._entered:
            if not hidden and id(module) in self._hidden:  # it runs, and so what it has is read
                self._hidden.discard(id(module))
                self._note_parameters(vars(module)["_parameters"])
            return
        self._entered.add(id(module))
        names = vars(module)
        if names.get("_forward_pre_hooks"):
            self._hooked.update(map(id, module.modules()))
        if id(module) in self._hooked:
            self._watch_leaving()
        parameters, buffers = names.get("_parameters"), names.get("_buffers")
        if type(parameters) is not dict or type(buffers) is not dict:  # a scripted module, whose state is torch's
            self._note_buffers(module, None, module.named_buffers(recurse=False))
            return
        if parameters and any(map(is_lazy, parameters.values())):
            self._lazy.append(module)  # it becomes what it will be in its first call
        else:
            self._state.add_namespace(names, STANDARD_ATTRIBUTES)
            for tensor in (*self._state.tensors, *tensors_named_by(module)):
                self._note_place(module, tensor)
            self._state.tensors.clear()
            while self._state.modules:  # kept in a list, say, so that they are not registered
                self._enter_all(self._state.modules.pop(), hidden=True)
            if id(module) not in self._hooked:
                for parameter in parameters.values():
                    if parameter is not None:
                        self._note_place(module, parameter)
                if hidden:
                    self._hidden.add(id(module))
                else:
                    self._note_parameters(parameters)
                self._rosters.append((parameters, {name: p is None for name, p in parameters.items()}))
            self._registries.append((buffers, dict(buffers)))
            for key in _REGISTRIES:
                registered = names[key]
                self._registries.append((registered, dict(registered) if registered else _NOTHING))
        if buffers:
            self._note_buffers(module, buffers, buffers.items())

    def _note_parameters(self, parameters: dict[str, Any]) -> None:
        self._parameters.extend((parameters, name, p) for name, p in parameters.items() if p is not None)

    def note_gradients(self) -> None:
        """Note the gradients that leaves have, as a backward pass inside the region begins, or goes on."""
        for _, tensor, *_ in self._places[self._graded_places :]:
            if tensor.requires_grad and id(tensor) not in self._gradients:
                self._gradients[id(tensor)] = tensor, tensor.grad, _version_of_gradient(tensor)
        self._graded_places = len(self._places)

    def _has_new_tensors(self) -> bool:
        """Whether modules hold tensors, in attributes, mappings or as buffers, that they did not hold before."""
        return (
            self._state.has_new_tensors()
            or any(snapshot.has_new_tensors() for snapshot in self._snapshots)
            or any(
                isinstance(value, Tensor) and then.get(name) is None
                for registry, then in self._registries
                for name, value in registry.items()
            )
        )

    def _graded(self) -> list[Tensor]:
        """Return the leaves, if the region has accumulated a gradient into any of them."""
        noted = self._gradients.values()
        if all(leaf.grad is then and _version_of_gradient(leaf) == version for leaf, then, version in noted):
            return []
        return [leaf for leaf, _, _ in noted]

    def _note_place(self, module: nn.Module | None, tensor: Tensor) -> None:
        """Note where the values of a tensor are that the region may write to, or give others."""
        if tensor.is_leaf and (type(tensor) is Tensor or type(tensor) is nn.Parameter) and not is_lazy(tensor):
            with aside():
                small = type(tensor) is Tensor and tensor.numel() <= _SMALL
                copy = tensor.detach().clone() if small else None
                place, version = place_of(tensor), version_of(tensor)
                self._places.append((module, tensor, tensor.data, place, version, copy))
                if module is None:
                    self._found.update(place)
                elif type(tensor) is Tensor:
                    self._held.update(dict.fromkeys(place, version))

    def _note_buffers(self, module: nn.Module, registry: Any, buffers: Iterable[tuple[str, Tensor | None]]) -> None:
        known = _known_module(module)
        for name, buffer in buffers:
            if buffer is not None:
                self._buffers.append(Buffer(module, registry, name, buffer, known))
                if not is_lazy(buffer):
                    self._storages.update(place_of(buffer))

    # Watching.

    def _open_watch(self, opener: Any) -> None:
        if is_faked():
            return  # there are no values that could be written
        watch = Watch()
        watch.__enter__()  # type: ignore[no-untyped-call]
        self._watching.append((opener, watch))

    def _close_watch(self) -> None:
        opener, watch = self._watching.pop()
        watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._watches.append(watch)
        if opener is self and self._keys is not None:
            self._known.append((self._keys, True))

    def is_lasting(self, tensor: Tensor) -> bool:
        """Whether a tensor that autograd saves is a part of what modules hold, and lives on anyway."""
        if not self._storages and not self._lazy and not self._held:
            return False
        keys = place_of(tensor)
        # What the region has written to before is saved as that has left it, which a rebuild brings about again.
        if self._held and keys and self._found.isdisjoint(keys):
            version = version_of(tensor)
            if all(self._held.get(key, -1) == version for key in keys):
                return True
        if not self._storages.isdisjoint(keys):
            return True
        return bool(self._lazy) and any(
            keys == place_of(buffer)
            for module in self._lazy
            for buffer in module.buffers(recurse=False)
            if not is_lazy(buffer)
        )

    @property
    def has_watched(self) -> bool:
        """Whether a dispatch mode was open, under which some operations save other tensors."""
        return bool(self._watches)

    @property
    def unsettled(self) -> set[int]:
        """Storages whose contents do not follow from what was computed; see :class:`Watch`."""
        watches = [*self._watches, *(watch for _, watch in self._watching)]
        return set().union(*(watch.unsettled for watch in watches)) if watches else set()

    def so_far(self) -> Record:
        """Return what a rebuild must know while the region has not run to its end."""
        watches = [*self._watches, *(watch for _, watch in self._watching)]
        copied = {key: copy for watch in reversed(watches) for key, copy in watch.written.items()}
        writes = [Copy(buffer.tensor, buffer.then) for buffer in self._buffers if buffer.then is not None]
        writes.extend(copied.values())
        graded = [leaf for leaf, _, _ in self._gradients.values()]
        return Record(
            self._state, self._parameters, self._registries, [], writes, self._snapshots, self._rosters, graded
        )

    def settle(self) -> Record:
        """Return what a rebuild must know; to be called when the region has run."""
        copied: dict[int, Copy] = {}
        for watch in reversed(self._watches):
            copied.update((key, copy) for key, copy in watch.written.items() if key not in self._brought)
        constant, writes, covered = _settled(self._buffers, copied)
        more = [copy for key, copy in copied.items() if key not in covered and copy.target() is not None]
        if more or self.unsettled:
            writes.extend(more)
            for known, _ in self._known:
                known.watched = True
        for module, tensor, then, place, version, copy in self._places:
            replaced = place_of(tensor) != place
            if not replaced and version_of(tensor) == version:
                continue
            if module is not None and id(module) in self._hooked:
                continue
            if replaced or not any(key in copied for key in place_of(tensor)):
                writes.append(Copy(tensor, then if replaced else copy))
                for known, _ in self._known:
                    known.watched = True
                for one in (self._keys, None if module is None else _known_module(module)):
                    if one is not None:
                        one.watched = True
        self._state.settle()
        if self._keys is not None:
            self._keys.learn(self._named)
        if self._known and not self._has_new_tensors():  # else: the next call may be the first to write to them
            for known, training in self._known:  # not before: recorders of regions around this one look too
                known.seen.add(training)
        self._known.clear()
        if self._unknown is not None and not self._watches and not is_faked():
            self._unknown.learn()
        for module in self._lazy:  # what they will stay
            self._note_parameters(vars(module)["_parameters"])
        return Record(
            self._state, self._parameters, self._registries, constant, writes, self._snapshots, self._rosters,
            self._graded(),
        )  # fmt: skip


def _settled(buffers: Iterable[Buffer], copied: Mapping[int, Copy]) -> tuple[list[Buffer], list[Copy], set[int]]:
    """Return which buffers a call only read, what it wrote to, and the keys of all their storages.

    Args:
        buffers: from before the call.
        copied: what else is known of what storages held.
    """
    writes: list[Copy] = []
    constant: list[Buffer] = []
    covered: set[int] = set()
    for buffer in buffers:
        if is_lazy(buffer.tensor):
            continue  # its module has not run
        keys = {*place_of(buffer.tensor), *(buffer.place or ())}
        covered |= keys
        if not buffer.is_written() and copied.keys().isdisjoint(keys):
            constant.append(buffer)
            continue
        buffer.known.written.add(buffer.name)
        if buffer.then is not None or copied.keys().isdisjoint(keys):
            writes.append(Copy(buffer.tensor, buffer.then))
        else:
            writes.extend(copied[key] for key in keys if key in copied)
    return constant, writes, covered


def _version_of_gradient(leaf: Tensor) -> int:
    return -1 if leaf.grad is None else version_of(leaf.grad)


def _state_of(module: nn.Module) -> Hashable:
    """Return what decides, beside its arguments, what a module does: its training flag and its hooks."""
    hooks = (*module._forward_hooks, *module._forward_pre_hooks)
    return (module.training, hooks) if hooks else module.training


def entering(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        for recorder in local.recorders:
            recorder.enter(module)


def leaving(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for recorder in reversed(local.recorders):
            recorder.leave(module)
