"""Random state of the devices that a region may draw from, and of threads that draw side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from recollect._torch import TorchDispatchMode, modes_are_open, outside_modes

__all__ = ["RandomState", "Randomness", "undrawn"]

States = list[tuple[torch.device, Tensor]]

_CPU = torch.device("cpu")


def _read(device: torch.device) -> Tensor:
    with outside_modes():
        return _state_of(device)


def _state_of(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.default_generator.get_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _states_of(devices: Iterable[torch.device]) -> States:
    """Return the state of the CPU's generator, and of those of other devices."""
    if not devices and not modes_are_open():
        return [(_CPU, torch.default_generator.get_state())]
    with outside_modes():
        return [(device, _state_of(device)) for device in _with_generators(devices)]


def _are_equal(a: Tensor, b: Tensor) -> bool:
    if a.numel() % 8 == 0 == b.numel() % 8:  # eight bytes at a time
        a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)


def _write(device: torch.device, state: Tensor) -> None:
    with outside_modes():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def _with_generators(devices: Iterable[torch.device]) -> list[torch.device]:
    return [_CPU, *(d for d in devices if d.type not in ("cpu", "meta"))]


class RandomState:
    """The generators' state at one moment: of the CPU, and of every device in ``devices``.

    Args:
        devices: devices beside the CPU; those without a generator (meta) are passed over.

    Example:
        >>> import torch
        >>> from recollect.frames import RandomState
        >>> state = RandomState()
        >>> first = torch.rand(3)
        >>> with state.replayed():
        ...     again = torch.rand(3)
        >>> torch.equal(first, again)
        True
    """

    __slots__ = ("states",)

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self.states = _states_of(devices)

    def replayed(self) -> AbstractContextManager[None]:
        """Draw in the body what was drawn after this moment; the generators go on as if nothing had happened."""
        return _replay(self.states)


@contextmanager
def _replay(states: States) -> Iterator[None]:
    with outside_modes():
        now = [(device, _state_of(device)) for device, _ in states]
    try:
        for device, state in states:
            _write(device, state)
        yield
    finally:
        for device, state in now:
            _write(device, state)


class undrawn:  # noqa: N801  (a context manager, many times in a step)
    """Give the CPU's generator back the state that it had before the body, which draws nothing, or seeds it itself.

    Not while other threads run regions: they would draw the same again.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _read(_CPU)

    def __exit__(self, *exc_info: object) -> None:
        if _threads.none_beside():
            with outside_modes():
                if not _are_equal(_state_of(_CPU), self._before):
                    _write(_CPU, self._before)


class _Threads:
    """Which threads run regions at this moment.

    The default generators belong to the process. A region that runs alone uses them as they are. One that begins while
    another thread is in a region draws from a stream of its own (:class:`_OwnStream`), and nobody waits for the end of
    another's region; only to draw beside a region that began alone does a thread wait for that one's end, and not for
    ever: such a region may in turn wait for threads that it started.
    """

    patience = 30.0  # seconds

    def __init__(self) -> None:
        self.drawing = threading.RLock()
        self._lock = threading.RLock()
        self._ended = threading.Condition(self._lock)
        self._active: dict[int, int] = {}  # thread: how many regions it runs
        self._alone: dict[int, int] = {}  # thread: how many of these use the process's generators
        self._waiting = 0

    def enter(self) -> bool:
        """Begin a region; return whether it may use the process's generators."""
        thread = threading.get_ident()
        active = self._active
        with self._lock:  # nobody may look between the two
            active[thread] = active.get(thread, 0) + 1
            alone = len(active) == 1
            if alone:
                self._alone[thread] = self._alone.get(thread, 0) + 1
        return alone

    def none_beside(self) -> bool:
        """Whether no other thread runs a region."""
        own = threading.get_ident()
        return all(thread == own for thread in list(self._active))

    def leave(self, alone: bool) -> None:
        """End a region."""
        thread = threading.get_ident()
        for counts in (self._active, self._alone) if alone else (self._active,):
            counts[thread] -= 1
            if not counts[thread]:
                del counts[thread]
        if alone and self._waiting:
            with self._ended:
                self._ended.notify_all()

    def wait_for_others(self) -> None:
        """Wait until no other thread uses the process's generators."""
        own = threading.get_ident()
        if _is_foreign() or all(thread == own for thread in list(self._alone)):
            return
        with self._ended:
            self._waiting += 1
            try:
                self._ended.wait_for(lambda: all(thread == own for thread in list(self._alone)), self.patience)
            finally:
                self._waiting -= 1


def _is_foreign() -> bool:
    """Whether this is a thread of autograd's own, on whose end somebody who is in a region may wait."""
    return isinstance(threading.current_thread(), threading._DummyThread)


_threads = _Threads()


class _OwnStream(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random operations of the body draw from generators of its own.

    Args:
        states: where they begin; ``None`` for a seed that the process's generator gives when it is needed.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled blocks are not to be compiled anew because of it."""
        return True

    def __init__(self, states: States | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first: dict[torch.device, Tensor] = dict(states or ())
        self._states = dict(self.first)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        devices = {torch.device("cpu")}
        for value in (*args, *kwargs.values()):
            device = value.device if isinstance(value, Tensor) else value
            if isinstance(device, torch.device) and device.type not in ("cpu", "meta"):
                devices.add(device)
        with _threads.drawing:
            _threads.wait_for_others()
            for device in devices:
                self._begin(device)
            now = [(device, _read(device)) for device in devices]
            try:
                for device in devices:
                    _write(device, self._states[device])
                return func(*args, **kwargs)
            finally:
                self._states.update((device, _read(device)) for device in devices)
                for device, state in now:
                    _write(device, state)

    def _begin(self, device: torch.device) -> None:
        if device not in self._states:
            seed = int(torch.randint(2**62, (), device="cpu"))  # moves the process's generator: streams differ
            state = torch.Generator(device).manual_seed(seed).get_state()
            self._states[device] = self.first[device] = state


class Randomness:
    """What one region draws: observed in its first run, and replayed.

    Args:
        devices: that the region's tensors are on, for their generators.
    """

    __slots__ = ("_before", "_devices", "_stream", "states")

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = devices
        self._stream: _OwnStream | None = None
        self._before: States | None = None
        self.states: States = []

    def __enter__(self) -> Randomness:
        if _threads.enter():
            self._before = _states_of(self._devices)
        else:
            self._stream = _OwnStream(None)
            self._stream.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._stream is not None:
            self._stream.__exit__(*exc_info)  # type: ignore[no-untyped-call]
            self.states = list(self._stream.first.items())
            self._stream = None
            _threads.leave(alone=False)
        elif self._before is not None:
            # Generators that nobody drew from are forgotten: a region without randomness then costs nothing.
            before, self._before = self._before, None
            now = _states_of(self._devices)
            for one, (_, state) in zip(before, now, strict=True):
                if not _are_equal(one[1], state):
                    self.states.append(one)
            _threads.leave(alone=True)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw in the body what was drawn in the first run; the generators go on as if nothing had happened."""
        states = self.states
        if self._stream is not None:  # the first run lasts
            states = list(self._stream.first.items())
        elif self._before is not None:
            states = self._before
        alone = _threads.enter()
        try:
            with _replay(states) if alone else _OwnStream(states):
                yield
        finally:
            _threads.leave(alone)
