"""Where in a training step the running thread is: forward, first call of a frame, rebuild, dry mode.

All of it is thread local: autograd runs backward in threads of its own on accelerators, and two threads may each
train a model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from recollect._torch import hooks_are_enabled, is_in_transform
from recollect.frames._errors import FrameError

__all__ = [
    "Scope", "aside", "backward_mode", "dry_mode", "enclosing", "frames_apply", "in_backward", "in_dry_mode",
    "keep_everything", "local", "observed", "save_nothing",
]  # fmt: skip


class _Rebuilt(Protocol):
    """A frame, as far as its scope knows it."""

    def forget(self) -> None:
        """Drop what the last rebuild left over."""


class Scope:
    """What frames of one nesting level share: the ones that were rebuilt last.

    Autograd runs backward in the reverse order of the forward, so when a frame is rebuilt, the one rebuilt before it
    is done with, even if some of what it saved was never asked for (gradients of a subset). Those leftovers are
    dropped then. Frames in a row that are rebuilt for the last of them are done with together.
    """

    __slots__ = ("__weakref__", "_last")

    def __init__(self) -> None:
        self._last: list[weakref.ref[_Rebuilt]] = []

    def now_rebuilds(self, frame: _Rebuilt, *, together: bool = False) -> None:
        """Drop the leftovers of the frames that were rebuilt before ``frame``, unless it is rebuilt with them."""
        if not together:
            for reference in self._last:
                last = reference()
                if last is not None and last is not frame:
                    last.forget()
            self._last.clear()
        self._last.append(weakref.ref(frame))


class _Local(threading.local):
    """The state of one thread; see the module's docstring."""

    def __init__(self) -> None:
        self.backward = 0
        self.dry = 0
        self.keeping_everything = 0
        self.first_call = 0
        self.policy: Any = None  # a StoragePolicy, if somebody does something to the inputs of stages
        self.scope: Scope | None = None  # the frame whose region this thread is running, if any
        self.outermost = Scope()
        self.freed: list[Any] = []  # nodes of the graph that are about to be freed
        self.freeing = False
        self.keeping = 0  # what is given to saved-tensor hooks is kept by a frame, and saved by no operation
        self.aside = 0  # what runs is recollect's own, and not observed
        self.recorders: list[Any] = []  # of the regions that this thread runs for the first time, outermost first


local = _Local()


class aside:  # noqa: N801  (a context manager, many times in a step)
    """What runs in the body is recollect's own, and not what a region does."""

    __slots__ = ()

    def __enter__(self) -> None:
        local.aside += 1

    def __exit__(self, *exc_info: object) -> None:
        local.aside -= 1


class observed:  # noqa: N801
    """What runs in the body, inside :class:`aside`, is again what a region does."""

    __slots__ = ()

    def __enter__(self) -> None:
        local.aside -= 1

    def __exit__(self, *exc_info: object) -> None:
        local.aside += 1


def enclosing() -> Scope:
    """Return the frame whose region this thread is running, or the thread's outermost scope."""
    return local.scope if local.scope is not None else local.outermost


def in_backward() -> bool:
    """Return whether this code runs because a backward pass asked a frame to rebuild what it had dropped.

    Side effects that must happen once per step belong behind ``if not recollect.in_backward()``.

    Example:
        >>> import recollect, torch
        >>> calls = []
        >>> def run(x):
        ...     calls.append(recollect.in_backward())
        ...     return x.exp()
        >>> recollect.checkpoint(run, torch.ones(3, requires_grad=True)).sum().backward()
        >>> calls
        [False, True]
    """
    return local.backward > 0


@contextmanager
def backward_mode(enabled: bool = True) -> Iterator[None]:
    """Run the body as a rebuild would: :func:`in_backward` is true in it.

    Args:
        enabled: with ``False`` the body runs as in a forward pass.

    Example:
        >>> import recollect
        >>> with recollect.backward_mode():
        ...     print(recollect.in_backward())
        True
    """
    before, local.backward = local.backward, int(enabled)
    try:
        yield
    finally:
        local.backward = before


def in_dry_mode() -> bool:
    """Return whether autograd builds a graph here without keeping what it saves.

    True inside :func:`dry_mode`, and in the first call of a function that a frame runs.

    Example:
        >>> import recollect
        >>> with recollect.dry_mode():
        ...     print(recollect.in_dry_mode())
        True
        >>> recollect.in_dry_mode()
        False
    """
    return local.dry > 0 or local.first_call > 0


def _refuse(_: None) -> Tensor:
    raise FrameError(
        "this graph was made in dry mode, in which nothing is saved for backward; "
        "run the forward pass again outside of recollect.dry_mode() to go backward through it"
    )


def save_nothing() -> AbstractContextManager[None]:
    """Return a context in which autograd builds its graph and saves nothing."""
    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, _refuse)


@contextmanager
def dry_mode(enabled: bool = True) -> Iterator[None]:
    """Build the autograd graph but save nothing for backward.

    Outputs have the ``requires_grad`` that they would have in training. Going backward through such a graph raises a
    :class:`~recollect.frames.FrameError`.

    Args:
        enabled: with ``False`` this is a no-op.

    Example:
        >>> import recollect, torch
        >>> from recollect.memory import peak_memory
        >>> x = torch.randn(1000, requires_grad=True)
        >>> with recollect.dry_mode(), peak_memory("cpu") as memory:
        ...     y = x.exp().exp().exp()
        >>> y.requires_grad, memory.peak_bytes  # two outputs at a time, and no others
        (True, 8000)
    """
    if not enabled:
        yield
        return
    local.dry += 1
    try:
        with save_nothing(), torch.enable_grad():
            yield
    finally:
        local.dry -= 1


@contextmanager
def keep_everything() -> Iterator[None]:
    """Let all frames in the body step aside: what autograd saves is kept, whatever modules are set to.

    Example:
        >>> import recollect, torch
        >>> calls = []
        >>> def run(x):
        ...     calls.append(None)
        ...     return x.exp()
        >>> with recollect.frames.keep_everything():
        ...     y = recollect.checkpoint(run, torch.ones(3, requires_grad=True))
        >>> y.sum().backward()
        >>> len(calls)  # it does not run again
        1
    """
    local.keeping_everything += 1
    try:
        yield
    finally:
        local.keeping_everything -= 1


def frames_apply() -> bool:
    """Return whether frames can and need to act here.

    They step aside, and the function runs plain, where nothing is saved anyway (no grad, inference, dry mode), inside
    :func:`keep_everything`, and where saved-tensor hooks do not exist (torch.func transforms, forward-mode
    differentiation, tracing, a whole model under torch.compile).

    Example:
        >>> import torch
        >>> from recollect.frames import frames_apply, keep_everything
        >>> with torch.no_grad():
        ...     frames_apply()
        False
        >>> with keep_everything():
        ...     frames_apply()
        False
        >>> frames_apply()
        True
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and local.dry == 0
        and local.keeping_everything == 0
        and not torch.is_inference_mode_enabled()
        and hooks_are_enabled()
        and not is_in_transform()
    )
