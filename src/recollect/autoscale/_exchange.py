"""Batch rows to the histories, halo rows from them: at once, or beside the computation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from recollect.autoscale._batch import Batch
from recollect.autoscale._stamp import GraphStamp, belongs, take_graph
from recollect.autoscale.histories._history import History
from recollect.autoscale.histories._pool import AsyncIOPool
from recollect.autoscale.histories._ranks import RankPull, RankTable
from recollect.autoscale.histories._rows_source import Pulls, Rows, pulled_again, pushes_of
from recollect.frames import frames_apply, in_backward, in_dry_mode

__all__ = ["Exchange"]


class Exchange:
    """What a model's layers push and pull.

    Args:
        pool: moves rows beside the computation; ``None``: each push and pull is done when it is asked for.
    """

    def __init__(self, pool: AsyncIOPool | None = None) -> None:
        self.pool = pool
        self.batch: Batch | None = None  # that the model evaluates now
        self.whole: GraphStamp | None = None  # or the whole graph, if it is known
        self._ahead: deque[History] = deque()  # whose pulls were started and not yet used, in this order
        self._coming: deque[History] = deque()  # over ranks, whose pulls are to be started one layer ahead
        self._begun: deque[tuple[History, Callable[[], Tensor]]] = deque()
        # By n_id and history: the last push before the rows of a frame's forward were pulled; over ranks, their pull.
        self._seen: MutableMapping[Tensor, dict[int, RankPull | int]] = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Exchange], tuple[AsyncIOPool | None]]:
        return Exchange, (self.pool,)

    def start(self, histories: Iterable[History], batch: Batch) -> None:
        """Begin with a mini-batch: start the pulls of all layers."""
        self.batch = batch
        if in_backward():
            return
        if self.pool is None:
            self._coming.extend(history for history in histories if isinstance(history.table, RankTable))
            self._begin_next()
            return
        for history in histories:
            self.pool.async_pull(history, n_id=batch.halo)
            self._ahead.append(history)

    def finish(self) -> None:
        """End with a mini-batch: give up the pulls that no layer has used."""
        self.batch = self.whole = None
        self._coming.clear()
        self._begun.clear()
        while self._ahead and self.pool is not None:
            self._ahead.popleft()
            self.pool.free_pull()

    def fill(self, history: History, x: Tensor) -> None:
        """Push a whole graph's rows, if they are of the graph of the history."""
        if x.size(0) != history.num_embeddings or (self.whole is not None and not belongs(history, self.whole)):
            return
        take_graph(history, self.whole)
        history.push(x.detach())

    def swap(self, history: History, x: Tensor, batch: Batch) -> Tensor:
        """Push the batch's rows, the first ones of ``x``; return them with those of its halo below."""
        own = x[: batch.size]
        if own.shape != (batch.size, history.embedding_dim):
            raise ValueError(
                f"x is {list(x.shape)}, but for a mini-batch of {batch.size} nodes and a history of "
                f"{history.embedding_dim} channels at least [{batch.size}, {history.embedding_dim}] is expected"
            )
        out = self._with_halo(history, batch, lambda rows: torch.cat([own, rows.to(own)]))
        self.push(history, own, batch)
        return out

    def pull(self, history: History, batch: Batch) -> Tensor:
        """Return the rows of a mini-batch's halo, of which no gradient is taken [halo, channels]."""
        return self._with_halo(history, batch, lambda rows: rows, copied=True)

    def push(self, history: History, own: Tensor, batch: Batch) -> None:
        """Write the batch's rows, when its halo has been pulled."""
        if self.pool is None or in_backward():
            history.write(own, batch.rows)
        else:
            self.pool.write(history, own, batch.rows)

    def _with_halo(
        self, history: History, batch: Batch, use: Callable[[Tensor], Tensor], copied: bool = False
    ) -> Tensor:
        """Return what is made of the halo's rows; the pool's buffer is free again afterwards."""
        take_graph(history, batch.graph)
        if self._begun and self._begun[0][0] is history:
            _, begun = self._begun.popleft()
            self._begin_next()
            self._note(history, batch, begun)
            return use(begun())
        # In a rebuild everything is as in the forward pass, when pulls were under way; they are over.
        if self.pool is None or in_backward() or not self._ahead or self._ahead[0] is not history:
            return use(self._pulled(history, batch))
        self._ahead.popleft()
        try:
            rows = self.pool.synchronize_pull()
            out = use(rows.clone() if copied else rows)
        finally:
            self.pool.free_pull()
        self._note(history, batch)
        return out

    def source_of(self, history: History, x: Tensor, batch: Batch) -> Rows:
        """Return what brings the result of the next :meth:`swap` back in a frame: the batch's rows, and pulled ones."""
        return self._noted(Rows(history, batch.halo, first=x[: batch.size]), batch)

    def halo_source(self, history: History, batch: Batch, pulls: Pulls) -> Rows:
        """Return what brings the result of the next :meth:`pull` back in frames, once for all that come in turn."""
        return self._noted(Rows(history, batch.halo, pulls=pulls), batch)

    def _noted(self, rows: Rows, batch: Batch) -> Rows:
        if frames_apply():
            begun = self._seen_of(rows.history, batch) if in_backward() else self._begun_of(rows.history)
            rows.note(begun if isinstance(begun, RankPull) else None)
        return rows

    def _begun_of(self, history: History) -> Callable[[], Tensor] | None:
        return self._begun[0][1] if self._begun and self._begun[0][0] is history else None

    def read(self, history: History, batch: Batch) -> Callable[[], Tensor]:
        """Start to read all rows of a batch; the result waits for them and returns them [B + halo, channels]."""
        pool = self.pool
        if pool is None or batch.n_id.numel() > pool.buffer_size:
            return lambda: history.pull(batch.n_id)
        _, n_id, offset, count = batch.arguments
        pool.async_pull(history, offset, count, n_id if offset is None else batch.halo)

        def take() -> Tensor:
            try:
                return pool.synchronize_pull().clone()
            finally:
                pool.free_pull()

        return take

    def write(self, history: History, x: Tensor, batch: Batch) -> None:
        """Push the batch's rows."""
        if self.pool is None:
            history.write(x, batch.rows)
        else:
            self.pool.write(history, x, batch.rows)

    def _begin_next(self) -> None:
        """Start the next pull over ranks: of rows as they are before this step pushes others."""
        if self._coming and self.batch is not None:
            history = self._coming.popleft()
            self._begun.append((history, history.begin_pull(self.batch.halo)))

    def clear(self) -> None:
        """Give up all pulls and wait for all pushes, so that nothing is left of a pass that failed."""
        self._ahead.clear()
        if self.pool is not None:
            self.pool.clear()

    def _pulled(self, history: History, batch: Batch) -> Tensor:
        """Pull the halo; in a rebuild make sure that it is what it was in the forward pass."""
        if in_backward():
            seen, what = self._seen_of(history, batch), "halo rows that a mini-batch pulled in its forward pass"
            if isinstance(seen, RankPull):
                return pulled_again(history, batch.halo, seen.since, what, seen)
            return history.pull(batch.halo) if seen is None else pulled_again(history, batch.halo, seen, what)
        begun = history.begin_pull(batch.halo)
        self._note(history, batch, begun)
        return begun()

    def _note(self, history: History, batch: Batch, begun: Callable[[], Tensor] | None = None) -> None:
        if in_dry_mode():  # the first call of a frame, whose rebuild will pull again
            if batch.n_id not in self._seen:
                self._seen[batch.n_id] = {}
            self._seen[batch.n_id][id(history)] = begun if isinstance(begun, RankPull) else pushes_of(history)

    def _seen_of(self, history: History, batch: Batch) -> RankPull | int | None:
        return self._seen[batch.n_id].get(id(history)) if batch.n_id in self._seen else None
