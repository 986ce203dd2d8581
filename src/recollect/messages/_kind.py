"""What blocks have in common that were made in the same way, and whether one has changed."""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Look", "kind_of", "look_of", "module_of", "settings_of"]

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.layout, torch.Size,
)  # fmt: skip
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_UNSEEN = _INTERNAL | {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DEEP = 12  # objects within objects; what is further inside counts by identity
_SHALLOW = 3
_MANY = 1024  # a container with more entries holds data, and counts by identity
_LIBRARIES = frozenset(["numpy", "torch", "torch_geometric"])  # whose objects are replaced, and not changed
_HEAP = 1 << 9  # of types that Python code makes


class _Identity:
    """An object of which nothing is known: equal to itself alone, and to no other once it is gone.

    (Another one may have the same address then.)
    """

    __slots__ = ("_address", "_get")

    def __init__(self, value: Any) -> None:
        self._address = id(value)
        try:
            self._get: Callable[[], Any] = weakref.ref(value)
        except TypeError:  # such as a long list: it stays
            self._get = lambda: value

    def __hash__(self) -> int:
        return self._address

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Identity):
            return NotImplemented
        value = self._get()
        return self is other or (value is not None and value is other._get())

    def __reduce__(self) -> tuple[Any, ...]:
        return _Identity, (object(),)  # in a copy, of nothing


def module_of(block: Any) -> nn.Module:
    """Return the module that a block runs."""
    module: nn.Module = block if isinstance(block, nn.Module) else getattr(block, "module", block)
    return module


def kind_of(block: Any) -> tuple[Any, ...]:
    """Return what blocks have in common that were made in the same way.

    These are the types of their modules, modes, hooks, shapes of tensors, and all attributes with what these hold.
    Values of parameters and buffers do not count. Objects of which nothing is known count by identity: such blocks are
    of another kind each.
    """
    modules = dict(sorted(module_of(block).named_modules()))
    names = {id(each): name for name, each in modules.items()}
    return tuple(_settings(vars(each), type(each), names, 0) for each in modules.values())


def settings_of(module: nn.Module) -> str:
    """Return the plain settings of all parts of a module, which are the same in another process.

    Whole numbers do not count: they may be counters, which a step moves.
    """
    kinds = (bool, float, str, type(None))
    found = [
        (name, type(each).__qualname__, key, value)
        for name, each in module.named_modules()
        for key, value in sorted(vars(each).items())
        if key not in _UNSEEN and type(value) in kinds
    ]
    return repr(found)


class Look:
    """What modules held when they were looked at: equal to another look if that found the same objects and values.

    Objects are not kept alive, but for those that cannot be referred to weakly, such as lists.
    """

    __slots__ = ("_found",)

    def __init__(self, found: Iterable[Any]) -> None:
        self._found = [*map(_weakly, found)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Look):
            return NotImplemented
        return len(self._found) == len(other._found) and all(map(_is_same, self._found, other._found))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Look, ((),)  # a copy's objects are others


def look_of(modules: Iterable[nn.Module]) -> Look:
    """Return what is another look when a module, a hook or an attribute is replaced; in much less time.

    Modes do not count.
    """
    found: list[Any] = []
    for module in modules:
        for each in module.modules():
            names = vars(each)
            found.append(type(each))
            for hooks in _HOOKS:
                if names[hooks]:
                    found.extend(names[hooks].values())
            for name, value in names.items():
                if name not in _UNSEEN:
                    _look_at(value, found, 0)
            found.extend(names["_modules"].values())
    return Look(found)


def _weakly(value: Any) -> Any:
    """Return a value that is plain, or cannot be referred to weakly; else a reference, the same while both live."""
    if type(value) in _PLAIN:
        return value
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _is_same(then: Any, now: Any) -> bool:
    return then is now or (type(then) in _PLAIN and type(then) is type(now) and bool(then == now))


