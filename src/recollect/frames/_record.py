"""What a rebuild must know of a region's first run, and how it is put back."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from recollect._devices import forms_of
from recollect._storages import storages_of
from recollect._torch import preserving_versions
from recollect.frames._bits import bits_of
from recollect.frames._errors import InPlaceError
from recollect.frames._modes import aside, observed
from recollect.frames._snapshot import Registered, Roster, Snapshot
from recollect.frames._state import PythonState, same_items
from recollect.frames._watch import Copy, Watch, key_of, place_of, version_of

__all__ = ["Buffer", "Changed", "Known", "Record", "check_unread"]

Changed = tuple[str, Tensor, int]
"""What was changed in place (kind and name), the tensor, and the version that it had."""


class Known:
    """What earlier calls of a module, or of a function, have taught."""

    __slots__ = ("_objects", "marks", "seen", "watched", "written")

    def __init__(self) -> None:
        self._objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # that a function named
        self.seen: set[Hashable] = set()  # training flags and hooks under which a call was watched from begin to end
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


# A buffer with more elements is a table, and not copied on the chance that a first call writes to it unseen.
_LARGE = 1 << 20


class Buffer:
    """A buffer at the moment in which its module began to run."""

    __slots__ = ("known", "mark", "module", "name", "place", "registry", "tensor", "then", "version", "was_lazy")

    def __init__(self, module: nn.Module, registry: Any, name: str, tensor: Tensor, known: Known) -> None:
        self.module = module
        self.registry = registry
        self.name = name
        self.tensor = tensor
        self.known = known
        self.version = version_of(tensor)
        self.was_lazy = type(tensor) is not Tensor and is_lazy(tensor)
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
            if forms_of(tensor.device).reads_at_once:  # elsewhere, comparing values would wait for the device
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


class Record:
    """What a rebuild must know of the first run: state of Python, parameters, buffers, and what was written.

    Args:
        state: of Python, before the run.
        parameters: of the modules that ran, with where they are registered.
        registries: of buffers and submodules, with what they held before the run.
        constant: buffers that the run did not write to.
        writes: what it wrote to.
        snapshots: of trees of modules, whose state, parameters and registries come in addition where they are needed.
        rosters: registries of parameters, with the names that they had before the run, and which stood for none.
        graded: leaves, if the run has accumulated gradients of its own into some of them.
        plain: nothing ran but a module of torch's own, of which there is the snapshot.
    """

    __slots__ = (
        "_brought",
        "_constant",
        "_flags",
        "_graded",
        "_marks",
        "_parameters",
        "_plain",
        "_registries",
        "_rosters",
        "_snapshots",
        "_state",
        "_versions",
        "_writes",
    )

    def __init__(
        self,
        state: PythonState,
        parameters: list[Registered],
        registries: list[tuple[dict[str, Any], dict[str, Any]]],
        constant: list[Buffer],
        writes: list[Copy],
        snapshots: Sequence[Snapshot] = (),
        rosters: Sequence[Roster] = (),
        graded: Sequence[Tensor] = (),
        plain: bool = False,
    ) -> None:
        self._state = state
        self._graded = graded
        self._rosters = rosters
        self._snapshots = snapshots
        self._plain = plain
        self._parameters = parameters
        self._registries = registries
        self._constant: list[Changed] = []
        self._marks: list[tuple[str, Tensor, Any]] = []
        for buffer in constant:
            if not is_lazy(buffer.tensor):
                self._constant.append((buffer.name, buffer.tensor, version_of(buffer.tensor)))
            if buffer.mark is not None:
                self._marks.append((buffer.name, buffer.tensor, buffer.mark))
        self._writes = writes
        tensors = self._tensors()
        self._versions = _versions_of(tensors)
        self._flags = [*map(_requires_grad, tensors)]
        self._brought: set[int] = set()
        for copy in writes:
            self._brought.update(copy.keys_brought_back())

    @property
    def is_plain(self) -> bool:
        """Whether nothing but modules of torch's own ran, and they are as they were."""
        return self._plain and bool(self._snapshots)

    def suspects(self) -> list[str]:
        """Return buffers that hold other values although no version says so, and what was written without a copy."""
        found = [f"buffer {name!r} holds other values" for name, tensor, mark in self._marks if bits_of(tensor) != mark]
        for copy in self._writes:
            tensor = copy.tensor()
            if copy.then is None and tensor is not None:
                found.append(
                    f"it wrote to a tensor of shape {list(tensor.shape)} in a later call, and not in the first one, so "
                    "that no copy of its old values was kept (from now on there is one: run the step again)"
                )
        return found

    def changed(self) -> list[Changed]:
        """Return the parameters and constant buffers that were changed in place since: kind and name, tensor, version.

        That matters only if the region reads them, and does not get back what they held.
        """
        changed: list[Changed] = []
        if self._versions != _versions_of(self._tensors()):
            self._spread()
            changed = [
                (f"parameter {name!r}", parameter, version)
                for (_, name, parameter), version in zip(self._parameters, self._versions, strict=True)
                if version_of(parameter) != version and self._brought.isdisjoint(place_of(parameter))
            ]
        for name, buffer, version in self._constant:
            if version_of(buffer) != version:
                changed.append((f"buffer {name!r}", buffer, version))
        return changed

    def _tensors(self) -> list[Tensor]:
        """Return the parameters: those of snapshots come last, which is where they are when they are written out."""
        snapshots = self._snapshots
        if len(snapshots) == 1 and not self._parameters:
            return snapshots[0].parameters
        found = [p for _, _, p in self._parameters]
        for snapshot in snapshots:
            found.extend(snapshot.parameters)
        return found

    def _spread(self) -> None:
        """Write out what the snapshots hold."""
        for snapshot in self._snapshots:
            parameters, registries, rosters = snapshot.spread(self._state)
            self._parameters = [*self._parameters, *parameters]
            self._registries = [*self._registries, *registries]
            self._rosters = [*self._rosters, *rosters]
        self._snapshots = ()

    def put_back(self, other: bool = False) -> AbstractContextManager[None] | None:
        """Give the body what the first run began with; afterwards everything is as it was before the body.

        ``None`` where a module of torch's own has that already: it changes nothing for a while.

        Args:
            other: the body is another function, the region's inverse: parameters that the first run has set
                (initialised by the data) are as it has left them.
        """
        if self._snapshots:
            if (
                other
                or not all(snapshot.holds() for snapshot in self._snapshots)
                or [*map(_requires_grad, self._tensors())] != self._flags
            ):
                self._spread()
            elif not self._writes:
                if self._plain:
                    return None
                if not (self._parameters or self._registries or self._rosters or self._graded):
                    return _Holding(self, self._snapshots, self._state)
        return self._writing(other)

    def standing(self) -> _Standing:
        """Return what of parameters and buffers an early stop may leave otherwise than the region does."""
        return _Standing([*self._tensors(), *(buffer for _, buffer, _ in self._constant)])

    def let_stand(self, standing: _Standing, snapshots: Sequence[Snapshot]) -> None:
        """Give parameters and buffers back what stood before a rebuild, and modules what snapshots hold."""
        standing.write()
        for snapshot in snapshots:
            if not snapshot.holds():
                _write_back(snapshot)
        self._versions = _versions_of(self._tensors())

    @contextmanager
    def _writing(self, other: bool) -> Iterator[None]:
        with aside():
            yield from self._exchanging(other)

    def _exchanging(self, other: bool) -> Iterator[None]:
        snapshots = self._snapshots  # these hold
        registries = [
            (registry, then if not (registry or then) or same_items(registry, then) else dict(registry))
            for registry, then in self._registries
        ]
        parameters: list[Registered] = []
        contents: list[tuple[Copy, Tensor, Tensor]] = []
        counted: list[Tensor] = []
        kept: set[int] = set()
        if other and self._writes:
            kept = {key for _, _, parameter in self._parameters for key in place_of(parameter)}
        rosters = [(registry, dict(registry)) for registry, _ in self._rosters]
        state = self._state.now()
        standing = self.standing()
        gradients = [(leaf, leaf.grad, None if leaf.grad is None else leaf.grad.clone()) for leaf in self._graded]
        try:
            self._state.write_then(state)
            for copy in self._writes:
                target = copy.target()
                if target is None:
                    continue
                contents.append((copy, target, target.clone()))
                tensor = copy.counting()
                if tensor is not None:
                    counted.append(tensor)
                if copy.then is not None and kept.isdisjoint(copy.keys_brought_back()):
                    target.copy_(copy.then)
            for (registry, then), (_, now) in zip(self._registries, registries, strict=True):
                if now is not then:
                    _register(registry, then)
            for registry, names in self._rosters:
                _take_back(registry, names)
            for registry, name, parameter in self._parameters:
                present = registry.get(name, _GONE)
                if present is _GONE:
                    registry[name] = parameter
                elif present is not parameter and _can_replace(present, parameter):
                    parameters.append((registry, name, present))
                    registry[name] = parameter
            for parameter, flag in zip(self._tensors(), self._flags, strict=True):
                if parameter.requires_grad is not flag and parameter.is_leaf:
                    parameter.requires_grad_(flag)
            with observed(), preserving_versions(counted):
                yield
        finally:
            standing.write()
            for leaf, gradient, held in gradients:
                leaf.grad = gradient
                if gradient is not None and held is not None:
                    gradient.detach().copy_(held)
            for registry, name, tensor in reversed(parameters):
                registry[name] = tensor
            for registry, now in (*registries, *rosters):
                if registry or now:
                    _register(registry, now)
            for copy, target, value in reversed(contents):
                target.copy_(value)
                copy.lead_to(target)
            for snapshot in snapshots:
                if not snapshot.holds():
                    _write_back(snapshot)
            self._versions = _versions_of(self._tensors())
            self._state.write(state)


