"""The network that the settings ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect import models
from recollect.autoscale import HistoryFileError, ScalableGNN
from recollect.train._embedding import learn_features
from recollect.train._errors import TrainingError, UsageError
from recollect.train._graph import TrainingGraph
from recollect.train._settings import ModelSettings, RevGNNSettings, ScalableSettings, TrainingSettings

__all__ = ["build_model", "build_scalable", "graph_inputs"]

_EDGE_CONVS = ("gat", "gen")
_SCALABLE: dict[str, Callable[..., ScalableGNN]] = {
    "appnp": models.APPNP,
    "gat": models.GAT,
    "gcn": models.GCN,
    "gcn2": models.GCN2,
    "gin": models.GIN,
    "pna": models.PNA,
    "pna_jk": models.PNA_JK,
}


def build_model(
    settings: ModelSettings,
    graph: TrainingGraph,
    training: TrainingSettings | None = None,
    device: torch.device | None = None,
    num_layers: int | None = None,
) -> nn.Module:
    """Make the network, with parameters drawn from torch's generator.

    Args:
        settings: of the network.
        graph: gives it its channels, and its task.
        training: says which histories it has; without it, or for training on the whole graph, it has none.
        device: of histories, where the settings choose none.
        num_layers: instead of the settings' number.

    Raises:
        UsageError: the settings do not go together.
        TrainingError: torch_geometric is missing, or a file of histories cannot be used.
    """
    if num_layers is not None:
        settings = replace(settings, num_layers=num_layers)
    network = _network(settings, graph, training, device)
    if graph.learnt_features:
        learn_features(network, graph.data.x)
    return network


def _network(
    settings: ModelSettings, graph: TrainingGraph, training: TrainingSettings | None, device: torch.device | None
) -> nn.Module:
    try:
        if isinstance(settings, RevGNNSettings):
            return _reversible(settings, graph)
        if isinstance(settings, ScalableSettings):
            if training is None or training.name == "full":
                return build_scalable(settings, graph, keep_histories=False)
            return build_scalable(settings, graph, **_history_options(training, graph.data.num_nodes, device))
    except (ImportError, OSError, HistoryFileError) as error:
        raise TrainingError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"the model cannot be built: {error}") from error
    raise UsageError(f"model.kind={settings.kind} is no known network")


def build_scalable(settings: ScalableSettings, graph: TrainingGraph, **histories: Any) -> ScalableGNN:
    """Make a network with histories; their options are those of `recollect.autoscale.ScalableGNN`."""
    options = dict(settings.options)
    if settings.kind in ("pna", "pna_jk"):
        options["deg"] = graph.data.adj_t.crow_indices().diff()
    return _SCALABLE[settings.kind](
        num_nodes=graph.data.num_nodes,
        in_channels=graph.data.x.size(-1),
        hidden_channels=settings.hidden_channels,
        out_channels=graph.num_classes,
        num_layers=settings.num_layers,
        dropout=settings.dropout,
        **options,
        **histories,
    )


def graph_inputs(settings: ModelSettings, graph: TrainingGraph) -> tuple[Tensor, ...]:
    """What the network is called with: features, edges and, where they are wanted and there, edge features."""
    if isinstance(settings, ScalableSettings):
        return graph.data.x, graph.data.adj_t
    inputs = (graph.data.x, graph.data.edge_index)
    return (*inputs, graph.data.edge_attr) if _has_edge_features(settings, graph) else inputs


def _reversible(settings: RevGNNSettings, graph: TrainingGraph) -> models.RevGNN:
    options = dict(settings.conv_kwargs)
    if _has_edge_features(settings, graph):
        options.setdefault("edge_dim", graph.data.edge_attr.size(-1))
    return models.RevGNN(
        graph.data.x.size(-1),
        settings.hidden_channels,
        graph.num_classes,
        settings.num_layers,
        settings.num_groups,
        settings.conv,
        settings.dropout,
        norm=settings.norm,  # type: ignore[arg-type]  # its values were checked with the settings
        shared_dropout=settings.shared_dropout,
        tied=settings.tied,
        task=graph.task,
        anchor_every=settings.anchor_every,
        disable=settings.disable,
        conv_kwargs=options,
    )


def _history_options(training: TrainingSettings, num_nodes: int, device: torch.device | None) -> dict[str, Any]:
    path = training.history_path
    return {
        "pool_size": training.pool_size,
        "buffer_size": (training.buffer_size or num_nodes) if training.pool_size else None,
        "device": None if path else training.history_device or device,
        "history_dtype": getattr(torch, training.history_dtype),
        "history_path": Path(path).expanduser() if path else None,
    }


def _has_edge_features(settings: ModelSettings, graph: TrainingGraph) -> bool:
    if not isinstance(settings, RevGNNSettings) or not settings.edge_features or graph.data.get("edge_attr") is None:
        return False
    if settings.conv not in _EDGE_CONVS:
        raise UsageError(
            f"model.edge_features=true needs a convolution that takes edge features ({', '.join(_EDGE_CONVS)}), "
            f"and model.conv is {settings.conv}"
        )
    return True
