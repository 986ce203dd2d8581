"""Convolutions of torch_geometric by products with the adjacency: how each is computed, and how it must be set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recollect.messages._adjacency import Edges, narrow_adj_t, sparse_csr
from recollect.messages._attention import attend
from recollect.messages._extreme import extreme
from recollect.messages._products import propagate

__all__ = ["Known", "Rule", "Sources", "known"]


class Sources:
    """What each node reduces the rows of its sources to.

    Args:
        edges: what is known of them.
        edge_index: the edges, [2, E] int64.
    """

    def __init__(self, edges: Edges, edge_index: Tensor) -> None:
        self._edges = edges
        self._edge_index = edge_index

    def targets(self, x: Tensor) -> Tensor:
        """Return the rows of the nodes for which there are sources, the first ones."""
        number = self._edges.num_targets
        return x if number == x.size(0) else x[:number]

    def reduced(self, conv: Any, x: Tensor) -> Tensor:
        """Return the sum, the mean, the largest or the smallest of the sources' rows, as the convolution is set."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if conv.aggr in ("max", "min"):
            return extreme(self._ones(dtype), x, conv.aggr)
        return propagate(self._means(dtype) if conv.aggr == "mean" else self._ones(dtype), x)

    def normalized(self, conv: Any, x: Tensor) -> Tensor:
        """Return the sum of the sources' rows, with the weights that GCNConv gives the edges."""
        options = (conv.improved, conv.add_self_loops, conv.flow)
        dtype = torch.promote_types(x.dtype, torch.float32)

        def make() -> Tensor:
            norm = sys.modules[type(conv).__module__].gcn_norm
            edge_index, weight = norm(self._edge_index, None, x.size(0), *options, dtype)
            return narrow_adj_t(edge_index, weight, self._edges.num_nodes)

        return propagate(self._edges.adj_t(("gcn", *options, dtype), make), x)

    def attended(self, conv: Any, of_source: Tensor, of_target: Tensor, x: Tensor) -> Tensor:
        """Return the mean of the sources' rows, weighted by attention, for each head."""

        def make() -> Tensor:
            edge_index = self._edge_index
            if conv.add_self_loops:  # one for each node, whatever there was
                nodes = torch.arange(x.size(0), device=x.device).expand(2, -1)
                edge_index = torch.cat([edge_index[:, edge_index[0] != edge_index[1]], nodes], 1)
            return narrow_adj_t(edge_index, torch.ones_like(edge_index[0], dtype=torch.bool), self._edges.num_nodes)

        adj_t = self._edges.adj_t(("attention", conv.add_self_loops), make)
        return attend(adj_t, of_source, of_target, x, conv.negative_slope)

    def _ones(self, dtype: torch.dtype) -> Tensor:
        def make() -> Tensor:
            value = torch.ones_like(self._edge_index[0], dtype=dtype)
            return narrow_adj_t(self._edge_index, value, self._edges.num_nodes)

        return self._edges.adj_t(("ones", dtype), make)

    def _means(self, dtype: torch.dtype) -> Tensor:
        def make() -> Tensor:
            ones = self._ones(dtype)
            degree = ones.crow_indices().diff()
            value = degree.to(dtype).reciprocal_().repeat_interleave(degree, output_size=ones.values().numel())
            return sparse_csr(ones.crow_indices(), ones.col_indices(), value, (ones.size(0), ones.size(1)))

        return self._edges.adj_t(("means", dtype), make)


Rule = Callable[[Any, Tensor, Sources], Tensor]


def _sage(conv: Any, x: Tensor, sources: Sources) -> Tensor:
    out: Tensor = conv.lin_l(sources.reduced(conv, conv.lin(x).relu() if conv.project else x))
    if conv.root_weight:
        out = out + conv.lin_r(sources.targets(x))
    return F.normalize(out, dim=-1) if conv.normalize else out


def _graph_conv(conv: Any, x: Tensor, sources: Sources) -> Tensor:
    out: Tensor = conv.lin_rel(sources.reduced(conv, x)) + conv.lin_root(sources.targets(x))
    return out


def _gin(conv: Any, x: Tensor, sources: Sources) -> Tensor:
    out: Tensor = conv.nn(sources.reduced(conv, x) + (1 + conv.eps) * sources.targets(x))
    return out


def _gcn(conv: Any, x: Tensor, sources: Sources) -> Tensor:
    weighted_in, x = x.dtype, conv.lin(x)
    if conv.normalize:  # under autocast the weights have the type of the features, and what is summed up is in half
        out = sources.normalized(conv, x.to(torch.promote_types(x.dtype, weighted_in)))
    else:
        out = sources.reduced(conv, x)
    return out if conv.bias is None else out + conv.bias


def _gat(conv: Any, x: Tensor, sources: Sources) -> Tensor:
    z = conv.lin(x).view(-1, conv.heads, conv.out_channels)
    of_source, of_target = (z * conv.att_src).sum(-1), (sources.targets(z) * conv.att_dst).sum(-1)
    out = sources.attended(conv, of_source, of_target, z).to(torch.promote_types(z.dtype, of_source.dtype))
    out = out.flatten(1) if conv.concat else out.mean(1)
    if conv.res is not None:
        out = out + conv.res(sources.targets(x))
    return out if conv.bias is None else out + conv.bias


_SUM = {"add": "SumAggregation", "sum": "SumAggregation"}
_ALL = {**_SUM, "mean": "MeanAggregation", "max": "MaxAggregation", "min": "MinAggregation"}


@dataclass(frozen=True)
class Known:
    """A convolution that has a rule.

    Attributes:
        rule: computes it.
        aggregations: that the rule has, by the names that the convolution may be given; the class of each.
        node_dim: that its messages have.
        allows: whether it is set so that the rule holds.
    """

    rule: Rule
    aggregations: dict[str, str]
    node_dim: int = -2
    allows: Callable[[Any], bool] = lambda conv: True


def _attends_alike(conv: Any) -> bool:
    """Whether one map makes sources and targets, and no attention is dropped: masks are drawn in the edges' order."""
    return conv.lin is not None and not (conv.training and conv.dropout > 0)


# The convolutions, by name, as torch_geometric need not be there.
_RULES = {
    "torch_geometric.nn.conv.gat_conv.GATConv": Known(_gat, _SUM, 0, _attends_alike),
    "torch_geometric.nn.conv.gcn_conv.GCNConv": Known(_gcn, _SUM),
    "torch_geometric.nn.conv.gin_conv.GINConv": Known(_gin, _ALL),
    "torch_geometric.nn.conv.graph_conv.GraphConv": Known(_graph_conv, _ALL),
    "torch_geometric.nn.conv.sage_conv.SAGEConv": Known(_sage, _ALL),
}


def known(kind: type) -> Known | None:
    """Return what is known of a class of convolutions, if anything."""
    return _RULES.get(f"{kind.__module__}.{kind.__qualname__}")
