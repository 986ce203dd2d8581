"""Rows that a pool was asked for, from the oldest request to the last."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.autoscale._buffers import Buffer, Buffers
from recollect.autoscale._history import History
from recollect.autoscale._selection import Selection, length
from recollect.autoscale._streams import Streams, streams_of
from recollect.autoscale._table import Table
from recollect.autoscale._worker import Worker

__all__ = ["Pull", "PullQueue"]


@dataclass(eq=False)
class Pull:
    """Rows of a history: some parts, one after the other; as long as there is no future, they wait for a buffer."""

    history: History
    parts: list[Selection]
    device: torch.device
    dtype: torch.dtype
    buffer: Buffer | None = None
    future: Future[Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and channels."""
        return sum(map(length, self.parts)), self.history.embedding_dim


class PullQueue:
    """Reads rows in a worker, into buffers.

    Args:
        size: buffers.
        capacity: values in a buffer.
        worker: that reads.
    """

    def __init__(self, size: int, capacity: int, worker: Worker) -> None:
        self._capacity = capacity
        self._worker = worker
        self._buffers = Buffers(size)
        self._pulls: deque[Pull] = deque()

    def __len__(self) -> int:
        return len(self._pulls)

    def add(self, pull: Pull) -> None:
        """Ask for rows: at once if the table is on a device, else as soon as there is a buffer."""
        if pull.history.table.records.device.type != "cpu":
            out = torch.empty(pull.shape, dtype=pull.dtype, device=pull.device)
            pull.future = Future()
            pull.future.set_result(_read(pull.history.table, pull.parts, out))
        self._pulls.append(pull)
        self.start()

    def oldest(self) -> Tensor:
        """Wait for the oldest request and return its rows."""
        pull = self._pulls[0]
        result = (pull.future or self._start(pull)).result()
        streams = streams_of(pull.device)
        if streams is None or pull.buffer is None or pull.buffer.in_use is None:
            return result.to(pull.device)
        return streams.receive(result, pull.buffer.in_use)

    def free(self) -> None:
        """Give up the oldest request, and its buffer to the first that waits for one."""
        pull = self._pulls[0]
        if pull.future is not None:
            wait([pull.future])
        self._pulls.popleft()
        if pull.buffer is not None:
            self._buffers.give(pull.buffer)
        self.start()

    def start(self, history: History | None = None) -> None:
        """Start what waits as far as there are buffers; for ``history`` all, so that nothing overtakes it there."""
        for pull in self._pulls:
            if pull.future is None and history in (None, pull.history):
                buffer = self._buffers.take(self._capacity * pull.dtype.itemsize)
                if buffer is None and history is None:
                    return
                self._start(pull, buffer)

    def settle(self, history: History) -> None:
        """Wait until all rows of a history that were asked for are read."""
        self.start(history)
        wait([pull.future for pull in self._pulls if pull.history is history and pull.future is not None])

    def _start(self, pull: Pull, buffer: Buffer | None = None) -> Future[Tensor]:
        rows, channels = pull.shape
        pull.buffer = buffer or Buffer(rows * channels * pull.dtype.itemsize)
        pull.future = self._worker.submit(_fill, pull, pull.buffer, streams_of(pull.device))
        return pull.future


def _read(table: Table, parts: list[Selection], out: Tensor) -> Tensor:
    done = 0
    for part in parts:
        table.read(part, out[done : done + length(part)])
        done += length(part)
    return out


def _fill(pull: Pull, buffer: Buffer, streams: Streams | None) -> Tensor:
    """Read into a buffer and send it on, in the worker."""
    if buffer.in_use is not None:
        buffer.in_use.synchronize()
    values = _read(pull.history.table, pull.parts, buffer.view(pull.shape, pull.dtype))
    return values if streams is None else streams.send(values, buffer)