def _look_at(value: Any, found: list[Any], depth: int) -> None:
    """Note what changes when a container or an object is replaced, or something that it holds."""
    kind = type(value)
    found.append(value)
    if kind in _PLAIN or depth > _SHALLOW:
        return
    within: Iterable[Any] = ()
    if kind in (list, tuple, set) and len(value) <= _MANY:
        within = value
    elif kind is dict and len(value) <= _MANY:
        within = itertools.chain.from_iterable(value.items())
    elif kind.__module__.partition(".")[0] not in _LIBRARIES and _is_open(kind):
        try:
            within = vars(value).values()
        except Exception:  # a proxy of something that is gone
            return
    before = len(found)
    for each in within:
        _look_at(each, found, depth + 1)
    found.append(len(found) - before)


def _is_open(kind: type) -> bool:
    """Whether all that an object of a type holds is in its ``__dict__``."""
    return all(
        base is object or (base.__module__ != "builtins" and "__slots__" not in vars(base) and base.__flags__ & _HEAP)
        for base in kind.__mro__
    )


def _settings(names: Mapping[str, Any], kind: type, known: dict[int, str], depth: int) -> Hashable:
    """Return what an object with attributes is; of a module, without those of its modules."""
    own = issubclass(kind, nn.Module)
    found: list[Hashable] = [kind]
    for name, value in sorted(names.items()):  # copies have them in another order
        if not own or name not in _INTERNAL:
            found.append((name, _of(value, known, depth + 1)))
        elif name in _HOOKS:
            found.extend(_of(hook, known, depth + 1) for hook in value.values())
        elif name in ("_parameters", "_buffers"):
            found.extend((each, _of(tensor, known, depth + 1)) for each, tensor in value.items())
        elif name == "_modules":
            found.extend((each, type(part)) for each, part in sorted(value.items()))
    return tuple(found)


def _of(value: Any, known: dict[int, str], depth: int) -> Hashable:
    """Return a value, or what stands for it.

    Args:
        value: any.
        known: what stands for the objects that are being looked at, by their identities.
        depth: how many objects it is within.
    """
    kind = type(value)
    if kind in _PLAIN or issubclass(kind, type):
        return (kind, value) if kind in (bool, int, float, complex) else value
    if id(value) in known:
        return known[id(value)]
    if depth > _DEEP:
        return _Identity(value)
    known[id(value)] = f"again: {len(known)}"
    try:
        return _inside(value, known, depth + 1)
    except Exception:  # an attribute that raises, a proxy of something that is gone
        return _Identity(value)


def _inside(value: Any, known: dict[int, str], depth: int) -> Hashable:
    kind = type(value)
    if isinstance(value, Tensor):
        return (kind, tuple(value.shape), value.dtype, value.requires_grad)
    if kind.__module__ == "typing":
        return value if hash(value) else _Identity(value)
    if isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        held += [value.__defaults__, value.__kwdefaults__]
        return (value.__code__, *(_of(each, known, depth) for each in (*held, vars(value))))
    if isinstance(value, types.MethodType):
        return (kind, *(_of(each, known, depth) for each in (value.__func__, value.__self__)))
    if kind is functools.partial:
        return (kind, *(_of(each, known, depth) for each in (value.func, value.args, value.keywords)))
    if kind in (dict, OrderedDict) and len(value) <= _MANY:
        return (kind, *((_of(key, known, depth), _of(each, known, depth)) for key, each in value.items()))
    named = issubclass(kind, tuple) and "__slots__" in vars(kind)  # one whose items have names holds nothing else
    if (named or kind in (list, tuple, deque)) and len(value) <= _MANY:
        return (kind, *(_of(each, known, depth) for each in value))
    if kind in (set, frozenset) and len(value) <= _MANY:
        return (kind, frozenset(_of(each, known, depth) for each in value))
    if isinstance(value, nn.Module):  # in a list, or in another object
        parts = dict(sorted(value.named_modules()))
        return (kind, *(_settings(vars(each), type(each), known, depth) for each in parts.values()))
    return _settings(vars(value), kind, known, depth) if _is_open(kind) else _Identity(value)
