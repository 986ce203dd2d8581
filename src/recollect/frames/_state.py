"""What Python holds at one moment in the attributes of modules, and in generators of random numbers.

A module may count its calls, switch its adapters or leave features behind. A rebuild starts from what its attributes
were before the forward pass, and puts back what they were before the rebuild. What a region does to other objects is
the region's own: it can ask :func:`recollect.in_backward`.
"""

from __future__ import annotations

import functools
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum, auto
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from recollect._torch import is_stand_in
from recollect._util._tree import ATOMS
from recollect.frames._forward import Forward

__all__ = ["DEPTH", "MANY", "PythonState", "is_open", "reached_by", "same_items", "tensors_named_by"]

MANY = 1024
"""A container with more entries holds data, not settings."""
DEPTH = 3
"""So many containers behind an attribute are looked into."""
_FEW = 64
_STEPS = 8  # from a function to what it names
_HELD = 3  # from an argument to what it holds
_REACH = 256  # objects in all

_FOREIGN = ("torch.", "numpy")
_ARRAY = 1 << 16  # elements; a larger one is a table

_MISSING = object()

_CLOSED = (
    type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial, Tensor,
    nn.Module, torch.UntypedStorage, weakref.ref, Forward,
)  # fmt: skip


class _Past:
    """A tensor with history, which would keep the graphs of past steps: its value, and itself while it lives."""

    __slots__ = ("_tensor", "_value")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._value = tensor.detach().requires_grad_()

    def get(self) -> Tensor:
        tensor = self._tensor()
        return self._value if tensor is None else tensor


def _past(value: Any) -> Any:
    return _Past(value) if isinstance(value, Tensor) and not value.is_leaf else value


def _present(value: Any) -> Any:
    return value.get() if type(value) is _Past else value


def reached_by(function: Any, args: Iterable[Any]) -> Iterator[Any]:
    """Yield the modules, generators, tensors and other objects that a function and its arguments name.

    These are what it is bound to, its variables, and what these hold. The region may use a module without running it as
    one. It may also not use it: putting its attributes back does no harm, and nothing else is concluded from it.
    """
    waiting = [(function, _STEPS), *[(argument, _HELD) for argument in args]]
    seen: dict[int, Any] = {}
    while waiting and len(seen) < _REACH:
        value, steps = waiting.pop()
        kind = _kind_of(type(value))
        if kind is _Kind.ATOM or id(value) in seen:
            continue
        seen[id(value)] = value
        if kind is _Kind.OTHER:  # it may pass for something else, as proxies do
            kind = next((found for found, kinds in _KINDS if isinstance(value, kinds)), kind)
        if kind is _Kind.NAMED:
            yield value
        elif steps == 0:
            continue
        elif kind is _Kind.CONTAINER:
            if len(value) <= _FEW:
                items = value.values() if isinstance(value, dict) else value
                waiting.extend([(item, steps - 1) for item in items])
        elif kind is _Kind.METHOD:
            waiting.extend([(value.__self__, steps), (value.__func__, steps)])
        elif kind is _Kind.FUNCTION:
            if value.__closure__ is not None or not str(value.__module__).startswith("recollect."):
                waiting.extend([(part, steps - 1) for part in _variables_of(value)])
        elif kind is _Kind.PARTIAL:
            waiting.extend([(part, steps - 1) for part in (value.func, *value.args, *value.keywords.values())])
        elif type(value).__module__.partition(".")[0] == "recollect" and hasattr(value, "owner"):  # around a block
            waiting.append((value.owner, steps))
        elif steps > 1 and not isinstance(value, _CLOSED) and not type(value).__module__.startswith("torch"):
            yield value
            try:
                names = getattr(value, "__dict__", None)
            except Exception:  # an object that nobody may look into
                continue
            if type(names) is dict and len(names) <= _FEW:
                waiting.extend([(item, steps - 1) for item in names.values()])


class _Kind(Enum):
    """How a value is looked into."""

    ATOM = auto()
    NAMED = auto()
    CONTAINER = auto()
    METHOD = auto()
    FUNCTION = auto()
    PARTIAL = auto()
    OTHER = auto()


_NAMED = (nn.Module, torch.Generator, Tensor)
_KINDS: list[tuple[_Kind, tuple[type, ...]]] = [
    (_Kind.NAMED, _NAMED),
    (_Kind.CONTAINER, (list, tuple, dict)),
    (_Kind.METHOD, (types.MethodType,)),
    (_Kind.FUNCTION, (types.FunctionType,)),
    (_Kind.PARTIAL, (functools.partial,)),
]


