"""Deep reversible networks on parts of the graph, with histories for what is around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from recollect import models
from recollect.autoscale import ScalableGNN
from recollect.train._batches import Batches
from recollect.train._graph import TrainingGraph
from recollect.train._settings import RevGNNSettings, Settings
from recollect.train.families._histories import PLAIN, HistoriesFamily
from recollect.train.families._reversible import SAVED, drift_of, edge_inputs, make_revgnn

__all__ = ["ReversiblePartsFamily"]


class ReversiblePartsFamily(HistoriesFamily):
    """Networks that keep one layer of a few parts, in any depth and on any graph."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.own = cast(RevGNNSettings, settings.model)

    def names(self, data: Any) -> tuple[str, ...]:
        """Edge features, where they are wanted and there."""
        return edge_inputs(self.own, data)

    def inputs(self, network: nn.Module, graph: TrainingGraph) -> tuple[Tensor, ...]:
        """Features, adjacency and what `names` says."""
        return (*super().inputs(network, graph), *(graph.data[name] for name in self.names(graph.data)))

    def call(self, model: Callable[..., Any], inputs: tuple[Any, ...]) -> Tensor:
        """Call it, with what comes last by name."""
        names = cast(models.RevGNN, model).inputs
        first = len(inputs) - len(names)
        named = dict(zip(names, inputs[first:], strict=True))
        if first > PLAIN:
            return self.corrected(model, inputs[:PLAIN], {"outward": inputs[PLAIN], **named})
        return cast(Tensor, model(*inputs[:first], **named))

    def modes(self, network: nn.Module) -> list[str]:
        """Reversible on parts, and on the whole graph with every activation kept."""
        return ["histories", "whole graph, everything kept"]

    def switch(self, network: nn.Module, second: bool) -> None:
        """Keep every activation, or recollect them."""
        cast(models.RevGNN, network).disable = second or self.own.disable

    def observe(self, network: nn.Module, graph: TrainingGraph, errors: bool) -> dict[str, float]:
        """What histories and reconstruction left to be seen."""
        return drift_of(cast(models.RevGNN, network).last_drift) | super().observe(network, graph, errors)

    def plain_bytes(self, network: nn.Module, graph: TrainingGraph, batches: Batches, peak: int) -> tuple[int, int]:
        """At most a layer of the whole graph for each layer, and about what layers save of each channel."""
        _, one = super().plain_bytes(network, graph, batches, peak)
        _, activations = self.size(graph.data.num_nodes)
        most = one * self.own.num_layers
        return most, min(most, one + 4 * SAVED * activations)

    def _build(self, graph: TrainingGraph, num_layers: int | None = None, **histories: Any) -> ScalableGNN:
        names = self.names(graph.data)
        return make_revgnn(self.own, graph, num_layers, num_nodes=graph.data.num_nodes, inputs=names, **histories)
