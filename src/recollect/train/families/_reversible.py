"""Deep reversible networks on the whole graph at once: `recollect.models.RevGNN`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from recollect import models
from recollect.train._errors import UsageError
from recollect.train._graph import TrainingGraph, with_edge_index
from recollect.train._settings import RevGNNSettings, Settings
from recollect.train.families._family import Family

__all__ = ["SAVED", "ReversibleFamily", "drift_of", "edge_inputs", "make_revgnn"]

SAVED = 5
"""Numbers of each layer and channel that norm, ReLU, dropout and convolution save in a plain step."""
_EDGE_CONVS = ("gat", "gen")


class ReversibleFamily(Family):
    """Networks that keep the output of their last layer, in any depth."""

    any_depth = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.own = cast(RevGNNSettings, settings.model)

    def inputs(self, network: nn.Module, graph: TrainingGraph) -> tuple[Tensor, ...]:
        """Features, edges and, where they are wanted and there, edge features."""
        return (graph.data.x, graph.data.edge_index, *(graph.data[name] for name in edge_inputs(self.own, graph.data)))

    def _edges(self, data: Any) -> tuple[Any, Tensor | None]:
        """``edge_index``; of a graph that was cut into parts too."""
        return (with_edge_index(data) if "adj_t" in data else data), None

    def of_parts(self, network: nn.Module, data: Any) -> tuple[Any, tuple[str, ...]]:
        """Edge features, where they are wanted and there."""
        return data, edge_inputs(self.own, data)

    def tables(self, num_classes: int) -> tuple[int, int]:
        """Activations and a gradient, and one for each of several objectives; a bit for each number and dropout."""
        channels, several = self.own.hidden_channels, self.settings.objective.name != "mean"
        masks = 2 * -(-channels // 8) if self.own.dropout else 0
        return (2 + (num_classes if several else 0)) * channels, masks

    def modes(self, network: nn.Module) -> list[str]:
        """Reversible, and with every activation kept."""
        return ["reversible", "everything kept"]

    def switch(self, network: nn.Module, second: bool) -> None:
        """Keep every activation, or recollect them."""
        cast(models.RevGNN, network).disable = second

    def observe(self, network: nn.Module, graph: TrainingGraph, errors: bool) -> dict[str, float]:
        """``drift``, the largest relative reconstruction error; NaN if nothing was reconstructed."""
        return drift_of(cast(models.RevGNN, network).last_drift)

    def size(self, num_nodes: int) -> tuple[int, int]:
        """Those of one group, which is what is computed at a time, and those of all layers."""
        features = num_nodes * self.own.hidden_channels
        return features // self.own.num_groups, features * self.own.num_layers

    def _network(self, graph: TrainingGraph, device: torch.device, num_layers: int | None) -> nn.Module:
        return make_revgnn(self.own, graph, num_layers)


def make_revgnn(own: RevGNNSettings, graph: TrainingGraph, num_layers: int | None, **further: Any) -> models.RevGNN:
    """Make the network.

    Args:
        own: its settings.
        graph: gives channels and task.
        num_layers: instead of the settings' number.
        **further: what `models.RevGNN` takes for mini-batches.

    Raises:
        UsageError: its convolution takes no edge features, and the settings give it some.
    """
    options = dict(own.conv_kwargs)
    if edge_inputs(own, graph.data):
        options.setdefault("edge_dim", graph.data.edge_attr.size(-1))
    make: Callable[..., models.RevGNN] = models.RevGNN
    return make(
        graph.data.x.size(-1),
        own.hidden_channels,
        graph.num_classes,
        own.num_layers if num_layers is None else num_layers,
        own.num_groups,
        own.conv,
        own.dropout,
        norm=own.norm,
        shared_dropout=own.shared_dropout,
        tied=own.tied,
        task=graph.task,
        anchor_every=own.anchor_every,
        disable=own.disable,
        exact=own.exact,
        conv_kwargs=options,
        **further,
    )


def edge_inputs(own: RevGNNSettings, data: Any) -> tuple[str, ...]:
    """What convolutions get of each edge: its features, where they are wanted and there.

    Raises:
        UsageError: the convolution takes none.
    """
    if not own.edge_features or data.get("edge_attr") is None:
        return ()
    if own.conv not in _EDGE_CONVS:
        raise UsageError(
            f"model.edge_features=true needs a convolution that takes edge features ({', '.join(_EDGE_CONVS)}), "
            f"and model.conv is {own.conv}"
        )
    return ("edge_attr",)


def drift_of(drift: float | None) -> dict[str, float]:
    """The column ``drift`` of an epoch."""
    return {"drift": float("nan") if drift is None else drift}
