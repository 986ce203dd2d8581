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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.nn.parameter import is_lazy

from recollect._storages import storages_of, storages_within
from recollect._torch import (
    STANDARD_ATTRIBUTES,
    TorchDispatchMode,
    compiled_blocks_exist,
    is_faked,
    preserving_versions,
    unwatch_leaving,
    unwatch_modules,
    watch_leaving,
    watch_modules,
    write_undeclared,
)
from recollect.frames._certificate import bits_of
from recollect.frames._errors import InPlaceError
from recollect.frames._modes import aside, local
from recollect.frames._state import PythonState, reached_by, same_items

__all__ = [
    "Record", "Recorder", "Watch", "attributes_of", "check_unread", "entering", "leaving", "place_of", "version_of",
]  # fmt: skip


def version_of(tensor: Tensor) -> int:
    """Return the in-place version of a tensor; inference tensors have none, and count as unchanged."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def attributes_of(tensor: Tensor) -> dict[str, Any] | None:
    """Return a copy of the attributes that Python holds of a tensor beside torch's own, which detaching loses."""
    attributes = getattr(tensor, "__dict__", None)
    return dict(attributes) if attributes else None


def key_of(storage: UntypedStorage) -> int:
    """Return the number of a storage, which another may have when it is gone."""
    number: int = storage._cdata
    return number


class _Known:
    """What earlier calls of a module, or of a function, have taught."""

    __slots__ = ("_objects", "marks", "seen", "watched", "written")

    def __init__(self) -> None:
        self._objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # that a function named
        self.seen: set[bool] = set()  # training flags under which a call was watched from begin to end
        self.watched = False  # writes to more than buffers, and is watched at each call
        self.written: set[str] = set()  # buffers that it was seen to write
        self.marks: dict[str, tuple[weakref.ref[Tensor], int, Any]] = {}  # of buffers that it only read

    def knows(self, thing: Any) -> bool:
        """Whether a function was watched with this object among those that it names."""
        return self._objects.get(id(thing)) is thing

    def learn(self, things: Iterable[Any]) -> None:
        """Note that it was; what has no weak references is not remembered."""
        for thing in things:
            with suppress(TypeError):
                self._objects[id(thing)] = thing


_modules_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
_functions_known: weakref.WeakKeyDictionary[types.CodeType, _Known] = weakref.WeakKeyDictionary()


def _known_module(module: nn.Module) -> _Known:
    known = _modules_known.get(module)
    if known is None:
        known = _modules_known[module] = _Known()
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


# Writes.


class _Copy:
    """What a tensor or a storage held before it was written to, where that is known."""

    __slots__ = ("_storage", "_tensor", "then")

    def __init__(self, of: Tensor | UntypedStorage, then: Tensor | None) -> None:
        self._tensor = of if isinstance(of, Tensor) else None
        self._storage = None if isinstance(of, Tensor) else weakref.ref(of)
        self.then = then

    def target(self) -> Tensor | None:
        """Return a tensor to write to that counts no versions; ``None`` if the storage is gone."""
        if self._tensor is not None:
            return self._tensor.data
        storage = self._storage() if self._storage is not None else None
        return None if storage is None else _bytes_of(storage)

    def brings_back(self, tensor: Tensor) -> bool:
        """Whether this has what a tensor held."""
        storage = self._storage() if self._storage is not None else None
        return self.then is not None and storage is not None and key_of(storage) in place_of(tensor)

    def lead_to(self, target: Tensor) -> None:
        """Let the tensor, if this is of one, have the memory of ``target`` again (it may have been given another)."""
        if self._tensor is not None and place_of(self._tensor) != place_of(target):
            self._tensor.data = target

    def tensor(self) -> Tensor | None:
        """Return the tensor itself, if this is of one."""
        return self._tensor


