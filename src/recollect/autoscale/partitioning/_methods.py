"""METIS, by pymetis, and KaMinPar, by kaminpar."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from recollect.autoscale._require import require
from recollect.autoscale.partitioning._undirected import Undirected, undirected
from recollect.autoscale.partitioning._weights import whole

__all__ = ["kaminpar_clusters", "metis_clusters", "write_parhip"]


def metis_clusters(
    adj_t: Tensor,
    num_parts: int,
    *,
    seed: int = 0,
    recursive: bool = False,
    weighted: bool = False,
    node_weight: Tensor | None = None,
) -> Tensor:
    """The part of each node, [N] int64, as METIS finds it.

    Args:
        adj_t: The graph, ``torch.sparse_csr`` [N, N].
        num_parts: At least 1.
        seed: Of METIS's random numbers.
        recursive: Halve again and again rather than divide into all parts at once.
        weighted: The values of ``adj_t`` are edge weights.
        node_weight: [N], not negative: what the parts are to have the same sum of; default: the number of nodes.

    Raises:
        ImportError: pymetis is not installed.
    """
    pymetis = require("pymetis", 'method="metis"', '; or choose method="random" or "contiguous"')
    graph = undirected(adj_t, weighted)
    if num_parts == 1 or num_parts >= adj_t.size(0):  # nothing to decide, and METIS complains
        return torch.arange(adj_t.size(0), device="cpu").clamp_(max=num_parts - 1)
    dtype = torch.int64 if str(pymetis.zero_copy_dtype()) == "int64" else torch.int32
    rowptr, col = graph.rowptr.to(dtype).numpy(), graph.col.to(dtype).numpy()
    _, parts = pymetis.part_graph(
        num_parts,
        adjacency=pymetis.CSRAdjacency(rowptr, col),
        vweights=None if node_weight is None else whole(node_weight).to(dtype).numpy(),
        eweights=None if graph.weight is None else graph.weight.to(dtype).numpy(),
        recursive=recursive,
        options=pymetis.Options(seed=seed + 1),  # srand takes 0 for 1
    )
    return torch.tensor(parts, dtype=torch.int64, device="cpu")


_NO_EDGE_WEIGHTS, _NO_NODE_WEIGHTS = 1, 2  # bits of the first number in a file


def kaminpar_clusters(
    adj_t: Tensor,
    num_parts: int,
    *,
    seed: int = 0,
    weighted: bool = False,
    imbalance: float = 0.03,
    preset: str = "default",
    threads: int | None = None,
    node_weight: Tensor | None = None,
) -> Tensor:
    """The part of each node, [N] int64, as KaMinPar finds it.

    Args:
        adj_t: The graph, ``torch.sparse_csr`` [N, N].
        num_parts: At least 1.
        seed: Of KaMinPar's random numbers.
        weighted: The values of ``adj_t`` are edge weights.
        imbalance: How far the largest part may exceed the mean, as a share of it; positive.
        preset: One of ``kaminpar.context_names()``.
        threads: At least 1; default: torch's number.
        node_weight: [N], not negative: what the parts are to have the same sum of; default: the number of nodes.

    Raises:
        ImportError: kaminpar is not installed.
        ValueError: An argument is out of its range.
    """
    kaminpar = require("kaminpar", 'method="kaminpar"', '; or choose method="random" or "contiguous"')
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1 or not imbalance > 0:
        raise ValueError(f"threads is {threads} and imbalance {imbalance}, but must be at least 1, and positive")
    if preset not in kaminpar.context_names():
        raise ValueError(f"preset is {preset!r}, but must be one of {', '.join(sorted(kaminpar.context_names()))}")
    graph = undirected(adj_t, weighted)
    if num_parts == 1 or num_parts >= adj_t.size(0):  # nothing to decide
        return torch.arange(adj_t.size(0), device="cpu").clamp_(max=num_parts - 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "graph.parhip")
        write_parhip(graph, file, None if node_weight is None else whole(node_weight))
        loaded = kaminpar.load_graph(str(file), kaminpar.GraphFileFormat.PARHIP)
    seed_before = kaminpar.seed()
    kaminpar.reseed(seed)
    try:
        solver = kaminpar.KaMinPar(threads, kaminpar.context_by_name(preset))
        return torch.tensor(solver.compute_partition(loaded, num_parts, imbalance), dtype=torch.int64, device="cpu")
    finally:
        kaminpar.reseed(seed_before)


def write_parhip(graph: Undirected, file: Path, node_weight: Tensor | None = None) -> None:
    """Write a graph in ParHiP's binary form, all of 64-bit numbers.

    First which weights are missing, the numbers of nodes and of directed edges; then N + 1 numbers, the positions in
    the file, in bytes, where each node's neighbours begin; then the neighbours, then the weights of the nodes, then
    those of these edges.
    """
    flags = (_NO_NODE_WEIGHTS if node_weight is None else 0) | (_NO_EDGE_WEIGHTS if graph.weight is None else 0)
    header = torch.tensor([flags, graph.rowptr.numel() - 1, graph.col.numel()], device="cpu")
    first_edge = 8 * (header.numel() + graph.rowptr.numel())
    with file.open("wb") as stream:
        for numbers in (header, graph.rowptr * 8 + first_edge, graph.col, node_weight, graph.weight):
            if numbers is not None:
                numbers.numpy().tofile(stream)
