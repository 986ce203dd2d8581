"""Ways to sum up the messages that a node gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recollect.messages import propagate, rows_of, values_of, with_weights

__all__ = ["AGGREGATORS", "Messages"]


class Messages:
    """What the sources of each target send: their rows, times the weights of the edges.

    Without terms of the edges' own, sums and means are products with the adjacency, and nothing with a row for each
    edge is made for them.

    Args:
        x: [num_sources, channels].
        adj_t: sparse CSR [num_targets, num_sources].
        edges: [num_edges, channels]: added to the source's row for each edge.
        activation: of these sums.
    """

    def __init__(
        self,
        x: Tensor,
        adj_t: Tensor,
        edges: Tensor | None = None,
        activation: Callable[[Tensor], Tensor] = lambda messages: messages,
    ) -> None:
        self._x = x
        self._adj_t = adj_t
        self._edges = edges
        self._activation = activation
        self._count = adj_t.crow_indices().diff().unsqueeze(-1)

    def sum(self, power: int = 1) -> Tensor:
        """Return the sum of the messages, or of a power of them; 0 where there are none."""
        if self._edges is not None:
            return self._reduced(self._each() ** power, "sum")
        if power == 1:
            return propagate(self._adj_t, self._x)
        return propagate(with_weights(self._adj_t, values_of(self._adj_t) ** power), self._x**power)

    def mean(self, power: int = 1) -> Tensor:
        """Return the mean of the messages, or of a power of them; 0 where there are none."""
        total = self.sum(power)
        return total / self._count.clamp(min=1).to(total.dtype)

    def var(self) -> Tensor:
        """Return the variance, without Bessel's correction."""
        return (self.mean(2) - self.mean().square()).relu()

    def std(self) -> Tensor:
        """Return the standard deviation; 1e-5 is added to the variance, as the root has no slope at 0."""
        return (self.var() + 1e-5).sqrt()

    def max(self) -> Tensor:
        """Return the largest in each channel; 0 where there are none."""
        return self._reduced(self._each(), "max")

    def min(self) -> Tensor:
        """Return the smallest in each channel; 0 where there are none."""
        return self._reduced(self._each(), "min")

    def _each(self) -> Tensor:
        """Return every message [num_edges, channels]."""
        rows = self._x.index_select(0, self._adj_t.col_indices())
        if self._edges is not None:
            rows = self._activation(rows + self._edges)
        return rows * values_of(self._adj_t).to(rows.dtype).unsqueeze(-1)

    def _reduced(self, messages: Tensor, how: str) -> Tensor:
        rowptr = self._adj_t.crow_indices()
        if how == "sum":
            out = torch.segment_reduce(messages, how, offsets=rowptr)
        else:
            out = _Extreme.apply(messages, rowptr, rows_of(self._adj_t), how)  # type: ignore[no-untyped-call]
        return out.masked_fill(self._count == 0, 0.0)


class _Extreme(torch.autograd.Function):
    """The largest or smallest message of each target; those that are equal share its gradient evenly.

    (In torch's own gradient each of them gets a share of a positive one, and the whole of a negative one.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(messages: Tensor, rowptr: Tensor, row: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(messages, how, offsets=rowptr)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
        messages, _, row, _ = inputs
        ctx.save_for_backward(messages, output, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        messages, out, row = ctx.saved_tensors
        is_top = (messages == out.index_select(0, row)).to(grad.dtype)
        number = torch.zeros_like(out).index_add(0, row, is_top).clamp(min=1)
        return is_top * (grad / number).index_select(0, row), None, None, None


AGGREGATORS: dict[str, Callable[[Messages], Tensor]] = {
    name: getattr(Messages, name) for name in ("max", "mean", "min", "std", "sum", "var")
}
