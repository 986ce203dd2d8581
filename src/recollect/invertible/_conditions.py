"""Conditions: arguments that a function and its inverse take alike, behind what is inverted."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from recollect._arguments import pack

__all__ = ["Carried", "Counts", "Passing", "Takes"]


@dataclass(frozen=True)
class Takes:
    """What a function takes, by its signature; one that has none takes everything.

    Attributes:
        least: how many positional arguments it needs.
        most: how many it takes at most; ``None``: any number.
        names: of the arguments that can be given by name, in their order, with their positions; keyword-only ones have
            ``None``.
        any_name: whether it takes keywords of any name.
    """

    least: int = 0
    most: int | None = None
    names: tuple[tuple[str, int | None], ...] = ()
    any_name: bool = True

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Takes:
        """Return what a function, or a module's ``forward``, takes."""
        function = getattr(function, "_orig_mod", function)  # what torch.compile wrapped
        if isinstance(function, nn.Module):
            function = function.forward
        plain, bound = getattr(function, "__func__", function), hasattr(function, "__func__")
        if torch.compiler.is_compiling():  # which knows no weak references
            return cls._by_signature(plain, int(bound))
        try:
            found = _TAKES.get(plain)
        except TypeError:  # of a type that cannot be referred to weakly
            return cls._by_signature(function, 0)
        if found is None:
            found = _TAKES[plain] = cls._by_signature(plain, int(bound))
        return found

    @classmethod
    def _by_signature(cls, function: Callable[..., Any], bound: int) -> Takes:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            return cls()
        kinds = [parameter.kind for parameter in parameters]
        if kinds[:1] != [inspect.Parameter.VAR_POSITIONAL]:
            parameters = parameters[bound:]
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names = [(p.name, i) for i, p in enumerate(positional) if p.kind is p.POSITIONAL_OR_KEYWORD]
        only = [(p.name, None) for p in parameters if p.kind is p.KEYWORD_ONLY]
        return cls(
            sum(p.default is p.empty for p in positional),
            None if inspect.Parameter.VAR_POSITIONAL in kinds else len(positional),
            (*names, *only),
            inspect.Parameter.VAR_KEYWORD in kinds,
        )

    def named(self, kwargs: Mapping[str, Any], given: int) -> dict[str, Any]:
        """Return the keyword arguments that it takes behind so many positional ones."""
        if self.any_name:
            return dict(kwargs)
        free = {name for name, position in self.names if position is None or position >= given}
        return {name: value for name, value in kwargs.items() if name in free}


_TAKES: weakref.WeakKeyDictionary[Callable[..., Any], Takes] = weakref.WeakKeyDictionary()


class Conditioned(Protocol):
    """A module, as far as its conditions are concerned."""

    def _conditions(
        self, function: Callable[..., Any], inverse: Callable[..., Any], outputs: tuple[Any, ...], given: int
    ) -> int:
        """Return how many of so many arguments of ``function`` are conditions."""


