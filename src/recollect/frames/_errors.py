"""What a frame says when a backward pass cannot be right, and how it names what the user gave."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = [
    "DriftWarning",
    "FrameError",
    "GraphFreedError",
    "InPlaceError",
    "LatticeError",
    "RebuildError",
    "ReleasedTensorError",
    "describe",
    "naming",
]


class FrameError(RuntimeError):
    """Base of every error that a frame raises."""


class RebuildError(FrameError):
    """A rebuild did not repeat the forward pass."""


class InPlaceError(FrameError):
    """A tensor that the backward pass needs was changed in place after the forward pass."""


class GraphFreedError(FrameError):
    """The graph behind a frame was freed by an earlier backward pass."""


class ReleasedTensorError(FrameError):
    """A tensor whose memory :func:`recollect.eager_release` gave back was read."""


class LatticeError(FrameError, ValueError):
    """A value is out of the range in which a stream is exact."""


class DriftWarning(UserWarning):
    """What a chain reconstructed differs from what the forward pass saw by more than the threshold."""


def describe(function: Callable[..., Any]) -> str:
    """Name a function in an error: a module by its ``repr``, anything else by its qualified name."""
    owner = _owner_of(function)
    if isinstance(owner, nn.Module):
        text = " ".join(repr(owner).split())
        return text if len(text) <= 120 else f"{text[:117]}..."
    while not hasattr(function, "__qualname__") and (hasattr(function, "owner") or hasattr(function, "func")):
        function = getattr(function, "owner", None) or function.func  # type: ignore[attr-defined]
    if isinstance(function, types.BuiltinFunctionType):
        return f"{function.__module__ or 'torch'}.{function.__name__}"
    return getattr(function, "__qualname__", None) or repr(function)


def _owner_of(function: Callable[..., Any]) -> Any:
    owner: Any = function
    while not isinstance(owner, nn.Module):  # bound methods, partials, and what says whom it works for
        inner = next((getattr(owner, name) for name in ("owner", "__self__", "func") if hasattr(owner, name)), None)
        if inner is None or isinstance(inner, types.ModuleType):
            break
        owner = inner
    return owner


def naming(function: Callable[..., Any]) -> Callable[[], str]:
    """Return what names a function later, without keeping a module alive, and without the cost of its ``repr`` now."""
    owner = _owner_of(function)
    if not isinstance(owner, nn.Module):
        name = describe(function)
        return lambda: name
    reference, kind = weakref.ref(owner), type(owner).__name__

    def name_of_module() -> str:
        module = reference()
        return kind if module is None else describe(module)

    return name_of_module
