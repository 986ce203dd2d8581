"""Offloaded tensors in host memory."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect._transfer import Lane, on_the_way
from recollect.frames._errors import InPlaceError
from recollect.frames._watch import version_of
from recollect.frames.sources._stores import Extent, Fetch, Store, Stored

__all__ = ["Copies", "HostStore", "host_store"]


class Copies(Lane):
    """Copies of frames' inputs between an accelerator and host memory, on a stream of their own.

    Device memory is allocated and given back on the stream that computes, and that stream waits for a copy before such
    memory can have another use. So memory is not held longer than the order of work asks for, however far the host is
    ahead of the device.

    Args:
        device: the accelerator.
        pin: whether host memory is pinned.
        backend: torch's module of the device; ``None``: what torch has for it.
    """

    def __init__(self, device: torch.device, pin: bool, backend: Any = None) -> None:
        super().__init__(device, backend)
        self._pin = pin and self.stream is not None

    def leave(self, tensor: Tensor, extent: Extent) -> tuple[Tensor, _Copy]:
        """Begin to copy a tensor to host memory, as it is after what was asked of the current stream until now."""
        host, flat = extent.empty("cpu", self._pin), extent.flat(tensor)
        return host, self._begin(host, flat, flat)

    def arrive(self, host: Tensor, extent: Extent) -> _Copy:
        """Begin to copy what :meth:`leave` has copied back to the device."""
        flat = extent.empty(self._device)
        return self._begin(flat, host, flat)

    def _begin(self, out: Tensor, source: Tensor, on_device: Tensor) -> _Copy:
        here = self.current()
        _, event = self.run(lambda: self.copy(out, source), behind=True)
        return _Copy(self, on_device, here, event)

    def copy(self, out: Tensor, source: Tensor, *, pinned: bool | None = None) -> None:
        """See :class:`Lane`."""
        pinned = self._pin if pinned is None else pinned
        super().copy(out, source, pinned=pinned or on_the_way(source, out.device))


class _Copy:
    """A copy that may be under way, and the device memory that it reads or writes."""

    __slots__ = ("_copies", "_event", "_memory", "_stream")

    def __init__(self, copies: Copies, memory: Tensor, stream: Any, event: Any) -> None:
        self._copies = copies
        self._memory: Tensor | None = memory
        self._stream = stream
        self._event = event

    def end(self) -> None:
        """Let the stream that began it wait for it, and give up the memory."""
        if self._memory is not None:
            if self._stream is not None:
                self._stream.wait_event(self._event)
            self._memory = None

    def take(self) -> Tensor:
        """Let the current stream wait for it, and return the memory."""
        memory = self._memory
        assert memory is not None  # a fetch is taken once
        current = self._copies.current()
        if current is not None and current != self._stream:
            current.wait_event(self._event)
            self._copies.lend(memory, current)
        self.end()
        return memory

    def __del__(self) -> None:
        if getattr(self, "_memory", None) is not None:  # dropped: by an exception, or fetched for nothing
            self.end()


class _OnHost:
    """A copy in host memory."""

    __slots__ = ("copies", "host", "leaving", "torn", "version", "watched")

    def __init__(self, copies: Copies, tensor: Tensor, extent: Extent) -> None:
        self.copies = copies
        self.torn = False
        self.watched: Any = weakref.ref(tensor)
        self.version = version_of(tensor)
        self.leaving: _Copy | None
        self.host, self.leaving = copies.leave(tensor, extent)


@functools.cache
def _copies(device: torch.device, pin: bool) -> Copies:
    return Copies(device, pin)


class HostStore(Store):
    """Host memory, for tensors on an accelerator; those on the CPU are there already.

    Args:
        pin: whether host memory is pinned.
        copies: from a device to what copies; tests put a fake here.
    """

    def __init__(self, pin: bool, copies: Callable[[torch.device, bool], Copies] = _copies) -> None:
        super().__init__()
        self._pin = pin
        self._copies = copies

    def takes(self, tensor: Tensor) -> bool:
        """See :class:`Store`."""
        return tensor.device.type != "cpu"

    def _put(self, tensors: list[Tensor]) -> list[Stored]:
        stored = []
        for tensor in tensors:
            extent = Extent(tensor)
            stored.append(Stored(tensor, extent, _OnHost(self._copies(tensor.device, self._pin), tensor, extent)))
        return stored

    def returned(self, stored: Sequence[Stored]) -> None:
        """From now on the tensors may be changed and freed: what the device does next comes after the copies."""
        for place in (one.place for one in stored):
            if place.leaving is not None:
                tensor = place.watched()
                place.torn = tensor is not None and version_of(tensor) != place.version
                place.leaving.end()
                place.leaving = None

    def fetch(self, stored: Sequence[Stored]) -> Fetch:
        """See :class:`Store`."""
        with torch.inference_mode(False), torch.no_grad():
            begun = [one.place.copies.arrive(one.place.host, one.extent) for one in stored]
        extents = [(one.extent, one.place.torn) for one in stored]

        def wait() -> list[Tensor]:
            tensors = []
            for copy, (extent, torn) in zip(begun, extents, strict=True):
                if torn:
                    raise InPlaceError(
                        f"an input of shape {list(extent.shape)} was changed in place by the region that got it, while "
                        "it was copied to host memory; change a copy instead (x = x + 1, not x += 1)"
                    )
                tensors.append(extent.restored(copy.take()))
            return tensors

        return wait


@functools.cache
def host_store(pin: bool) -> HostStore:
    """Return the store in host memory: one for all sources."""
    return HostStore(pin)
