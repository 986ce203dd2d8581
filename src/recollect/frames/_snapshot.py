"""What trees of modules hold at one moment, noted in one go: all values in their dictionaries and behind these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import is_, itemgetter, methodcaller
from typing import Any, NamedTuple

from torch import Tensor, nn

from recollect._torch import STANDARD_ATTRIBUTES
from recollect.frames._state import PythonState

__all__ = ["HOOKS", "Opening", "Registered", "Roster", "Snapshot"]

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

_parameters_of, _buffers_of, _modules_of, _training_of = map(
    itemgetter, ("_parameters", "_buffers", "_modules", "training")
)
_values_of = methodcaller("values")


class Opening(NamedTuple):
    """Which of a snapshot's values are looked into, by position: mappings, objects, lists and tuples."""

    mappings: tuple[int, ...]
    objects: tuple[int, ...]
    sequences: tuple[int, ...]


class _Level:
    """Containers that were opened together, and what they held.

    Args:
        values: among which they are.
        opening: where.
    """

    __slots__ = ("_mappings", "_sequences", "keys", "sizes", "values")

    def __init__(self, values: list[Any], opening: Opening) -> None:
        of = values.__getitem__
        self._mappings: list[Any] = [*map(of, opening.mappings), *map(vars, map(of, opening.objects))]
        self._sequences: list[Any] = [*map(of, opening.sequences)]
        self.sizes, self.keys, self.values = self.sizes_now(), self.keys_now(), self.values_now()

    def values_now(self) -> list[Any]:
        values = [*chain.from_iterable(map(_values_of, self._mappings))]
        values.extend(chain.from_iterable(self._sequences))
        return values

    def sizes_now(self) -> list[int]:
        return [*map(len, self._mappings), *map(len, self._sequences)]

    def keys_now(self) -> list[Any]:
        return [*chain.from_iterable(self._mappings)]

    def held(self) -> Iterator[tuple[Any, Any]]:
        """Yield the containers with what they held: a mapping for mappings, a list for others."""
        at, keyed = 0, len(self._mappings)
        for i, (container, size) in enumerate(zip((*self._mappings, *self._sequences), self.sizes, strict=True)):
            values = self.values[at : at + size]
            yield container, dict(zip(self.keys[at : at + size], values, strict=True)) if i < keyed else values
            at += size


