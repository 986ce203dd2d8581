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
    """Base of every error that a frame raises.

    Example:
        >>> import recollect, torch
        >>> x = torch.ones(3, requires_grad=True)
        >>> with recollect.dry_mode():
        ...     y = x.exp()
        >>> try:
        ...     y.sum().backward()
        ... except recollect.frames.FrameError as error:
        ...     print(str(error).partition(",")[0])
        this graph was made in dry mode
    """


class RebuildError(FrameError):
    """A rebuild did not repeat the forward pass.

    Example:
        >>> import random, recollect, torch
        >>> x = torch.ones(3, requires_grad=True)
        >>> y = recollect.checkpoint(lambda x: (x * random.random()).exp(), x)
        >>> try:
        ...     y.sum().backward()
        ... except recollect.frames.RebuildError as error:
        ...     print("Python" in str(error) or "random" in str(error))
        True
    """


class InPlaceError(FrameError):
    """A tensor that the backward pass needs was changed in place after the forward pass.

    Example:
        >>> import recollect, torch
        >>> x = torch.ones(3, requires_grad=True) * 2
        >>> y = recollect.checkpoint(torch.exp, x)
        >>> x += 1
        >>> try:
        ...     y.sum().backward()
        ... except recollect.frames.InPlaceError as error:
        ...     print("x = x + 1" in str(error))
        True
    """


class GraphFreedError(FrameError):
    """The graph behind a frame was freed by an earlier backward pass.

    Example:
        >>> import recollect, torch
        >>> y = recollect.checkpoint(torch.exp, torch.ones(3, requires_grad=True)).sum()
        >>> y.backward()
        >>> try:
        ...     y.backward()
        ... except recollect.frames.GraphFreedError as error:
        ...     print("retain_graph" in str(error))
        True
    """


class ReleasedTensorError(FrameError):
    """A tensor whose memory :func:`recollect.eager_release` gave back was read.

    Example:
        >>> import recollect, torch
        >>> x = torch.ones(3, requires_grad=True) * 2
        >>> with recollect.eager_release():
        ...     y = recollect.checkpoint(torch.exp, x, inverse=torch.log)
        >>> try:
        ...     x.sum()
        ... except recollect.frames.ReleasedTensorError as error:
        ...     print("exp" in str(error))
        True
    """


class LatticeError(FrameError, ValueError):
    """A value is out of the range in which a stream is exact.

    Example:
        >>> import torch
        >>> from recollect.frames import Lattice, LatticeError
        >>> try:
        ...     Lattice(16).enter(torch.tensor([300.0]))
        ... except LatticeError as error:
        ...     print("|x| < 256" in str(error))
        True
    """


class DriftWarning(UserWarning):
    """What a chain reconstructed differs from what the forward pass saw by more than the threshold.

    Example:
        >>> import warnings
        >>> from recollect.frames import DriftGauge, DriftWarning
        >>> with warnings.catch_warnings(record=True) as found:
        ...     warnings.simplefilter("always", DriftWarning)
        ...     DriftGauge("the encoder", threshold=1e-3).record(0.02)
        >>> [warning.category.__name__ for warning in found]
        ['DriftWarning']
    """


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
