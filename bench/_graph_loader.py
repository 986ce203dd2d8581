"""How many edges a second a loader cuts out of a graph, side by side with sorting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from bench._harness import alternating, median
from bench._report import OTHER_SIZE, Target, ratio, show, table
from recollect.autoscale import SubData, SubgraphLoader

PYGAS_EDGES_PER_SECOND = (
    6.3e6  # its compiled relabelling, one thread, measured on LOADED[0] once; it is not installable
)
SORTING = "a sorting unique"
RECOLLECT = "recollect"


@dataclass(frozen=True)
class Loaded:
    """A graph in parts of equal size, and how many of them make a mini-batch.

    Attributes:
        name: in tables.
        nodes: N.
        edges: E, directed. Targets are random.
        parts: P.
        parts_at_once: in a mini-batch.
        local: share of edges whose source is a random node of the same part; all other sources are any random nodes.
    """

    name: str
    nodes: int
    edges: int
    parts: int
    parts_at_once: int
    local: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.nodes:,} nodes, {self.edges:,} edges, {self.local:.0%} inside of parts; "
            f"mini-batches of {self.parts_at_once:,} parts x {self.nodes // self.parts:,} nodes"
        )


LOADED = (
    Loaded("random", 1_000_000, 10_000_000, 1_000, 20),
    Loaded("partitioned", 1_000_000, 10_000_000, 1_000, 20, local=0.8),
    Loaded("few big parts", 1_000_000, 10_000_000, 20, 1, local=0.8),
    Loaded("many small parts", 1_000_000, 10_000_000, 100_000, 2_000, local=0.8),
    Loaded("many nodes", 10_000_000, 10_000_000, 10_000, 20, local=0.8),
    Loaded("small", 2_700, 10_800, 40, 10, local=0.8),
)
QUICK = (Loaded("random", 2_000, 20_000, 20, 4), Loaded("partitioned", 2_000, 20_000, 20, 4, local=0.8))


def make_graph(work: Loaded, device: torch.device, seed: int = 0) -> tuple[Data, Tensor]:
    """The graph, without features: they would take as long to copy for everybody; and where its parts begin."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(work.nodes, (work.edges,), generator=generator)
    source = torch.randint(work.nodes, (work.edges,), generator=generator)
    size = work.nodes // work.parts
    neighbour = target // size * size + torch.randint(size, (work.edges,), generator=generator)
    stays = (torch.rand(work.edges, generator=generator) < work.local) & (neighbour < work.nodes)
    edge_index = torch.stack([torch.where(stays, neighbour, source), target])
    ptr = (torch.arange(work.parts + 1) * size).clamp_(max=work.nodes)
    ptr[-1] = work.nodes
    data = Data(edge_index=edge_index, num_nodes=work.nodes, node_order=torch.arange(work.nodes))
    return data.to(device), ptr


def mini_batches(work: Loaded, number: int, seed: int = 0) -> list[list[int]]:
    """Random parts for each of some mini-batches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(work.parts, generator=generator)[: work.parts_at_once].tolist() for _ in range(number)]


class Sorting:
    """What a loader does without a table of marks: sorts the nodes of a mini-batch with all of its sources."""

    def __init__(self, adj_t: Tensor, ptr: Tensor) -> None:
        self._rowptr, self._col, self._value = adj_t.crow_indices(), adj_t.col_indices(), adj_t.values()
        self._node_ptr = ptr.tolist()
        self._edge_ptr = self._rowptr[ptr.to(adj_t.device)].tolist()

    def __call__(self, parts: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        """The adjacency of these parts, their nodes and halo, and the number of the parts' nodes."""
        nodes = [(self._node_ptr[part], self._node_ptr[part + 1]) for part in parts]
        edges = [(self._edge_ptr[part], self._edge_ptr[part + 1]) for part in parts]
        inside = torch.cat([torch.arange(start, stop, device=self._col.device) for start, stop in nodes])
        source = torch.cat([self._col[start:stop] for start, stop in edges])
        distinct, place = torch.unique(torch.cat([inside, source]), return_inverse=True)
        number = torch.full_like(distinct, -1)
        number[place[: inside.numel()]] = torch.arange(inside.numel(), device=inside.device)
        outside = number < 0
        halo = distinct[outside]
        number[outside] = torch.arange(inside.numel(), inside.numel() + halo.numel(), device=inside.device)
        rowptr = self._rowptr.new_zeros(inside.numel() + 1)
        torch.cumsum(self._rowptr[inside + 1] - self._rowptr[inside], 0, out=rowptr[1:])
        value = torch.cat([self._value[start:stop] for start, stop in edges])
        n_id = torch.cat([inside, halo])
        size = (inside.numel(), n_id.numel())
        col = number[place[inside.numel() :]]
        return torch.sparse_csr_tensor(rowptr, col, value, size, check_invariants=False), n_id, inside.numel()


def loader_figures(
    work: Loaded, *, repeats: int = 7, number: int = 10, device: torch.device | None = None
) -> dict[str, Any]:
    """Cut the same mini-batches with `SubgraphLoader`, nothing left out but features, and by sorting, taking turns.

    Args:
        work: the graph and its mini-batches.
        repeats: of the timing.
        number: of mini-batches in each repeat.
        device: default: the CPU.

    Returns:
        `workload`; `edges` and `halo` of the mean mini-batch; and by system `milliseconds` for a mini-batch (median)
        and `edges_per_second`.
    """
    device = device or torch.device("cpu")
    data, ptr = make_graph(work, device)
    chosen = mini_batches(work, number)
    loader = SubgraphLoader(data, ptr, log=False, batch_sampler=chosen)
    sorting = Sorting(loader.data.adj_t, ptr)
    found: list[SubData] = list(loader)  # also the first mini-batch, which makes the table
    systems: dict[str, Callable[[], Any]] = {
        RECOLLECT: lambda: [None for _ in loader],
        SORTING: lambda: [sorting(parts) for parts in chosen],
    }
    edges = sum(batch.data.adj_t.values().numel() for batch in found)
    halo = sum(batch.n_id.numel() - batch.batch_size for batch in found)
    del found
    seconds = {name: median(times) for name, times in alternating(systems, repeats, device).items()}
    return {
        "workload": str(work),
        "edges": edges / number,
        "halo": halo / number,
        "milliseconds": {name: value and 1e3 * value / number for name, value in seconds.items()},
        "edges_per_second": {name: value and edges / value for name, value in seconds.items()},
    }


def loader_targets(work: Loaded, figures: dict[str, Any]) -> list[Target]:
    """Hold the figures of the first of `LOADED` against the numbers to reach."""
    ours = figures["edges_per_second"][RECOLLECT] if work == LOADED[0] else None
    return [
        Target(
            "loader: twice the edges/s of PyGAS's compiled relabelling, over recollect's",
            ratio(2 * PYGAS_EDGES_PER_SECOND, ours),
            1.0,
            why_not_measured=OTHER_SIZE,
        )
    ]


def loader_table(works: Sequence[Loaded], rows: Sequence[dict[str, Any]]) -> str:
    """Millions of edges per second, one line for each graph."""
    systems = (RECOLLECT, SORTING)
    body = [
        [work.name, show(row["edges"], ",.0f"), *(show(row["edges_per_second"][name], ".1f", 1e6) for name in systems)]
        for work, row in zip(works, rows, strict=True)
    ]
    return table(["graph", "edges in a batch", *(f"{name}, M edges/s" for name in systems)], body)
