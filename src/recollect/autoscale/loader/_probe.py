"""What a graph's class declares of its attributes, beyond what torch_geometric's `Data` says by their names."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["Declarations"]

Follows = Literal["nodes", "nothing", "unclear"]


class Declarations:
    """Asks a graph's class for ``__cat_dim__``, ``__inc__``, ``is_node_attr`` and ``is_edge_attr``.

    Answers are compared with those of `Data` itself: what does not differ, nobody has declared. Whether an increment
    is the number of nodes, or only as large, is found by asking again for a graph of other size, a probe with the same
    attributes, edges and node-level rows but for a number of nodes and edges that no tensor has.

    Args:
        data: The graph.
        num_nodes: N.
        node_names: Attributes that have a row for each node by their name.
    """

    def __init__(self, data: Data, num_nodes: int, node_names: Iterable[str]) -> None:
        self._data, self._num_nodes = data, num_nodes
        self._node_names = frozenset(node_names)
        self._base = _base_of(type(data))
        self._probe: tuple[Data, int] | None = None

    def dim(self, name: str, value: Tensor) -> tuple[int | None, bool]:
        """The dimension along which rows or entries lie, and whether the class itself says so.

        None: there is none, because the tensor belongs to the graph as a whole, or has no dimensions.
        """
        found: Any = self._data.__cat_dim__(name, value)
        declared = self._overridden("__cat_dim__") and found != self._base.__cat_dim__(self._data, name, value)
        if not isinstance(found, int) or value.dim() == 0:
            return None, declared
        if not -value.dim() <= found < value.dim():
            raise ValueError(
                f"{type(self._data).__name__}.__cat_dim__ is {found} for {name}, which has shape {tuple(value.shape)}"
            )
        return found % value.dim(), declared

    def increment(self, name: str, value: Tensor) -> Follows:
        """What ``__inc__`` follows: the number of nodes, so that entries are nodes; or not."""
        usual: Follows = "nodes" if ("index" in name or name == "face") and "batch" not in name else "nothing"
        if not self._overridden("__inc__"):
            return usual
        found, default = self._data.__inc__(name, value), self._base.__inc__(self._data, name, value)
        if _equal(found, default):
            return usual
        if not (torch.as_tensor(found) == self._num_nodes).any():
            return "nothing"
        probe, size = self._probe_and_size()
        follows = torch.as_tensor(probe.__inc__(name, value)) == size
        return "nodes" if bool(follows.all()) else "unclear"

    def level(self, name: str) -> Literal["node", "edge"] | None:
        """What ``is_node_attr`` and ``is_edge_attr`` say of an attribute, if the class has them."""
        for kind, method in (("node", "is_node_attr"), ("edge", "is_edge_attr")):
            if self._overridden(method):
                probe, _ = self._probe_and_size()  # of another size, so that no size can be the reason
                if getattr(probe, method)(name):
                    return kind  # type: ignore[return-value]
        return None

    def _overridden(self, method: str) -> bool:
        return getattr(type(self._data), method) is not getattr(self._base, method)

    def _probe_and_size(self) -> tuple[Data, int]:
        if self._probe is None:
            tensors = [value for value in self._data.to_dict().values() if isinstance(value, Tensor)]
            size = 1 + self._num_nodes + sum(sum(value.shape) for value in tensors)
            self._probe = self._make_probe(size), size
        return self._probe

    def _make_probe(self, size: int) -> Data:
        probe = copy.copy(self._data)
        for name, value in self._data.to_dict().items():
            if name == "adj_t":
                del probe.adj_t
            elif name in self._node_names and isinstance(value, Tensor):
                dim, _ = self.dim(name, value)
                if dim is not None:
                    probe[name] = _resized(value, dim, size)
        probe.edge_index = torch.zeros((), dtype=torch.int64).expand(2, size + 1)
        probe.num_nodes = size
        return probe


def _base_of(kind: type) -> Any:
    """`Data` of torch_geometric, among the classes that a graph's class is made of."""
    names = {"Data": "torch_geometric.data.data"}
    return next((base for base in kind.__mro__ if names.get(base.__name__) == base.__module__), kind)


def _equal(one: Any, other: Any) -> bool:
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    return one.shape == other.shape and bool((one == other).all())


def _resized(value: Tensor, dim: int, size: int) -> Tensor:
    """A tensor with so many rows that takes no memory."""
    shape = list(value.shape)
    shape[dim] = size
    return value.new_zeros(()).expand(shape)
