"""Copies between the host and a device that go on beside the computation.

All that overlaps is here: streams, events and pinned buffers, and who waits for what. Whoever copies beside the
computation, histories and frames' inputs alike, does it by a :class:`Lane`. A lane takes torch's module of the device
as its backend, so that tests can put one there which writes down what happens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from recollect._devices import forms_of

__all__ = [
    "Buffer",
    "Buffers",
    "Event",
    "Fetch",
    "Lane",
    "Order",
    "Streams",
    "on_the_way",
    "sent",
    "streams_of",
    "write",
]

_T = TypeVar("_T")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; nothing waits on the way there, as far as the device can do that."""
    return tensor.to(device, non_blocking=on_the_way(tensor, device))


def write(out: Tensor, values: Tensor) -> None:
    """Copy values into a tensor, as :func:`sent` does."""
    out.copy_(values, non_blocking=on_the_way(values, out.device))


def on_the_way(values: Tensor, device: torch.device) -> bool:
    """Whether the host may go on, and change the values, while they are copied to a device."""
    return device.type != "cpu" and (values.device.type != "cpu" or forms_of(device).sends_at_once)


class Event(Protocol):
    """A place in the order of a stream's work."""

    def synchronize(self) -> None:
        """Let the host wait until all that was asked of the stream before is done."""
        ...


class Lane:
    """A stream of a device for copies alone; where a device has no streams (mps), a copy is over when it returns.

    Args:
        device: whose stream it is.
        backend: torch's module of the device; ``None``: what torch has for it.

    Attributes:
        stream: the device's; ``None`` where there are none.
    """

    def __init__(self, device: torch.device, backend: Any = None) -> None:
        self._device = device
        self._backend = torch.get_device_module(device) if backend is None else backend
        streams = all(hasattr(self._backend, name) for name in ("Stream", "stream", "current_stream"))
        self.stream = self._backend.Stream(device) if streams else None

    def current(self) -> Any:
        """Return the stream that computes; ``None`` where there are none."""
        return None if self.stream is None else self._backend.current_stream(self._device)

    def run(self, copies: Callable[[], _T], *, behind: bool) -> tuple[_T, Any]:
        """Run a function whose copies go on in this stream.

        Args:
            copies: may not wait for the host.
            behind: whether they come after what was asked of the stream that computes until now.

        Returns:
            What it returns, and the event that comes after its copies; ``None`` where there are no streams.
        """
        if self.stream is None:
            return copies(), None
        if behind:
            self.stream.wait_stream(self.current())
        with self._backend.stream(self.stream):
            result = copies()
            return result, self.stream.record_event()

    def copy(self, out: Tensor, source: Tensor, *, pinned: bool = True) -> None:
        """Copy on the current stream, and let the host go on, as it can where its memory is pinned."""
        out.copy_(source, non_blocking=pinned)

    def lend(self, memory: Tensor, stream: Any) -> None:
        """Let a stream use memory that was allocated on another one: it is given to nobody else before that is over."""
        memory.record_stream(stream)


class Fetch:
    """Values on their way to the host, beside what their device does next, in the order of its current stream.

    Where a device has no events nobody knows when a copy is over, and to read the values waits for it.

    Args:
        values: on any device; on the CPU they are there.
        backend: torch's module of the device; ``None``: what torch has for it.
    """

    def __init__(self, values: Tensor, backend: Any = None) -> None:
        self._host, self._event = values, None
        device = values.device
        if backend is None and device.type != "cpu":
            backend = torch.get_device_module(device)
        if hasattr(backend, "Event"):
            pinned = device.type == "cuda"
            self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=pinned)
            self._host.copy_(values, non_blocking=True)
            self._event = backend.Event()
            if hasattr(backend, "current_stream"):
                self._event.record(backend.current_stream(device))  # of the values' device, of several
            else:
                self._event.record()

    @property
    def is_late(self) -> bool:
        """Whether there is something to wait for."""
        return self._event is not None

    def is_here(self) -> bool:
        """Whether reading waits for nothing."""
        return self._event is None or bool(self._event.query())

    def read(self) -> Tensor:
        """Return the values on the host, and wait if they are not there."""
        if self._event is not None and not self._event.query():
            self._event.synchronize()
        return self._host.cpu()


