"""Rows that a pool is writing, from the oldest to the last."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.autoscale._buffers import Buffer, Buffers
from recollect.autoscale._history import History
from recollect.autoscale._selection import Selection
from recollect.autoscale._streams import streams_of
from recollect.autoscale._table import Table
from recollect.autoscale._worker import Worker

__all__ = ["PushQueue"]


@dataclass(eq=False)
class _Push:
    history: History
    buffer: Buffer
    future: Future[None]


class PushQueue:
    """Writes rows in a worker, from buffers.

    Args:
        size: buffers.
        worker: that writes.
    """

    def __init__(self, size: int, worker: Worker) -> None:
        self._worker = worker
        self._buffers = Buffers(size)
        self._pushes: deque[_Push] = deque()
        self._failure: BaseException | None = None

    def add(self, history: History, x: Tensor, where: Selection) -> None:
        """Write ``x`` [rows, channels], which is copied first; if all buffers are taken, wait for the oldest."""
        if history.table.records.device.type != "cpu":
            history.table.write(x, where)
            return
        while (buffer := self._buffers.take(x.numel() * x.dtype.itemsize)) is None:
            self._end()
        values = buffer.view((x.size(0), x.size(1)), x.dtype)
        streams = streams_of(x.device)
        fetched = None if streams is None else streams.fetch(x, values)
        if streams is None:
            values.copy_(x)
        if isinstance(where, Tensor):
            where = where.clone()  # the caller may change it meanwhile
        self._pushes.append(_Push(history, buffer, self._worker.submit(_write, history.table, values, where, fetched)))

    def settle(self, history: History | None = None) -> None:
        """Wait until what was pushed, to one history or to all, is written."""
        while any(history in (None, push.history) for push in self._pushes):
            self._end()

    def raise_failure(self) -> None:
        """Raise what went wrong, as far as is known by now; once."""
        while self._pushes and self._pushes[0].future.done():
            self._end()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _end(self) -> None:
        """Wait for the oldest push."""
        failure = self._pushes[0].future.exception()
        self._buffers.give(self._pushes.popleft().buffer)
        self._failure = self._failure or failure


def _write(table: Table, values: Tensor, where: Selection, fetched: torch.cuda.Event | None) -> None:
    """Write what is in a buffer, or on its way there, in the worker."""
    if fetched is not None:
        fetched.synchronize()
    table.write(values, where)
