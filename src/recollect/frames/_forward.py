"""What stands in front of one module's forward, without another class, name or entry in its state dict."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from recollect.frames._modes import keep_everything

__all__ = ["Forward", "Own"]


class Own:
    """A module's own forward, to be run in a frame.

    Attributes:
        owner: the bound method, or what stood on the module before.

    Example:
        >>> import torch
        >>> from recollect.frames import Forward
        >>> layer = torch.nn.Linear(3, 2)
        >>> own = Forward(layer).own()
        >>> own.module is layer, own(torch.randn(5, 3)).shape
        (True, torch.Size([5, 2]))
    """

    __slots__ = ("_plain", "owner")

    def __init__(self, owner: Callable[..., Any], plain: bool) -> None:
        self.owner = owner
        self._plain = plain

    @property
    def module(self) -> Any:
        """The module, if nothing but its class's method runs; else the function itself."""
        return self.owner.__self__ if isinstance(self.owner, types.MethodType) else self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it; frames inside step aside if it is to keep everything."""
        if not self._plain:
            return self.owner(*args, **kwargs)
        with keep_everything():
            return self.owner(*args, **kwargs)


class Forward:
    """Stands in the instance's ``forward``. It is copied and pickled with the module, and does not keep it alive.

    Subclasses define ``__call__``, and ``settings`` with what they are made of beside the module.

    Args:
        module: in front of whose forward this stands, once it is put there.

    Attributes:
        before: what stood there before, if anything did.

    Example:
        >>> import torch
        >>> from recollect.frames import Forward
        >>> class Doubled(Forward):
        ...     def __call__(self, *args, **kwargs):
        ...         return 2 * self.own()(*args, **kwargs)
        >>> layer, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        >>> plain, front = layer(x), Doubled(layer)
        >>> front.put()
        >>> torch.equal(layer(x), 2 * plain)
        True
        >>> front.take()
        >>> torch.equal(layer(x), plain)
        True
    """

    __slots__ = ("__weakref__", "_module", "before")

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.before: Callable[..., Any] | None = None

    def settings(self) -> tuple[Any, ...]:
        """Return the constructor's arguments after the module."""
        return ()

    def own(self, plain: bool = False) -> Own:
        """Return the module's own forward; with ``plain``, all frames in it step aside."""
        if self.before is not None:
            return Own(self.before, plain)
        module: Any = self._module()
        return Own(types.MethodType(type(module).forward, module), plain)

    def put(self) -> None:
        """Stand in front of the module's forward from now on."""
        names = vars(self._module())
        self.before = names.get("forward")
        names["forward"] = self

    def take(self) -> None:
        """Leave the place, wherever others have put themselves in front since."""
        module = self._module()
        if module is None:
            return
        names = vars(module)
        front = names.get("forward")
        if front is self:
            if self.before is None:
                del names["forward"]
            else:
                names["forward"] = self.before
            return
        while isinstance(front, Forward):
            if front.before is self:
                front.before = self.before
                return
            front = front.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the place of the module's forward."""
        return self.own()(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), self._module(), self.settings(), self.before)


def _remake(kind: Any, module: nn.Module, settings: tuple[Any, ...], before: Any) -> Forward:
    made: Forward = kind(module, *settings)
    made.before = before
    return made
