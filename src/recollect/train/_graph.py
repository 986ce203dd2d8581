"""The graph as a network takes it: features, adjacency, and the parts that it is cut into."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from recollect.autoscale import add_self_loops, normalize, partition, permute, to_adj_t
from recollect.data import GraphDataset
from recollect.train._errors import TrainingError, UsageError
from recollect.train._settings import ScalableSettings, Settings, TrainingSettings

__all__ = ["TrainingGraph", "prepare", "to_device"]


@dataclass(frozen=True, eq=False)
class TrainingGraph(GraphDataset):
    """A graph that was prepared.

    Attributes:
        num_edges: of the graph as it was loaded, without self-loops that a network wants.
        ptr: [num_parts + 1] int64: part ``p`` holds the nodes from ``ptr[p]`` to ``ptr[p + 1]``; or ``None``.
    """

    num_edges: int = 0
    ptr: Tensor | None = None


def prepare(settings: Settings, graph: GraphDataset) -> TrainingGraph:
    """Bring a graph into the form that the settings' network and training take.

    Networks with histories get ``adj_t`` in the place of ``edge_index``; for training on parts the nodes are in the
    order of the parts.

    Raises:
        UsageError: the parts cannot be as the settings say.
        TrainingError: the package that cuts the graph is missing.
    """
    data = copy.copy(graph.data)
    if graph.learnt_features and (settings.data.features or settings.training.name == "autoscale"):
        raise UsageError(
            "dataset.features=embedding needs data.features=null and training=full: learnt vectors are no numbers of "
            "the file; or choose dataset.features=degree"
        )
    data.x = _features(data.x, settings.data.features)
    ptr = None
    if isinstance(settings.model, ScalableSettings):
        if "edge_attr" in data:
            del data.edge_attr  # none of these networks takes it
        data = to_adj_t(data)
        if settings.training.name == "autoscale":
            perm, ptr = _partition(settings.training, data.adj_t)
            data = permute(data, perm)
        data.adj_t = _ADJACENCY[settings.model.adjacency](data.adj_t)
    known = {item.name: getattr(graph, item.name) for item in fields(GraphDataset)}
    return TrainingGraph(**known | {"data": data}, num_edges=graph.data.num_edges, ptr=ptr)


def to_device(graph: TrainingGraph, device: torch.device) -> TrainingGraph:
    """The graph on a device."""
    return replace(graph, data=copy.copy(graph.data).to(device))


_ADJACENCY = {"plain": lambda adj_t: adj_t, "loops": add_self_loops, "symmetric": normalize}


def _partition(training: TrainingSettings, adj_t: Tensor) -> tuple[Tensor, Tensor]:
    if training.num_parts > adj_t.size(0):
        raise UsageError(f"training.num_parts={training.num_parts}: the graph has only {adj_t.size(0)} nodes")
    cache = Path(training.partition_cache).expanduser() if training.partition_cache else None
    try:
        return partition(adj_t, training.num_parts, training.partition, cache=cache)  # type: ignore[arg-type]  # its values were checked with the settings
    except ImportError as error:
        raise TrainingError(f"{error}. On this command line: training.partition=random") from error


def _features(x: Tensor, how: str | None) -> Tensor:
    if how == "rows":
        return x / x.sum(dim=1, keepdim=True).clamp(min=1)  # as torch_geometric's NormalizeFeatures
    if how == "columns":
        deviation, mean = torch.std_mean(x, dim=0)
        return (x - mean) / deviation.masked_fill(deviation == 0, 1.0)
    return x
