"""Rows that a pool was asked to read or write, from the oldest request to the last, and the thread that does it."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from recollect._transfer import Buffer, Buffers, Event, Streams, sent, streams_of
from recollect.autoscale.histories._history import History
from recollect.autoscale.histories._selection import Selection, length
from recollect.autoscale.histories._table import Table

__all__ = ["Pull", "PullQueue", "PushQueue", "Worker"]

_NAME = "recollect-io"
_P = ParamSpec("_P")
_T = TypeVar("_T")


def _end(executor: ThreadPoolExecutor) -> None:
    """Let the thread finish what it was given, and wait for that; but not in it, where garbage may be collected too."""
    executor.shutdown(wait=not threading.current_thread().name.startswith(_NAME))


class Worker:
    """A thread that starts with its first job, and ends with :meth:`close`, with this object or with the process.

    In each case it first does all that it was given. So it does before the process forks: a child has no such thread,
    and finds everything done; its first job starts a thread of its own. It computes with one thread.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._last: Future[Any] | None = None
        _workers.add(self)

    def submit(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Let the thread call a function after all that was submitted before."""
        with _no_fork:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix=_NAME)
                self._finalizer = weakref.finalize(self, _end, self._executor)
            self._last = future = self._executor.submit(function, *args, **kwargs)
        return future

    def close(self) -> None:
        """Wait until all is done, and end the thread; another job starts another one."""
        if self._executor is not None:
            self._finalizer()
            self._executor = self._last = None

    def drain(self) -> None:
        """Wait until all is done."""
        if self._last is not None:
            self._last.exception()  # in their order: then all are, and the thread holds the lock of none

    def forget(self) -> bool:
        """Forget a thread that is not in this process; return whether there was one."""
        if self._executor is None:
            return False
        self._finalizer.detach()
        self._executor = self._last = None
        return True


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_no_fork = threading.RLock()


def _before_fork() -> None:
    _no_fork.acquire()
    if not threading.current_thread().name.startswith(_NAME):  # it would wait for itself
        for worker in list(_workers):
            worker.drain()


def _after_fork_in_child() -> None:
    forgotten = [worker.forget() for worker in list(_workers)]
    if any(forgotten):
        # Nor are OpenMP's other threads in the child: it would wait for them forever. Loaders' workers do so too.
        torch.set_num_threads(1)
    _no_fork.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_no_fork.release, after_in_child=_after_fork_in_child)


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
            return sent(result, pull.device)
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
    values = _read(pull.history.table, pull.parts, buffer.view(pull.shape, pull.dtype))
    return values if streams is None else streams.send(values, buffer)


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


def _write(table: Table, values: Tensor, where: Selection, fetched: Event | None) -> None:
    """Write what is in a buffer, or on its way there, in the worker."""
    if fetched is not None:
        fetched.synchronize()
    table.write(values, where)
