"""A ledger of the storages that come into being and die while it is open.

The ledger is a dispatch mode: it looks at what every operation returns, and learns of a storage's death from
a weak reference to its Python object. PyTorch keeps that object alive for exactly as long as the storage
itself, so the callback also comes where only C++ held the storage (a tensor saved for backward, a gradient on
its way), at the moment of death and for constant work: nothing is ever polled.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from recollect._storages import storages_within
from recollect._torch import TorchDispatchMode, uncompiled

__all__ = ["StorageLedger"]

_PLAIN_DISPATCH = Tensor.__torch_dispatch__
_CPU = torch.device("cpu")
_LIFT_FRESH = torch.ops.aten.lift_fresh.default


class _Entry(weakref.ref[UntypedStorage]):
    """A weak reference to a storage, with its key, the bytes that do not count (`base`) and those that do."""

    __slots__ = ("base", "counted", "key")
    key: int
    base: int
    counted: int


class StorageLedger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages on one device that operations of this thread allocate while the ledger is open.

    A storage counts from the operation that first returns it until it dies. One that goes into an operation
    before it ever came out of one existed before the ledger, or was made without an operation (read from
    a file), and counts only with the bytes by which it grows.

    What torch.compile has compiled runs as it was written: compiled code does not show its operations.

    Args:
        device: whose storages count; without an index, those of all devices of its type.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._entries: dict[int, _Entry] = {}
        # Deaths are reported at any moment, in whichever thread drops the last reference: a queue keeps their
        # order and needs no lock.
        self._changes: deque[int] = deque()
        self._current = 0
        self._peak = 0
        self._thread = threading.get_ident()
        self._uncompiled: Any = None

    @property
    def current_bytes(self) -> int:
        """Bytes alive now."""
        self._settle()
        return self._current

    @property
    def peak_bytes(self) -> int:
        """The largest number of bytes that were alive at the same time."""
        self._settle()
        return self._peak

    def __enter__(self) -> StorageLedger:
        self._thread = threading.get_ident()
        self._uncompiled = uncompiled()
        _ResizeWatch.add(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        finally:
            _ResizeWatch.remove(self)
            self._uncompiled.__exit__(*exc_info)
            self._settle()
            self._entries.clear()  # drops the callbacks: what dies from now on is not the ledger's concern

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(kind.__torch_dispatch__ is not _PLAIN_DISPATCH for kind in types):
            return NotImplemented  # a subclass with operations of its own unwraps first; what it runs is seen
        kwargs = kwargs or {}
        # Taken before the operation: one that works in place may give its argument another storage or size.
        # The list keeps the storages alive during it: the key of one that dies would be free for a new one.
        inputs = [(storage, storage.nbytes()) for storage in storages_within((args, kwargs))]
        out = func(*args, **kwargs)
        if func is _LIFT_FRESH:
            inputs = []  # `torch.tensor(...)`: its argument was made a moment ago, unseen
        known = {storage._cdata: nbytes for storage, nbytes in inputs}
        for storage in storages_within(out):
            self._see(storage, known.get(storage._cdata, 0))
        if func._schema.is_mutable:
            for storage, nbytes in inputs:
                self._see(storage, nbytes)
        return out

    def resized(self, storage: UntypedStorage, before: int) -> None:
        """Take note that Python code resized a storage that had `before` bytes."""
        if storage._cdata in self._entries or threading.get_ident() == self._thread:
            self._see(storage, before)

    def _see(self, storage: UntypedStorage, base: int) -> None:
        """Bring a storage's entry up to date; `base` are the bytes not to count where it is seen first."""
        place = storage.device
        if place.type != self._device.type or self._device.index not in (None, place.index):
            return
        key, nbytes = storage._cdata, storage.nbytes()
        entry = self._entries.get(key)
        if entry is None:
            if nbytes == base:  # existed before and is as it was: not ours, nothing to remember
                return
            entry = _Entry(storage, self._died)
            entry.key, entry.base, entry.counted = key, base, 0
            self._entries[key] = entry
        counted = max(0, nbytes - entry.base)
        if counted != entry.counted:
            self._changes.append(counted - entry.counted)
            entry.counted = counted
            self._settle()

    def _died(self, entry: weakref.ref[UntypedStorage]) -> None:
        assert isinstance(entry, _Entry)
        self._changes.append(-entry.counted)
        self._entries.pop(entry.key, None)

    def _settle(self) -> None:
        while self._changes:
            self._current += self._changes.popleft()
            self._peak = max(self._peak, self._current)


class _ResizeWatch:
    """Reports `UntypedStorage.resize_` to the open ledgers: it is no operation, so dispatch does not see it.

    Libraries that empty a tensor's storage between forward and backward do it in this way. The method is
    replaced on the class only while a ledger is open.
    """

    _ledgers: list[StorageLedger] = []  # noqa: RUF012  (shared on purpose: the method it stands for is too)
    _native: Callable[[UntypedStorage, int], Any] = UntypedStorage.resize_
    _lock = threading.Lock()

    @classmethod
    def add(cls, ledger: StorageLedger) -> None:
        with cls._lock:
            if not cls._ledgers:
                setattr(UntypedStorage, "resize_", cls._resize)  # noqa: B010
            cls._ledgers.append(ledger)

    @classmethod
    def remove(cls, ledger: StorageLedger) -> None:
        with cls._lock:
            cls._ledgers.remove(ledger)
            if not cls._ledgers:
                delattr(UntypedStorage, "resize_")

    @staticmethod
    def _resize(storage: UntypedStorage, size: int) -> Any:
        before = storage.nbytes()
        result = _ResizeWatch._native(storage, size)
        for ledger in tuple(_ResizeWatch._ledgers):
            ledger.resized(storage, before)
        return result
