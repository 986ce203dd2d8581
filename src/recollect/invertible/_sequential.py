"""Invertible modules one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from recollect._arguments import pack, unpack
from recollect.frames import frames_apply
from recollect.invertible._measured import Measured
from recollect.invertible._module import Module

__all__ = ["Sequential"]


class _Counts(tuple[int, ...]):
    """How many hidden outputs each layer of a Sequential has; the last output of its function."""

    __slots__ = ()


class Sequential(Module, nn.Sequential):
    """Invertible modules one after the other: a chain that keeps its last outputs only.

    Several outputs of a layer are the arguments of the next. With ``invertible`` (the default) every layer acts by its
    own flags and is rebuilt by itself, so that memory does not grow with their number; with ``invertible=False`` the
    whole is one checkpoint, and with ``checkpoint=False`` everything in it is kept.

    :meth:`function` returns the last layer's outputs, then what the layers hide, and last how many those are;
    :meth:`inverse` takes all of that, or the outputs alone where the layers can be inverted from them. A reversed
    Sequential has its layers reversed, in opposite order: its :meth:`inverse` is then the inverse of that.

    Args:
        *layers: invertible modules, or one ordered dict of them.
        anchor_every: given to every layer; ``None`` leaves the layers' own.
        drift_threshold: the same.

    Raises:
        TypeError: a layer that is not invertible; the message says which.

    Example:
        >>> import torch, recollect.invertible as inn
        >>> flow = inn.Sequential(inn.ActNorm(4), inn.Linear(4, 4))
        >>> x = torch.randn(8, 4)
        >>> y = flow(x)
        >>> torch.allclose(flow.inverse(y), x, atol=1e-5)
        True
    """

    def __init__(self, *layers: Any, anchor_every: int | None = None, drift_threshold: float | None = None) -> None:
        super().__init__(*layers, anchor_every=anchor_every)
        for layer in self._layers():
            for part in layer.modules():
                if isinstance(part, Measured):
                    part.anchor_every = anchor_every or part.anchor_every
                    part.drift_threshold = part.drift_threshold if drift_threshold is None else drift_threshold

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

    def forward(self, *args: Any, keep: Iterable[Tensor] = ()) -> Any:
        """Return the last layer's visible outputs; see :meth:`Module.forward`."""
        if not self.invertible or not frames_apply():
            return super().forward(*args, keep=keep)
        self._forget_drift()
        keep = tuple(keep)
        for layer in self._layers():
            args = pack(layer(*args, keep=keep))
        return unpack(args)

    def forward_and_log_det(self, *args: Any, keep: Iterable[Tensor] = ()) -> tuple[Any, Tensor]:
        """Return the outputs and the sum of the layers' log-determinants; see :meth:`Module.forward_and_log_det`."""
        if not self.invertible or not frames_apply():
            return super().forward_and_log_det(*args, keep=keep)
        keep = tuple(keep)
        total: Tensor | None = None
        for layer in self._layers():
            output, log_det = layer.forward_and_log_det(*args, keep=keep)
            args = pack(output)
            total = log_det if total is None else total + log_det
        return unpack(args), self._total(total, args)

    def function(self, *args: Any) -> Any:
        """Return (*outputs, *hidden, counts); see the class."""
        outputs, hidden, _ = self._compose(args)
        return (*outputs, *hidden)

    def function_and_log_det(self, *args: Any) -> tuple[Any, ...]:
        """Return what :meth:`function` does, and last the sum of the layers' log-determinants."""
        outputs, hidden, total = self._compose(args, log_det=True)
        return (*outputs, *hidden, self._total(total, outputs))

    def _compose(
        self, args: tuple[Any, ...], log_det: bool = False
    ) -> tuple[tuple[Any, ...], tuple[Any, ...], Tensor | None]:
        hidden: list[Any] = []
        counts: list[int] = []
        total: Tensor | None = None
        for layer in self._layers():
            outputs = pack((layer.call_function_and_log_det if log_det else layer.call_function)(*args))
            if log_det:
                outputs, one = outputs[:-1], outputs[-1]
                total = one if total is None else total + one
            args = pack(layer.process(outputs))
            rest = outputs[len(args) :]
            hidden.extend(rest)
            counts.append(len(rest))
        return args, (*hidden, _Counts(counts)), total

    @staticmethod
    def _total(total: Tensor | None, outputs: tuple[Any, ...]) -> Tensor:
        return outputs[0].new_zeros(outputs[0].shape[:1]) if total is None else total

    def inverse(self, *args: Any) -> Any:
        """Return the first layer's arguments, from the last's outputs and what the layers hid."""
        *outputs, hidden, counts = self._split(args)
        args = tuple(outputs)
        for layer, count in zip(reversed(tuple(self._layers())), reversed(counts), strict=True):
            own, hidden = hidden[len(hidden) - count :], hidden[: len(hidden) - count]
            args = pack(layer.process(layer.call_inverse(*args, *own), inverse=True))
        return unpack(args)

    def inverse_and_log_det(self, *args: Any) -> tuple[Any, ...]:
        """Return what :meth:`inverse` does, and last the log-determinant of its Jacobian."""
        inputs = pack(self.inverse(*args))
        return (*inputs, -self.function_and_log_det(*inputs)[-1])

    def _split(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return outputs, hidden ones, counts; without counts nothing is hidden."""
        if not args or not isinstance(args[-1], _Counts):
            return (*args, (), _Counts([0] * len(self._modules)))
        counts = args[-1]
        end = len(args) - 1 - sum(counts)
        return (*args[:end], args[end:-1], counts)

    def process(self, args: Any, inverse: bool = False) -> Any:
        """Cut off what the layers hide."""
        args = pack(args)
        if not inverse and isinstance(args[-1], _Counts):
            args = args[: len(args) - 1 - sum(args[-1])]
        return unpack(args)

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
