"""Which parts of a graph, and which rows of tables, each rank owns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler
from torch.utils.weak import WeakTensorKeyDictionary

from recollect._arguments import as_count
from recollect.distributed._group import SharesError
from recollect.distributed._ranks import Ranks
from recollect.distributed._routes import Route

__all__ = ["Shares"]

_Found = TypeVar("_Found")


class Shares:
    """Contiguous parts of a permuted graph for each rank, so many that nodes, or their weights, are balanced.

    All ranks make it at the same time, of the same ``ptr``; it compares what they were given.

    Args:
        ptr: [num_parts + 1] int64: part ``p`` holds the nodes from ``ptr[p]`` to ``ptr[p + 1]``, as `metis` returns it.
        weights: [num_parts], of each part, such as its nodes and edges; by default its nodes.
        process_group: of torch.distributed, with a CPU backend such as gloo; by default the default group. Give a group
            of its own where ``DistributedDataParallel`` uses the default one beside it.

    Attributes:
        ranks: of the group, and what they tell one another.
        rank: of this process in it.
        world_size: ranks in it, R.
        ptr: as given, on the CPU.
        bounds: [R + 1], the first part of each rank, and the number of parts.

    Raises:
        SharesError: ranks were given different parts, there are fewer parts than ranks, or weights do not fit.
        RuntimeError: torch.distributed is not initialized.

    Example:
        >>> import torch
        >>> from torch import distributed as dist
        >>> from recollect.distributed import Shares
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # as torchrun does for many
        >>> shares = Shares(torch.tensor([0, 10, 30, 40]))
        >>> shares.parts, shares.nodes
        (range(0, 3), (0, 40))
        >>> dist.destroy_process_group()
    """

    def __init__(
        self, ptr: Tensor, weights: Tensor | Sequence[float] | None = None, process_group: Any | None = None
    ) -> None:
        self.ranks = Ranks(process_group, "these Shares")
        self._wire = self.ranks.wire
        self.rank, self.world_size = self.ranks.rank, self.ranks.size
        self.ptr = torch.as_tensor(ptr).detach().to("cpu", torch.int64)
        self.agree("ptr", (list(self.ptr.shape), _digest(self.ptr)))
        parts = self.ptr.numel() - 1
        ascends = self.ptr.dim() == 1 and bool((self.ptr.diff() >= 0).all() and self.ptr[:1].eq(0).all())
        if not ascends or parts < self.world_size:
            raise SharesError(
                f"ptr is [num_parts + 1], ascends from 0, and has a part at least for each of the {self.world_size} "
                f"ranks (got a tensor of {list(self.ptr.shape)})"
            )
        heavy = self.ptr.diff().double() if weights is None else torch.as_tensor(weights, dtype=torch.float64).cpu()
        self.agree("weights", (list(heavy.shape), _digest(heavy)))
        if heavy.shape != (parts,) or not bool(((heavy >= 0) & heavy.isfinite()).all()):
            raise SharesError(f"weights are [{parts}], finite and not negative (got {list(heavy.shape)})")
        self.bounds = _balanced(heavy, self.world_size)
        self._first = self.ptr[self.bounds]
        self._routes: Any = WeakTensorKeyDictionary()
        self._tables = 0

    @property
    def group(self) -> Any:
        """The process group, which is not kept by this.

        Raises:
            RuntimeError: it was destroyed.
        """
        return self.ranks.group

    @property
    def wire_bytes(self) -> int:
        """Bytes of rows that this rank has sent to others since this was made."""
        return self._wire.row_bytes

    @property
    def num_nodes(self) -> int:
        """Of the whole graph, N."""
        return int(self.ptr[-1])

    @property
    def parts(self) -> range:
        """The parts of this rank."""
        return range(int(self.bounds[self.rank]), int(self.bounds[self.rank + 1]))

    @property
    def nodes(self) -> tuple[int, int]:
        """The first node of this rank, and the end of its nodes."""
        return int(self._first[self.rank]), int(self._first[self.rank + 1])

    def owners(self, nodes: Tensor) -> Tensor:
        """Return the rank that owns each node, [n] int64."""
        return torch.searchsorted(self._first, nodes.to(torch.int64), right=True) - 1

    def batches(self, parts_per_batch: int = 1, *, shuffle: bool = True, seed: int = 0) -> Batches:
        """Return a ``batch_sampler`` of a loader: this rank's parts, in as many mini-batches as each other rank has.

        All ranks take the same number of steps, so that none waits for another that has ended. Where a rank has fewer
        parts than another, its mini-batches have fewer of them.

        Args:
            parts_per_batch: at most.
            shuffle: draw the order of the parts anew in each epoch.
            seed: of the order; each rank draws its own.

        Raises:
            SharesError: a rank has fewer parts than mini-batches are needed.
        """
        parts_per_batch = as_count("parts_per_batch", parts_per_batch)
        counts = self.bounds.diff()
        steps = int((counts.max() + parts_per_batch - 1) // parts_per_batch)
        if int(counts.min()) < steps:
            raise SharesError(
                f"ranks own {counts.tolist()} parts, and mini-batches of {parts_per_batch} parts make {steps} steps; "
                f"in each of them every rank needs a part: take more parts, or "
                f"parts_per_batch={-int(-counts.max() // counts.min())}"
            )
        return Batches(self.parts, steps, shuffle, seed * self.world_size + self.rank)

    def scale(self, count: int | Tensor) -> Tensor:
        """Return by what to multiply a mean loss over ``count`` nodes, so that the mean over ranks is that of all.

        ``DistributedDataParallel`` divides the sum of the ranks' gradients by their number R: the factor is
        R count / Σ count, and 0 where no rank has a node. It is an exchange of one number.

        Args:
            count: training nodes of this rank's mini-batch.

        Returns:
            A scalar, float64 on the CPU.

        Raises:
            SharesError: on every rank, if one calls something else.
        """
        own = torch.as_tensor(count, dtype=torch.float64).cpu()
        total = sum(self._wire.meet("scale of a loss", float(own)))
        return own * self.world_size / max(total, 1)

    def route(self, rows: Tensor, what: str = "rows") -> Route:
        """Say to all ranks which rows each wants; all of them call this together.

        Args:
            rows: [n] int64 on the CPU, nodes of any ranks; may be empty. For the same tensor, as that of a mini-batch's
                halo in each layer, it is done once.
            what: they are, for the error.

        Raises:
            SharesError: on every rank, if one calls something else.
        """
        if rows.is_inference():  # such tensors have no version
            return self._route(rows, what)
        known: tuple[int, Route] | None = self._routes.get(rows)
        if known is None or known[0] != rows._version:
            known = self._routes[rows] = rows._version, self._route(rows, what)
        return known[1]

    def _route(self, rows: Tensor, what: str) -> Route:
        return Route(rows, self.owners(rows), self.nodes[0], self._wire, what)

    def next_table(self) -> int:
        """Return the number of one more table whose rows lie with the ranks, which is the same on each."""
        self._tables += 1
        return self._tables

    def meet(self, what: str) -> None:
        """Wait until all ranks are at the same place, which has this name.

        Raises:
            SharesError: on every rank, if one is at another place, or has ended.
        """
        self._wire.meet(what)

    def agree(self, what: str, value: Any) -> None:
        """Compare a value over the ranks.

        Args:
            what: its name, for the message.
            value: small, and picklable.

        Raises:
            SharesError: on every rank, if two differ, or one calls something else.
        """
        self.ranks.agree(what, value)

    def together(self, what: str, function: Callable[[], _Found]) -> _Found:
        """Return what a function returns on this rank, if it raises no error on any; all ranks call this together.

        Args:
            what: it is for, for the error where ranks differ.
            function: takes no part in an exchange.

        Raises:
            Exception: the function's own, on the ranks where there is one.
            SharesError: on the others; it names the first of those ranks, and its error.
        """
        found: _Found | None = None
        error: Exception | None = None
        try:
            found = function()
        except Exception as own:
            error = own
        told = self.ranks.gather(None if error is None else f"{type(error).__name__}: {error}", what)
        if error is not None:
            raise error
        for rank, message in enumerate(told):
            if message is not None:
                raise SharesError(f"rank {rank} could not go on, and so no other could: {message}")
        return cast(_Found, found)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shares:
        return self  # a process group cannot be copied


class Batches(Sampler[list[int]]):
    """Groups of parts, ``steps`` of them in an epoch, of sizes that differ by one at most."""

    def __init__(self, parts: range, steps: int, shuffle: bool, seed: int) -> None:
        self.parts, self.steps = parts, steps
        self._generator = torch.Generator().manual_seed(seed) if shuffle else None

    def __len__(self) -> int:
        return self.steps

    @property
    def drawn(self) -> Tensor | None:
        """The state of what draws the next epochs' orders; ``None``: nothing is drawn."""
        return None if self._generator is None else self._generator.get_state()

    @drawn.setter
    def drawn(self, state: Tensor) -> None:
        if self._generator is not None:
            self._generator.set_state(state)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.tensor(list(self.parts), dtype=torch.int64)
        if self._generator is not None:
            order = order[torch.randperm(order.numel(), generator=self._generator)]
        return iter([group.tolist() for group in order.tensor_split(self.steps)])


def _balanced(weights: Tensor, ranks: int) -> Tensor:
    """Cut parts into contiguous ranges, the heaviest of which is as light as can be; each has one part at least.

    Returns:
        [ranks + 1] int64.
    """
    ends = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    parts = weights.numel()

    def cut(bound: float) -> list[int] | None:
        found = [0]
        for rank in range(ranks):
            left = ranks - rank - 1  # of which each needs a part
            end = int(torch.searchsorted(ends, ends[found[-1]] + bound * (1 + 1e-12), right=True)) - 1
            end = min(max(end, found[-1] + 1), parts - left)
            if float(ends[end] - ends[found[-1]]) > bound * (1 + 1e-9):
                return None
            found.append(end)
        return found if found[-1] == parts else None

    low, high = float(weights.max()), float(ends[-1])
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cut(middle) is not None else (middle, high)
    found = cut(high)
    assert found is not None
    return torch.tensor(found)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:16]
