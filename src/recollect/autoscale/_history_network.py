"""Networks that own histories: what they are, how old they are, and whose nodes their rows are."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any, Self

import torch

from recollect._arguments import as_count
from recollect.autoscale._batch import Batch
from recollect.autoscale._combination import Combination
from recollect.autoscale._exchange import Exchange
from recollect.autoscale._making import HistoryOptions, as_channels, widths_of
from recollect.autoscale._network import LayeredGNN
from recollect.autoscale.histories._history import History

__all__ = ["HistoryGNN"]


class HistoryGNN(LayeredGNN):
    """A network with a history for each of its layers but the last; arguments are those of ``ScalableGNN``.

    Attributes:
        num_nodes: N; 0 where there shall be no histories at all.
    """

    def __init__(
        self,
        num_nodes: int | None,
        hidden_channels: int | Sequence[int],
        num_layers: int,
        pool_size: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        *,
        histories: HistoryOptions | None = None,
        recompute: bool = False,
        compensate: bool = False,
        combine: Combination | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_layers, recompute)
        self.compensate = compensate
        self.combine = combine
        given = {"pool_size": pool_size, "buffer_size": buffer_size, "device": device}
        self.history_options = (histories or HistoryOptions()).updated(**given, **options)
        self.num_nodes = self._count_of(num_nodes)
        self.hidden_channels = as_channels(hidden_channels)
        self._make_histories()
        self._told = False  # that they were not filled

    def _count_of(self, num_nodes: int | None) -> int:
        """Return the number of nodes, checked."""
        return as_count("num_nodes", num_nodes, ", such as data.num_nodes")

    def _widths(self) -> list[int]:
        """Return the width of each history."""
        return widths_of(self.hidden_channels, self.num_layers)

    def _make_histories(self) -> None:
        widths = self._widths() if self.num_nodes else []
        self.pool = self.history_options.make_pool(widths)
        self.histories = self.history_options.make_histories(self.num_nodes, widths)
        self._exchange = Exchange(self.pool)

    @property
    def keep_histories(self) -> bool:
        """Whether there are histories for mini-batches."""
        return self.history_options.keep

    @property
    def pool_size(self) -> int | None:
        """Buffers of the pool; ``None``: there is no pool."""
        return self.history_options.pool_size

    @property
    def buffer_size(self) -> int | None:
        """Rows of each of the pool's buffers; ``None``: there is no pool."""
        return self.history_options.buffer_size

    @property
    def emb_device(self) -> torch.device:
        """On which the histories lie."""
        for history in self.tables:
            return history.table.records.device
        return torch.device(self.history_options.device or "cpu")

    @property
    def device(self) -> torch.device:
        """On which the network computes, and its histories return what is pulled."""
        for history in self.tables:
            return history.out_device
        return next((tensor.device for tensor in self.parameters()), self.emb_device)

    def staleness(self) -> list[float]:
        """Return the mean age of each history's rows: how often the history was pushed to since a row was.

        Rows that were never pushed, which are 0, count as old as the history; :meth:`never_pushed` tells how many there
        are. A history that was never pushed to at all has no age: it is infinite. See
        :func:`~recollect.autoscale.history_errors` for how wrong the rows are.

        Raises:
            RuntimeError: the network was made with ``keep_histories=False``.
        """
        ages = [float(history.age().to(torch.float64).mean()) for history in self.tables]
        return [age if history.table.clock.pushes else math.inf for age, history in zip(ages, self.tables, strict=True)]

    def never_pushed(self) -> list[int]:
        """Return how many rows of each history are still 0: their nodes were in no mini-batch, and nothing filled them.

        ``model(loader=loader)`` fills them all.

        Raises:
            RuntimeError: the network was made with ``keep_histories=False``.
        """
        return [history.never_pushed() for history in self.tables]

    @property
    def tables(self) -> list[History]:
        """The histories, as what they are."""
        return [history for history in self.histories if isinstance(history, History)]

    def for_graph(self, num_nodes: int, histories: HistoryOptions | None = None) -> Self:
        """Return this network for another graph: with histories of its own, which are empty, and the same parameters.

        Submodules are shared too, and so is their mode: training one network trains the other.

        Args:
            num_nodes: of the other graph.
            histories: their options; default: those of this network. If these have a path, another one is needed.

        Raises:
            ValueError: a number is out of its range, or both would have their histories in the same files.
        """
        options = histories or self.history_options
        if options.path is not None and options.path == self.history_options.path:
            raise ValueError(
                f"the histories of this network lie in {str(options.path)!r}, which cannot be those of another graph "
                "too: give HistoryOptions with another path"
            )
        other = copy.copy(self)
        other.__dict__ |= {name: copy.copy(value) for name, value in self.__dict__.items() if isinstance(value, dict)}
        other.history_options = options
        other.num_nodes = as_count("num_nodes", num_nodes, ", such as data.num_nodes")
        other._make_histories()
        other._told = False
        for ours, theirs in zip(self.tables, other.tables, strict=True):
            theirs.to(ours.out_device, ours.out_dtype)
        return other

    def warn_of_unfilled(self, batch: Batch) -> None:
        """Say once that a mini-batch is trained on rows that nobody pushed."""
        if self._told or not (self.training and torch.is_grad_enabled() and batch.halo.numel() and self.keep_histories):
            return
        self._told = True
        unfilled = self.never_pushed()
        if any(unfilled):
            warnings.warn(
                f"histories are not filled: of {self.num_nodes} rows, {', '.join(map(str, unfilled))} were never "
                "pushed and are 0, and training pulls such rows for the halo of this mini-batch; fill them before "
                "the first step by model(loader=EvalSubgraphLoader(data, ptr))",
                stacklevel=3,
            )
