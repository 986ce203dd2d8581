"""The error for modules that mix the elements of a batch, and which module it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from recollect.autogram._probe import Layouts
from recollect.autogram._walk import Graph, Use

__all__ = ["Independence"]


# Edges to weights, in which a batch's size is a coincidence.
_RIGHT_SIDES = {("AddmmBackward0", 2), ("MmBackward0", 1), ("ConvolutionBackward0", 1)}


class Independence:
    """Tells what mixes the batch from what has none, as the embedding of positions.

    Args:
        modules: the engine's.
        batch_dim: the engine's.
    """

    def __init__(self, modules: Sequence[nn.Module], batch_dim: int) -> None:
        self._modules = modules
        self._batch_dim = batch_dim

    def check(self, graph: Graph, use: Use, node: int, position: int, layouts: Layouts) -> None:
        """Raise if what a node takes in has the batch in the same axis, though its gradient mixes the batch.

        What has no batch is broadcast, or is the other side of a product.

        Args:
            graph: the output's.
            use: the use of a parameter that is looked at.
            node: the number of the nearest node towards the output whose gradient does not.
            position: the edge of that node that leads towards that use.
            layouts: where the batch is.

        Raises:
            ValueError: it is so; the message names modules.
        """
        child, index = graph.edges[node][position], graph.indices[node][position]
        if (graph.names[node], position) in _RIGHT_SIDES or not graph.touches_data(child):
            return
        taken = graph.shape(child, index)
        for k, layout in enumerate(layouts.found[node]):
            if layout is None:
                continue
            shape = graph.shape(node, k)
            dim = layout.dim - len(shape) + len(taken)
            if dim >= 0 and taken[dim] == shape[layout.dim]:
                raise ValueError(self._message(graph, use, node))

    def _message(self, graph: Graph, use: Use, node: int) -> str:
        below = self._users(graph, [use.node if use.capture is None else use.capture])
        above = self._users(graph, [node])
        place = f"after {', '.join(below)}" + (f", in or before {', '.join(above)}" if above else "")
        return (
            f"batch_dim={self._batch_dim} is for modules that treat the elements of a batch independently, but the "
            f"loss of one element depends on other elements; they are mixed {place}. Put something that does not mix "
            "the batch in its place (GroupNorm for BatchNorm, or BatchNorm in eval mode), or give batch_dim=None, "
            "which asks for no independence"
        )

    def _users(self, graph: Graph, nodes: list[int]) -> list[str]:
        """Return the names of the modules that these nodes belong to, or else the next ones towards the output."""
        names, parents = _names(self._modules), graph.parents
        seen = set(nodes)
        while nodes:
            found: dict[str, None] = {}
            for node in nodes:
                if node in graph.captures:
                    found[names.get(id(graph.nodes[node].call.layer), "a layer")] = None
                for child in graph.edges[node]:
                    for leaf in (child, *(graph.edges[child] if child >= 0 else ())):
                        if leaf in graph.leaves:
                            found[names.get(graph.leaves[leaf], "a module")] = None
            if found:
                return list(found)
            nodes = [parent for parent in {p for node in nodes for p in parents[node]} if parent not in seen]
            seen.update(nodes)
        return []


def _names(modules: Sequence[nn.Module]) -> Mapping[int, str]:
    """Return the modules' names, by their ids and their parameters'."""
    names: dict[int, str] = {}
    for module in modules:
        for name, child in module.named_modules():
            shown = f"{name!r} ({type(child).__name__})" if name else type(child).__name__
            names[id(child)] = shown
            for parameter in child._parameters.values():
                if isinstance(parameter, Tensor):
                    names.setdefault(id(parameter), shown)
    return names