class _Holding:
    """The body begins with what a record's snapshots hold, as it is, and with a state; all is so afterwards."""

    __slots__ = ("_now", "_record", "_snapshots", "_standing", "_state")

    def __init__(self, record: Record, snapshots: Sequence[Snapshot], state: PythonState) -> None:
        self._record = record
        self._snapshots = snapshots
        self._state = state

    def __enter__(self) -> None:
        with aside():
            self._now = self._state.now()
            self._standing = self._record.standing()
            self._state.write_then(self._now)

    def __exit__(self, *exc_info: object) -> None:
        with aside():
            self._record.let_stand(self._standing, self._snapshots)
            self._state.write(self._now)


_requires_grad = attrgetter("requires_grad")
_version = attrgetter("_version")


def _write_back(snapshot: Snapshot) -> None:
    """Let a tree of modules hold again what it held."""
    state = PythonState()
    parameters, registries, rosters = snapshot.spread(state)
    state.write_then(state.now())
    held: dict[int, dict[str, Any]] = {id(registry): dict.fromkeys(names) for registry, names in rosters}
    for registry, name, parameter in parameters:
        held[id(registry)][name] = parameter
    for registry, then in (*registries, *((registry, held[id(registry)]) for registry, _ in rosters)):
        _register(registry, then)


