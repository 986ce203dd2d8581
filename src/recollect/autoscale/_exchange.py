"""Batch rows to the histories, halo rows from them: at once, or beside the computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recollect.autoscale._batch import Batch
from recollect.autoscale._history import History
from recollect.frames import in_backward

if TYPE_CHECKING:
    from recollect.autoscale._pool import AsyncIOPool

__all__ = ["Exchange"]


class Exchange:
    """What a model's layers push and pull.

    Args:
        pool: moves rows beside the computation; ``None``: each push and pull is done when it is asked for.
    """

    def __init__(self, pool: AsyncIOPool | None = None) -> None:
        self.pool = pool
        self._ahead: deque[History] = deque()  # whose pulls were started and not yet used, in this order

    def start(self, histories: Iterable[History], halo: Tensor) -> None:
        """Start the pulls of all layers of a mini-batch."""
        if self.pool is None or in_backward():
            return
        self.finish()
        self.synchronize()  # what the last mini-batch pushed may be this one's halo
        for history in histories:
            self.pool.async_pull(history, None, None, halo)
            self._ahead.append(history)

    def finish(self) -> None:
        """Discard the pulls that no layer has used."""
        while self._ahead and self.pool is not None:
            self._ahead.popleft()
            self.pool.synchronize_pull()
            self.pool.free_pull()

    def synchronize(self) -> None:
        """Wait until all that was pushed stands in the histories."""
        if self.pool is not None:
            self.pool.synchronize_push()

    def __call__(self, history: History, x: Tensor, batch: Batch) -> Tensor:
        """Push the batch's rows and return them, with those of its halo below.

        Pulling comes first: what is wrong with ``n_id`` is found before a row is written.
        """
        own = x[: batch.size]
        if self.pool is None or in_backward() or not self._ahead or self._ahead[0] is not history:
            self.synchronize()
            out = torch.cat([own, history.pull(batch.halo).to(own)])
            history.push(own.detach(), batch.n_id, batch.offset, batch.count)
            return out
        self._ahead.popleft()
        out = torch.cat([own, self.pool.synchronize_pull().to(own)])
        self.pool.free_pull()
        self.pool.async_push(history, own.detach(), batch.offset, batch.count)
        return out
