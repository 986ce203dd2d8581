"""Settings of weightings: what may be assigned to them is said once, and checked at every assignment."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from recollect.aggregation._gramian import check_tensor
from recollect.aggregation._host import fetched

__all__ = [
    "FRACTION",
    "NOT_NEGATIVE",
    "POSITIVE",
    "UNIT",
    "Check",
    "Choice",
    "Configurable",
    "Number",
    "Vector",
    "generator",
    "weighting_of_any_kind",
    "weighting_of_gramians",
]

# Takes a setting's name and the value for it; returns the value that is kept, or raises.
Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Number:
    """A check for numbers; 0-D tensors count as such.

    Attributes:
        holds: whether a number is allowed.
        words: which are, in the form "must {words}".
        whole: whether they must be whole.
    """

    holds: Callable[[float], bool]
    words: str
    whole: bool = False

    def __call__(self, name: str, value: Any) -> Any:
        """Return the number, or raise a TypeError or a ValueError."""
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            raise TypeError(f"{name} must be a {'whole ' if self.whole else ''}number (got {value!r})")
        if not self.holds(float(value)):
            raise ValueError(f"{name} must {self.words} (got {value})")
        return value


NOT_NEGATIVE = Number(lambda x: 0 <= x < math.inf, "not be negative or infinite")
POSITIVE = Number(lambda x: 0 < x < math.inf, "be finite and positive")
UNIT = Number(lambda x: 0 <= x <= 1, "be from 0 to 1")
FRACTION = Number(lambda x: 0 <= x < 1, "be at least 0 and below 1")


@dataclass(frozen=True)
class Choice:
    """A check for one of some values."""

    allowed: Collection[str]

    def __call__(self, name: str, value: Any) -> Any:
        """Return the value, or raise a ValueError."""
        if value not in self.allowed:
            raise ValueError(f"{name} must be one of {', '.join(self.allowed)} (got {value!r})")
        return value


@dataclass(frozen=True)
class Vector:
    """A check for tensors ``[m]`` of finite numbers, one for each objective.

    Attributes:
        negative: whether there may be negative ones.
        optional: whether None is as good.
    """

    negative: bool = False
    optional: bool = True

    def __call__(self, name: str, value: Any) -> Tensor | None:
        """Return the tensor without history, in host memory, or raise a TypeError or a ValueError."""
        if value is None and self.optional:
            return None
        check_tensor(name, value)
        if value.ndim != 1 or not len(value):
            raise ValueError(f"{name} has one number for each objective, [m]; found {list(value.shape)}")
        kept: Tensor = value.detach().cpu()
        if not bool((kept.isfinite() & ((kept >= 0) | self.negative)).all()):
            also = "" if self.negative else " and not negative"
            raise ValueError(f"{name} must be finite{also}; found {kept.tolist()}")
        return kept


def generator(name: str, value: Any) -> Any:
    """Return a generator of random numbers or None, or raise a TypeError."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator or None (got {value!r})")
    return value


def weighting_of_any_kind(name: str, value: Any) -> Any:
    """Return something to call, or raise a TypeError."""
    if isinstance(value, type) or not callable(value):
        found = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"{name} must be an object that can be called, such as UPGradWeighting() (got {found})")
    return value


def weighting_of_gramians(name: str, value: Any) -> Any:
    """Return something to call with a Gramian alone, or raise a TypeError."""
    value = weighting_of_any_kind(name, value)
    if getattr(value, "takes_residuals", False):
        raise TypeError(f"{name} must weigh by the Gramian alone; {type(value).__name__} takes residuals too")
    return value


class Configurable(nn.Module):
    """A module whose settings are checked whenever they are assigned, in the constructor and later.

    A class names its settings, and the check of each, in its header: ``class Method(Weighting, settings={"rate":
    POSITIVE})``. It inherits those of its bases. Attributes of other names are free.
    """

    _settings: ClassVar[Mapping[str, Check]] = {}

    def __init_subclass__(cls, settings: Mapping[str, Check] | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        inherited = {k: v for base in reversed(cls.__mro__[1:]) for k, v in vars(base).get("_settings", {}).items()}
        cls._settings = {**inherited, **(settings or {})}

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Refuse what the method has no setting of this name for, and list those that it has."""
        _, *known = inspect.signature(cls.__init__).parameters.values() if settings else (None,)
        names = [parameter.name for parameter in known]
        wrong = [name for name in settings if name not in names]
        if wrong and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in known):
            raise TypeError(f"{cls.__name__} has no setting {wrong[0]!r}; those that it has: {', '.join(names)}")
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        check = self._settings.get(name)
        super().__setattr__(name, value if check is None else check(name, value))

    def extra_repr(self) -> str:
        """Show what the module was made with."""
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return ", ".join(f"{k}={v}" for k, v in settings.items() if k not in ("training", "last_residual"))

    def on_host(self, *values: Any) -> list[Any]:
        """Return values with all tensors in host memory, having waited once for each device that they are on.

        Buffers come along, also those of a wrapped weighting, and stay there: weights are computed in host memory.
        """
        held = [
            (module, name, buffer)
            for module in self.modules()
            if isinstance(module, Configurable)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.device.type != "cpu"
        ]
        found = fetched([*values, *(buffer for *_, buffer in held)])
        for (module, name, _), buffer in zip(held, found[len(values) :], strict=True):
            setattr(module, name, buffer)
        return found[: len(values)]
