"""The processes of a group: who they are, and what is said to all of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Ranks", "SharesError"]


# Tensors are summed up over ranks so many bytes at a time.
_BUCKET = 2**25


class SharesError(ValueError):
    """What ranks were given does not fit together; it is raised on every one of them.

    Example:
        >>> import torch
        >>> from torch import distributed as dist
        >>> from recollect.distributed import Shares, SharesError
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> try:
        ...     Shares(torch.tensor([0, 10, 30]), weights=[1.0])  # two parts
        ... except SharesError as error:
        ...     print(error)
        ... finally:
        ...     dist.destroy_process_group()
        weights are [2], finite and not negative (got [1])
    """


class Ranks:
    """A process group that is not kept alive, and what small things its ranks tell one another.

    Args:
        process_group: of torch.distributed; None: the default group.
        owner: what is made of it, for the error when the group is gone.

    Attributes:
        rank: of this process.
        size: how many there are, R.

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
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialized: start the script by torchrun, and call "
                "torch.distributed.init_process_group('gloo') first"
            )
        # A group that outlives its end until the interpreter's ends the process by a signal: so none is kept here.
        self._group = weakref.ref(dist.group.WORLD if process_group is None else process_group)
        self._owner = owner
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise SharesError("this process is not in the process group")

    @property
    def group(self) -> Any:
        """The process group.

        Raises:
            RuntimeError: it was destroyed.
        """
        group = self._group()
        if group is None:
            raise RuntimeError(f"the process group of {self._owner} was destroyed: make others")
        return group

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order; small, and picklable."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, what: str, value: Any) -> None:
        """Compare a value over the ranks.

        Args:
            what: its name, for the message.
            value: small, and picklable.

        Raises:
            SharesError: on every rank, if two differ.
        """
        self.compare(what, self.gather(value))

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

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor of the same shape on each, in its memory."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def spread(self, tensor: Tensor) -> Tensor:
        """Return the tensor of rank 0, in the memory of each rank's own."""
        dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)
        return tensor

    def add_up_all(
        self, own: Mapping[int, Tensor], numbers: Sequence[int], kinds: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield sums over ranks of many tensors, with their numbers: a few megabytes at a time.

        Args:
            own: this rank's, by number; where there is none, it counts as zeros.
            numbers: of those that are wanted, the same on every rank.
            kinds: a tensor of the shape and dtype of each number.
        """
        for bucket in _buckets(numbers, kinds):
            parts = [own[k].to_dense() if k in own else torch.zeros_like(kinds[k]) for k in bucket]
            flat = self.add_up(torch.cat([part.reshape(-1) for part in parts]))
            del parts
            for number, total in zip(bucket, torch.split(flat, [kinds[k].numel() for k in bucket]), strict=True):
                yield number, total.view(kinds[number].shape)

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Return the rows [n_r, ...] of every rank, of which there are so many each, of one dtype."""
        most = max(counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        all_rows = [rows.new_empty(padded.shape) for _ in counts]
        dist.all_gather(all_rows, padded, group=self.group)
        return [part[:count] for part, count in zip(all_rows, counts, strict=True)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a process group cannot be copied

    def __reduce__(self) -> Any:
        raise TypeError(
            f"the process group of {self._owner} cannot be pickled; save what belongs to it without it, and make it "
            "anew in the processes that load it"
        )


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