def _versions_of(tensors: list[Tensor]) -> list[int]:
    try:
        return [*map(_version, tensors)]
    except RuntimeError:
        return [version_of(tensor) for tensor in tensors]


def _register(registry: dict[str, Any], values: dict[str, Any]) -> None:
    if same_items(registry, values):
        return
    for name, value in values.items():
        if name not in registry or registry[name] is not value:
            registry[name] = value
    if len(registry) != len(values):
        for name in [name for name in registry if name not in values]:
            del registry[name]
    if list(registry) != list(values):
        registry.clear()
        registry.update(values)


def _take_back(registry: dict[str, Any], names: dict[str, bool]) -> None:
    """Take parameters out of a registry that were not there under these names: the region made them, or makes them."""
    for name in [name for name in registry if name not in names]:
        del registry[name]
    for name, is_none in names.items():
        if is_none and registry.get(name) is not None:
            registry[name] = None


def _lies_there(tensor: Tensor, other: Tensor) -> bool:
    """Whether a tensor has the memory of another, in its form."""
    if tensor.is_cpu:
        return tensor.is_set_to(other)
    return _lies(tensor) == _lies(other)


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    return place_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()


class _Standing:
    """Of parameters and buffers, which memory they have and whether they require a gradient.

    Args:
        tensors: with or without history.
    """

    __slots__ = ("_flags", "_tensors", "_values")

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if type(tensor) in _PLAIN and tensor.is_leaf]
        self._flags = [*map(_requires_grad, self._tensors)]
        self._values = [tensor.data for tensor in self._tensors]

    def write(self) -> None:
        """Give them these again."""
        if [*map(_requires_grad, self._tensors)] != self._flags:
            for tensor, flag in zip(self._tensors, self._flags, strict=True):
                if tensor.requires_grad is not flag:
                    tensor.requires_grad_(flag)
        for tensor, value in zip(self._tensors, self._values, strict=True):
            if tensor.layout is torch.strided and not _lies_there(tensor, value):
                tensor.data = value


_GONE = object()
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
