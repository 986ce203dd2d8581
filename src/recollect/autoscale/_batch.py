"""The arguments that tell a model which nodes its mini-batch holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """Which nodes a mini-batch holds: first those of its parts, then their halo.

    That the numbers fit the histories is checked by these, before they are read or written.

    Attributes:
        size: number of nodes that the batch computes, B.
        n_id: all nodes [B + halo], int64.
        offset: first node of each part [parts], int64.
        count: number of nodes of each part [parts], int64.
    """

    size: int
    n_id: Tensor
    offset: Tensor
    count: Tensor

    @property
    def arguments(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """The batch as a model's arguments."""
        return self.size, self.n_id, self.offset, self.count

    @property
    def halo(self) -> Tensor:
        """The nodes whose embeddings come from histories [halo]."""
        return self.n_id[self.size :]

    @classmethod
    def of(
        cls, batch_size: int | None, n_id: Tensor | None, offset: Tensor | None, count: Tensor | None
    ) -> Batch | None:
        """Make a batch of a model's arguments; ``None`` if there are none, for the whole graph.

        Raises:
            TypeError: some are missing, or no tensors.
            ValueError: their sizes disagree.
        """
        given = {"batch_size": batch_size, "n_id": n_id, "offset": offset, "count": count}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        if batch_size is None or n_id is None or offset is None or count is None:
            raise TypeError(
                f"a mini-batch needs batch_size, n_id, offset and count, as a SubgraphLoader yields them (without "
                f"{', '.join(missing)}); for the whole graph give none of them"
            )
        if not all(isinstance(value, Tensor) and value.dim() == 1 for value in (n_id, offset, count)):
            raise TypeError(
                f"n_id, offset and count must be tensors of one dimension, as a SubgraphLoader yields them (got "
                f"{', '.join(map(_described, (n_id, offset, count)))})"
            )
        total = int(count.sum())
        if total != batch_size or not 0 <= batch_size <= n_id.numel():
            raise ValueError(
                f"batch_size={batch_size}, but count adds up to {total} nodes and n_id has {n_id.numel()}: "
                "batch_size must be the sum of count, and n_id these nodes and then their halo"
            )
        return cls(int(batch_size), n_id, offset, count)

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
