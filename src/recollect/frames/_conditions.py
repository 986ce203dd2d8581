"""The conditions under which a region ran, to be met again in its rebuild."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from recollect.frames._modes import outside_transforms
from recollect.frames._modules import ModuleState, find_modules
from recollect.frames._rng import RandomState, replaying

__all__ = ["Conditions"]


class Conditions:
    """Random state, autocast and module state at the start of a region.

    Args:
        function: the region.
        args: its arguments.
        devices: the devices of the arguments' tensors.
        seed: whether random state is captured and replayed.
    """

    __slots__ = ("_autocast", "_modules", "_random")

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], devices: set[torch.device], seed: bool
    ) -> None:
        self._modules = ModuleState(find_modules(function, args))
        self._random = RandomState(devices) if seed else None
        types = {"cpu", *(d.type for d in devices if torch.amp.is_autocast_available(d.type))}
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(types)
        ]

    def settle(self) -> None:
        """Forget what the region did not touch; to be called when it has run."""
        self._modules.settle()
        if self._random is not None:
            self._random.drop_untouched()
            if not self._random.states:
                self._random = None

    def check(self, function: Callable[..., Any]) -> None:
        """Raise if what the region reads was changed since; ``function`` is the one to name."""
        self._modules.check(function)

    @contextmanager
    def replayed(self, other: bool = False) -> Iterator[None]:
        """Meet the conditions again for the body.

        Args:
            other: the body is another function than the region's own (its inverse).
        """
        with ExitStack() as stack:
            stack.enter_context(outside_transforms())
            for kind, enabled, dtype in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    # Without the cache: casts of a rebuild must not be handed to a later forward, nor the reverse.
                    stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
            if self._random is not None:
                stack.enter_context(replaying())
                stack.enter_context(self._random.replayed())
            stack.enter_context(self._modules.replayed(other))
            yield
