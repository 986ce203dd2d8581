"""The processes of a group: who they are, and what is said to all of them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from recollect.distributed._group import Group, SharesError
from recollect.distributed._wire import UNKNOWN, Wire

__all__ = ["Ranks"]


# Tensors are summed up over ranks so many bytes at a time.
_BUCKET = 2**25


class Ranks(Group):
    """A process group that is not kept alive, and what its ranks tell one another.

    Each operation begins with headers, which are compared: where ranks call something else, each raises an error that
    names both, and nothing is sent.

    Args:
        process_group: of torch.distributed; None: the default group.
        owner: what is made of it, for the error when the group is gone.

    Attributes:
        rank: of this process.
        size: how many there are, R.
        wire: their exchanges.

    Raises:
        SharesError: this process is not in the group.
        RuntimeError: torch.distributed is not initialized.

    Example:
        >>> from torch import distributed as dist
        >>> from recollect.distributed import Ranks
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # as torchrun does for many
        >>> Ranks().gather("a value of this rank")
        ['a value of this rank']
        >>> dist.destroy_process_group()
    """

    def __init__(self, process_group: Any | None = None, owner: str = "this") -> None:
        super().__init__(process_group, owner)
        self.wire = Wire(self)

    def gather(self, value: Any, what: str = "values of ranks") -> list[Any]:
        """Return the values of all ranks, in their order.

        Args:
            value: small, and picklable.
            what: they are, for the error.

        Raises:
            SharesError: on every rank, if one calls something else.
        """
        data, size = pickle.dumps(value), self.size
        headers = self.wire.announce(what, wants=[UNKNOWN] * size, sends=[len(data)] * size).hear()
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.place)
        found = self._gathered(own, [header.sends for header in headers])
        return [pickle.loads(part.cpu().numpy().tobytes()) for part in found]

    def agree(self, what: str, value: Any) -> None:
        """Compare a value over the ranks.

        Args:
            what: its name, for the message.
            value: small, and picklable.

        Raises:
            SharesError: on every rank, if two differ, or one calls something else.
        """
        self.compare(what, self.gather(value, f"comparing {what}"))

    @staticmethod
    def compare(what: str, values: Sequence[Any]) -> None:
        """Compare what was gathered.

        Args:
            what: its name, for the message.
            values: of the ranks, in their order.

        Raises:
            SharesError: two differ.
        """
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise SharesError(
                f"{what} of rank {others[0]} is another than that of rank 0 ({values[others[0]]} and {values[0]}): "
                "every rank must be given the same graph, parts and options"
            )

    def add_up(self, tensor: Tensor, what: str = "a sum over ranks") -> Tensor:
        """Return the sum over ranks of a tensor of the same shape on each, in its memory.

        Args:
            tensor: contiguous.
            what: it is, for the error.

        Raises:
            SharesError: on every rank, if one calls something else, or has another number of elements, or type.
        """
        self._announce(what, tensor, tensor.numel())
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def spread(self, tensor: Tensor, what: str = "a tensor of rank 0") -> Tensor:
        """Return the tensor of rank 0, in the memory of each rank's own; arguments and errors as of :meth:`add_up`."""
        self._announce(what, tensor, tensor.numel())
        dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)
        return tensor

    def add_up_all(
        self, own: Mapping[int, Tensor], numbers: Sequence[int], kinds: Sequence[Tensor], what: str = "sums over ranks"
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield sums over ranks of many tensors, with their numbers: a few megabytes at a time.

        Args:
            own: this rank's, by number; where there is none, it counts as zeros.
            numbers: of those that are wanted, the same on every rank.
            kinds: a tensor of the shape and dtype of each number.
            what: they are, for the error.

        Raises:
            SharesError: on every rank, if one calls something else, or for other numbers of elements.
        """
        size = sum(kinds[number].numel() for number in numbers)
        self.wire.announce(f"{what}: {len(numbers)} tensors", channels=size, item=1).hear()
        for bucket in _buckets(numbers, kinds):
            parts = [own[k].to_dense() if k in own else torch.zeros_like(kinds[k]) for k in bucket]
            flat = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(flat, group=self.group)
            del parts
            for number, total in zip(bucket, torch.split(flat, [kinds[k].numel() for k in bucket]), strict=True):
                yield number, total.view(kinds[number].shape)

    def gather_rows(self, rows: Tensor, counts: Sequence[int], what: str = "rows of all ranks") -> list[Tensor]:
        """Return the rows [n_r, ...] of every rank, of one dtype.

        Args:
            rows: this rank's.
            counts: how many each has.
            what: they are, for the error.

        Raises:
            SharesError: on every rank, if one calls something else, or has rows of another width, or type.
        """
        self._announce(what, rows, math.prod(rows.shape[1:]))
        return self._gathered(rows, counts)

    def _announce(self, what: str, tensor: Tensor, channels: int) -> None:
        kind = str(tensor.dtype).removeprefix("torch.")
        self.wire.announce(f"{what}, {kind}", channels=channels, item=tensor.element_size()).hear()

    def _gathered(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        most = max(counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        all_rows = [rows.new_empty(padded.shape) for _ in counts]
        dist.all_gather(all_rows, padded, group=self.group)
        return [part[:count] for part, count in zip(all_rows, counts, strict=True)]


def _buckets(numbers: Sequence[int], kinds: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the numbers of tensors of one dtype that are summed up together."""
    bucket: list[int] = []
    size = 0
    for number in numbers:
        kind = kinds[number]
        if bucket and (size >= _BUCKET or kinds[bucket[0]].dtype != kind.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(number)
        size += kind.numel() * kind.itemsize
    if bucket:
        yield bucket
