"""Whether a module is invertible as it says, for all kinds of modules that recollect can invert."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from recollect import invertible
from recollect._arguments import pack
from recollect.frames import run_invertible
from recollect.invertible.checks import Subject, check_subject, plainly
from recollect.reversible import GroupRevRes, InvertibleModule

__all__ = ["check_invertible"]


def check_invertible(module: nn.Module, *inputs: Any, rtol: float = 1e-3, atol: float = 1e-5, **kwargs: Any) -> bool:
    """Check that a module's inverse, its repetition and its gradients are right.

    Tried are the module's own mode and, for the gradients, training mode too. The module, its gradients, its buffers
    and the random state are left as they were.

    Args:
        module: a :class:`recollect.invertible.Module`; a :class:`recollect.reversible.InvertibleModule`, with its
            groups; or any module with ``inverse(*outputs)``, which is run as
            ``recollect.checkpoint(module, *inputs, inverse=module.inverse)``.
        *inputs: what it is called with. Of a module of ``recollect.reversible`` only the features are given back by
            the inverse; ``edge_index`` (or the graph) and what follows is passed on to it.
        rtol: relative tolerance, against the largest value of each tensor.
        atol: absolute tolerance.
        **kwargs: keyword arguments of the module and of its inverse.

    Returns:
        ``True``.

    Raises:
        TypeError: the module is none of these.
        AssertionError: the inverse does not give back the inputs, or a second run gives other outputs, or the
            gradients are not those of plain autograd; the message says which, by how much, and what to try.

    Example:
        >>> import torch
        >>> from recollect.testing import check_invertible
        >>> class Shift(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.by = torch.nn.Parameter(torch.ones(3))
        ...
        ...     def forward(self, x):
        ...         return x + self.by
        ...
        ...     def inverse(self, y):
        ...         return y - self.by
        >>> check_invertible(Shift(), torch.randn(4, 3))
        True
    """
    if isinstance(module, invertible.Module):
        return module.check(*inputs, rtol=rtol, atol=atol, **kwargs)
    if isinstance(module, InvertibleModule):
        make = _features_second if isinstance(module, GroupRevRes) else _features_first
    elif isinstance(module, nn.Module) and callable(getattr(module, "inverse", None)):
        make = _ordinary
    else:
        raise TypeError(
            f"check_invertible takes a module with an inverse: one of recollect.invertible, one of "
            f"recollect.reversible, or any with a method inverse(*outputs) (got {type(module).__name__})"
        )

    def subject(module: Any) -> Subject:
        made = make(module)
        if not kwargs:
            return made
        runs = (made.function, made.inverse, made.framed, made.plain)
        function, inverse, framed, plain = (functools.partial(run, **kwargs) for run in runs)
        uncertified = None if made.uncertified is None else functools.partial(made.uncertified, **kwargs)
        return Subject(module, function, inverse, framed, plain, made.seed, uncertified)

    return check_subject(subject(module), inputs, rtol, atol, subject)


def _ordinary(module: Any) -> Subject:
    def framed(*args: Any, certify: bool = True, **kwargs: Any) -> Any:
        return run_invertible(module, module.inverse, args, kwargs, certify=certify)

    uncertified = functools.partial(framed, certify=False)
    return Subject(module, module, module.inverse, framed, _plain(module), uncertified=uncertified)


def _features_first(module: Any) -> Subject:
    """Of ``forward(x, *others)`` and ``inverse(*outputs, *others)``, which returns x."""

    def function(x: Any, *others: Any, **kwargs: Any) -> Any:
        return (*pack(module(x, *others, **kwargs)), others)

    def inverse(*values: Any, **kwargs: Any) -> Any:
        *outputs, others = values
        return (*pack(module.inverse(*outputs, *others, **kwargs)), *others)

    return Subject(module, function, inverse, module, _plain(module))


def _features_second(module: Any) -> Subject:
    """Of ``forward(graph, x, *others)`` and ``inverse(graph, y, *others)``, which returns x."""

    def function(graph: Any, x: Any, *others: Any, **kwargs: Any) -> Any:
        return graph, module(graph, x, *others, **kwargs), others

    def inverse(graph: Any, y: Any, others: Any, **kwargs: Any) -> Any:
        return graph, module.inverse(graph, y, *others, **kwargs), *others

    return Subject(module, function, inverse, module, _plain(module))


def _plain(module: nn.Module) -> Callable[..., Any]:
    return functools.partial(plainly, module)
