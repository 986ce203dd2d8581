"""Pulls and pushes beside the computation."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from recollect._arguments import as_count
from recollect.autoscale.histories._history import History
from recollect.autoscale.histories._queues import Pull, PullQueue, PushQueue, Worker
from recollect.autoscale.histories._selection import (
    Integers,
    Selection,
    check_values,
    length,
    select_batch,
    select_parts,
)
from recollect.frames import in_backward

__all__ = ["AsyncIOPool"]


class AsyncIOPool:
    """Lets a thread read and write histories in host memory or in files while the model computes.

    Everything comes out as if each call did its work at once, bit for bit: what is pulled holds what was pushed before
    it and nothing that was pushed after it, and the histories' own methods wait for what is still under way on them.

    Ask for the rows of all layers first, and take them in that order::

        for history in histories:
            pool.async_pull(history, n_id=n_id[batch_size:])
        for layer, history in zip(layers, histories):
            x = layer(x, adj_t)[:batch_size]
            pool.async_push(history, x, offset, count)
            x = torch.cat([x, pool.synchronize_pull()])
            pool.free_pull()

    The next mini-batch need not wait for the pushes: its pulls come after them. For a model on a CUDA device, rows pass
    through pinned buffers and travel on streams of their own (arXiv 2106.05609, section 5). A history whose table is on
    a device is read and written at once, on the current stream.

    One thread at a time may use a pool. Its own thread ends with :meth:`close`, with the pool or with the process, and
    before that does all that was asked for.

    Args:
        pool_size: pulls, and pushes, that are under way at a time. Further pulls wait for :meth:`free_pull`; a further
            push waits for the oldest.
        buffer_size: rows of a pull, at most: those of the largest halo.
        embedding_dim: channels of the widest history.

    Raises:
        ValueError: an argument is no integer, or below 1.

    Example:
        >>> import torch
        >>> from recollect.autoscale import AsyncIOPool, History
        >>> history = History(10, 4)
        >>> with AsyncIOPool(pool_size=2, buffer_size=10, embedding_dim=4) as pool:
        ...     pool.async_push(history, torch.ones(3, 4), offset=torch.tensor([2]), count=torch.tensor([3]))
        ...     pool.async_pull(history, n_id=torch.tensor([1, 2]))
        ...     print(pool.synchronize_pull()[:, 0])
        ...     pool.free_pull()
        tensor([0., 1.])
    """

    def __init__(self, pool_size: int, buffer_size: int, embedding_dim: int) -> None:
        self.pool_size = as_count("pool_size", pool_size)
        self.buffer_size = as_count("buffer_size", buffer_size)
        self.embedding_dim = as_count("embedding_dim", embedding_dim)
        self._worker = Worker()
        self._open()

    def _open(self) -> None:
        self._pulls = PullQueue(self.pool_size, self.buffer_size * self.embedding_dim, self._worker)
        self._pushes = PushQueue(self.pool_size, self._worker)

    def async_pull(
        self,
        history: History,
        offset: Integers | None = None,
        count: Integers | None = None,
        n_id: Tensor | None = None,
    ) -> None:
        """Begin to read the rows ``offset[k] : offset[k] + count[k]`` of all parts k, then the rows ``n_id``.

        Raises:
            TypeError, ValueError, IndexError: as for :meth:`History.push`; more rows than ``buffer_size``, or a history
                that is wider than ``embedding_dim``.
            Exception: what went wrong in an earlier push.
        """
        parts = select_parts(n_id, offset, count, history.num_embeddings)
        pull = Pull(history, parts, history.out_device, history.out_dtype)
        rows, channels = pull.shape
        if rows > self.buffer_size or channels > self.embedding_dim:
            raise ValueError(
                f"this pull needs AsyncIOPool(..., buffer_size={rows}, embedding_dim={channels}) at least "
                f"(got buffer_size={self.buffer_size}, embedding_dim={self.embedding_dim})"
            )
        self._begin(history)
        self._pulls.add(pull)

    def synchronize_pull(self) -> Tensor:
        """Return the rows of the oldest pull, [rows, embedding_dim of its history], on the history's ``out_device``.

        On the CPU they lie in a buffer: copy what is needed after :meth:`free_pull`, which is to follow, also after an
        error.

        Raises:
            RuntimeError: there is no pull.
            Exception: what went wrong in reading these rows, or in an earlier push.
        """
        self._check_pulls()
        rows = self._pulls.oldest()
        self._pushes.raise_failure()
        return rows

    def free_pull(self) -> None:
        """Give up the rows of the oldest pull; its buffer goes to the next that waits for one.

        Raises:
            RuntimeError: there is no pull.
        """
        self._check_pulls()
        self._pulls.free()

    @torch.no_grad()
    def async_push(
        self,
        history: History,
        x: Tensor,
        offset: Integers | None = None,
        count: Integers | None = None,
        n_id: Tensor | None = None,
    ) -> None:
        """Begin to write rows, as :meth:`History.push` does; ``x`` may be changed at once. In a rebuild: nothing.

        Raises:
            TypeError, ValueError, IndexError: as for :meth:`History.push`.
            Exception: what went wrong in an earlier push.
        """
        if in_backward():
            return
        where = select_batch(n_id, offset, count, history.num_embeddings)
        self.write(history, check_values(x, length(where), history.embedding_dim, exact=offset is None), where)

    @torch.no_grad()
    def write(self, history: History, x: Tensor, where: Selection) -> None:
        """Do what :meth:`async_push` does, for rows that were selected already."""
        if in_backward():
            return
        x = check_values(x, length(where), history.embedding_dim, exact=False)
        self._begin(history)
        self._pulls.start(history)
        self._pushes.add(history, x, where)

    def synchronize_push(self) -> None:
        """Wait until all that was pushed is written.

        Raises:
            Exception: what went wrong in a push; the first of several.
        """
        self._pushes.settle()
        self._pushes.raise_failure()

    def settle(self, history: History) -> None:
        """Wait until this history is read and written as far as it was asked for.

        Raises:
            Exception: what went wrong in a push.
        """
        self._pulls.settle(history)
        self._pushes.settle(history)
        self._pushes.raise_failure()

    def clear(self) -> None:
        """Give up all pulls, as after an error between asking for them and taking them, and wait for the pushes.

        Raises:
            Exception: what went wrong in a push.
        """
        while self._pulls:
            self._pulls.free()
        self.synchronize_push()

    def close(self) -> None:
        """Give up all pulls, do the pushes, end the thread, free the buffers. Another call starts anew.

        Raises:
            Exception: what went wrong in a push.
        """
        try:
            self.clear()
        finally:
            self._worker.close()
            self._open()

    def _begin(self, history: History) -> None:
        """Have done with what must come before anything on this history."""
        self._pushes.raise_failure()
        history.settle(beside=self)
        history.used_by(self)

    def _check_pulls(self) -> None:
        if not self._pulls:
            raise RuntimeError("there is no pull: each synchronize_pull() and free_pull() needs an async_pull() before")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[AsyncIOPool], tuple[int, int, int]]:
        return AsyncIOPool, (self.pool_size, self.buffer_size, self.embedding_dim)
