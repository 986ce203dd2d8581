"""Convolutions of torch_geometric, by products with the adjacency."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.messages._edges import Edges, edges_of
from recollect.messages._propagate import propagate

__all__ = ["convolve"]


def convolve(conv: Any, x: Tensor, edge_index: Any, *args: Any) -> Any:
    """Return ``conv(x, edge_index, *args)``, without a row for each edge where the convolution allows it.

    Those that do are torch_geometric's own SAGEConv, GraphConv, GCNConv and GINConv (no subclasses of them) where they
    sum or average the rows of the sources, on a plain ``edge_index`` and without further arguments. All others are
    called as they are; so are convolutions that are compiled, that cache a graph of their own (``cached=True``), with a
    hook on them or under explanation, and all under torch.func transforms and in what is compiled, traced or captured
    in a CUDA graph. The result is the same up to rounding. The edges are sorted once for an ``edge_index``, and the
    adjacency is kept as long as that lives and is not changed; changes that torch does not count, made through
    ``.data`` or NumPy, are not seen.

    Args:
        conv: the convolution; any callable.
        x: [num_nodes, channels].
        edge_index: the graph, in whatever form the convolution takes.
        *args: further arguments of the convolution.
    """
    rule = None if any(arg is not None for arg in args) else _rule_of(conv)
    if rule is None or not _are_plain(x, edge_index):
        return conv(x, edge_index, *args)
    edges = edges_of(edge_index, x.size(0))
    if not edges.inside:
        return conv(x, edge_index)  # which says what is wrong
    return rule(conv, x, _Sums(edges, edge_index))


class _Sums:
    """Sums over the sources of each node."""

    def __init__(self, edges: Edges, edge_index: Tensor) -> None:
        self._edges = edges
        self._edge_index = edge_index

    def reduced(self, conv: Any, x: Tensor) -> Tensor:
        """Return the sum of the sources' rows, or their mean, whichever the convolution takes."""
        return self._product(("mean",), self._means, x) if conv.aggr == "mean" else self._product((), self._ones, x)

    def normalized(self, conv: Any, x: Tensor) -> Tensor:
        """Return the sum of the sources' rows, with the weights that GCNConv gives the edges."""
        options = (conv.improved, conv.add_self_loops, conv.flow)

        def weighted(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            norm = sys.modules[type(conv).__module__].gcn_norm
            found: tuple[Tensor, Tensor] = norm(self._edge_index, None, x.size(0), *options, dtype)
            return found

        return self._product(("gcn", *options), weighted, x)

    def _product(
        self, kind: tuple[Any, ...], weighted: Callable[[torch.dtype], tuple[Tensor, Tensor]], x: Tensor
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return propagate(self._edges.adj_t((*kind, dtype), lambda: weighted(dtype)), x)

    def _ones(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self._edge_index, torch.ones_like(self._edge_index[0], dtype=dtype)

    def _means(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        target = self._edge_index[1]
        return self._edge_index, target.bincount(minlength=self._edges.num_nodes).to(dtype).reciprocal_()[target]


def _sage(conv: Any, x: Tensor, sums: _Sums) -> Tensor:
    out: Tensor = conv.lin_l(sums.reduced(conv, conv.lin(x).relu() if conv.project else x))
    if conv.root_weight:
        out = out + conv.lin_r(x)
    return F.normalize(out, dim=-1) if conv.normalize else out


def _graph_conv(conv: Any, x: Tensor, sums: _Sums) -> Tensor:
    out: Tensor = conv.lin_rel(sums.reduced(conv, x)) + conv.lin_root(x)
    return out


def _gin(conv: Any, x: Tensor, sums: _Sums) -> Tensor:
    out: Tensor = conv.nn(sums.reduced(conv, x) + (1 + conv.eps) * x)
    return out


def _gcn(conv: Any, x: Tensor, sums: _Sums) -> Tensor:
    weighted_in, x = x.dtype, conv.lin(x)
    if conv.normalize:  # under autocast the weights have the type of the features, and what is summed up is in half
        out = sums.normalized(conv, x.to(torch.promote_types(x.dtype, weighted_in)))
    else:
        out = sums.reduced(conv, x)
    return out if conv.bias is None else out + conv.bias


_SUM, _MEAN = {"add": "SumAggregation", "sum": "SumAggregation"}, {"mean": "MeanAggregation"}

# The convolutions, by name, as torch_geometric need not be there; how each is computed, and its aggregations.
_RULES: dict[str, tuple[Callable[[Any, Tensor, _Sums], Tensor], dict[str, str]]] = {
    "torch_geometric.nn.conv.gcn_conv.GCNConv": (_gcn, _SUM),
    "torch_geometric.nn.conv.gin_conv.GINConv": (_gin, _SUM | _MEAN),
    "torch_geometric.nn.conv.graph_conv.GraphConv": (_graph_conv, _SUM | _MEAN),
    "torch_geometric.nn.conv.sage_conv.SAGEConv": (_sage, _SUM | _MEAN),
}

# Convolutions that were called for what was on them: a backward pass that repeats the call must find it the same, even
# if that (a hook) was taken off in between.
_CALLED: WeakSet[nn.Module] = WeakSet()


def _rule_of(conv: Any) -> Callable[[Any, Tensor, _Sums], Tensor] | None:
    """Return how a convolution, as it is set, is computed; ``None`` where it must be called."""
    rule, aggregations = _RULES.get(f"{type(conv).__module__}.{type(conv).__qualname__}", (None, {}))
    if rule is None or conv in _CALLED or not isinstance(conv.aggr, str):
        return None
    if aggregations.get(conv.aggr) != type(conv.aggr_module).__name__:
        return None
    if not (_is_untouched(conv) and _is_untouched(conv.aggr_module)):
        if torch.is_grad_enabled():
            _CALLED.add(conv)
        return None
    cached = getattr(conv, "cached", False)  # goes by the first graph that it meets, whatever it is called with
    fits = conv.flow == "source_to_target" and conv.node_dim == -2 and not conv.explain and not cached
    return rule if fits else None


_METHODS = frozenset({"forward", "propagate", "message", "aggregate", "message_and_aggregate", "update"})


def _is_untouched(conv: nn.Module) -> bool:
    """Whether no hook and no method was put on this one, and it is not compiled."""
    own = vars(conv)
    if not _METHODS.isdisjoint(own) or own.get("_compiled_call_impl") is not None:
        return False
    return not any(value for name, value in own.items() if name.endswith("_hooks"))


def _is_recorded() -> bool:
    """Whether this runs under torch.func, or is compiled or traced: the tensors are then not what they seem to be."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.FUNCTIONAL, modes.PROXY))


def _are_plain(x: Tensor, edge_index: Any) -> bool:
    """Whether these are the tensors that products are made for, and not what will be run again with other numbers."""
    if _is_recorded() or type(edge_index) is not Tensor or type(x) not in (Tensor, nn.Parameter):
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    if edge_index.dtype != torch.int64 or edge_index.layout != torch.strided or edge_index.is_inference():
        return False
    if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.numel() == 0:
        return False
    if not x.is_cuda and not (x.device.type == "cpu" and torch.backends.mkl.is_available()):  # type: ignore[no-untyped-call]
        return False  # no library for the product
    return x.dim() == 2 and x.is_floating_point() and x.device == edge_index.device
