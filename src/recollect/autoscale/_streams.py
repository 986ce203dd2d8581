"""The CUDA streams that rows travel on, beside what is computed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from recollect.autoscale._buffers import Buffer

__all__ = ["Streams", "streams_of"]


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
