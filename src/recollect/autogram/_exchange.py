"""Products of the Jacobians of different ranks' losses: each layer's factors go round the ranks, and meet there.

When a rank has a parameter's Jacobian, it sends its factor to half of the others, one after another as in a ring, and
multiplies what comes with its own: of each pair of ranks one computes the block. Ranks take such steps together, also
those that have nothing left. What comes for a parameter before the own Jacobian is there waits, so ranks may come by
parameters in different orders; where the order is the same, nothing is held for longer than a step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import torch
from torch import Tensor
from torch import distributed as dist

from recollect.autogram._contract import add_cross
from recollect.autogram._factors import Blocks, Factor, Lookups, Outer, Picked, Rows, as_rows, held_elements, merge
from recollect.autogram._lookups import padded
from recollect.autogram._sums import WholeSum
from recollect.distributed import Ranks, SharesError

__all__ = ["Exchange", "RankSum"]

# Rows that are formed or sent at once take at most so many bytes.
_PART = 2**26
_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
_FIELDS = 20
_Sent = Rows | Outer | Picked | Blocks


class _Status(IntEnum):
    FACTOR, DONE, DECLINED, FAILED = range(4)


class _Kind(IntEnum):
    ROWS, OUTER, PICKED, PART = range(4)


@dataclass(frozen=True, slots=True)
class _Parcel:
    """What a rank sends in a step.

    Attributes:
        status: of the rank.
        parameter: its number.
        kind: of the factor.
        is_last: whether the parameter's Jacobian is whole with it.
        axis: of the parameter, of which a part is sent; -1: of its elements, laid flat.
        start: of the part.
        stop: of the part.
        tensors: those of the factor.
    """

    status: _Status
    parameter: int = 0
    kind: _Kind = _Kind.ROWS
    is_last: bool = False
    axis: int = 0
    start: int = 0
    stop: int = 0
    tensors: tuple[Tensor, ...] = ()

    def header(self, device: torch.device) -> Tensor:
        """Return what others must know before it comes."""
        numbers = [*map(int, (self.status, self.parameter, self.kind, self.is_last, self.axis, self.start, self.stop))]
        numbers.append(len(self.tensors))
        for tensor in self.tensors:
            shape = [*tensor.shape]
            numbers += [_DTYPES.index(tensor.dtype), len(shape), *shape, *[0] * (4 - len(shape))]
        return torch.tensor(numbers + [0] * (_FIELDS - len(numbers)), device=device)

    @classmethod
    def of(cls, header: Sequence[int], device: torch.device) -> _Parcel:
        """Return room for what is announced."""
        status, parameter, kind, is_last, axis, start, stop, count = header[:8]
        tensors = []
        for k in range(8, 8 + 6 * count, 6):
            dtype, dims = _DTYPES[header[k]], header[k + 1]
            tensors.append(torch.empty(header[k + 2 : k + 2 + dims], dtype=dtype, device=device))
        return cls(_Status(status), parameter, _Kind(kind), bool(is_last), axis, start, stop, tuple(tensors))


@dataclass(slots=True)
class Exchange:
    """The blocks of the Gramian in which this rank's losses meet those of others.

    Args:
        ranks: who takes part.
        counts: how many losses each has.
        uses: the numbers of the parameters that each may send.
        shapes: of the parameters.
        dtype: what is summed in.
        device: where.

    Attributes:
        block: [m_r, Σ m], of which the columns of half of the other ranks are filled.
        sent: bytes of factors that went to other ranks.
    """

    ranks: Ranks
    counts: Sequence[int]
    uses: Sequence[Collection[int]]
    shapes: Sequence[torch.Size]
    dtype: torch.dtype
    device: torch.device
    block: Tensor = field(init=False)
    sent: int = field(init=False, default=0)
    _mine: dict[int, _Sent] = field(init=False, default_factory=dict)
    _theirs: dict[int, list[tuple[int, _Parcel]]] = field(init=False, default_factory=dict)
    _awaited: dict[int, int] = field(init=False, default_factory=dict)
    _text: str | None = field(init=False, default=None)
    _is_over: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        rank = self.ranks.rank
        self.block = torch.zeros(self.counts[rank], sum(self.counts), dtype=self.dtype, device=self.device)
        for source, _ in self._pairs():
            if source is not None:
                for parameter in self.uses[source]:
                    self._awaited[parameter] = self._awaited.get(parameter, 0) + 1

    def columns(self, rank: int) -> slice:
        """Return where the losses of a rank are among all."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def take(self, parameter: int, factors: Sequence[Factor]) -> None:
        """Take a parameter's Jacobian of this rank's losses, and step with the others."""
        factor = _one(factors, self.shapes[parameter])
        if self._awaited.get(parameter):
            self._mine[parameter] = factor
            for source, parcel in self._theirs.pop(parameter, ()):
                self._meet(source, parcel)
        for parcel in _parcels(parameter, factor):
            self._step(parcel)

    def finish(self, declined: bool) -> bool:
        """Step with the others until none has anything left; return whether rules of any declined."""
        status = _Status.DECLINED if declined else _Status.DONE
        while True:
            seen = self._step(_Parcel(status))
            if _Status.FACTOR not in seen:
                self._is_over = True
                return _Status.DECLINED in seen

    def fail(self, text: str) -> None:
        """Tell the others that this rank cannot go on, unless they know that all end."""
        if not self._is_over:
            self._text = text
            try:
                self._step(_Parcel(_Status.FAILED))
            except SharesError:
                return  # the caller has an error of its own

    def _pairs(self) -> Iterator[tuple[int | None, int | None]]:
        """Yield from whom this rank gets something, and to whom it sends; None: nobody."""
        rank, size = self.ranks.rank, self.ranks.size
        for distance in range(1, size // 2 + 1):
            source: int | None = (rank - distance) % size
            target: int | None = (rank + distance) % size
            if 2 * distance == size:  # both are at this distance of one another, and one of them is enough
                source, target = (source, None) if rank >= distance else (None, target)
            some = self.counts[rank] > 0
            yield (
                source if source is not None and some and self.counts[source] else None,
                target if target is not None and some and self.counts[target] else None,
            )

    def _step(self, parcel: _Parcel) -> list[_Status]:
        """Send a parcel and take those of others; return the status of all."""
        header = parcel.header(self.device)
        found = [torch.empty_like(header) for _ in self.counts]
        dist.all_gather(found, header, group=self.ranks.group)
        headers: list[list[int]] = torch.stack(found).tolist()
        seen = [_Status(numbers[0]) for numbers in headers]
        if _Status.FAILED in seen:
            self._is_over = True
            raise_first(self.ranks.gather(self._text, "errors within an engine"))
        for source, target in self._pairs():
            room = None
            if source is not None and seen[source] == _Status.FACTOR:
                room = _Parcel.of(headers[source], self.device)
            self._move(parcel.tensors if target is not None else (), target, room, source)
            if room is not None and source is not None:
                self._arrive(source, room)
        return seen

    def _move(self, tensors: tuple[Tensor, ...], target: int | None, room: _Parcel | None, source: int | None) -> None:
        group, ops = self.ranks.group, []
        if target is not None:
            peer = dist.get_global_rank(group, target)
            ops += [dist.P2POp(dist.isend, some, peer, group, tag) for tag, some in enumerate(tensors) if some.numel()]
            self.sent += sum(some.numel() * some.itemsize for some in tensors)
        if room is not None and source is not None:
            peer = dist.get_global_rank(group, source)
            waiting = enumerate(room.tensors)
            ops += [dist.P2POp(dist.irecv, some, peer, group, tag) for tag, some in waiting if some.numel()]
        for work in dist.batch_isend_irecv(ops) if ops else ():
            work.wait()

    def _arrive(self, source: int, parcel: _Parcel) -> None:
        if parcel.parameter in self._mine:
            self._meet(source, parcel)
        elif parcel.parameter in self.uses[self.ranks.rank]:
            self._theirs.setdefault(parcel.parameter, []).append((source, parcel))

    def _meet(self, source: int, parcel: _Parcel) -> None:
        """Add the product of the own Jacobian and what came of another rank's."""
        parameter, shape = parcel.parameter, self.shapes[parcel.parameter]
        block = self.block[:, self.columns(source)]
        if parcel.kind == _Kind.PART:
            own = self._part(parameter, parcel.axis, slice(parcel.start, parcel.stop))
            block.addmm_(own.to(block.dtype), parcel.tensors[0].to(block.dtype).mT)
        else:
            add_cross(block, [self._mine[parameter]], [_factor(parcel, shape)])
        if parcel.is_last:
            self._awaited[parameter] -= 1
            if not self._awaited[parameter]:
                del self._mine[parameter]

    def _part(self, parameter: int, axis: int, part: slice) -> Tensor:
        """Return the own Jacobian's part [m, columns]."""
        own = self._mine[parameter]
        if isinstance(own, Blocks) and own.axis == axis:
            return own.form(slice(0, own.num_rows), part).flatten(1)
        if not isinstance(own, Rows):
            own = self._mine[parameter] = as_rows([own], self.shapes[parameter])
        values = _flat(own) if axis < 0 else own.values
        return values.narrow(max(axis, 0) + 1, part.start, part.stop - part.start).flatten(1)


class RankSum(WholeSum):
    """The Gramian of this rank's own losses, each parameter's Jacobian of which goes to other ranks too.

    Args:
        parameters: by id.
        passes: the number of backward passes.
        rows: how many rows come in each.
        exchange: with the other ranks.
        places: for each loss, its row among those of all passes; None: they are in order.
    """

    def __init__(
        self, parameters: Mapping[int, Tensor], passes: int, rows: int, exchange: Exchange, places: Tensor | None
    ) -> None:
        super().__init__(parameters, passes, rows, exchange.dtype, exchange.device)
        self._exchange = exchange
        self._numbers = {key: number for number, key in enumerate(parameters)}
        self._places = places

    def add(self, parameter: int, factors: Sequence[Factor]) -> None:
        """Square a parameter's Jacobian, and let it meet those of others."""
        factors = merge(factors)
        if self._places is not None:
            factors = [_ordered(factor, self._places) for factor in factors]
        super().add(parameter, factors)
        self._exchange.take(self._numbers[parameter], factors)


def raise_first(errors: Sequence[str | None]) -> None:
    """Raise on every rank what the first of those that cannot go on says.

    Raises:
        SharesError: one cannot.
    """
    for rank, text in enumerate(errors):
        if text is not None:
            raise SharesError(f"rank {rank} could not go on, and so no other could: {text}")


def _one(factors: Sequence[Factor], shape: torch.Size) -> _Sent:
    """Return one factor for several, in the form that takes the least room."""
    merged = [padded(factor) if isinstance(factor, Lookups) else factor for factor in merge(factors)]
    only = merged[0]
    if len(merged) == 1 and (
        isinstance(only, (Rows, Blocks)) or held_elements(merged) <= only.num_rows * shape.numel()
    ):
        return only
    return as_rows(merged, shape)


def _parcels(parameter: int, factor: _Sent) -> Iterator[_Parcel]:
    """Yield what is sent of a Jacobian, step by step."""
    if isinstance(factor, Outer):
        yield _whole(parameter, _Kind.OUTER, factor.left, factor.right)
    elif isinstance(factor, Picked):
        yield _whole(parameter, _Kind.PICKED, factor.grad, factor.index)
    elif isinstance(factor, Blocks):
        parts = factor.shape[factor.axis]
        width = factor.num_rows * factor.shape.numel() // max(1, parts) * 8
        for start, stop in _ranges(parts, width):
            formed = factor.form(slice(0, factor.num_rows), slice(start, stop)).flatten(1).contiguous()
            yield _part(parameter, factor.axis, start, stop, parts, formed)
    else:
        rows = _flat(factor)
        for start, stop in _ranges(rows.shape[1], len(rows) * rows.itemsize):
            yield _part(parameter, -1, start, stop, rows.shape[1], rows[:, start:stop].contiguous())


def _flat(factor: Rows) -> Tensor:
    return factor.values.flatten(1) if factor.values.dim() > 1 else factor.values.unsqueeze(1)


def _whole(parameter: int, kind: _Kind, first: Tensor, second: Tensor) -> _Parcel:
    return _Parcel(_Status.FACTOR, parameter, kind, True, tensors=(first.contiguous(), second.contiguous()))


def _part(parameter: int, axis: int, start: int, stop: int, end: int, formed: Tensor) -> _Parcel:
    return _Parcel(_Status.FACTOR, parameter, _Kind.PART, stop == end, axis, start, stop, (formed,))


def _ranges(count: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of so many columns of so many bytes that each fits."""
    step = max(1, _PART // max(1, width))
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _factor(parcel: _Parcel, shape: torch.Size) -> Outer | Picked:
    """Return what another rank has sent."""
    first, second = parcel.tensors
    return Outer(first, second, shape) if parcel.kind == _Kind.OUTER else Picked(first, second, shape[0])


def _ordered(factor: Factor, places: Tensor) -> Factor:
    """Return a factor with its rows in another order."""

    def pick(side: Tensor) -> Tensor:
        return side if len(side) == 1 else side[places]

    if isinstance(factor, Outer):
        return Outer(pick(factor.left), pick(factor.right), factor.shape)
    if isinstance(factor, Picked):
        return Picked(factor.grad[places], pick(factor.index), factor.num_entries)
    if isinstance(factor, Lookups):
        return replace(factor, owner=places.argsort()[factor.owner])
    if isinstance(factor, Rows):
        return Rows(factor.values[places])
    whole, form = slice(0, factor.num_rows), factor.form

    def ordered(rows: slice, part: slice) -> Tensor:
        return form(whole, part)[places[rows]]

    return Blocks(factor.num_rows, factor.shape, ordered, factor.row_elements, factor.axis, factor.sources)
