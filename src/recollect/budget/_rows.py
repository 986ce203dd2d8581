"""The lines of a plan's table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recollect.budget._bytes import in_words
from recollect.budget._measure import Measured
from recollect.budget._solve import Choice

__all__ = ["Row", "inverting", "lines_of", "rows_of", "seconds_of"]


@dataclass(frozen=True)
class Row:
    """One line of a plan's table.

    Args:
        unit: its name.
        keeps: bytes from its forward to its backward, as measured with everything kept in it.
        strategy: ``"store"``, ``"checkpoint"``, ``"link"`` (a checkpoint whose input the unit before makes again),
            ``"selective"`` (stored but for what cheap functions return), ``"offload"`` or ``"invert"``.
        bytes: that it keeps with this strategy.
        seconds: that the strategy adds to a step.

    Example:
        >>> import recollect, torch
        >>> model = torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(3)])
        >>> row = recollect.plan(model, torch.randn(64, 32, requires_grad=True), budget="1 MB").rows[0]
        >>> row.unit, row.strategy, row.keeps, row.bytes  # of 64 * 32 numbers
        ('0', 'store', 8192, 8192)
    """

    unit: str
    keeps: int
    strategy: str
    bytes: int
    seconds: float


def lines_of(rows: tuple[Row, ...]) -> list[str]:
    """Return rows in words, in columns, under their head."""
    head = ("unit", "everything", "strategy", "keeps", "adds")
    body = [(r.unit, in_words(r.keeps), r.strategy, in_words(r.bytes), f"{1e3 * r.seconds:.2f} ms") for r in rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}  {e:>{widths[4]}}".rstrip()
        for a, b, c, d, e in (head, *body)
    ]


def seconds_of(rows: tuple[Row, ...]) -> float:
    return sum(row.seconds for row in rows)


def rows_of(measured: Measured, choice: Choice) -> tuple[Row, ...]:
    rows: list[Row] = []
    calls = iter(measured.calls)
    for length, region in choice.regions:
        for place in range(length):
            call = next(calls)
            keeps = region.keeps if place == 0 else 0
            strategy = "link" if place > 0 and region.strategy == "checkpoint" else region.strategy
            seconds = region.seconds / length
            rows.append(Row(call.name, call.kept, strategy, keeps, seconds))
    return tuple(rows)


def inverting(rows: tuple[Row, ...], measured: Measured) -> tuple[Row, ...]:
    """Return the rows with every unit inverted that can be."""
    return tuple(
        row
        if call.cost is None or call.cost.inverted is None
        else replace(row, strategy="invert", bytes=0, seconds=call.cost.inverted)
        for row, call in zip(rows, measured.calls, strict=True)
    )