class Order:
    """The streams that compute some tensors, for whoever uses them later, perhaps from others.

    Args:
        tensors: what was asked of the current streams of their devices.
        backend: torch's module of the devices; ``None``: what torch has for each.
    """

    def __init__(self, tensors: Sequence[Tensor], backend: Any = None) -> None:
        self._streams: dict[torch.device, tuple[Any, Any]] = {}
        for device in {tensor.device for tensor in tensors if backend is not None or not tensor.is_cpu}:
            module = torch.get_device_module(device) if backend is None else backend
            if hasattr(module, "current_stream"):
                self._streams[device] = module, module.current_stream(device)

    def before(self, tensors: Sequence[Tensor]) -> None:
        """Let the current streams come behind those that computed the tensors."""
        for device, (module, stream) in self._streams.items():
            current = module.current_stream(device)
            if current == stream:
                continue
            current.wait_stream(stream)
            for tensor in tensors:
                if tensor.device == device:
                    tensor.record_stream(current)


class Buffer:
    """Bytes in host memory, pinned if there is CUDA.

    Attributes:
        in_use: the copy from here to a device that was begun last, if any.
    """

    def __init__(self, nbytes: int) -> None:
        with torch.inference_mode(False):
            self._flat = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available())
        self.in_use: Event | None = None

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._flat.numel()

    def view(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return its first bytes as a tensor, about to be written: for autograd, earlier views change now.

        The host waits for the copy that still reads them, if any.
        """
        if self.in_use is not None:
            self.in_use.synchronize()
        self._flat[:0].zero_()
        return self._flat[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)


class Buffers:
    """Up to a number of buffers, made when they are first needed, and as large as any was before.

    Args:
        size: how many there may be at a time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._nbytes = 0
        self._free: list[Buffer] = []
        self._taken: set[Buffer] = set()

    def take(self, nbytes: int) -> Buffer | None:
        """Return a buffer of at least so many bytes, or ``None`` if all are taken."""
        if len(self._taken) == self._size:
            return None
        self._nbytes = max(self._nbytes, nbytes)
        buffer = self._free.pop() if self._free else None
        if buffer is None or buffer.nbytes < nbytes:
            buffer = Buffer(self._nbytes)
        self._taken.add(buffer)
        return buffer

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back; one that is not from here is dropped."""
        if buffer in self._taken:
            self._taken.remove(buffer)
            self._free.append(buffer)


class Streams:
    """Copies between host buffers and one device, beside what is computed there: a lane for each direction.

    Args:
        device: with streams.
        lane: makes a lane for the device.
    """

    def __init__(self, device: torch.device, lane: Callable[[torch.device], Lane] = Lane) -> None:
        self._device = device
        self._to_device = lane(device)
        self._to_host = lane(device)

    def fetch(self, x: Tensor, out: Tensor) -> Event:
        """Begin to copy ``x`` to the host, after what the current stream does to it until now."""
        _, event = self._to_host.run(lambda: self._to_host.copy(out, x), behind=True)
        self._to_host.lend(x, self._to_host.stream)
        fetched: Event = event
        return fetched

    def send(self, values: Tensor, buffer: Buffer) -> Tensor:
        """Begin to copy a buffer's ``values`` to the device."""

        def copies() -> Tensor:
            result = torch.empty_like(values, device=self._device)
            self._to_device.copy(result, values)
            return result

        result, buffer.in_use = self._to_device.run(copies, behind=False)
        return result

    def receive(self, result: Tensor, sent: Event) -> Tensor:
        """Let the current stream wait for what was sent."""
        current = self._to_device.current()
        current.wait_event(sent)
        self._to_device.lend(result, current)
        return result


@functools.cache
def _streams(device: torch.device) -> Streams:
    return Streams(device)


def streams_of(device: torch.device) -> Streams | None:
    """Return the streams of a CUDA device, one pair for all pools; of another device ``None``."""
    return _streams(device) if device.type == "cuda" else None
