"""The error for modules that mix the elements of a batch, and which module it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from recollect.autogram._probe import Layouts
from recollect.autogram._walk import Graph

__all__ = ["Independence"]


class Independence:
    """Tells what has no batch, as the embedding of positions, from what mixes the batch.

    Args:
        modules: the engine's.
        batch_dim: the engine's.
        batch: B.
    """

    def __init__(self, modules: Sequence[nn.Module], batch_dim: int, batch: int) -> None:
        self._modules = modules
        self._batch_dim = batch_dim
        self._batch = batch

    def check(self, graph: Graph, node: int, layouts: Layouts) -> None:
        """Raise if a node, whose gradient for one element's loss reaches others, has something to do with data.

        Raises:
            ValueError: it is so; the message names modules.
        """
        shapes = [graph.shape(node, k) for k in range(len(layouts.found[node]))]
        if any(self._may_have_batch(shape) for shape in shapes) and _touches_data(graph, node):
            raise ValueError(self._message(graph, node, layouts))

    def _may_have_batch(self, shape: Sequence[int]) -> bool:
        dim, batch = self._batch_dim, self._batch
        return len(shape) > 0 and (shape[0] % batch == 0 or (len(shape) > dim and shape[dim] == batch))

    def _message(self, graph: Graph, node: int, layouts: Layouts) -> str:
        below = self._users(graph, [node]) or ["the model's first layers"]
        above = self._users(graph, _next_confined(graph, node, layouts))
        after = f"; what mixes them comes after that: {', '.join(above)}" if above else ""
        return (
            f"batch_dim={self._batch_dim} is for modules that treat the elements of a batch independently, but the "
            f"loss of one element has a gradient in other elements' rows of what {', '.join(below)} returns{after}. "
            "Put something that does not mix the batch in its place (GroupNorm for BatchNorm, or BatchNorm in eval "
            "mode), or give batch_dim=None, which asks for no independence"
        )

    def _users(self, graph: Graph, nodes: Sequence[int]) -> list[str]:
        """Return the names of the modules to which these nodes belong, as far as one sees from parameters."""
        names = _names(self._modules)
        found: dict[str, None] = {}
        for node in nodes:
            if node in graph.captures:
                found[names.get(id(graph.nodes[node].call.layer), "a layer")] = None
            for child in graph.edges[node]:
                if child in graph.leaves:
                    found[names.get(graph.leaves[child], "a module")] = None
                elif child >= 0 and graph.names[child] == "TBackward0" and graph.edges[child][0] in graph.leaves:
                    found[names.get(graph.leaves[graph.edges[child][0]], "a module")] = None
        return list(found)


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


def _touches_data(graph: Graph, node: int) -> bool:
    """Whether anything that needs no gradient comes in behind a node, as data does."""
    waiting, seen = [node], {node}
    while waiting:
        for child in graph.edges[waiting.pop()]:
            if child < 0:
                return True
            if child not in seen:
                seen.add(child)
                waiting.append(child)
    return False


def _next_confined(graph: Graph, node: int, layouts: Layouts) -> list[int]:
    """Return the nearest nodes towards the output whose gradients do not mix the batch."""
    parents = graph.parents()
    waiting, seen = [node], {node}
    found: list[int] = []
    while waiting:
        for parent in parents[waiting.pop()]:
            if parent in seen:
                continue
            seen.add(parent)
            (waiting if parent in layouts.free else found).append(parent)
    return found
