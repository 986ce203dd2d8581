"""The modules that a function runs, and the state of theirs that a rebuild must neither change nor miss."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from recollect.frames._describe import describe
from recollect.frames._errors import InPlaceError

__all__ = ["ModuleState", "find_modules", "version_of"]

# A buffer this large is a table, not a statistic: it is not copied on the chance that the region changes it.
_LARGE = 1 << 20

# A list this long holds data, not modules: it is not searched for them.
_MANY = 256


def version_of(tensor: Tensor) -> int:
    """Return the in-place version of a tensor; inference tensors have none, and count as unchanged."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def find_modules(function: Callable[..., Any], args: tuple[Any, ...] = ()) -> list[nn.Module]:
    """Return the modules that calling ``function(*args)`` can reach, as far as Python lets one see.

    Looks at the function itself, bound methods, partials, closures, the globals that its code names, the attributes of
    plain objects among them, and the arguments that are modules. Every module is listed once, with its submodules.
    """
    found: dict[int, nn.Module] = {}
    # A list of what is to be seen and not a recursive closure, which would keep what it found until the garbage
    # collector comes.
    waiting: list[tuple[Any, int]] = [(argument, 1) for argument in args if isinstance(argument, nn.Module)]
    waiting.append((function, 4))
    seen: dict[int, Any] = {}  # held, so that no other object takes its place
    while waiting:
        thing, depth = waiting.pop()
        if isinstance(thing, nn.Module):
            if id(thing) not in found:
                found.update((id(module), module) for module in thing.modules())
        elif depth > 0 and id(thing) not in seen and not isinstance(thing, _PLAIN):
            seen[id(thing)] = thing
            waiting.extend(_reachable(thing, depth))
    return list(found.values())


# What holds no modules.
_PLAIN = (type(None), Tensor, str, int, float)


def _reachable(thing: Any, depth: int) -> Iterator[tuple[Any, int]]:
    """Yield what one sees from an object that is no module, with how many steps may still follow."""
    yield getattr(thing, "__self__", None), depth  # of bound methods, and of adapters that name it so
    yield getattr(thing, "owner", None), depth
    if isinstance(thing, types.MethodType):
        yield thing.__func__, depth
    elif isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            with suppress(ValueError):  # a variable that is not bound yet
                yield cell.cell_contents, depth - 1
        for name in thing.__code__.co_names:
            yield thing.__globals__.get(name), depth - 1
        for default in thing.__defaults__ or ():
            yield default, depth - 1
    elif isinstance(thing, functools.partial):
        for part in (thing.func, *thing.args, *thing.keywords.values()):
            yield part, depth - 1
    elif isinstance(thing, (list, tuple, dict)):
        if len(thing) <= _MANY:
            for item in thing.values() if isinstance(thing, dict) else thing:
                yield item, depth - 1
    elif not isinstance(thing, (type, types.BuiltinFunctionType, types.ModuleType)) and hasattr(thing, "__dict__"):
        for item in list(vars(thing).values()):
            yield item, depth - 1


class ModuleState:
    """What the modules of a region were like when its forward ran.

    A rebuild runs with the training flags and the parameters of the forward, and on copies of the buffers that the
    forward updates, so that running statistics change once a step. Build it before the region runs and call
    :meth:`settle` after it.
    """

    __slots__ = ("_buffers", "_constant", "_flags", "_parameters", "_updated", "_versions")

    def __init__(self, modules: list[nn.Module]) -> None:
        self._flags = [(module, module.training) for module in modules]
        self._parameters: list[tuple[dict[str, Any], str, Tensor]] = []
        self._versions: list[int] = []
        self._constant: list[tuple[dict[str, Any], str, Tensor, int]] = []  # buffers that the region did not change
        # (registry, name, the copy that a rebuild starts from; None: the present value serves)
        self._updated: list[tuple[dict[str, Any], str, Tensor | None]] = []
        self._buffers: list[tuple[dict[str, Any], str, Tensor, int, Tensor | None]] | None = []
        for module in modules:
            registry: dict[str, Any] = module._parameters
            for name, parameter in registry.items():
                if parameter is not None:
                    self._parameters.append((registry, name, parameter))
            registry = module._buffers
            if not registry or type(registry) is not dict:
                continue
            # The kernels of normalisation layers do not count their updates as versions, and their outputs in
            # training do not depend on the running statistics.
            statistics = isinstance(module, _NormBase)
            for name, buffer in registry.items():
                if buffer is None:
                    continue
                if statistics and module.training:
                    self._updated.append((registry, name, None))
                else:
                    copy = buffer.detach().clone() if buffer.numel() <= _LARGE else None
                    self._buffers.append((registry, name, buffer, version_of(buffer), copy))

    def settle(self) -> None:
        """Keep copies only of the buffers that the region changed or replaced, and note the parameters' versions."""
        self._note_versions()
        for registry, name, buffer, version, copy in self._buffers or ():
            if registry.get(name) is not buffer or version_of(buffer) != version:
                self._updated.append((registry, name, copy))
            else:
                self._constant.append((registry, name, buffer, version))
        self._buffers = None

    def _note_versions(self) -> None:
        self._versions = [version_of(parameter) for _, _, parameter in self._parameters]

    def check(self, function: Callable[..., Any]) -> None:
        """Raise an :class:`InPlaceError` if a parameter, or a buffer that the region only reads, was changed since."""
        for (_, key, parameter), version in zip(self._parameters, self._versions, strict=False):
            if version_of(parameter) != version:
                now = version_of(parameter)
                raise InPlaceError(
                    f"{describe(function)}: parameter {key!r} of shape {list(parameter.shape)} was changed in place "
                    f"between the forward pass (version {version}) and backward (version {now}), most often by an "
                    "optimizer step; call backward before the step, or run the forward pass again"
                )

        for _, key, buffer, version in self._constant:
            if version_of(buffer) != version:
                raise InPlaceError(
                    f"{describe(function)}: buffer {key!r} of shape {list(buffer.shape)} was changed in place "
                    f"between the forward pass (version {version}) and backward (version {version_of(buffer)}); "
                    "change it after backward, or assign a new tensor instead"
                )

    @contextmanager
    def replayed(self, other: bool = False) -> Iterator[None]:
        """Give the modules the forward's flags, parameters and buffers for the body.

        Args:
            other: the body is another function than the forward's, and may update buffers that the forward only read.
        """
        flags = [(module, module.training) for module, training in self._flags if module.training != training]
        tensors: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for module, training in flags:
                module.training = not training
            for registry, name, parameter in self._parameters:
                if registry.get(name) is not parameter:
                    tensors.append((registry, name, registry.get(name)))
                    registry[name] = parameter
            for registry, name, buffer, _ in self._constant:
                aside = other and buffer.numel() <= _LARGE
                if aside or registry.get(name) is not buffer:
                    tensors.append((registry, name, registry.get(name)))
                    registry[name] = buffer.detach().clone() if aside else buffer
            for registry, name, copy in self._updated:
                now = registry.get(name)
                if now is not None:
                    tensors.append((registry, name, now))
                    registry[name] = (now if copy is None else copy).detach().clone()
            yield
        finally:
            for module, training in flags:
                module.training = training
            for registry, name, tensor in reversed(tensors):
                registry[name] = tensor
            self._note_versions()  # a region may renormalise its own parameters (Embedding's max_norm)
