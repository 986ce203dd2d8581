"""Exchanges between ranks: each begins with a header of fixed size, which is compared before anything else counts.

A header goes to every rank by one collective operation, the same for all kinds of exchanges. What follows goes from
rank to rank under a tag that is made of the header, or by a collective operation that begins when all headers have
come: where two headers differ, what belongs to one of them never arrives in memory that was made for the other. A rank
that cannot go on says so in the header of its next exchange.
"""

from __future__ import annotations

import struct
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from recollect.distributed._group import Group, SharesError

__all__ = ["HEADER_BYTES", "NONE", "UNKNOWN", "Exchange", "Header", "Values", "Wire"]

_TEXT = 176
_LAYOUT = struct.Struct(f"<7q3d{_TEXT}s")
HEADER_BYTES = _LAYOUT.size
UNKNOWN = -1
Values = tuple[float, float, float]
NONE = (0.0, 0.0, 0.0)
_Take = TypeVar("_Take", bound=Callable[[], Tensor])


@dataclass(frozen=True)
class Header:
    """What one rank says to another at the beginning of an exchange.

    Attributes:
        number: of the exchange among those of the rank, from 1; 0: nothing was said.
        what: in words, of at most 176 bytes; of a rank that failed, why.
        route: number of the exchange that made the list of rows, or 0.
        channels: of a row.
        item: bytes of a number.
        wants: rows, of the rank that is told; -1: as many as that rank says that it sends.
        sends: rows, to the rank that is told; -1: as many as that rank says that it wants.
        values: numbers that are no condition.
        failed: whether the rank cannot go on, whatever the exchange is.
    """

    number: int
    what: str
    route: int = 0
    channels: int = 0
    item: int = 0
    wants: int = 0
    sends: int = 0
    values: Values = NONE
    failed: bool = False

    def pack(self) -> bytes:
        """Return it as bytes, always as many."""
        numbers = (self.number, self.route, self.channels, self.item, self.wants, self.sends, self.failed)
        return _LAYOUT.pack(*numbers, *self.values, _short(self.what).encode())

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Return what was packed."""
        number, route, channels, item, wants, sends, failed, *values, what = _LAYOUT.unpack(data)
        first, second, third = values
        words = what.rstrip(b"\0").decode()
        return cls(number, words, route, channels, item, wants, sends, (first, second, third), bool(failed))

    def fits(self, other: Header) -> bool:
        """Return whether two ranks take part in the same exchange."""

        def same(sends: int, wants: int) -> bool:
            return UNKNOWN in (sends, wants) or sends == wants

        mine, theirs = ((x.number, _short(x.what), x.route, x.channels, x.item) for x in (self, other))
        return mine == theirs and same(self.sends, other.wants) and same(other.sends, self.wants)

    def tag(self, rows: int) -> int:
        """Return what marks rows that follow this header."""
        kind = (self.number, _short(self.what), self.route, self.channels, self.item, rows)
        return zlib.crc32(repr(kind).encode()) & 0x7FFFFFFF

    def __str__(self) -> str:
        rows = ""
        if self.item:
            sends = "" if self.sends == UNKNOWN else f", sends it {self.sends}"
            rows = f": {self.channels} x {self.item} bytes a row, wants {self.wants} rows of the other{sends}"
            rows += f", by the list of exchange {self.route}" if self.route else ""
        return f"exchange {self.number} ({_short(self.what)}{rows})"


class Wire:
    """Exchanges of a process group, numbered on each rank.

    After one that failed there are no others: what ranks would go on with no longer fits together.

    Args:
        ranks: the group.

    Attributes:
        ranks: as given.
        number: exchanges that were begun.
        row_bytes: bytes of rows that were sent to other ranks, without headers and row numbers.
    """

    def __init__(self, ranks: Group) -> None:
        self.ranks = ranks
        self.number = 0
        self.row_bytes = 0
        self._broken: str | None = None
        # Memory that an exchange reads or writes has to stay until it is over, also if nobody asks for the result.
        self._begun: list[tuple[weakref.ref[Callable[[], Tensor]], Exchange]] = []

    def announce(
        self,
        what: str,
        *,
        wants: Sequence[int] | None = None,
        sends: Sequence[int] | None = None,
        route: int = 0,
        channels: int = 0,
        item: int = 0,
        values: Values = NONE,
        failed: bool = False,
    ) -> Exchange:
        """Begin an exchange, of which all ranks must say the same; its header is on its way when this returns.

        Args:
            what: see :class:`Header`, also for the others.
            wants: rows of each rank [R]; by default none.
            sends: rows to each rank [R]; by default as many as those say that they want.
            route: number of the exchange that made the list of rows.
            channels: of a row.
            item: bytes of a number.
            values: numbers that are no condition.
            failed: whether this rank cannot go on.

        Raises:
            SharesError: an exchange has failed before.
        """
        self.check()
        for _, exchange in [begun for begun in self._begun if begun[0]() is None]:
            exchange.wait()
        self.number += 1
        header = Header(self.number, what, route, channels, item, values=values, failed=failed)
        size = self.ranks.size
        pairs = zip(wants or [0] * size, [UNKNOWN if wants else 0] * size if sends is None else sends, strict=True)
        return Exchange(self, [replace(header, wants=w, sends=s) for w, s in pairs])

    def meet(self, what: str, value: float = 0.0) -> list[float]:
        """Wait until all ranks are at the same place, and return what value each brings [R].

        Raises:
            SharesError: on every rank, if one is at another place, or has ended.
        """
        return [header.values[0] for header in self.announce(what, values=(value, 0.0, 0.0)).hear()]

    @contextmanager
    def telling(self, settle: Callable[[], None] | None = None) -> Iterator[None]:
        """Tell the other ranks of an error within, in the place of the next exchange, to which all of them come.

        They raise a SharesError there, which names this rank and the error.

        Args:
            settle: waits for exchanges of this rank that are under way in another thread.
        """
        try:
            yield
        except SharesError:
            raise  # the others have it too
        except Exception as error:
            if settle is not None:
                settle()
            # The caller has an error of its own, whatever becomes of this.
            with suppress(SharesError, RuntimeError):
                self.announce(f"{type(error).__name__}: {error}", failed=True).hear()
            raise

    def check(self) -> None:
        """Raise a SharesError if an exchange has failed before."""
        if self._broken is not None:
            raise SharesError(f"an exchange between these ranks failed before: {self._broken}")

    def fail(self, message: str) -> SharesError:
        """Return the error, behind which there are no exchanges."""
        self._broken = message
        return SharesError(message)

    def keep(self, take: _Take, exchange: Exchange) -> _Take:
        """Keep an exchange until it is over; where ``take`` is dropped, the next one waits for it."""
        self._begun.append((weakref.ref(take), exchange))
        return take

    def drop(self, exchange: Exchange) -> None:
        """Forget an exchange that is over."""
        self._begun = [begun for begun in self._begun if begun[1] is not exchange]


class Exchange:
    """One exchange: a header to each rank, and behind it rows from rank to rank.

    Args:
        wire: of the group.
        headers: to each rank [R].
    """

    def __init__(self, wire: Wire, headers: list[Header]) -> None:
        self._wire, self.headers = wire, headers
        self._rank = wire.ranks.rank
        data = b"".join(header.pack() for header in headers)
        self._said = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(wire.ranks.place)
        self._heard = torch.zeros_like(self._said)
        self._told = dist.all_to_all_single(self._heard, self._said, group=wire.ranks.group, async_op=True)
        self._works: list[dist.Work | None] = []
        self._memory: list[Tensor] = []
        self._headers: list[Header] | None = None

    @property
    def number(self) -> int:
        """Of the exchange."""
        return self.headers[0].number

    def hear(self) -> list[Header]:
        """Wait for the headers of all ranks [R], and compare them.

        Raises:
            SharesError: a rank cannot go on, is at another exchange, or says nothing.
        """
        self._wire.check()
        if self._headers is None:
            ended = None
            try:
                self._told.wait()
            except RuntimeError as error:
                ended = error
            heard = [Header.unpack(part.numpy().tobytes()) for part in self._heard.cpu().view(-1, HEADER_BYTES)]
            self._check_failed(heard)
            for rank, (mine, theirs) in enumerate(zip(self.headers, heard, strict=True)):
                if theirs.number and rank != self._rank and not (mine.failed or theirs.fits(mine)):
                    raise self._wire.fail(self._difference(rank, mine, theirs)) from ended
            if ended is not None:
                silent = [rank for rank, theirs in enumerate(heard) if not theirs.number and rank != self._rank]
                raise self._wire.fail(self._silence(silent)) from ended
            self._headers = heard
        return self._headers

    def send(self, rows: Tensor, counts: Sequence[int], came: Tensor, expected: Sequence[int]) -> None:
        """Send rows to each rank, and get others; neither may be used before :meth:`wait`.

        Args:
            rows: for all ranks, one rank's behind another's [Σ counts, ...].
            counts: of them, for each rank [R].
            came: to be written [Σ expected, ...].
            expected: rows of each rank [R].
        """
        group = self._wire.ranks.group
        self._memory += [rows, came]
        try:
            for rank, (out, into) in enumerate(
                zip(torch.split(rows, list(counts)), torch.split(came, list(expected)), strict=True)
            ):
                other, header = dist.get_global_rank(group, rank), self.headers[rank]
                if into.numel():
                    self._works.append(dist.irecv(into, other, group=group, tag=header.tag(len(into))))
                if out.numel():
                    self._works.append(dist.isend(out, other, group=group, tag=header.tag(len(out))))
        except RuntimeError as error:
            self.hear()  # what it says is more than that a connection is closed
            raise self._wire.fail(self._silence([])) from error

    def wait(self) -> None:
        """Wait until rows have come and are sent.

        Raises:
            SharesError: a rank is at another exchange, or has ended.
        """
        self.hear()
        try:
            for work in self._works:
                if work is not None:
                    work.wait()
        except RuntimeError as error:
            raise self._wire.fail(self._silence([])) from error
        self._works.clear()
        self._memory.clear()
        self._wire.drop(self)

    def _check_failed(self, heard: Sequence[Header]) -> None:
        """Raise a SharesError if another rank cannot go on; the next exchange fits if no rows are under way."""
        if self.headers[self._rank].failed:
            return
        for rank, theirs in enumerate(heard):
            if theirs.failed:
                message = f"rank {rank} could not go on, and so no other could: {theirs.what}"
                is_in_step = not self._memory and all(each.number in (0, self.number) for each in heard)
                raise SharesError(message) if is_in_step else self._wire.fail(message)

    def _difference(self, rank: int, mine: Header, theirs: Header) -> str:
        first, second = sorted([(self._rank, mine), (rank, theirs)], key=lambda side: side[0])
        return (
            f"ranks are at different exchanges: rank {first[0]} at {first[1]}, rank {second[0]} at {second[1]}. One of "
            "them called something else (a model with other layers, one step more, an evaluation beside a training "
            "step), or left a step in the middle, such as by an error that was caught. Let all ranks call the same, "
            "and begin anew in all processes, from a checkpoint"
        )

    def _silence(self, ranks: list[int]) -> str:
        who = "another rank" if not ranks else " and ".join(f"rank {rank}" for rank in ranks)
        return (
            f"rank {self._rank} waited in vain for {who} at {self.headers[ranks[0] if ranks else 0]}: {who} made fewer "
            f"exchanges than {self.number}, as by fewer steps or layers, or has ended, such as by an error of its own. "
            "Let all ranks call the same, and begin anew in all processes, from a checkpoint"
        )


def _short(what: str) -> str:
    return what.encode()[:_TEXT].decode(errors="ignore")
