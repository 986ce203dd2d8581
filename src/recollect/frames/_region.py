"""A piece of the forward pass that can be run again under the conditions of its first run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from recollect.frames._conditions import Conditions
from recollect.frames._describe import describe
from recollect.frames._errors import RebuildError
from recollect.frames._modes import Scope, backward_mode, local
from recollect.frames._rng import drawing

__all__ = ["Region"]


class Region:
    """A function, and what its first run depended on beside its arguments.

    Args:
        function: called with positional arguments.
        seed: whether random state is captured and replayed.
    """

    __slots__ = ("_conditions", "function", "seed")

    def __init__(self, function: Callable[..., Any], seed: bool) -> None:
        self.function = function
        self.seed = seed
        self._conditions: Conditions | None = None

    @property
    def name(self) -> str:
        """The region's module or function, for messages."""
        return describe(self.function)

    def first(
        self,
        args: tuple[Any, ...],
        devices: set[torch.device],
        scope: Scope,
        hooks: AbstractContextManager[Any],
    ) -> Any:
        """Run the region for the first time.

        Args:
            args: its arguments.
            devices: the devices whose random state and autocast count.
            scope: what frames made inside belong to.
            hooks: saved-tensor hooks for the duration.
        """
        with drawing(alone=self.seed):
            conditions = self._conditions = Conditions(self.function, args, devices, self.seed)
            outer, local.scope = local.scope, scope
            local.first_call += 1
            try:
                with hooks:
                    output = self.function(*args)
            finally:
                local.first_call -= 1
                local.scope = outer
            conditions.settle()
        return output

    def again(
        self,
        args: tuple[Any, ...],
        scope: Scope,
        hooks: AbstractContextManager[Any],
        function: Callable[..., Any] | None = None,
    ) -> Any:
        """Run the region once more, as it ran the first time; see :meth:`first`.

        Args:
            args: as in :meth:`first`.
            scope: as in :meth:`first`.
            hooks: as in :meth:`first`.
            function: run this under the region's conditions instead (its inverse).
        """
        if self._conditions is None:
            raise RebuildError(f"{self.name}: asked to run again before it has run")
        self._conditions.check(self.function)
        outer, local.scope = local.scope, scope
        try:
            with backward_mode(), self._conditions.replayed(other=function is not None), torch.enable_grad(), hooks:
                return (function or self.function)(*args)
        finally:
            local.scope = outer
