"""Random state of the devices that a region may draw from."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomState", "drawing", "replaying"]


class _Generators:
    """Who draws from the default generators.

    They belong to the process, so two threads that train side by side would draw from the middle of each other's
    regions. The forward of a region and a rebuild hold the lock; a rebuild in one of autograd's own threads only once a
    second thread has been seen, because a lone thread may go backward inside a region while it holds the lock itself.
    Nobody waits for ever: a region may in turn be waiting for threads that it started.
    """

    patience = 30.0  # seconds

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.first: weakref.ref[threading.Thread] | None = None
        self.shared = False

    @contextmanager
    def held(self) -> Iterator[None]:
        taken = self.lock.acquire(timeout=self.patience)
        try:
            yield
        finally:
            if taken:
                self.lock.release()

    def note_thread(self) -> None:
        thread = threading.current_thread()
        first = self.first() if self.first is not None else None
        if first is thread or self.shared:
            return
        if first is None or not first.is_alive():
            self.first = weakref.ref(thread)
        else:
            self.shared = True


_generators = _Generators()


@contextmanager
def drawing(alone: bool) -> Iterator[None]:
    """Keep other threads' regions from drawing during the body, if ``alone``."""
    if not alone:
        yield
        return
    _generators.note_thread()
    with _generators.held():
        yield


def replaying() -> AbstractContextManager[Any]:
    """Return a context that does in a rebuild what :func:`drawing` does in a forward."""
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    return nullcontext() if foreign and not _generators.shared else _generators.held()


def _read(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _write(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


class RandomState:
    """The generators' state at one moment: of the CPU, and of every device in ``devices``.

    Args:
        devices: devices beside the CPU; those without a generator (meta) are passed over.
    """

    __slots__ = ("states",)

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        chosen = [torch.device("cpu"), *(d for d in devices if d.type not in ("cpu", "meta"))]
        self.states = [(device, _read(device)) for device in chosen]

    def drop_untouched(self) -> None:
        """Forget the generators that nobody drew from since: a region without randomness then costs nothing."""
        self.states = [(d, s) for d, s in self.states if not torch.equal(s, _read(d))]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw in the body what was drawn after this moment; the generators go on as if nothing had happened."""
        now = [(device, _read(device)) for device, _ in self.states]
        try:
            for device, state in self.states:
                _write(device, state)
            yield
        finally:
            for device, state in now:
                _write(device, state)
