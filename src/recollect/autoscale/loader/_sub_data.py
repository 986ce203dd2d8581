"""What a loader yields."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from recollect.autoscale.loader._storage import graph_copy
from recollect.messages import sparse_csr

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["SubData"]


class SubData(NamedTuple):
    """A mini-batch: the nodes of some parts, then the nodes outside that they have edges from (the 1-hop halo).

    Attributes:
        data: The graph of these nodes: node-level tensors have ``len(n_id)`` rows; ``adj_t`` holds all edges into
            nodes of the parts, and no others; edge-level tensors follow these edges. Tensors of nodes by number hold
            rows of the mini-batch, below B.
        batch_size: Number of nodes in the parts: B. They are the first B rows. A loader's number has a ``graph``, the
            stamp by which histories know whose rows they are; another integer says nothing of it.
        n_id: [B + halo] int64: the nodes' numbers in the whole graph. Those of the halo ascend.
        offset: [parts] int64 on the CPU: the number of each part's first node.
        count: [parts] int64 on the CPU: the nodes in each part; ``n_id[:B]`` are the ranges
            ``offset[k]`` to ``offset[k] + count[k]``.

    Example:
        >>> from recollect.autoscale import SubgraphLoader, get_data, partition, permute
        >>> data = get_data(None, "karate").data
        >>> perm, ptr = partition(data.adj_t, 2, "contiguous", log=False)
        >>> batch = next(iter(SubgraphLoader(permute(data, perm, log=False), ptr, log=False)))
        >>> batch.batch_size, batch.offset.tolist(), batch.count.tolist()
        (17, [0], [17])
        >>> batch.data.x.size(0) == len(batch.n_id) == batch.data.adj_t.size(1)
        True
    """

    data: Data
    batch_size: int
    n_id: Tensor
    offset: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count

    def to(self, *args: Any, **kwargs: Any) -> SubData:
        """Move ``data`` as ``Tensor.to`` would; the numbers stay where the histories are addressed from."""
        outward = self.data.get("outward")
        data = self.data.to(*args, **kwargs)
        if outward is not None:
            data.outward = data.outward._replace(n_id=outward.n_id)
        return self._replace(data=data)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send ``adj_t`` in parts: torch's own way from a worker warns of checks that it does not make."""
        if "adj_t" not in self.data or self.data.adj_t.layout != torch.sparse_csr:
            return SubData, tuple(self)
        data, adj_t = copy.copy(self.data), self.data.adj_t
        del data.adj_t
        parts = (adj_t.crow_indices(), adj_t.col_indices(), adj_t.values(), tuple(adj_t.shape))
        return _rebuild, (parts, data, *self[1:])


def _say_where(batch: SubData, name: str) -> NoReturn:
    """Refuse an attribute that a mini-batch does not have, and say so if its graph has it."""
    where = f"its graph has it: batch.data.{name}" if name in batch.data else f"it has {', '.join(batch._fields)}"
    raise AttributeError(f"'SubData' object has no attribute {name!r}; {where}")


if not TYPE_CHECKING:  # type checkers know what there is
    SubData.__getattr__ = _say_where


def _rebuild(parts: tuple[Tensor, Tensor, Tensor, tuple[int, int]], data: Data, *rest: Any) -> SubData:
    data = graph_copy(data)
    data.adj_t = sparse_csr(*parts)
    return SubData(data, *rest)
