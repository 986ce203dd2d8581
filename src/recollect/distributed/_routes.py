"""Rows from the ranks that own them to those that ask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recollect.distributed._wire import NONE, Exchange, Values, Wire

__all__ = ["Coming", "Route"]


class Coming:
    """Rows that are on their way; called once, it waits for them, and returns them.

    What came of other ranks stays here, so that the rows can be put together once more as long as this lives.

    Args:
        exchange: brings them.
        route: by which they come.
        came: rows of other ranks, when the exchange is over.
        own: rows of this rank.
    """

    def __init__(self, exchange: Exchange, route: Route, came: Tensor, own: Tensor) -> None:
        self._exchange, self.route, self.came = exchange, route, came
        self._own: list[Tensor] = [own]  # until the rows are returned

    def __call__(self) -> Tensor:
        """Return the rows [rows, width].

        Raises:
            SharesError: ranks differ, or one has ended.
        """
        self._exchange.wait()
        return self.again(self._own.pop())

    def again(self, own: Tensor) -> Tensor:
        """Return the rows [rows, width] once more, with those of this rank as they are given [k, width]."""
        rows = self.came.new_empty(self.route.num_rows, self.came.size(1))
        rows[self.route.places] = self.came
        rows[self.route.inside] = own
        return rows

    def values(self) -> list[Values]:
        """Wait for the headers alone, and return the numbers that each rank said beside its rows [R]."""
        return [header.values for header in self._exchange.hear()]


class Route:
    """Who sends which rows to whom: made once for a list of rows, used for any number of tables.

    Making it takes an exchange among all ranks, of counts and then of row numbers; each :meth:`begin` takes one.

    Args:
        rows: wanted [n] int64, on the CPU.
        owners: the rank that owns each [n].
        first: number of this rank's first row.
        wire: of the group.
        what: the rows are, for the error where ranks differ.

    Attributes:
        asked: rows of this rank that others want, by rank, numbered from this rank's first one [Σ].
        inside: where in ``rows`` this rank's own are [k].
        own: these rows, numbered from this rank's first one [k].
        places: where in ``rows`` those of other ranks are, by rank [n - k].

    Raises:
        SharesError: other ranks are at another exchange, or have ended; here, and where rows are exchanged.
    """

    def __init__(self, rows: Tensor, owners: Tensor, first: int, wire: Wire, what: str) -> None:
        ranks, self._wire = wire.ranks, wire
        is_own = owners == ranks.rank
        self.inside = is_own.nonzero().view(-1)
        self.own = rows[self.inside] - first
        away = (~is_own).nonzero().view(-1)
        self.places = away[owners[away].argsort(stable=True)]  # of the rows that come from others, by rank
        self._out = torch.bincount(owners[away], minlength=ranks.size).tolist()
        exchange = wire.announce(f"numbers of {what}", wants=self._out, channels=1, item=8)
        self._in = [header.wants for header in exchange.hear()]
        self.asked = rows.new_empty(sum(self._in))
        exchange.send(rows[self.places], self._out, self.asked, self._in)
        exchange.wait()
        self._number = exchange.number
        self.asked -= first
        self.num_rows = rows.numel()

    def begin(self, table: Callable[[Tensor], Tensor], what: str, values: Values = NONE) -> Coming:
        """Begin to exchange the rows of one table; what is returned waits for them.

        Args:
            table: from numbers of this rank's rows [n] to the rows [n, width], as they are now.
            what: the rows are, for the error where ranks differ.
            values: that all ranks are told beside them.

        Returns:
            What returns the rows [num_rows, width], of the table's type.
        """
        sent = table(self.asked).contiguous()
        own = table(self.own)
        came = sent.new_empty(len(self.places), sent.size(1))
        exchange = self._send(what, sent, self._in, came, self._out, values)
        return self._wire.keep(Coming(exchange, self, came, own), exchange)

    def give_back(self, values: Tensor, what: str) -> list[tuple[Tensor, Tensor]]:
        """Send values for all rows to the ranks that own them.

        Args:
            values: of the rows [num_rows, width].
            what: the values are, for the error where ranks differ.

        Returns:
            What came, rank by rank, and this rank's own: numbers of its rows, each once, counted from its first one,
            and values.
        """
        sent = values[self.places]
        came = sent.new_empty(self.asked.numel(), sent.size(1))
        self._send(what, sent, self._out, came, self._in).wait()
        parts = zip(torch.split(self.asked, self._in), torch.split(came, self._in), strict=True)
        return [*((rows, found) for rows, found in parts if rows.numel()), (self.own, values[self.inside])]

    def _send(
        self, what: str, sent: Tensor, counts: list[int], came: Tensor, expected: list[int], values: Values = NONE
    ) -> Exchange:
        exchange = self._wire.announce(
            what,
            wants=expected,
            sends=counts,
            route=self._number,
            channels=sent.size(1),
            item=sent.element_size(),
            values=values,
        )
        self._wire.row_bytes += sent.numel() * sent.element_size()
        exchange.send(sent, counts, came, expected)
        return exchange
