"""What a training step is taken on: the whole graph, or some of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader, dropout
from recollect.distributed import Shares
from recollect.train._graph import TrainingGraph
from recollect.train._settings import TrainingSettings

__all__ = ["Batch", "Batches", "FullBatch", "PartBatches", "evaluation_loader", "outward_of"]


class Batch(NamedTuple):
    """One step.

    Attributes:
        inputs: what the network is called with.
        target: labels of its output's rows.
        rows: those that the loss is of [number] int64. Places and not a mask: a mask has to be turned into them in each
            step, which waits for the device.
    """

    inputs: tuple[Any, ...]
    target: Tensor
    rows: Tensor


class Batches(Protocol):
    """The steps of an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield them."""
        ...


class FullBatch:
    """One step, on the whole graph.

    Args:
        graph: on the network's device.
        inputs: what the network is called with.
        edge_dropout: share of the edges that each step leaves out; with it, ``inputs`` are features and adjacency.
    """

    def __init__(self, graph: TrainingGraph, inputs: tuple[Any, ...], edge_dropout: float = 0.0) -> None:
        self._graph = graph
        self._rows = graph.data.train_mask.nonzero().flatten()
        self._inputs = inputs
        self._edge_dropout = edge_dropout

    def __iter__(self) -> Iterator[Batch]:
        """Yield it."""
        inputs = self._inputs
        if self._edge_dropout:
            inputs = (inputs[0], dropout(inputs[1], self._edge_dropout))
        yield Batch(inputs, self._graph.data.y, self._rows)

    def largest(self) -> Batch:
        """Return the step with all edges, without a draw of random numbers."""
        return Batch(self._inputs, self._graph.data.y, self._rows)


class PartBatches:
    """Steps on parts of the graph with their halo, in another order in each epoch.

    Parts are drawn with torch's generator. Mini-batches without a training node are left out.

    Args:
        graph: cut into parts.
        training: how many parts make a step, and the share of the edges that each leaves out.
        device: of the network.
        shares: the parts of each process, where there are several: all of them take as many steps.
        names: of what the network takes of a mini-batch besides; it comes last among the inputs.

    Attributes:
        order: of the parts of this process, which it draws by itself; ``None``: torch's generator draws it.
    """

    order: Any = None

    def __init__(
        self,
        graph: TrainingGraph,
        training: TrainingSettings,
        device: torch.device,
        shares: Shares | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self._outward = outward_of(training)
        self._shares = shares
        if shares is None:
            self._loader = SubgraphLoader(
                graph.of_batches, _bounds(graph), training.parts_per_batch, shuffle=True, outward=self._outward
            )
        else:
            self.order = shares.batches(training.parts_per_batch)
            self._loader = SubgraphLoader(
                graph.of_batches, _bounds(graph), batch_sampler=self.order, outward=self._outward
            )
        self._edge_dropout = training.edge_dropout
        self._device, self._beside = device, forms_of(device).sends_at_once
        self._names = names

    def __iter__(self) -> Iterator[Batch]:
        """Yield them."""
        for sub in self._loader:
            rows = sub.data.train_mask[: sub.batch_size].nonzero().flatten()
            if not len(rows) and self._shares is None:
                continue
            data, size, *where = sub.to(self._device, non_blocking=self._beside)
            adj_t = dropout(data.adj_t, self._edge_dropout)
            outward = (data.outward,) if self._outward else ()
            named = (data[name] for name in self._names)
            yield Batch(
                (data.x, adj_t, size, *where, *outward, *named),
                data.y[:size],
                rows.to(self._device, non_blocking=self._beside),
            )


def evaluation_loader(graph: TrainingGraph, training: TrainingSettings, shares: Shares | None = None) -> SubgraphLoader:
    """Mini-batches that have every node once, or every node of this process, for layer-wise inference.

    Their loader has a generator of its own: every pass of a loader draws a number, and evaluation shall leave torch's
    generator as it is, so that a run goes on from a checkpoint with the same numbers.
    """
    if shares is not None:
        steps = shares.batches(training.parts_per_batch, shuffle=False)
        return SubgraphLoader(graph.of_batches, _bounds(graph), batch_sampler=steps, generator=torch.Generator())
    return EvalSubgraphLoader(graph.data, _bounds(graph), training.parts_per_batch, generator=torch.Generator())


def outward_of(training: TrainingSettings) -> Literal["cut", "induced", "complete"] | bool:
    """Which edges to nodes outside mini-batches have."""
    if training.compensate is None:
        return False
    if training.compensate == "complete":
        return "complete"
    return "cut" if training.combine is None else "induced"


def _bounds(graph: TrainingGraph) -> Tensor:
    if graph.ptr is None:
        raise ValueError("the graph is not cut into parts: prepare it for training=autoscale")
    return graph.ptr
