"""Copies between the host and a device that go on beside the computation: buffers, streams and events."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["Buffer", "Buffers", "Streams", "streams_of"]


class Buffer:
    """Bytes in host memory, pinned if there is CUDA.

    Attributes:
        in_use: the copy from here to a device that was begun last, if any; wait for it before writing.
    """

    def __init__(self, nbytes: int) -> None:
        with torch.inference_mode(False):
            self._flat = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available())
        self.in_use: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._flat.numel()

    def view(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return its first bytes as a tensor, about to be written: for autograd, earlier views change now."""
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
    """Copies between host buffers and one CUDA device, beside what is computed there.

    Args:
        device: the CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._to_device = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._to_host = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fetch(self, x: Tensor, out: Tensor) -> torch.cuda.Event:
        """Begin to copy ``x`` to the host, after what the current stream does to it until now."""
        self._to_host.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._to_host):
            out.copy_(x, non_blocking=True)
            x.record_stream(self._to_host)  # its memory is not given to others before
            event: torch.cuda.Event = self._to_host.record_event()
        return event

    def send(self, values: Tensor, buffer: Buffer) -> Tensor:
        """Begin to copy a buffer's ``values`` to the device."""
        with torch.cuda.stream(self._to_device):
            result = values.to(self._device, non_blocking=True)
            buffer.in_use = self._to_device.record_event()
        return result

    def receive(self, result: Tensor, sent: torch.cuda.Event) -> Tensor:
        """Let the current stream wait for what was sent."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(sent)
        result.record_stream(current)
        return result


@functools.cache
def _streams(device: torch.device) -> Streams:
    return Streams(device)


def streams_of(device: torch.device) -> Streams | None:
    """Return the streams of a CUDA device, one pair for all pools; of another device ``None``."""
    return _streams(device) if device.type == "cuda" else None
