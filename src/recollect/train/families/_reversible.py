"""Deep reversible networks: `recollect.models.RevGNN`."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from recollect import models
from recollect.train._errors import UsageError
from recollect.train._graph import TrainingGraph
from recollect.train._settings import RevGNNSettings, Settings
from recollect.train.families._family import Family

__all__ = ["ReversibleFamily"]

_EDGE_CONVS = ("gat", "gen")


class ReversibleFamily(Family):
    """Networks that keep the output of their last layer, in any depth."""

    any_depth = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.own = cast(RevGNNSettings, settings.model)

    def inputs(self, network: nn.Module, graph: TrainingGraph) -> tuple[Tensor, ...]:
        """Features, edges and, where they are wanted and there, edge features."""
        found = (graph.data.x, graph.data.edge_index)
        return (*found, graph.data.edge_attr) if self._has_edge_features(graph) else found

    def modes(self, network: nn.Module) -> list[str]:
        """Reversible, and with every activation kept."""
        return ["reversible", "everything kept"]

    def switch(self, network: nn.Module, second: bool) -> None:
        """Keep every activation, or recollect them."""
        cast(models.RevGNN, network).disable = second

    def observe(self, network: nn.Module, graph: TrainingGraph, errors: bool) -> dict[str, float]:
        """``drift``, the largest relative reconstruction error; NaN if nothing was reconstructed."""
        drift = cast(models.RevGNN, network).last_drift
        return {"drift": float("nan") if drift is None else drift}

    def size(self, num_nodes: int) -> tuple[int, int]:
        """Those of one group, which is what is computed at a time, and those of all layers."""
        features = num_nodes * self.own.hidden_channels
        return features // self.own.num_groups, features * self.own.num_layers

    def _network(self, graph: TrainingGraph, device: torch.device, num_layers: int | None) -> nn.Module:
        own = self.own
        options = dict(own.conv_kwargs)
        if self._has_edge_features(graph):
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
            conv_kwargs=options,
        )

    def _has_edge_features(self, graph: TrainingGraph) -> bool:
        if not self.own.edge_features or graph.data.get("edge_attr") is None:
            return False
        if self.own.conv not in _EDGE_CONVS:
            raise UsageError(
                f"model.edge_features=true needs a convolution that takes edge features ({', '.join(_EDGE_CONVS)}), "
                f"and model.conv is {self.own.conv}"
            )
        return True