def _find_kind(kind: type) -> _Kind:
    if kind in ATOMS:
        return _Kind.ATOM
    return next((found for found, bases in _KINDS if issubclass(kind, bases)), _Kind.OTHER)


_kind_of: Callable[[Any], _Kind] = functools.lru_cache(maxsize=1024)(_find_kind)


def _variables_of(function: types.FunctionType) -> Iterator[Any]:
    """Yield the values of a function's variables from outside: defaults, closure, some of its globals."""
    yield from function.__defaults__ or ()
    if function.__kwdefaults__:
        yield from function.__kwdefaults__.values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that is not bound yet
            continue
    names = function.__globals__
    for name in _names_in(function.__code__):
        value = names.get(name)
        if value is None:
            continue
        kind = _kind_of(type(value))
        # A container too: a module in it whose forward is called directly tells nobody that it runs.
        if kind is _Kind.NAMED or kind is _Kind.CONTAINER or (kind is _Kind.OTHER and isinstance(value, _NAMED)):
            yield value


@functools.lru_cache(maxsize=1024)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes in a function's code, with those of functions that are made in it."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _names_in(part)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))


def tensors_named_by(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors among the variables from outside of a module's ``forward``, if it is written in Python."""
    forward = vars(type(module)).get("forward")
    if isinstance(forward, types.FunctionType):
        for value in _variables_of(forward):
            if isinstance(value, Tensor):
                yield value


class PythonState:
    """What Python held when this was made, of the things that were added.

    Attributes:
        tensors: those that were met, in containers and objects too, until somebody takes them.
        modules: those that were met so, which no module has registered.
    """

    __slots__ = ("_cells", "_seen", "_things", "modules", "tensors")

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self._cells: list[_Cell] = []
        self._things: list[Any] = []
        self._seen: set[int] = set()

    def add_generator(self, generator: torch.Generator) -> None:
        """Note the state of a generator."""
        if id(generator) not in self._seen:
            self._seen.add(id(generator))
            self._things.append(_Generator(generator))

    def add_variables(self, function: Any) -> None:
        """Note the variables of a function's closure."""
        while not isinstance(function, types.FunctionType):
            inner = next((n for n in ("owner", "__func__", "func") if hasattr(function, n)), None)
            if inner is None or isinstance(function, nn.Module):
                return
            function = getattr(function, inner)
        for cell in function.__closure__ or ():
            try:
                self._cells.append(_Cell(cell, cell.cell_contents))
            except ValueError:  # not bound yet
                continue

    def settle(self) -> None:
        """Keep the variables that the region did not bind anew; those that it does are its own to count with."""
        self._things.extend(cell for cell in self._cells if cell.is_read_only)
        self._cells = []

    def add_namespace(self, names: dict[str, Any], skip: frozenset[str] = frozenset(), depth: int = DEPTH) -> None:
        """Note the attributes of an object."""
        whole = names.copy()  # in one go: another thread may put a forward there
        has_history = False
        for name, value in whole.items():
            if type(value) not in ATOMS and name not in skip:
                self._add(value, depth)
                has_history = has_history or (isinstance(value, Tensor) and not value.is_leaf)
        self._things.append(_Namespace(names, None if has_history else whole, skip))

    def add_noted(self, names: dict[str, Any], whole: dict[str, Any], skip: frozenset[str]) -> None:
        """Note the attributes that an object had, all of them immutable."""
        self._things.append(_Namespace(names, whole, skip))

    def add_held(self, container: Any, then: Any) -> None:
        """Note what a mapping, namespace or list held; a tuple holds the same."""
        if isinstance(then, dict):
            self._things.append(_Dict(container, then))
        elif type(container) is list:
            self._things.append(_List(container, then))

    def _add(self, value: Any, depth: int) -> None:
        """Note what a value holds, if it can change."""
        kind = type(value)
        if kind is Tensor:
            self.tensors.append(value)
            return
        if kind in ATOMS or id(value) in self._seen:
            return
        if isinstance(value, _CLOSED):
            held = value() if isinstance(value, weakref.ref) else value
            self.modules.extend(one for one in reached_by(held, ()) if isinstance(one, nn.Module))
            return
        self._seen.add(id(value))
        if _is_array(value):
            if value.size <= _ARRAY and not value.dtype.hasobject:
                self._things.append(_Array(value))
            return
        if _state_of(value) is not None:
            self._things.append(_Generator(value))
            return
        items: Iterable[Any] = ()
        if isinstance(value, (list, deque)):
            if len(value) <= MANY:
                self._things.append(_List(value))
                items = value
            elif type(value) is list:
                self._things.append(_LongList(value))
        elif isinstance(value, dict):
            if len(value) <= MANY:
                self._things.append(_Dict(value))
                items = value.values()
        elif isinstance(value, set):
            self._things.append(_Set(value))
        elif isinstance(value, tuple):
            items = value
        elif depth > 0 and (isinstance(value, torch.optim.Optimizer) or not kind.__module__.startswith(_FOREIGN)):
            names = getattr(value, "__dict__", None)
            if type(names) is dict:
                self.add_namespace(names, depth=depth - 1)
            slots = [name for base in kind.__mro__ for name in _slots_of(base)]
            if slots:
                self._things.append(_Slots(value, slots))
                items = [getattr(value, name, None) for name in slots]
        if depth > 0:
            for item in list(items):
                if type(item) not in ATOMS:
                    self._add(item, depth - 1)

    def has_new_tensors(self) -> bool:
        """Whether an attribute, or an entry of a mapping, is a tensor that was none, as what a first call makes is."""
        return any(
            isinstance(value, Tensor) and not isinstance(_present(thing.then.get(name)), Tensor)
            for thing in self._things
            if type(thing) in (_Namespace, _Dict)
            for name, value in thing.read().items()
        )

    def now(self) -> list[Any]:
        """Return what is held now, for :meth:`write`."""
        return [thing.read() for thing in self._things]

    def write_then(self, now: list[Any]) -> None:
        """Hold what was held then, where that is something else than ``now``."""
        for thing, value in zip(self._things, now, strict=True):
            if value is not thing.then:
                thing.write(thing.then)

    def write(self, values: list[Any]) -> None:
        """Hold these again."""
        for thing, value in zip(reversed(self._things), reversed(values), strict=True):
            thing.write(value)


def is_open(value: Any, depth: int) -> bool | None:
    """Return whether :class:`PythonState` notes the namespace of an object, and nothing else; ``None`` if not sure.

    Args:
        value: no atom, list, tuple or mapping.
        depth: how many containers deeper is looked.
    """
    kind = type(value)
    if isinstance(value, (*_CLOSED, list, deque, dict, set, tuple)) or _is_array(value) or _state_of(value) is not None:
        return False if isinstance(value, type) else None
    if depth == 0 or (kind.__module__.startswith(_FOREIGN) and not isinstance(value, torch.optim.Optimizer)):
        return False
    if value.__class__ is not kind or type(getattr(value, "__dict__", None)) is not dict:
        return None
    return None if any(_slots_of(base) for base in kind.__mro__) else True


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def same_items(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    """Whether two mappings hold the same objects in the same order."""
    return len(a) == len(b) and (not a or (all(map(is_, a.values(), b.values())) and list(a) == list(b)))


class _Namespace:
    """Names and their values.

    Args:
        names: and their values.
        whole: a copy of all of them; ``None`` if some have a history, which is not to be kept.
        skip: names that do not count.
    """

    __slots__ = ("_names", "_skip", "_whole", "then")

    def __init__(self, names: dict[str, Any], whole: dict[str, Any] | None, skip: frozenset[str]) -> None:
        self._names = names
        self._skip = skip
        self._whole = whole
        self.then = whole if whole is not None else {name: _past(value) for name, value in self._counting().items()}

    def _counts(self, name: str, value: Any) -> bool:
        return name not in self._skip and not (name == "forward" and is_stand_in(value))

    def _counting(self) -> dict[str, Any]:
        return {name: value for name, value in self._names.copy().items() if self._counts(name, value)}

    def read(self) -> dict[str, Any]:
        if self._whole is not None and same_items(self._names, self._whole):
            return self._whole
        return self._counting()

    def write(self, values: dict[str, Any]) -> None:
        names = self._names
        if values is self._whole:
            if same_items(names, values):
                return
            values = {name: value for name, value in values.items() if self._counts(name, value)}
        for name, value in values.items():
            value = _present(value)
            if names.get(name, _MISSING) is not value:
                names[name] = value
        if not names.keys() <= values.keys():
            for name in [name for name in self._counting() if name not in values]:
                del names[name]


class _Slots:
    """The slots of an object."""

    __slots__ = ("_names", "_owner", "then")

    def __init__(self, owner: Any, names: list[str]) -> None:
        self._owner = owner
        self._names = names
        self.then = [_past(value) for value in self.read()]

    def read(self) -> list[Any]:
        return [getattr(self._owner, name, _MISSING) for name in self._names]

    def write(self, values: list[Any]) -> None:
        for name, value in zip(self._names, map(_present, values), strict=True):
            if getattr(self._owner, name, _MISSING) is not value:
                if value is _MISSING:
                    object.__delattr__(self._owner, name)
                else:
                    object.__setattr__(self._owner, name, value)


class _Cell:
    """A variable of a closure that the region only reads: a loop may have given it another value since."""

    __slots__ = ("_cell", "then")

    def __init__(self, cell: types.CellType, value: Any) -> None:
        self._cell = cell
        self.then = _past(value)

    @property
    def is_read_only(self) -> bool:
        """Whether it still has the value that it had."""
        return self.read() is _present(self.then)

    def read(self) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:  # deleted
            return _MISSING

    def write(self, value: Any) -> None:
        value = _present(value)
        if value is _MISSING:
            del self._cell.cell_contents
        elif self.read() is not value:
            self._cell.cell_contents = value


class _List:
    """The items of a list or deque."""

    __slots__ = ("_items", "then")

    def __init__(self, items: Any, then: Any = None) -> None:
        self._items = items
        self.then = [_past(item) for item in (items if then is None else then)]

    def read(self) -> list[Any]:
        return list(self._items)

    def write(self, values: list[Any]) -> None:
        items, present = self._items, [_present(value) for value in values]
        if len(items) != len(present) or any(a is not b for a, b in zip(items, present, strict=True)):
            items.clear()
            items.extend(present)


class _LongList:
    """The length of a long list, to which things may be added."""

    __slots__ = ("_items", "then")

    def __init__(self, items: list[Any]) -> None:
        self._items = items
        self.then: tuple[int, list[Any]] = (len(items), [])

    def read(self) -> tuple[int, list[Any]]:
        return len(self._items), self._items[self.then[0] :]

    def write(self, value: tuple[int, list[Any]]) -> None:
        _, added = value
        self._items[self.then[0] :] = added


class _Dict:
    """The items of a mapping."""

    __slots__ = ("_mapping", "then")

    def __init__(self, mapping: dict[Any, Any], then: dict[Any, Any] | None = None) -> None:
        self._mapping = mapping
        self.then = {key: _past(value) for key, value in (mapping if then is None else then).items()}

    def read(self) -> dict[Any, Any]:
        return dict(self._mapping)

    def write(self, values: dict[Any, Any]) -> None:
        mapping, present = self._mapping, {key: _present(value) for key, value in values.items()}
        if list(map(id, mapping)) == list(map(id, present)) and all(mapping[key] is present[key] for key in present):
            return
        mapping.clear()
        for key, value in present.items():
            mapping[key] = value


class _Set:
    """The members of a set."""

    __slots__ = ("_members", "then")

    def __init__(self, members: set[Any]) -> None:
        self._members = members
        self.then = set(members)

    def read(self) -> set[Any]:
        return set(self._members)

    def write(self, values: set[Any]) -> None:
        if self._members != values:
            self._members.clear()
            self._members.update(values)


class _Array:
    """The elements of an array of NumPy."""

    __slots__ = ("_array", "then")

    def __init__(self, array: Any) -> None:
        self._array = array
        self.then = array.copy()

    def read(self) -> Any:
        same = self._array.shape == self.then.shape and self._array.tobytes() == self.then.tobytes()
        return self.then if same else self._array.copy()

    def write(self, values: Any) -> None:
        if self._array.flags.writeable and self._array.shape == values.shape:
            self._array[...] = values


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray


class _Generator:
    """The state of a generator of random numbers."""

    __slots__ = ("_generator", "then")

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self.then = self.read()

    def read(self) -> Any:
        state = _state_of(self._generator)
        return state[0]() if state is not None else None

    def write(self, value: Any) -> None:
        state = _state_of(self._generator)
        if state is not None:
            state[1](value)


def _state_of(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """Return how the state of a generator of torch, Python or NumPy is read and written; ``None`` for other things."""
    if isinstance(generator, torch.Generator):
        return generator.get_state, generator.set_state
    if isinstance(generator, random.Random):
        return generator.getstate, generator.setstate
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(generator, numpy.random.Generator):
            bits = generator.bit_generator
            return lambda: bits.state, lambda state: setattr(bits, "state", state)
        if isinstance(generator, numpy.random.RandomState):
            return generator.get_state, generator.set_state
    return None