def _bytes_of(storage: UntypedStorage) -> Tensor:
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return whole.set_(storage, 0, (storage.nbytes(),), (1,))


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees which storages from outside the operations of its body read and write.

    Attributes:
        read: keys of the storages that were read.
        written: storages that were written, by key, with what they held before.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled blocks are not to be compiled anew because somebody watches."""
        return True

    def __init__(self, copies: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: set[int] = set()
        self.written: dict[int, _Copy] = {}
        self._made: set[int] = set()
        self._copies = copies

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_faked():  # also where a DTensor asks fake ones for the shape of its output
            return func(*args, **(kwargs or {}))
        if any(kind.__torch_dispatch__ is not _PLAIN_DISPATCH for kind in types):
            return NotImplemented  # a subclass with operations of its own unwraps first; what it runs is seen
        kwargs = kwargs or {}
        if local.aside:
            return func(*args, **kwargs)
        inputs = {key_of(storage) for storage in storages_within((args, kwargs))}
        if func is _LIFT_FRESH:  # torch.tensor(...): its argument was made a moment ago, unseen
            self._made |= inputs
        outside = inputs - self._made
        if outside:
            self.read |= outside
            self._note_writes(func, args, kwargs, outside)
        out = func(*args, **kwargs)
        self._made.update(key for key in map(key_of, storages_within(out)) if key not in inputs)
        return out

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outside: set[int]) -> None:
        targets = write_undeclared(func, args)
        schema = func._schema
        if schema.is_mutable:
            for i, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    given = args[i] if i < len(args) else kwargs.get(argument.name)
                    targets.extend(given if isinstance(given, (list, tuple)) else [given])
        for target in targets:
            if isinstance(target, Tensor):
                for storage in storages_of(target):
                    key = key_of(storage)
                    if key in outside and key not in self.written:
                        then = _bytes_of(storage).clone() if self._copies else None
                        self.written[key] = _Copy(storage, then)


_PLAIN_DISPATCH = Tensor.__torch_dispatch__
_LIFT_FRESH = torch.ops.aten.lift_fresh.default


# Observation.


# So many modules are noted without having run, where a function names them.
_FEW = 64

# A buffer with more elements is a table, and not copied on the chance that a first call writes to it unseen.
_LARGE = 1 << 20


def place_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the keys of a tensor's storages."""
    kind = type(tensor)
    if (kind is Tensor or kind is nn.Parameter) and tensor.layout is torch.strided:
        return (tensor.untyped_storage()._cdata,)
    return () if is_lazy(tensor) else tuple(key_of(storage) for storage in storages_of(tensor))


class _Buffer:
    """A buffer at the moment in which its module began to run."""

    __slots__ = ("known", "mark", "module", "name", "place", "registry", "tensor", "then", "version", "was_lazy")

    def __init__(self, module: nn.Module, registry: Any, name: str, tensor: Tensor, known: _Known) -> None:
        self.module = module
        self.registry = registry
        self.name = name
        self.tensor = tensor
        self.known = known
        self.version = version_of(tensor)
        self.was_lazy = is_lazy(tensor)
        self.place = None if self.was_lazy else place_of(tensor)
        self.then: Tensor | None = None
        self.mark: Any = None
        if self.was_lazy:
            return
        with aside():
            if name in known.written:
                self.then = tensor.detach().clone()
                return
            if module.training not in known.seen and tensor.numel() <= _LARGE:
                self.then = tensor.detach().clone()  # in case it is written in a way that nothing tells of
            if tensor.device.type == "cpu":  # elsewhere, comparing values would wait for the device
                before = known.marks.get(name)
                if before is not None and before[0]() is tensor and before[1] == self.version:
                    self.mark = before[2]
                else:
                    self.mark = bits_of(tensor)

    def is_written(self) -> bool:
        """Whether the region has written to it."""
        if self.name in self.known.written or self.was_lazy:
            return True
        if version_of(self.tensor) != self.version or place_of(self.tensor) != self.place:
            return True
        if self.mark is None:
            return False
        with aside():
            if bits_of(self.tensor) != self.mark:
                return True
        self.known.marks[self.name] = (weakref.ref(self.tensor), self.version, self.mark)
        return False


