"""Graphs with sparse CSR tensors that can be copied deeply and shared between processes.

Torch's own ``Tensor.__deepcopy__`` and ``share_memory_`` ask a sparse CSR tensor for a storage, which it does not have:
its rows, columns and values have one each.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recollect.autoscale._require import require
from recollect.autoscale.loader._attributes import leaves

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["graph_copy"]


def graph_copy(data: Data) -> Data:
    """A shallow copy of a graph that can itself be copied deeply and shared, also with sparse CSR tensors in it."""
    result = copy.copy(data)
    store: Any = result.__dict__.get("_store")
    plain, ours = _storages()
    if type(store) is plain:
        made = ours.__new__(ours)
        made.__dict__.update(store.__dict__)
        result.__dict__["_store"] = made
    return result


@functools.cache
def _storages() -> tuple[Any, Any]:
    """In which torch_geometric keeps the attributes of a graph, and ours in its place."""
    geometric = require("torch_geometric.data.storage", "a graph")
    plain: Any = geometric.GlobalStorage

    class GraphStorage(plain):  # type: ignore[misc]
        """Attributes, some of which may be sparse CSR tensors."""

        def __deepcopy__(self, memo: dict[int, Any] | None) -> Any:
            memo = {} if memo is None else memo
            for _, value in leaves(self._mapping):
                if _is_csr(value) and id(value) not in memo:
                    memo[id(value)] = _clone(value)  # where deepcopy looks first
            return super().__deepcopy__(memo)

        def apply_(self, func: Callable[..., Any], *args: str) -> Any:
            """Apply a function in place to each tensor, or to those under the given names; to each part of a CSR."""
            names = args or tuple(self.keys())
            for _, value in leaves({name: self[name] for name in names if name in self}):
                parts = (value.crow_indices(), value.col_indices(), value.values()) if _is_csr(value) else value
                geometric.recursive_apply_(parts, func)
            return self

        def __reduce_ex__(self, protocol: Any) -> Any:
            """As a storage of torch_geometric, so that files do not depend on this library."""
            return plain, (), self.__getstate__()

    return plain, GraphStorage


def _is_csr(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.sparse_csr


def _clone(adj_t: Tensor) -> Tensor:
    if not adj_t.is_leaf:
        raise RuntimeError("a tensor that was computed with a gradient cannot be copied deeply: detach it first")
    return adj_t.detach().clone().requires_grad_(adj_t.requires_grad)
