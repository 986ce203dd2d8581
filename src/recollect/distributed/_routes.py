"""Rows from the ranks that own them to those that ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Route"]


class Route:
    """Who sends which rows to whom: made once for a list of rows, used for any number of tables.

    Making it takes two exchanges among all ranks, of counts and of row numbers; each :meth:`begin` takes one.

    Args:
        rows: wanted [n] int64, on the CPU.
        owners: the rank that owns each [n].
        first: number of this rank's first row.
        group: process group.
        rank: of this process.
        world_size: R.
        number: of this exchange among those of the rank, from 1.

    Attributes:
        asked: rows of this rank that others want, by rank, numbered from this rank's first one [Σ].
        inside: where in ``rows`` this rank's own are [k].
        own: these rows, numbered from this rank's first one [k].
    """

    def __init__(
        self,
        rows: Tensor,
        owners: Tensor,
        first: int,
        group: Any,
        rank: int,
        world_size: int,
        number: int,
    ) -> None:
        is_own = owners == rank
        self.inside = is_own.nonzero().view(-1)
        self.own = rows[self.inside] - first
        away = (~is_own).nonzero().view(-1)
        self._places = away[owners[away].argsort(stable=True)]  # of the rows that come from others, by rank
        wanted = torch.bincount(owners[away], minlength=world_size)
        sent = wanted.new_empty(world_size, 2)
        dist.all_to_all_single(sent, torch.stack([wanted, torch.full_like(wanted, number)], 1), group=group)
        _check_numbers(sent[:, 1], number)
        self._in, self._out = sent[:, 0].tolist(), wanted.tolist()
        self.asked = rows.new_empty(sum(self._in))
        dist.all_to_all_single(self.asked, rows[self._places], self._in, self._out, group=group)
        self.asked -= first
        self.num_rows = rows.numel()

    def begin(
        self, table: Callable[[Tensor], Tensor], count: Callable[[int], None], number: int, group: Any
    ) -> Callable[[], Tensor]:
        """Begin to exchange the rows of one table; what is returned waits for them.

        Args:
            table: from numbers of this rank's rows [n] to the rows [n, width], as they are now.
            count: is told the bytes that are sent to other ranks.
            number: of this exchange among those of the rank.
            group: process group.

        Returns:
            A function that returns the rows [num_rows, width], of the table's type.
        """
        sent = table(self.asked).contiguous()
        own = table(self.own)
        came = sent.new_empty(len(self._places), sent.size(1))
        width = sent.size(1) * sent.element_size()
        count(sent.numel() * sent.element_size())
        # Beside the rows goes the number of the exchange: rows of another step are not taken for those of this one.
        numbers = torch.full((len(self._in),), number)
        theirs = torch.empty_like(numbers)
        told = dist.all_to_all_single(theirs, numbers, group=group, async_op=True)
        work = dist.all_to_all_single(
            _as_bytes(came, width),
            _as_bytes(sent, width),
            self._out,
            self._in,
            group=group,
            async_op=True,
        )

        def take() -> Tensor:
            told.wait()
            _check_numbers(theirs, number)
            work.wait()
            rows = came.new_empty(self.num_rows, came.size(1))
            rows[self._places] = came
            rows[self.inside] = own
            _ = sent  # the exchange reads it until now
            return rows

        return take

    def give_back(
        self, values: Tensor, count: Callable[[int], None], number: int, group: Any
    ) -> list[tuple[Tensor, Tensor]]:
        """Send values for all rows to the ranks that own them.

        Args:
            values: of the rows [num_rows, width].
            count: is told the bytes that are sent to other ranks.
            number: of this exchange among those of the rank.
            group: process group.

        Returns:
            What came, rank by rank, and this rank's own: numbers of its rows, each once, counted from its first one,
            and values.
        """
        sent = values[self._places]
        came = sent.new_empty(self.asked.numel(), sent.size(1))
        width = sent.size(1) * sent.element_size()
        count(sent.numel() * sent.element_size())
        numbers = torch.full((len(self._in),), number)
        theirs = torch.empty_like(numbers)
        dist.all_to_all_single(theirs, numbers, group=group)
        _check_numbers(theirs, number)
        dist.all_to_all_single(_as_bytes(came, width), _as_bytes(sent, width), self._in, self._out, group=group)
        parts = zip(torch.split(self.asked, self._in), torch.split(came, self._in), strict=True)
        return [*((rows, found) for rows, found in parts if rows.numel()), (self.own, values[self.inside])]


def _as_bytes(rows: Tensor, width: int) -> Tensor:
    """Return the same memory as bytes, a row for each: what is in it does not matter to the transport."""
    return rows.view(torch.uint8).view(-1, width) if rows.numel() else rows.new_empty(rows.size(0), width).byte()


def _check_numbers(theirs: Tensor, number: int) -> None:
    """Refuse what belongs to another step: a rank has left one in the middle."""
    if not bool((theirs == number).all()):
        raise RuntimeError(
            f"ranks are at different exchanges (this one at {number}, others at {sorted(set(theirs.tolist()))}): one "
            "left a step in the middle, such as by an error that was caught. Begin anew in all processes, from a "
            "checkpoint"
        )
