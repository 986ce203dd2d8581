"""Buffers that layers write in training, such as the vectors of a power iteration: once a step, as the network does.

A forward pass of the network writes each buffer once for each layer that does. Parts would write it once each, and in
backward again. So what writes is run once on a small graph before the parts, in the network's order; and whenever it is
computed for a part it begins with the buffers as they were then, and writes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.frames import RebuildError

__all__ = ["Writes"]


@dataclass(frozen=True)
class _Write:
    buffer: Tensor
    before: Tensor
    after: Tensor


class Writes:
    """What a step's forward pass writes into buffers.

    Example:
        >>> import torch
        >>> from recollect.outofcore._writes import Writes
        >>> count, writes = torch.zeros(1), Writes()
        >>> writes.watch("layer 0", [count], lambda: count.add_(1))
        >>> for part in range(3):
        ...     with writes.again("layer 0"):
        ...         _ = count.add_(1)
        >>> count
        tensor([1.])
    """

    def __init__(self) -> None:
        self._at: dict[Hashable, list[_Write]] = {}

    def watch(self, place: Hashable, buffers: Sequence[Tensor], run: Callable[[], object]) -> None:
        """Run what is at a place, for the first time, and take notice of what it writes."""
        before = [buffer.clone() for buffer in buffers]
        run()
        pairs = zip(buffers, before, strict=True)
        self._at[place] = [_Write(b, old, b.clone()) for b, old in pairs if not _same(b, old)]

    @contextmanager
    def again(self, place: Hashable) -> Iterator[None]:
        """Let what is at a place be run once more.

        Raises:
            RebuildError: it wrote something else.
        """
        writes = self._at.get(place, ())
        _copy([(write.buffer, write.before) for write in writes])
        yield
        if not all(_same(write.buffer, write.after) for write in writes):
            raise RebuildError(
                f"{place}: what it writes into its buffers depends on the rows that it gets, or on what it draws, and "
                "was something else on a small graph: keep such statistics outside of layers, or evaluate the network"
            )

    def undo(self) -> None:
        """Put back what the buffers were before the first run."""
        _copy([(write.buffer, write.before) for writes in reversed(self._at.values()) for write in writes])

    def settle(self) -> None:
        """Leave what they are behind the network's forward pass."""
        _copy([(write.buffer, write.after) for writes in self._at.values() for write in writes])


@torch.no_grad()
def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in pairs:
        buffer.copy_(value)


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