class Carried:
    """A function of a module that hands its conditions on behind its outputs, where its inverse finds them.

    Args:
        module: whose function it is; it knows how many of its arguments are conditions.
        function: takes inputs and conditions.
        inverse: takes the outputs and the conditions.
        log_det: whether the last output is a log-determinant, which the inverse does not get.
    """

    __slots__ = ("_function", "_inverse", "_log_det", "_module", "_number", "owner")

    def __init__(
        self, module: Conditioned, function: Callable[..., Any], inverse: Callable[..., Any], log_det: bool = False
    ) -> None:
        self.owner = module
        self._module = module
        self._function = function
        self._inverse = inverse
        self._log_det = log_det
        self._number = 0

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the outputs, the conditions, and the log-determinant where there is one."""
        outputs = pack(self._function(*args, **kwargs))
        outputs, last = (outputs[:-1], outputs[-1:]) if self._log_det else (outputs, ())
        self._number = self._module._conditions(self._function, self._inverse, outputs, len(args))
        conditions = args[len(args) - self._number :]
        return (*outputs, *(c if isinstance(c, Tensor) else _Held(c) for c in conditions), *last)

    def inverse(self, *values: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the inputs and the conditions."""
        values = tuple(value.value if isinstance(value, _Held) else value for value in values)
        return (*pack(self._inverse(*values, **kwargs)), *values[len(values) - self._number :])

    def without(self, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what was returned, less the conditions."""
        end = len(outputs) - int(self._log_det)
        return (*outputs[: end - self._number], *outputs[end:])


class _Held:
    """A condition that is no tensor, in a wrapper: no output of an invertible function may be a dict."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Counts(tuple[int, ...]):
    """How many hidden outputs each layer of a Sequential has; the last output of its function.

    Attributes:
        left: how many of its arguments were further ones.
        taken: positions of the arguments that a layer took as further ones.
        named: names of the keyword arguments that a layer took.
    """

    left: int
    taken: frozenset[int]
    named: frozenset[str]


class Passing:
    """What is on its way through layers: the stream, which they change, and further arguments, which they share.

    A layer gets the stream, and of what follows as much as it takes. Of the caller's own arguments those that the first
    layers do not take in are further ones; outputs of a layer never are.

    Args:
        args: what the first layer gets.
        kwargs: further arguments by keyword.
        streams: how many of ``args`` are known to be the stream; ``None``: all that is not found to be further.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], streams: int | None = None) -> None:
        streams = len(args) if streams is None else streams
        self.stream = args[:streams]
        self.further = args[streams:]
        self.kwargs = kwargs
        self.taken: set[int] = set()  # ids of further arguments that a layer took
        self.named: set[str] = set()
        self._given = args

    def give(
        self,
        layer: Any,
        function: Callable[..., Any],
        inverse: Callable[..., Any],
        arity: int | None,
        hidden: tuple[Any, ...] = (),
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a layer gets.

        Args:
            layer: the layer.
            function: of its that is to run.
            inverse: the other one.
            arity: how much of the stream it changes; ``None``: as much as it takes.
            hidden: what stands between the stream and the further arguments.
        """
        if len(self.stream) < 2 and not self.further and not self.kwargs:
            return (*self.stream, *hidden), {}
        most = layer._takes_most(function)
        fits = len(self.stream) if arity is None or arity < 0 else min(arity, len(self.stream))
        fits = fits if most is None else min(fits, max(most - len(hidden), 0))
        rest = self.stream[fits:]
        if all(any(value is given for given in self._given) for value in rest):
            self.stream, self.further = self.stream[:fits], rest + self.further
        inputs = (*self.stream, *hidden)
        extra = self.further[: layer._takes_further(function, inverse, len(inputs))]
        kwargs = layer._named(function, self.kwargs, len(inputs) + len(extra))
        if not layer._hands_on:  # a Sequential knows what its layers take
            self.taken.update(map(id, extra))
            self.named.update(kwargs)
        return (*inputs, *extra), kwargs

    def went(self, layer: Any, given: int, hidden: int, outputs: tuple[Any, ...], conditions: int) -> None:
        """Take a layer's outputs.

        Args:
            layer: the layer.
            given: how many arguments it got.
            hidden: how many of them were neither stream nor further.
            outputs: the layer's.
            conditions: how many of its last arguments it did not change.
        """
        kept = conditions - (given - hidden - len(self.stream))  # of the stream
        if kept > 0:
            values = self.stream[len(self.stream) - kept :]
            if not layer._hands_on:
                self.taken.update(map(id, values))
            self.further = values + self.further
        self.stream = outputs

    def counts(self, hidden: Iterable[int] = ()) -> Counts:
        """Return what a Sequential around the layers must know; it holds no tensor."""
        counts = Counts(hidden)
        counts.left, counts.named = len(self.further), frozenset(self.named)
        counts.taken = frozenset(i for i, value in enumerate(self._given) if id(value) in self.taken)
        return counts

    def merge(self, inner: Counts, given: tuple[Any, ...]) -> None:
        """Take note of what the layers of a Sequential in this one took of what it was given."""
        self.taken.update(id(given[i]) for i in inner.taken)
        self.named |= inner.named

    def check(self, owner: str) -> None:
        """Raise a TypeError if there is an argument that no layer took."""
        lost = [i for i, value in enumerate(self._given) if any(value is f for f in self.further)]
        lost = [i for i in lost if id(self._given[i]) not in self.taken]
        names = [name for name in self.kwargs if name not in self.named]
        if lost or names:
            found = ", ".join([*(f"argument {i}" for i in lost), *(f"keyword {name!r}" for name in names)])
            raise TypeError(
                f"{owner}: none of its layers takes {found}; layers take what the signature of their function, or of "
                "their blocks' forward, has beyond their input"
            )
