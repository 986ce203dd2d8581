"""The mini-batch that a model gets: its arguments, checked once, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from recollect.autoscale._stamp import BatchSize, GraphStamp
from recollect.autoscale.histories._selection import Selection, select_batch, select_rows

__all__ = ["Batch", "BatchArguments"]

BatchArguments = tuple[int | None, Tensor | None, Tensor | None, Tensor | None]
"""``batch_size``, ``n_id``, ``offset`` and ``count``, as a loader yields them and a model takes them."""

_ANY_NUMBER = 2**62


@dataclass(frozen=True)
class Batch:
    """Which nodes a mini-batch holds: first those that it computes, then their halo.

    Attributes:
        size: number of nodes that the batch computes, B.
        n_id: all nodes [B + halo].
        rows: the rows of histories that the batch's own nodes are pushed to.
        halo: the nodes whose embeddings come from histories [halo], int64 on the CPU.
        num_nodes: rows of the histories that all this was checked for; ``None``: of none.
        graph: that the loader cut the mini-batch out of, if it says so.
        arguments: what the batch was made of.
    """

    size: int
    n_id: Tensor
    rows: Selection
    halo: Tensor
    num_nodes: int | None
    graph: GraphStamp | None
    arguments: BatchArguments

    @classmethod
    def of(cls, arguments: BatchArguments, num_nodes: int | None) -> Batch | None:
        """Make a batch of a model's arguments; ``None`` if there are none, for the whole graph.

        Args:
            arguments: ``batch_size``, by default the sum of ``count``, or all of ``n_id``; ``n_id``, nodes [B + halo],
                int64 or int32; ``offset`` and ``count``, the first node and the number of nodes of each part [parts].
                Without parts the rows are those of ``n_id[:B]``.
            num_nodes: rows of the histories; ``None``: there are none.

        Raises:
            TypeError: some are missing, or no tensors of integers.
            ValueError: sizes disagree, a node is there twice, or ``n_id`` does not begin with the nodes of the parts.
            IndexError: rows that the histories do not have.
        """
        batch_size, n_id, offset, count = arguments
        if all(value is None for value in arguments):
            return None
        if n_id is None or (offset is None) != (count is None):
            given = {"n_id": n_id, "offset": offset, "count": count}
            missing = [name for name, value in given.items() if value is None]
            raise TypeError(
                "a mini-batch needs batch_size, n_id and, if its rows are parts, offset and count, as a SubgraphLoader "
                f"yields them (without {', '.join(missing)}); for the whole graph give none of them"
            )
        tensors = [value for value in (n_id, offset, count) if value is not None]
        if not all(isinstance(value, Tensor) and value.dim() == 1 for value in tensors):
            raise TypeError(
                f"n_id, offset and count must be tensors of one dimension, as a SubgraphLoader yields them (got "
                f"{', '.join(map(_described, tensors))})"
            )
        total = None if count is None else int(count.sum())
        size = int(batch_size) if batch_size is not None else n_id.numel() if total is None else total
        if total not in (None, size) or not 0 <= size <= n_id.numel():
            counted = "" if total is None else f"count adds up to {total} nodes and "
            raise ValueError(
                f"batch_size={size}, but {counted}n_id has {n_id.numel()}: "
                "batch_size must be the sum of count, and n_id these nodes and then their halo"
            )
        bound = _ANY_NUMBER if num_nodes is None else num_nodes
        numbers = select_rows(n_id, bound)
        rows = select_batch(numbers if count is not None else numbers[:size], offset, count, bound)
        graph = batch_size.graph if isinstance(batch_size, BatchSize) else None
        return cls(size, n_id, rows, numbers[size:], num_nodes, graph, arguments)

    def is_made_of(self, arguments: BatchArguments, num_nodes: int | None) -> bool:
        """Return whether it is the batch of these very arguments, checked for so many rows."""
        same = all(ours is given for ours, given in zip(self.arguments, arguments, strict=True))
        return same and self.num_nodes == num_nodes

    def check_inputs(self, x: Tensor, adj_t: Tensor) -> None:
        """Raise a ValueError unless features and adjacency are those of this batch's nodes."""
        nodes = self.n_id.numel()
        if x.size(0) != nodes:
            raise ValueError(f"x has {x.size(0)} rows, but n_id has {nodes} nodes: a row for each is expected")
        if adj_t.size(0) not in (self.size, nodes) or adj_t.size(1) != nodes:
            raise ValueError(
                f"adj_t is {list(adj_t.shape)}, but for {self.size} nodes in the batch and {nodes} with their halo it "
                f"must be [{self.size}, {nodes}] or [{nodes}, {nodes}]"
            )


def _described(value: object) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
