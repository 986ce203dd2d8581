"""METIS, by pymetis."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.autoscale._require import require
from recollect.autoscale._undirected import undirected

__all__ = ["metis_clusters"]


def metis_clusters(
    adj_t: Tensor, num_parts: int, *, seed: int = 0, recursive: bool = False, weighted: bool = False
) -> Tensor:
    """The part of each node, [N] int64, as METIS finds it.

    Args:
        adj_t: The graph, ``torch.sparse_csr`` [N, N].
        num_parts: At least 1.
        seed: Of METIS's random numbers.
        recursive: Halve again and again rather than divide into all parts at once.
        weighted: The values of ``adj_t`` are edge weights.

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
        eweights=None if graph.weight is None else graph.weight.to(dtype).numpy(),
        recursive=recursive,
        options=pymetis.Options(seed=seed + 1),  # srand takes 0 for 1
    )
    return torch.tensor(parts, dtype=torch.int64, device="cpu")
