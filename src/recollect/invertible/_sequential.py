"""Invertible modules one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from recollect._arguments import Certify, pack, unpack
from recollect.frames import frames_apply
from recollect.invertible._conditions import Counts, Passing
from recollect.invertible._measured import Measured
from recollect.invertible._module import Module

__all__ = ["Sequential"]


class Sequential(Module, nn.Sequential):
    """Invertible modules one after the other: a chain that keeps its last outputs only.

    Several outputs of a layer are the arguments of the next. Further arguments (conditions: a class, a time, features),
    positional and keyword, go to every layer that takes them: ``flow(x, c)`` and ``flow.inverse(y, c)`` call each layer
    as ``layer(x, c)`` where the signature of its function, or of a coupling's blocks, has room for ``c`` behind its
    input (see :attr:`Module.num_conditions`), and as ``layer(x)`` elsewhere.

    With ``invertible`` (the default) every layer acts by its own flags and is rebuilt by itself, so that memory does
    not grow with their number; with ``invertible=False`` the whole is one checkpoint, and with ``checkpoint=False``
    everything in it is kept.

    :meth:`function` returns the last layer's outputs, then what the layers hide, and last how many those are;
    :meth:`inverse` takes all of that, or the outputs alone where the layers can be inverted from them. A reversed
    Sequential has its layers reversed, in opposite order: its :meth:`inverse` is then the inverse of that.

    Args:
        *layers: invertible modules, or one ordered dict of them.
        anchor_every: given to every layer; ``None`` leaves the layers' own.
        drift_threshold: the same.
        certify: the same.

    Raises:
        TypeError: a layer that is not invertible; the message says which. A further argument that no layer takes.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> flow = inn.Sequential(inn.ActNorm(4), inn.Linear(4, 4))
        >>> x = torch.randn(8, 4)
        >>> y = flow(x)
        >>> torch.allclose(flow.inverse(y), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        *layers: Any,
        anchor_every: int | None = None,
        drift_threshold: float | None = None,
        certify: Certify | None = None,
    ) -> None:
        super().__init__(*layers, anchor_every=anchor_every, certify=True if certify is None else certify)
        for layer in self._layers():
            for part in layer.modules():
                if isinstance(part, Measured):
                    part.anchor_every = anchor_every or part.anchor_every
                    part.drift_threshold = part.drift_threshold if drift_threshold is None else drift_threshold
                    part.certify = part.certify if certify is None else certify

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a layer; see :class:`torch.nn.Module`."""
        self._check(name, module)
        super().add_module(name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) or name in self.__dict__.get("_modules", ()):
            self._check(name, value)
        super().__setattr__(name, value)

    def insert(self, index: int, module: nn.Module) -> Sequential:
        """Insert a layer before the one at ``index``; see :class:`torch.nn.Sequential`."""
        self._check(str(index), module)
        layers = list(self._layers())
        if not -len(layers) <= index <= len(layers):
            raise IndexError(f"index {index} is out of range for {len(layers)} layers")
        layers.insert(index, module)
        if self.reversed:  # names count from the end
            layers.reverse()
        self._modules.clear()
        for i, layer in enumerate(layers):
            self._modules[str(i)] = layer
        if self.reversed:
            self._turn()
        return self

    def __add__(self, other: nn.Sequential) -> Sequential:
        """Return the layers of both, which must be invertible, one after the other."""
        return Sequential(*super().__add__(other))

    def __mul__(self, times: int) -> Sequential:
        """Return the layers so many times one after the other; they share their parameters."""
        return Sequential(*super().__mul__(times))

    @staticmethod
    def _check(name: str, module: Any) -> None:
        if not isinstance(module, Module):
            raise TypeError(
                f"layer {name} of an invertible Sequential is {module!r}, which has no inverse; use one of "
                "recollect.invertible, make it a block of a coupling, or put all into torch.nn.Sequential, in which "
                "neighbouring invertible modules still form chains"
            )

    def _layers(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def forward(self, *args: Any, keep: Iterable[Tensor] = (), _passing: list[Any] | None = None, **kwargs: Any) -> Any:
        """Return the last layer's visible outputs; see :meth:`Module.forward`.

        Args:
            *args: of the first layer, then further arguments.
            keep: input tensors that stay in memory.
            **kwargs: further arguments by keyword.
        """
        return self._forward(args, kwargs, keep, _passing, log_det=False)[0]

    def forward_and_log_det(
        self, *args: Any, keep: Iterable[Tensor] = (), _passing: list[Any] | None = None, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Return the outputs and the sum of the layers' log-determinants; see :meth:`Module.forward_and_log_det`.

        Args:
            *args: as in :meth:`forward`.
            keep: as in :meth:`forward`.
            **kwargs: as in :meth:`forward`.
        """
        output, total = self._forward(args, kwargs, keep, _passing, log_det=True)
        assert total is not None
        return output, total

    def _forward(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        keep: Iterable[Tensor],
        outer: list[Any] | None,
        log_det: bool,
    ) -> tuple[Any, Tensor | None]:
        """Return outputs and log-determinant, and to a Sequential around this one what is left of the arguments."""
        passing = Passing(args, kwargs, len(outer[0].stream) if outer else None)
        total: Tensor | None = None
        if not self.invertible or not frames_apply():
            streams = len(passing.stream) if outer else None
            function = functools.partial(self._outputs, (streams, outer is not None, log_det))
            outputs = self._run(function, self.inverse, args, kwargs, keep)
            if log_det:
                outputs, total = outputs[:-1], outputs[-1]
            output, counts = self.process(outputs), outputs[-1]
        else:
            self._forget_drift()
            keep = tuple(keep)
            for layer in self._layers():
                one = self._step(layer, passing, keep, log_det)
                total = one if total is None else total + one
            output = unpack(passing.stream)
            total = self._total(total, passing.stream) if log_det else None
            counts = passing.counts()
            if outer is None:
                passing.check(type(self).__name__)
        if outer is not None:
            outer.append(counts)
        return output, total

    @staticmethod
    def _step(layer: Any, passing: Passing, keep: tuple[Tensor, ...], log_det: bool) -> Any:
        """Run one layer in frames of its own, and return its log-determinant, if that is asked for."""
        args, kwargs = passing.give(layer, layer.call_function, layer.call_inverse, layer.num_inputs)
        inner: list[Any] = [passing]
        if isinstance(layer, Sequential):
            kwargs["_passing"] = inner  # of a Sequential around it
        run = layer.forward_and_log_det if log_det else layer
        output, one = run(*args, keep=keep, **kwargs) if log_det else (run(*args, keep=keep, **kwargs), None)
        outputs = pack(output)
        if isinstance(layer, Sequential):
            passing.merge(inner[1], args)
            conditions = inner[1].left
        elif layer.num_outputs is not None and layer.num_conditions is None:  # there may be hidden ones, uncounted
            conditions = len(args) - len(passing.stream)
        else:
            conditions = layer._conditions(layer.call_function, layer.call_inverse, outputs, len(args))
        passing.went(layer, len(args), 0, outputs, conditions)
        return one

    def function(self, *args: Any, **kwargs: Any) -> Any:
        """Return (*outputs, *hidden, counts); see the class."""
        return self._outputs((None, False, False), *args, **kwargs)

    def function_and_log_det(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return what :meth:`function` does, and last the sum of the layers' log-determinants."""
        return self._outputs((None, False, True), *args, **kwargs)

    def _outputs(self, how: tuple[int | None, bool, bool], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return outputs, what layers hide, counts, and the log-determinant if it is asked for.

        Args:
            how: how many arguments are the stream, if that is known; whether this is inside of another Sequential;
                whether the log-determinant is asked for.
            *args: as in :meth:`forward`.
            **kwargs: as in :meth:`forward`.
        """
        streams, inner, log_det = how
        passing = Passing(args, kwargs, streams)
        hidden: list[Any] = []
        counts: list[int] = []
        total: Tensor | None = None
        for layer in self._layers():
            given, named = passing.give(layer, layer.call_function, layer.call_inverse, layer.num_inputs)
            if isinstance(layer, Sequential):
                outputs = layer._outputs((len(passing.stream), True, log_det), *given, **named)
            else:
                outputs = pack((layer.call_function_and_log_det if log_det else layer.call_function)(*given, **named))
            if log_det:
                outputs, one = outputs[:-1], outputs[-1]
                total = one if total is None else total + one
            shown = pack(layer.process(outputs))
            if isinstance(layer, Sequential):
                passing.merge(outputs[-1], given)
                conditions = outputs[-1].left
            elif layer.num_outputs is not None and layer.num_conditions is None:
                conditions = len(given) - len(passing.stream)
            else:
                conditions = layer._conditions(layer.call_function, layer.call_inverse, outputs, len(given))
            passing.went(layer, len(given), 0, shown, conditions)
            rest = outputs[len(shown) :]
            hidden.extend(rest)
            counts.append(len(rest))
        if not inner:
            passing.check(type(self).__name__)
        outputs = (*passing.stream, *hidden, passing.counts(counts))
        return (*outputs, self._total(total, passing.stream)) if log_det else outputs

    @staticmethod
    def _total(total: Tensor | None, outputs: tuple[Any, ...]) -> Tensor:
        return outputs[0].new_zeros(outputs[0].shape[:1]) if total is None else total

    def inverse(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first layer's arguments, from the last's outputs, what the layers hid, and further arguments."""
        passing = self._inputs(args, kwargs)
        passing.check(type(self).__name__)
        return unpack(passing.stream)

    def inverse_and_log_det(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return what :meth:`inverse` does, and last the log-determinant of its Jacobian."""
        passing = self._inputs(args, kwargs)
        passing.check(type(self).__name__)
        return (*passing.stream, -self.function_and_log_det(*passing.stream, *passing.further, **kwargs)[-1])

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], streams: int | None = None) -> Passing:
        """Return what is left of the arguments of :meth:`inverse`; without counts among them nothing is hidden."""
        where = [i for i, value in enumerate(args) if isinstance(value, Counts)]
        counts: tuple[int, ...] = args[where[-1]] if where else (0,) * len(self._modules)
        end = where[-1] - sum(counts) if where else None
        hidden, further = (args[end : where[-1]], args[where[-1] + 1 :]) if where else ((), ())
        passing = Passing((*args[:end], *further), kwargs, len(args[:end]) if where else streams)
        for layer, count in zip(reversed(tuple(self._layers())), reversed(counts), strict=True):
            own, hidden = hidden[len(hidden) - count :], hidden[: len(hidden) - count]
            given, named = passing.give(layer, layer.call_inverse, layer.call_function, layer.num_outputs, own)
            if isinstance(layer, Sequential):
                inner = layer._inputs(given, named, len(passing.stream))
                passing.merge(inner.counts(), given)
                inputs, conditions = inner.stream, len(inner.further)
            else:
                inputs = pack(layer.process(layer.call_inverse(*given, **named), inverse=True))
                conditions = layer._conditions(layer.call_inverse, layer.call_function, inputs, len(given))
                if own:  # which only its function makes
                    conditions = min(conditions, len(given) - len(own) - 1)
            passing.went(layer, len(given), len(own), inputs, conditions)
        return passing

    def process(self, args: Any, inverse: bool = False) -> Any:
        """Cut off what the layers hide."""
        args = pack(args)
        if not inverse and isinstance(args[-1], Counts):
            args = args[: len(args) - 1 - sum(args[-1])]
        return unpack(args)

    def _conditions(
        self, function: Callable[..., Any], inverse: Callable[..., Any], outputs: tuple[Any, ...], given: int
    ) -> int:
        counts = [value for value in outputs if isinstance(value, Counts)]
        return counts[-1].left if counts else 0

    _hands_on: ClassVar[bool] = True

    def _takes_most(self, function: Callable[..., Any]) -> int | None:
        return None

    def _takes_further(self, function: Callable[..., Any], inverse: Callable[..., Any], given: int) -> int | None:
        return None  # it hands on what its layers take

    def _named(self, function: Callable[..., Any], kwargs: Mapping[str, Any], given: int) -> dict[str, Any]:
        return {
            name: value
            for name, value in kwargs.items()
            if any(layer._named(layer.call_function, {name: value}, 1) for layer in self._layers())
        }

    # A reversed Sequential is the reversed layers in reverse order: its own function stays what it is.

    @property
    def call_function(self) -> Callable[..., Any]:
        """:meth:`function`: the layers know their direction."""
        return self.function

    @property
    def call_inverse(self) -> Callable[..., Any]:
        """:meth:`inverse`: the layers know their direction."""
        return self.inverse

    @property
    def call_function_and_log_det(self) -> Callable[..., Any]:
        """:meth:`function_and_log_det`: the layers know their direction."""
        return self.function_and_log_det

    @property
    def reversible(self) -> bool:
        """Whether all layers are."""
        return all(layer.reversible for layer in self._layers())

    def reverse(self, mode: bool | None = None) -> Sequential:
        """Reverse every layer, and their order; see :meth:`Module.reverse`."""
        before = self.reversed
        super().reverse(mode)
        if self.reversed != before:
            for layer in dict.fromkeys(self._layers()):  # one that stands in several places is turned once
                layer.reverse()
            self._turn()
        return self

    def _turn(self) -> None:
        """Put the layers into the opposite order; each keeps its name, and its parameters theirs in ``state_dict``."""
        for name in reversed(list(self._modules)):
            self._modules[name] = self._modules.pop(name)

    @property
    def last_drift(self) -> float | None:
        """The largest ``last_drift`` of the layers; NaN if one is."""
        return self.largest_drift(self._layers())
