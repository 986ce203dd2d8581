"""What one of several ranks needs of a graph for the mini-batches of its own parts, so that the rest need not stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recollect.autoscale._stamp import GraphStamp
from recollect.autoscale.loader._attributes import found_at, put, spelled
from recollect.autoscale.loader._order import to_adj_t
from recollect.autoscale.loader._roles import roles_of
from recollect.autoscale.loader._storage import graph_copy
from recollect.distributed import Shares
from recollect.messages import row_pointers, rows_of, sparse_csr

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["OwnGraph", "own_graph"]


@dataclass(frozen=True)
class OwnGraph:
    """The nodes of a rank with their neighbours, numbered anew in the same order; see :func:`own_graph`.

    Attributes:
        data: the graph of them, with ``adj_t``.
        nodes: their numbers in the whole graph [n] int64, ascending.
        ptr: [num_parts + 1] int64, where the nodes of each part of the whole graph begin among them.
        parts: those that are here as a whole, which are the rank's own.
        kinds: what its tensors belong to, by name, as it was found of the whole graph.
        outward: whether edges out of the own nodes are here too.
        graph: the stamp of the whole graph.
    """

    data: Data
    nodes: Tensor
    ptr: Tensor
    parts: range
    kinds: dict[str, str]
    outward: bool
    graph: GraphStamp

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        adj_t = self.data.adj_t
        tensors = [self.nodes, self.ptr, adj_t.crow_indices(), adj_t.col_indices(), adj_t.values()]
        tensors += [found_at(self.data, path) for path in roles_of(self.data, self.kinds).roles]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, Tensor))


def own_graph(data: Data, shares: Shares, *, outward: bool = False, kinds: Mapping[str, str] | None = None) -> OwnGraph:
    """Copy what a rank's own mini-batches need of a graph, after which the whole graph can be deleted.

    These are the edges into its nodes, what belongs to them, and the rows of its nodes and of their neighbours. A
    :class:`SubgraphLoader` takes it in the place of the graph, with the ``ptr`` of the whole one and samplers such as
    ``shares.batches()``: its mini-batches are those of the whole graph, of this rank's parts alone.

    Args:
        data: a graph in the order of the parts, see :func:`~recollect.autoscale.permute`.
        shares: which parts are this rank's.
        outward: whether mini-batches shall have the edges to nodes outside, ``SubgraphLoader(outward=True)``; then
            edges out of its nodes, and rows of the nodes that they lead to, are copied too.
        kinds: what each tensor belongs to, where names do not say; see :func:`~recollect.autoscale.permute`.

    Returns:
        The copy, on the CPU or wherever the graph lies; ``nbytes`` tells what it takes.

    Raises:
        ValueError: the graph has other nodes than the shares, was not permuted, or has a tensor of nodes by number
            beside its edges.

    Example:
        >>> import torch
        >>> from torch import distributed as dist
        >>> from recollect.autoscale import SubgraphLoader, get_data, own_graph, partition, permute
        >>> from recollect.distributed import Shares
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # as torchrun does for many
        >>> data = get_data(None, "karate").data
        >>> perm, ptr = partition(data.adj_t, 4, "contiguous", log=False)
        >>> shares = Shares(ptr)
        >>> own = own_graph(permute(data, perm, log=False), shares)
        >>> del data
        >>> loader = SubgraphLoader(own, ptr, batch_sampler=shares.batches(2), log=False)
        >>> sum(batch.batch_size for batch in loader)
        34
        >>> dist.destroy_process_group()
    """
    data = to_adj_t(data, kinds)
    kinds = {name: kind for name, kind in (kinds or {}).items() if name.partition(".")[0] in data}
    roles, adj_t = roles_of(data, kinds), data.adj_t
    numbers = [spelled(path) for path in roles.of_kind("index")]
    if shares.num_nodes != roles.num_nodes or "node_order" not in data or numbers:
        wrong = f"data has {roles.num_nodes} nodes, and the shares {shares.num_nodes}"
        if numbers:
            wrong = f"data.{numbers[0]} holds nodes by number, which ranks cannot have in part: leave it out"
        elif "node_order" not in data:
            wrong = "data is not in the order of the parts: call permute(data, perm) first"
        raise ValueError(wrong)
    start, stop = shares.nodes
    col, target = adj_t.col_indices().long(), rows_of(adj_t)
    kept = (target >= start) & (target < stop)
    if outward:
        kept |= (col >= start) & (col < stop)
    edges = kept.nonzero().squeeze(1)
    col, target = col[edges], target[edges]
    is_here = torch.zeros(roles.num_nodes, dtype=torch.bool, device=col.device)
    is_here[start:stop] = True
    is_here[col] = True
    is_here[target] = True
    nodes = is_here.nonzero().squeeze(1)
    place = is_here.cumsum(0) - 1
    size = nodes.numel()
    result = graph_copy(data)
    del result.adj_t
    for kind, rows in (("node", nodes), ("edge", edges)):
        of: dict[Any, Any] = roles.of_kind(kind)  # type: ignore[arg-type]
        put(result, {path: found_at(data, path).index_select(role.dim or 0, rows) for path, role in of.items()})
    if "num_nodes" in data:
        result.num_nodes = size
    rowptr = row_pointers(place[target], size, torch.int64)
    result.adj_t = sparse_csr(rowptr, place[col], adj_t.values()[edges], (size, size))
    ptr = torch.searchsorted(nodes.cpu(), shares.ptr)
    found = {spelled(path): str(role.kind) for path, role in roles.roles.items()}
    return OwnGraph(result, nodes, ptr, shares.parts, found, outward, GraphStamp.of(adj_t, data.node_order))
