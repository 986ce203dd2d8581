"""The graph as a network takes it: features, adjacency, and the parts that it is cut into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recollect.autoscale import add_self_loops, edge_index_of, normalize, own_graph, partition
from recollect.data import GraphDataset
from recollect.distributed import Shares
from recollect.train._errors import TrainingError, UsageError
from recollect.train._settings import TrainingSettings

if TYPE_CHECKING:
    from recollect.autoscale.loader import OwnGraph

__all__ = ["ADJACENCY", "TrainingGraph", "cut", "scaled_features", "to_device", "with_edge_index"]

ADJACENCY: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda adj_t: adj_t,
    "loops": add_self_loops,
    "symmetric": normalize,
}


@dataclass(frozen=True, eq=False)
class TrainingGraph(GraphDataset):
    """A graph that was prepared.

    Attributes:
        num_edges: of the graph as it was loaded, without self-loops that a network wants.
        ptr: [num_parts + 1] int64: part ``p`` holds the nodes from ``ptr[p]`` to ``ptr[p + 1]``; or ``None``.
        own: of one of several processes, what its mini-batches are cut from; ``data`` then has labels and masks alone.
    """

    num_edges: int = 0
    ptr: Tensor | None = None
    own: OwnGraph | None = None

    @property
    def of_batches(self) -> Any:
        """What mini-batches are cut from."""
        return self.data if self.own is None else self.own

    def in_part(self, shares: Shares, names: Sequence[str], outward: bool) -> TrainingGraph:
        """Return what one of several processes needs of the graph.

        Args:
            shares: whose parts are whose.
            names: of what the network takes beside features and adjacency.
            outward: whether mini-batches have edges to nodes outside.
        """
        labels = ["y", *(f"{part}_mask" for part in ("train", "val", "test"))]
        taken = {name: self.data[name] for name in dict.fromkeys(["x", "adj_t", "node_order", *labels, *names])}
        number, kind = self.data.num_nodes, type(self.data)
        own = own_graph(kind(**taken, num_nodes=number), shares, outward=outward)
        return replace(self, data=kind(**{name: taken[name] for name in labels}, num_nodes=number), own=own)


def to_device(graph: TrainingGraph, device: torch.device) -> TrainingGraph:
    """The graph on a device."""
    return replace(graph, data=copy.copy(graph.data).to(device))


def cut(training: TrainingSettings, adj_t: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a graph into parts.

    Returns:
        The nodes in the order of the parts [num_nodes] int64, and the bounds of the parts [num_parts + 1] int64.

    Raises:
        UsageError: there are more parts than nodes.
        TrainingError: the package that cuts the graph is missing.
    """
    if training.num_parts > adj_t.size(0):
        raise UsageError(
            f"training.num_parts={training.num_parts}: the graph has only {adj_t.size(0)} nodes, and a part has one at "
            f"least; write training.num_parts={min(adj_t.size(0), 4)}, or another number up to {adj_t.size(0)}"
        )
    cache = Path(training.partition_cache).expanduser() if training.partition_cache else None
    try:
        return partition(adj_t, training.num_parts, training.partition, cache=cache)  # type: ignore[arg-type]  # its values were checked with the settings
    except ImportError as error:
        raise TrainingError(f"{error}. On this command line: training.partition=random") from error
    except OSError as error:
        raise TrainingError(f"training.partition_cache={cache} cannot be used: {error}") from error


def with_edge_index(data: Any) -> Any:
    """A shallow copy with ``edge_index`` in the place of ``adj_t``, in its order, and without weights."""
    data = copy.copy(data)
    data.edge_index = edge_index_of(data.adj_t)
    del data.adj_t
    return data


def scaled_features(x: Tensor, how: str | None) -> Tensor:
    """Features [num_nodes, F] with rows that sum to 1, or columns of mean 0 and deviation 1; None: as they are."""
    if how == "rows":
        return x / x.sum(dim=1, keepdim=True).clamp(min=1)  # as torch_geometric's NormalizeFeatures
    if how == "columns":
        deviation, mean = torch.std_mean(x, dim=0)
        return (x - mean) / deviation.masked_fill(deviation == 0, 1.0)
    return x
