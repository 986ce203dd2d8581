"""Rows of nodes that a reversible layer reads and does not compute, such as the halo of a mini-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from recollect.frames import Source

__all__ = ["Beside", "Through"]

Arguments = list[tuple[Any, ...]]


class Through(Protocol):
    """What stands before and behind each block of a layer, within its frame."""

    def enter(self, group: int, z: Tensor) -> Tensor:
        """Return the input of a block, counted from 0, at the layer's own nodes [n, channels]."""

    def leave(self, group: int, out: Tensor) -> Tensor:
        """Return the output of a block at the layer's own nodes [n, channels]."""


@dataclass(frozen=True)
class Beside:
    """Rows of further nodes, for a layer y = (y_1, ..., y_C) of x = (x_1, ..., x_C).

    The first block reads x_2 + ... + x_C, and block i the partial output y_(i-1): of the further nodes too, whose rows
    are therefore needed of the input and of the output.

    Attributes:
        inputs: their x [H, C * channels].
        outputs: their y [H, C * channels].
        sources: what brings these two back in backward, as the first argument of a region; ``None``: they are kept.
        through: what stands before and behind each block.

    Example:
        >>> import torch
        >>> from recollect.reversible import Beside, GroupAddRev
        >>> class Sums(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(2, 2)
        ...     def forward(self, x, adjacency):
        ...         return adjacency @ self.linear(x)
        >>> layer = GroupAddRev(Sums(), num_groups=2)
        >>> x, adjacency = torch.randn(5, 4), torch.rand(5, 5)
        >>> y = layer(x, adjacency)
        >>> halo = Beside(x[3:], y[3:])  # of the first three nodes
        >>> torch.allclose(layer(x[:3], adjacency, beside=halo), y[:3], atol=1e-6)
        True
    """

    inputs: Tensor
    outputs: Tensor
    sources: tuple[Source | None, Source | None] = (None, None)
    through: Through | None = None

    def put(
        self, blocks: Sequence[Any], arguments: Arguments, x: Tensor, dim: int
    ) -> tuple[list[_Among], Arguments, list[Source | None]]:
        """Return the blocks, with what each gets, so that they see these rows behind their own.

        Args:
            blocks: f_1..f_C.
            arguments: of each, after its input.
            x: the layer's input.
            dim: that its groups lie in.

        Raises:
            ValueError: the rows have another form than those of ``x``, or the groups lie along the rows.
        """
        for name, rows in (("inputs", self.inputs), ("outputs", self.outputs)):
            if rows.dim() != x.dim() or rows.shape[1:] != x.shape[1:] or dim % x.dim() == 0:
                raise ValueError(
                    f"beside.{name}: rows like those of x are expected, [H, {', '.join(map(str, x.shape[1:]))}], with "
                    f"the groups in another dimension than the first (got {list(rows.shape)}, and dimension {dim})"
                )
        read = [self.inputs, *[self.outputs] * (len(blocks) - 1)]
        given = [(more, *own) for more, own in zip(read, arguments, strict=True)]
        sources = [self.sources[0], *[self.sources[1]] * (len(blocks) - 1)]
        among = [_Among(block, i, len(blocks), dim, self.through) for i, block in enumerate(blocks)]
        return among, given, sources


class _Among:
    """A block that sees the rows of further nodes behind its own.

    Attributes:
        owner: whom messages name.
    """

    __slots__ = ("_block", "_dim", "_index", "_number", "_through", "owner")

    def __init__(
        self, block: Callable[..., Any], index: int, number: int, dim: int, through: Through | None = None
    ) -> None:
        self.owner = getattr(block, "owner", block)
        self._block = block
        self._index = index
        self._number = number
        self._dim = dim
        self._through = through

    def __call__(self, z: Tensor, rows: Tensor, graph: Any, *args: Any, **kwargs: Any) -> Any:
        if self._through is None:
            return self._run(z, rows, graph, *args, **kwargs)
        out = self._run(self._through.enter(self._index, z), rows, graph, *args, **kwargs)
        return self._through.leave(self._index, out) if isinstance(out, Tensor) else out

    def _run(self, z: Tensor, rows: Tensor, graph: Any, *args: Any, **kwargs: Any) -> Any:
        if not rows.size(0):
            return self._block(z, graph, *args, **kwargs)
        groups = torch.chunk(rows, self._number, self._dim)
        more = sum(groups[2:], start=groups[1]) if self._index == 0 else groups[self._index - 1]
        out = self._block(torch.cat([z, more.to(z)]), graph, *args, **kwargs)
        if not isinstance(out, Tensor) or not out.dim() or out.size(0) != z.size(0) + more.size(0):
            return out  # the coupling says what is expected
        return out[: z.size(0)]
