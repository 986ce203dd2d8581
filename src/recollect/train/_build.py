"""The graph, the network and the optimizer that the settings ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from recollect import data
from recollect.models import RevGNN
from recollect.train._errors import TrainingError, UsageError, choose_from
from recollect.train._settings import DatasetSettings, DataSettings, ModelSettings, OptimizerSettings

__all__ = ["build_dataset", "build_model", "build_optimizer", "graph_inputs", "warmup"]

_EDGE_CONVS = ("gat", "gen")
_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD}


def build_dataset(dataset: DatasetSettings, files: DataSettings) -> data.GraphDataset:
    """Load the graph.

    Raises:
        UsageError: its name or an option is wrong.
        TrainingError: its raw files or a package are missing, or its split has an empty part.
    """
    try:
        graph = data.load(dataset.name, files.root or None, seed=files.seed, **dataset.options)
    except data.MissingRawFilesError as error:
        here = "On this command line: data.root=FOLDER, dataset.options.download=true."
        raise TrainingError(f"{error}\n{here}") from error
    except (data.InvalidRawFilesError, OSError, ImportError) as error:
        raise TrainingError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    for part in ("train", "val", "test"):
        if not bool(graph.data[f"{part}_mask"].any()):
            raise TrainingError(f"the split of {dataset.name!r} has no {part} nodes, so it cannot be used here")
    return graph


def build_model(settings: ModelSettings, graph: data.GraphDataset, num_layers: int | None = None) -> RevGNN:
    """Make the network, with parameters drawn from torch's generator.

    Args:
        settings: of the network.
        graph: gives it its channels, and its task.
        num_layers: instead of the settings' number.

    Raises:
        UsageError: the settings do not go together.
        TrainingError: torch_geometric is missing.
    """
    if num_layers is not None:
        settings = replace(settings, num_layers=num_layers)
    options = dict(settings.conv_kwargs)
    if _has_edge_features(settings, graph):
        options.setdefault("edge_dim", graph.data.edge_attr.size(-1))
    try:
        return RevGNN(
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
    except ImportError as error:
        raise TrainingError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"the model cannot be built: {error}") from error


def graph_inputs(settings: ModelSettings, graph: data.GraphDataset) -> tuple[Tensor, ...]:
    """What the network is called with: features, edges and, where they are wanted and there, edge features."""
    inputs = (graph.data.x, graph.data.edge_index)
    return (*inputs, graph.data.edge_attr) if _has_edge_features(settings, graph) else inputs


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> Optimizer:
    """Make the optimizer of the model's parameters.

    Raises:
        UsageError: a value or option is wrong.
    """
    if settings.name not in _OPTIMIZERS:
        raise UsageError(choose_from("optimizer", settings.name, _OPTIMIZERS))
    options: dict[str, Any] = dict(settings.options)
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    try:
        return _OPTIMIZERS[settings.name](
            model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, **options
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"the optimizer cannot be built: {error}") from error


def _has_edge_features(settings: ModelSettings, graph: data.GraphDataset) -> bool:
    if not settings.edge_features or graph.data.get("edge_attr") is None:
        return False
    if settings.conv not in _EDGE_CONVS:
        raise UsageError(
            f"model.edge_features=true needs a convolution that takes edge features ({', '.join(_EDGE_CONVS)}), "
            f"and model.conv is {settings.conv}"
        )
    return True


def warmup(optimizer: Optimizer, epochs: int) -> torch.optim.lr_scheduler.LinearLR:
    """Let the learning rate rise linearly to its value, which it reaches after ``epochs`` epochs."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / (epochs + 1), total_iters=epochs)
