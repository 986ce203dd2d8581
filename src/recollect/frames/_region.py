"""A piece of the forward pass that can be run again under the conditions of its first run."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from recollect._arguments import Certify
from recollect._torch import (
    ScaledProductBackends,
    autocast_as,
    autocast_now,
    cached_parametrizations,
    compiled_blocks_exist,
    default_device,
    is_batched,
    is_faked,
    outside_transforms,
    parametrizations_as,
    selective_storage,
    unwatch_leaving,
    unwatch_modules,
    watch_leaving,
    watch_modules,
)
from recollect.frames._certificate import Certificate, tolerance_of
from recollect.frames._errors import RebuildError, describe
from recollect.frames._modes import Scope, local, save_nothing
from recollect.frames._random import Randomness, undrawn
from recollect.frames._record import Changed, Record, check_unread
from recollect.frames._recorder import Noted, Recorder, entering, leaving, recorder_of
from recollect.frames._watch import Watch
from recollect.frames.sources._source import Arguments

__all__ = ["Region"]


class Region:
    """A function, and what its first run depended on beside its arguments.

    Args:
        function: what is run.
        seed: whether random state is captured and replayed.
        contexts: of the forward and of the rebuild, entered in addition (selective checkpoints).
        certify: what is accepted of a rebuild.
        certificate: where it is counted.
    """

    __slots__ = (
        "_conditions", "_contexts", "_random", "_record", "_recorder", "certificate", "certify", "function",
        "rewatched", "seed", "watched",
    )  # fmt: skip

    def __init__(
        self,
        function: Callable[..., Any],
        seed: bool,
        contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] | None = None,
        certify: Certify = True,
        certificate: Certificate | None = None,
    ) -> None:
        self.watched = False  # whether the first run was, and whether repetitions are
        self.rewatched = False
        self.certify = certify
        self.certificate = certificate
        self.function = function
        self.seed = seed
        self._contexts = contexts
        self._conditions: _Conditions | None = None
        self._random: Randomness | None = None
        self._record: Record | None = None
        self._recorder: Recorder | Noted | None = None  # while the first run lasts

    @property
    def name(self) -> str:
        """The region's module or function, for messages."""
        return describe(self.function)

    @property
    def is_plain(self) -> bool:
        """Whether nothing but modules of torch's own has run."""
        return self._record is not None and self._record.is_plain

    @property
    def tolerance(self) -> float:
        """The relative error that is rounding in the type that autocast computed in; 0.0 without autocast."""
        return self._conditions.tolerance() if self._conditions is not None else 0.0

    def first(
        self,
        arguments: Arguments,
        devices: set[torch.device],
        scope: Scope,
        hooks: AbstractContextManager[Any],
        take: Callable[[Recorder | Noted], None] | None = None,
    ) -> Any:
        """Run the region for the first time.

        Args:
            arguments: its arguments.
            devices: the devices whose random state and autocast count.
            scope: what frames made inside belong to.
            hooks: saved-tensor hooks for the duration.
            take: is given the recorder before the run.
        """
        args, kwargs = arguments
        recorder = self._recorder = recorder_of(self.function, (*args, *kwargs.values()) if kwargs else args)
        self._conditions = _Conditions(devices, recorder.may_draw)
        if take is not None:
            take(recorder)
        draws = self._random = Randomness(devices) if self.seed and recorder.may_draw and not is_faked() else None
        outer, local.scope = local.scope, scope
        local.first_call += 1
        try:
            with draws or _NULL, self._contexts[0] if self._contexts else _NULL, recorder, hooks:
                output = self.function(*args, **kwargs)
        finally:
            local.first_call -= 1
            local.scope = outer
            self._recorder = None
        self._random = draws if draws is not None and draws.states else None
        self.watched = recorder.has_watched
        self._record = recorder.settle()
        return output

    def again(
        self,
        arguments: Arguments,
        scope: Scope,
        hooks: AbstractContextManager[Any],
        function: Callable[..., Any] | None = None,
        changed: Sequence[Changed] = (),
    ) -> Any:
        """Run the region once more, as it ran the first time; see :meth:`first`.

        Args:
            arguments: as in :meth:`first`.
            scope: as in :meth:`first`.
            hooks: as in :meth:`first`.
            function: run this under the region's conditions instead (its inverse).
            changed: arguments that were changed in place since.

        Raises:
            InPlaceError: it reads a parameter, buffer or argument that was changed in place since.
        """
        # A gradient may be taken inside the region itself, while it runs for the first time.
        record = self._record if self._recorder is None else self._recorder.so_far()
        if self._conditions is None or record is None:
            raise RebuildError(f"{self.name}: asked to run again before it has run")
        args, kwargs = arguments
        changed = [*changed, *record.changed()]
        watch = Watch(copies=False) if changed or self.rewatched else None
        dtype = torch.get_default_dtype()
        outer, local.scope = local.scope, scope
        backward, local.backward = local.backward, 1
        recorders, local.recorders = local.recorders, []  # of regions that are running: what runs now is none of theirs
        try:
            surroundings = self._surroundings(record, other=function is not None)
            return _run_within(surroundings, (hooks, watch), function or self.function, args, kwargs)
        finally:
            if torch.get_default_dtype() is not dtype:  # set by the region, and its end left out
                torch.set_default_dtype(dtype)
            local.scope = outer
            local.backward = backward
            local.recorders = recorders
            if watch is not None:
                check_unread(self.name, changed, watch)

    def _surroundings(self, record: Record, other: bool) -> list[AbstractContextManager[Any]]:
        """Return what a repetition needs around it, in order: nothing, where all is as it was in the first run."""
        found: list[AbstractContextManager[Any]] = []
        if is_batched():
            found.append(outside_transforms())
        if compiled_blocks_exist():  # hooks that tell nobody anything: compiled blocks depend on whether there are some
            found.append(_seen_modules())
        if self._conditions is not None and not self._conditions.hold():
            found.append(self._conditions.again())
        if self._random is not None:
            found.append(self._random.replayed())
        elif not record.is_plain:
            found.append(undrawn())
        put_back = record.put_back(other)
        if put_back is not None:
            found.append(put_back)
        if self._contexts is not None and not other:
            found.append(_repeatable(self._contexts[1]))
        return found

    def suspects(self, arguments: Arguments, scope: Scope) -> list[str]:
        """Return what a repetition that computes something else may be due to; runs the region once more."""
        found = self._record.suspects() if self._record is not None else []
        before = _states_of_others()
        try:
            self.again(arguments, scope, save_nothing())
        except Exception:  # what is wrong with it, another error has said already
            return found
        for name, state in _states_of_others().items():
            if state != before.get(name):
                found.append(f"it draws random numbers from {name}")
        return found


