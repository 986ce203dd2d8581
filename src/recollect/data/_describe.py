"""What was understood of a graph, as a table."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.data._dataset import GraphDataset


def describe(graph: GraphDataset) -> list[tuple[str, str]]:
    """Count what a graph has.

    Returns:
        Rows of a table: what, and how much of it; and what was made or left out when it was read.

    Example:
        >>> from recollect.data import describe, load
        >>> for what, found in describe(load("karate"))[:3]:
        ...     print(f"{what}: {found}")
        graph: karate: 34 nodes, 156 edges
        edges: undirected
        self-loops: 0
    """
    data, edges = graph.data, graph.data.edge_index
    n, e = int(data.num_nodes), edges.size(1)
    loops = int((edges[0] == edges[1]).sum())
    isolated = n - int(torch.unique(edges[:, edges[0] != edges[1]]).numel())
    task = (
        f"{graph.num_classes} classes, one a node"
        if graph.task == "multiclass"
        else f"{graph.num_classes} labels a node"
    )
    parts = [f"{int(data[f'{part}_mask'].sum()):,} {part}" for part in ("train", "val", "test")]
    rest = n - sum(int(data[f"{part}_mask"].sum()) for part in ("train", "val", "test"))
    features = f"{data.x.size(1):,} a node{', which are learnt' if graph.learnt_features else ''}"
    rows = [
        ("graph", f"{graph.name}: {n:,} nodes, {e:,} edges"),
        ("edges", f"{'undirected' if is_undirected(edges, n) else 'directed'}{_weighted(data)}"),
        ("self-loops", f"{loops:,}"),
        ("repeated edges", f"{e - int(torch.unique(edges[0] * n + edges[1]).numel()):,}"),
        ("isolated nodes", f"{isolated:,}"),
        ("features", features),
        ("task", f"{graph.task}: {task}"),
        ("split", ", ".join(parts) + (f", {rest:,} in no part" if rest else "")),
    ]
    return rows + [("note", note) for note in graph.notes]


def is_undirected(edge_index: Tensor, num_nodes: int) -> bool:
    """Whether every edge is there in both directions."""
    forth = torch.unique(edge_index[0] * num_nodes + edge_index[1])
    back = torch.unique(edge_index[1] * num_nodes + edge_index[0])
    return torch.equal(forth, back)


def _weighted(data: object) -> str:
    return ", weighted" if getattr(data, "edge_weight", None) is not None else ""