class Snapshot:
    """What the dictionaries of trees of modules hold at one moment, and the containers behind them.

    Args:
        parts: the modules.
        hooks: where among the values the hooks of the forward pass are.
        known: training flags of all parts with which nothing is to be learned from a call.
        is_own: whether nothing runs but modules of torch's own.
        is_still: whether a call draws no random numbers, if so.

    Attributes:
        values: all of them; those of containers behind the dictionaries come after these.
        parameters: of the modules, each as often as it is registered.
        buffered: the modules that have buffers.
        tensors: in attributes, and in containers behind them, with the module.
        foreign: the modules that are not of torch's types.
    """

    __slots__ = (
        "_dicts", "_flags", "_hooks", "_known", "_levels", "_names", "_number", "_sizes", "buffered", "foreign",
        "is_own", "is_still", "keys", "parameters", "parts", "tensors", "values",
    )  # fmt: skip

    def __init__(
        self,
        parts: list[nn.Module],
        hooks: Sequence[int],
        known: set[tuple[bool, ...]],
        is_own: bool,
        is_still: bool,
    ) -> None:
        self._hooks = hooks
        self._known = known
        self.is_own = is_own
        self.is_still = is_still
        self.parts = parts
        names: Dicts = [*map(vars, parts)]
        self._names = names
        buffers = [*map(_buffers_of, names)]
        dicts = [*names, *map(_parameters_of, names), *buffers, *map(_modules_of, names)]
        self._dicts = dicts
        while True:
            sizes = [*map(len, dicts)]
            self.keys: list[str] = [*chain.from_iterable(dicts)]
            values: list[Any] = [*chain.from_iterable(map(dict.values, dicts))]
            if sum(sizes) == len(self.keys) == len(values):  # else another thread put something there meanwhile
                break
        self._sizes = sizes
        self.values = values
        self._number = len(values)  # of values in the dictionaries
        number = len(parts)
        start = sum(sizes[:number])
        registered = values[start : start + sum(sizes[number : 2 * number])]
        self.parameters: list[Tensor] = [p for p in registered if p is not None]
        self.buffered = [part for part, d in zip(parts, buffers, strict=True) if d] if any(buffers) else []
        self._flags: tuple[bool, ...] = tuple(map(_training_of, names))
        self._levels: list[_Level] = []
        self.tensors: list[tuple[nn.Module, Tensor]] = []
        self.foreign: list[nn.Module] = []

    def shape(self) -> tuple[list[int], list[str], list[type]]:
        """Return sizes, keys and types in the modules' dictionaries."""
        return self._sizes, self.keys, [*map(type, self.values)]

    def open(self, opening: Opening) -> tuple[list[int], list[Any], list[type]]:
        """Note what containers among the values hold; return sizes, keys and types there."""
        level = _Level(self.values, opening)
        self._levels.append(level)
        self.values = self.values + level.values
        return level.sizes, level.keys, [*map(type, level.values)]

    @property
    def is_known(self) -> bool:
        """Whether nothing is to be learned from a call."""
        return self.is_own and self._flags in self._known

    def learn(self) -> None:
        """Note that a call has taught nothing."""
        self._known.add(self._flags)

    def holds(self) -> bool:
        """Whether all is as it was."""
        # Where all values are the same objects, the registries and the containers are the same.
        dicts, values = self._dicts, self.values
        now = [*chain.from_iterable(map(dict.values, dicts))]
        for level in self._levels:
            now.extend(level.values_now())
        return (
            len(now) == len(values)
            and all(map(is_, now, values))
            and not any(map(values.__getitem__, self._hooks))
            and [*map(len, dicts)] == self._sizes
            and [*chain.from_iterable(dicts)] == self.keys
            and all(level.sizes_now() == level.sizes and level.keys_now() == level.keys for level in self._levels)
        )

    def has_new_tensors(self) -> bool:
        """Whether an attribute, an entry of a mapping or a buffer is a tensor that was none."""
        if self.holds():
            return False
        number = len(self.parts)
        mappings = [pair for i, pair in enumerate(zip(self._dicts, self._held(), strict=True)) if i // number != 1]
        for level in self._levels:
            mappings.extend(pair for pair in level.held() if isinstance(pair[1], dict))
        return any(
            isinstance(value, Tensor) and not isinstance(then.get(name), Tensor)
            for mapping, then in mappings
            for name, value in mapping.items()
        )

    def _held(self) -> Dicts:
        """Return the dictionaries as they were."""
        at, held = 0, []
        for size in self._sizes:
            held.append(dict(zip(self.keys[at : at + size], self.values[at : at + size], strict=True)))
            at += size
        return held

    def spread(self, state: PythonState) -> tuple[list[Registered], list[tuple[Any, Any]], list[Roster]]:
        """Return the parameters with where they are registered, the other registries with what they held, and rosters.

        Args:
            state: is given the attributes, and the containers behind them.
        """
        number = len(self._names)
        held = self._held()
        wholes, registered, buffers, children = (held[i : i + number] for i in range(0, 4 * number, number))
        parameters: list[Registered] = []
        registries: list[tuple[Any, Any]] = []
        rosters: list[Roster] = []
        for i, whole in enumerate(wholes):
            state.add_noted(self._names[i], whole, STANDARD_ATTRIBUTES)
            registry = whole["_parameters"]
            parameters.extend([(registry, name, p) for name, p in registered[i].items() if p is not None])
            rosters.append((registry, {name: p is None for name, p in registered[i].items()}))
            registries.append((whole["_buffers"], buffers[i]))
            registries.append((whole["_modules"], children[i]))
            registries.extend([(whole[kind], {}) for kind in HOOKS])
        for level in self._levels:
            for container, then in level.held():
                state.add_held(container, then)
        return parameters, registries, rosters