def _states_of_others() -> dict[str, Any]:
    """Return the states of random generators that are not torch's."""
    states: dict[str, Any] = {"Python's random": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy.random"] = str(numpy.random.get_state())
    return states


_NULL: AbstractContextManager[Any] = nullcontext()


def _run_within(
    surroundings: Sequence[AbstractContextManager[Any]],
    within: tuple[AbstractContextManager[Any], AbstractContextManager[Any] | None],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a function with gradients.

    Args:
        surroundings: of this, the first of them the outermost.
        within: saved-tensor hooks, and a mode that sees its operations.
        function: what is run.
        args: its arguments.
        kwargs: its arguments by name.
    """
    if surroundings:
        with surroundings[0]:
            return _run_within(surroundings[1:], within, function, args, kwargs)
    hooks, watch = within
    with torch.enable_grad(), hooks, watch or _NULL:
        return function(*args, **kwargs)


@contextmanager
def _seen_modules() -> Iterator[None]:
    watch_modules(entering)
    watch_leaving(leaving)
    try:
        yield
    finally:
        unwatch_leaving()
        unwatch_modules()


@contextmanager
def _repeatable(context: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context of a rebuild that may be entered again, which torch's selective checkpoints are not made for."""
    storage = selective_storage(context)
    before = None if storage is None else {key: dict(entries) for key, entries in storage.items()}
    try:
        with context:
            yield
    finally:
        if storage is not None and before is not None:
            for key, entries in before.items():
                storage[key].update(entries)


class _Conditions:
    """Contexts at the start of a region: autocast, attention backends, default dtype and device, parametrizations.

    Args:
        devices: the devices of the arguments' tensors.
        attends: whether what runs may attend; known layers that draw nothing do not.
    """

    __slots__ = ("_attention", "_autocast", "_device", "_dtype", "_parametrizations")

    def __init__(self, devices: set[torch.device], attends: bool) -> None:
        others = {d.type for d in devices if d.type != "cpu" and torch.amp.is_autocast_available(d.type)}
        self._autocast = autocast_now(["cpu", *sorted(others)])
        self._dtype = torch.get_default_dtype()
        self._device = default_device()
        self._attention = ScaledProductBackends() if attends else None
        self._parametrizations = cached_parametrizations()

    def hold(self) -> bool:
        """Whether nothing of this differs from what is now, without autocast and cached parametrizations."""
        return (
            self._device is default_device() is None
            and self._dtype is torch.get_default_dtype()
            and not self._casts()
            and self._parametrizations is None
            and cached_parametrizations() is None
            and (self._attention is None or self._attention.hold())
        )

    def _casts(self) -> bool:
        """Whether autocast is on, now or then."""
        for kind, enabled, _ in self._autocast:  # noqa: SIM110  (any() takes twice as long)
            if enabled or torch.is_autocast_enabled(kind):
                return True
        return False

    @contextmanager
    def again(self) -> Iterator[None]:
        """Enter the contexts again, as far as they differ from the present ones."""
        with ExitStack() as stack:
            self._enter(stack)
            yield

    def _enter(self, stack: ExitStack) -> None:
        stack.enter_context(autocast_as(self._autocast))
        dtype = torch.get_default_dtype()
        if dtype is not self._dtype:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(self._dtype)
        if default_device() != self._device:
            stack.enter_context(self._device or torch.device("cpu"))
        if self._attention is not None and not self._attention.hold():
            stack.callback(ScaledProductBackends().set)
            self._attention.set()
        if self._parametrizations is not None or cached_parametrizations() is not None:
            stack.enter_context(parametrizations_as(self._parametrizations))

    def tolerance(self) -> float:
        """Return the largest tolerance of the types that autocast computes in; 0.0 without autocast."""
        return max((tolerance_of(dtype) for _, enabled, dtype in self._autocast if enabled), default=0.0)