Registered = tuple[dict[str, Any], str, Tensor]
Changed = tuple[str, Tensor, int]
"""What was changed in place (kind and name), the tensor, and the version that it had."""


class Recorder:
    """Observes the first run of a region; :meth:`settle` returns what a rebuild must know.

    Args:
        function: what the region runs.
        arguments: what it is called with, for objects among them.
    """

    __slots__ = (
        "_brought", "_buffers", "_entered", "_hooked", "_keys", "_known", "_lazy", "_leaves", "_named", "_parameters",
        "_parts", "_ran", "_registries", "_runs", "_state", "_storages", "_watches", "_watching",
    )  # fmt: skip

    def __init__(self, function: Callable[..., Any], arguments: Iterable[Any]) -> None:
        self._entered: set[int] = set()
        self._ran: set[int] = set()  # those that ran, and their parts
        # Modules whose parameters hooks may bring and take away, and the storages of what they brought: hooks do in a
        # rebuild what they do, and the parameters that are there are used.
        self._hooked: set[int] = set()
        self._brought: set[int] = set()
        self._parts: tuple[int, list[int]] | None = None  # of the function, if it is a module
        self._state = PythonState()
        self._buffers: list[_Buffer] = []
        self._storages: set[int] = set()  # of buffers
        self._parameters: list[Registered] = []
        self._registries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._watching: list[tuple[Any, Watch]] = []  # who opened the mode, and the mode
        self._watches: list[Watch] = []
        self._known: list[tuple[_Known, bool]] = []  # entered while the mode was open, and in which training mode
        self._lazy: list[nn.Module] = []
        self._runs = self._leaves = False  # whether it observes, and also when modules have run
        code = _code_of(function)
        self._keys = None if code is None else _functions_known.setdefault(code, _Known())
        self._named: list[Any] = []  # objects that the function names, if it was not watched with them before
        for found in reached_by(function, arguments):
            if self._keys is not None and not self._keys.knows(found):
                self._named.append(found)
            if isinstance(found, torch.Generator):
                self._state.add_generator(found)
            elif isinstance(found, nn.Module):
                # A part of it may be used without being called as a module; of a large one that would be too many.
                parts = list(itertools.islice(found.modules(), _FEW + 1))
                if found is function and len(parts) <= _FEW:  # nothing runs before it that could give it others
                    self._parts = (id(found), [id(part) for part in parts])
                for part in parts if len(parts) <= _FEW else [found]:
                    self._enter(part)

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
        if not self._watching and (known.watched or module.training not in known.seen):
            self._open_watch(module)
            self._watch_leaving()
        if self._watching:
            self._known.append((known, module.training))
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

    def _enter(self, module: nn.Module) -> None:
        if id(module) in self._entered:
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
            if id(module) not in self._hooked:
                for name, parameter in parameters.items():
                    if parameter is not None:
                        self._parameters.append((parameters, name, parameter))
            self._registries.append((buffers, dict(buffers)))
            if names["_modules"]:
                self._registries.append((names["_modules"], dict(names["_modules"])))
        if buffers:
            self._note_buffers(module, buffers, buffers.items())

    def _note_buffers(self, module: nn.Module, registry: Any, buffers: Iterable[tuple[str, Tensor | None]]) -> None:
        known = _known_module(module)
        for name, buffer in buffers:
            if buffer is not None:
                self._buffers.append(_Buffer(module, registry, name, buffer, known))
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
        """Whether a tensor that autograd saves is a part of a buffer, and lives on anyway."""
        if not self._storages and not self._lazy:
            return False
        keys = place_of(tensor)
        if not self._storages.isdisjoint(keys):
            return True
        return bool(self._lazy) and any(
            keys == place_of(buffer)
            for module in self._lazy
            for buffer in module.buffers(recurse=False)
            if not is_lazy(buffer)
        )

    def so_far(self) -> Record:
        """Return what a rebuild must know while the region has not run to its end."""
        watches = [*self._watches, *(watch for _, watch in self._watching)]
        copied = {key: copy for watch in reversed(watches) for key, copy in watch.written.items()}
        writes = [_Copy(buffer.tensor, buffer.then) for buffer in self._buffers if buffer.then is not None]
        writes.extend(copied.values())
        return Record(self._state, self._parameters, self._registries, [], writes)

    def settle(self) -> Record:
        """Return what a rebuild must know; to be called when the region has run."""
        writes: list[_Copy] = []
        constant: list[_Buffer] = []
        covered: set[int] = set()
        copied: dict[int, _Copy] = {}
        for watch in reversed(self._watches):
            copied.update((key, copy) for key, copy in watch.written.items() if key not in self._brought)
        for buffer in self._buffers:
            keys = set(place_of(buffer.tensor)) | set(buffer.place or ())
            covered |= keys
            if not buffer.is_written() and not any(key in copied for key in keys):
                constant.append(buffer)
                continue
            buffer.known.written.add(buffer.name)
            if buffer.then is not None or not any(key in copied for key in keys):
                writes.append(_Copy(buffer.tensor, buffer.then))
            else:
                writes.extend(copied[key] for key in keys if key in copied)
        more = [copy for key, copy in copied.items() if key not in covered and copy.target() is not None]
        if more:
            writes.extend(more)
            for known, _ in self._known:
                known.watched = True
        if self._keys is not None:
            self._keys.learn(self._named)
        for known, training in self._known:  # not before: recorders of regions around this one look too
            known.seen.add(training)
        self._known.clear()
        for module in self._lazy:  # what they will stay
            parameters = vars(module)["_parameters"]
            self._parameters.extend((parameters, name, p) for name, p in parameters.items() if p is not None)
        return Record(self._state, self._parameters, self._registries, constant, writes)


