"""How messages name what the user gave."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["describe"]


def describe(function: Callable[..., Any]) -> str:
    """Name a function in an error: a module by its ``repr``, anything else by its qualified name."""
    if isinstance(function, functools.partial):
        return describe(function.func)
    owner: Any = function
    while not isinstance(owner, nn.Module) and (hasattr(owner, "owner") or hasattr(owner, "__self__")):
        owner = owner.owner if hasattr(owner, "owner") else owner.__self__  # adapters, and bound methods
        if isinstance(owner, functools.partial):
            owner = owner.func
    if isinstance(owner, nn.Module):
        text = " ".join(repr(owner).split())
        return text if len(text) <= 120 else f"{text[:117]}..."
    while not hasattr(function, "__qualname__") and hasattr(function, "__self__"):
        function = function.__self__
    if isinstance(function, types.BuiltinFunctionType):
        return f"{function.__module__ or 'torch'}.{function.__name__}"
    return getattr(function, "__qualname__", None) or repr(function)
