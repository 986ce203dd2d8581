"""Graphs with sparse CSR tensors that can be copied deeply and shared between processes.

Torch's own ``Tensor.__deepcopy__`` and ``share_memory_`` ask a sparse CSR tensor for a storage, which it does not have:
its rows, columns and values have one each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data.storage import GlobalStorage, recursive_apply_

from recollect.autoscale.loader._attributes import leaves

__all__ = ["GraphStorage", "copyable"]


class GraphStorage(GlobalStorage):  # type: ignore[misc]  # which has no types
    """The attributes of a graph, as torch_geometric keeps them, some of which may be sparse CSR tensors.

    It is saved as a storage of torch_geometric, so that files do not depend on this library.
    """

    def __deepcopy__(self, memo: dict[int, Any] | None) -> GraphStorage:
        memo = {} if memo is None else memo
        for _, value in leaves(self._mapping):
            if _is_csr(value) and id(value) not in memo:
                memo[id(value)] = _clone(value)
        return super().__deepcopy__(memo)  # type: ignore[no-any-return]

    def apply_(self, func: Callable[..., Any], *args: str) -> GraphStorage:
        """Apply a function in place to all tensors, or to those under the given names: to each part of a CSR one."""
        names = args or tuple(self.keys())
        for _, value in leaves({name: self[name] for name in names if name in self}):
            parts = (value.crow_indices(), value.col_indices(), value.values()) if _is_csr(value) else value
            recursive_apply_(parts, func)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return GlobalStorage, (), self.__getstate__()


def copyable(data: Any) -> Any:
    """``data`` itself, its attributes now in a `GraphStorage` if they were in a storage of torch_geometric."""
    store = data.__dict__.get("_store")
    if type(store) is GlobalStorage:
        made = GraphStorage.__new__(GraphStorage)
        made.__dict__.update(store.__dict__)
        data.__dict__["_store"] = made
    return data


def _is_csr(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.sparse_csr


def _clone(adj_t: Tensor) -> Tensor:
    if not adj_t.is_leaf:
        raise RuntimeError("a tensor that was computed with a gradient cannot be copied deeply: detach it first")
    return adj_t.detach().clone().requires_grad_(adj_t.requires_grad)