def entering(module: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        for recorder in local.recorders:
            recorder.enter(module)


def leaving(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for recorder in reversed(local.recorders):
            recorder.leave(module)


class Record:
    """What a rebuild must know of the first run: state of Python, parameters, buffers, and what was written.

    Args:
        state: of Python, before the run.
        parameters: of the modules that ran, with where they are registered.
        registries: of buffers and submodules, with what they held before the run.
        constant: buffers that the run did not write to.
        writes: what it wrote to.
    """

    __slots__ = ("_constant", "_marks", "_parameters", "_registries", "_state", "_versions", "_writes")

    def __init__(
        self,
        state: PythonState,
        parameters: list[Registered],
        registries: list[tuple[dict[str, Any], dict[str, Any]]],
        constant: list[_Buffer],
        writes: list[_Copy],
    ) -> None:
        self._state = state
        self._parameters = parameters
        self._registries = registries
        self._constant = [(b.name, b.tensor, version_of(b.tensor)) for b in constant if not is_lazy(b.tensor)]
        self._marks = [(b.name, b.tensor, b.mark) for b in constant if b.mark is not None]
        self._writes = writes
        self._versions = _versions_of(parameters)

    def suspects(self) -> list[str]:
        """Return the buffers that hold other values than in the first run, although no version says so."""
        return [f"buffer {name!r} holds other values" for name, tensor, mark in self._marks if bits_of(tensor) != mark]

    def changed(self) -> list[Changed]:
        """Return the parameters and constant buffers that were changed in place since: kind and name, tensor, version.

        That matters only if the region reads them, and does not get back what they held.
        """
        if self._versions == _versions_of(self._parameters) and not self._constant:
            return []
        changed = [
            (f"parameter {name!r}", parameter, version)
            for (_, name, parameter), version in zip(self._parameters, self._versions, strict=True)
            if version_of(parameter) != version and not any(copy.brings_back(parameter) for copy in self._writes)
        ]
        changed.extend(
            (f"buffer {name!r}", buffer, version)
            for name, buffer, version in self._constant
            if version_of(buffer) != version
        )
        return changed

    @contextmanager
    def put_back(self, other: bool = False) -> Iterator[None]:
        """Give the body what the first run began with; afterwards everything is as it was before the body.

        Args:
            other: the body is another function, the region's inverse: parameters that the first run has set
                (initialised by the data) are as it has left them.
        """
        registries = [
            (registry, then if not (registry or then) or same_items(registry, then) else dict(registry))
            for registry, then in self._registries
        ]
        parameters: list[Registered] = []
        contents: list[tuple[_Copy, Tensor, Tensor]] = []
        counted: list[Tensor] = []
        kept = [parameter for _, _, parameter in self._parameters] if other and self._writes else []
        state = self._state.now()
        try:
            self._state.write_then(state)
            for copy in self._writes:
                if any(copy.brings_back(parameter) for parameter in kept):
                    continue
                target = copy.target()
                if target is None:
                    continue
                contents.append((copy, target, target.clone()))
                tensor = copy.tensor()
                if tensor is not None and not tensor.is_inference():
                    counted.append(tensor)
                if copy.then is not None:
                    target.copy_(copy.then)
            for (registry, then), (_, now) in zip(self._registries, registries, strict=True):
                if now is not then:
                    _register(registry, then)
            for registry, name, parameter in self._parameters:
                present = registry.get(name)
                if present is not parameter and _can_replace(present, parameter):
                    parameters.append((registry, name, present))  # type: ignore[arg-type]
                    registry[name] = parameter
            with preserving_versions(counted):
                yield
        finally:
            for registry, name, tensor in reversed(parameters):
                registry[name] = tensor
            for registry, now in registries:
                if registry or now:
                    _register(registry, now)
            for copy, target, value in reversed(contents):
                target.copy_(value)
                copy.lead_to(target)
            self._versions = _versions_of(self._parameters)
            self._state.write(state)


def _versions_of(registered: list[Registered]) -> list[int]:
    try:
        return [parameter._version for _, _, parameter in registered]
    except RuntimeError:
        return [version_of(parameter) for _, _, parameter in registered]


def _register(registry: dict[str, Any], values: dict[str, Any]) -> None:
    if same_items(registry, values):
        return
    for name, value in values.items():
        if name not in registry or registry[name] is not value:
            registry[name] = value
    if len(registry) != len(values):
        for name in [name for name in registry if name not in values]:
            del registry[name]


_PLAIN = {Tensor, nn.Parameter}  # torch.func.functional_call brings either


def _can_replace(now: Any, then: Tensor) -> bool:
    """Whether the forward's parameter takes the place of the present one.

    Not where hooks bring parameters and take them away again (sharding, offloading): those that are there are used.
    """
    if not isinstance(now, Tensor) or (type(now) is not type(then) and not {type(now), type(then)} <= _PLAIN):
        return False
    return then.numel() == 0 or any(storage.nbytes() > 0 for storage in storages_of(then))


def check_unread(name: str, changed: Iterable[Changed], watch: Watch) -> None:
    """Raise an :class:`InPlaceError` if the region that ``watch`` has seen reads what was changed in between."""
    for what, tensor, version in changed:
        if any(key_of(storage) in watch.read for storage in storages_of(tensor)):
            remedy = "change a copy instead (x = x + 1, not x += 1)"
            if not what.startswith("its"):
                remedy = "by an optimizer step, a hook or an update of averages; call backward before that"
            raise InPlaceError(
                f"{name}: {what} of shape {list(tensor.shape)}, which it reads, was changed in place between the "
                f"forward pass (version {version}) and backward (version {version_of(tensor)}); {remedy}, or run the "
                "forward pass again"
            )
