"""Sums of a tensor's bits: equal for equal bits, whatever the order in which they are summed up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect.frames._reading import limit_of, pieces_of, values_of

__all__ = ["bits_of", "sum_of_bits"]

# Positions have a period, a prime, so that whole rows or samples never fall on one another.
_PERIOD = 1021
_PERIODS = (_PERIOD, 1019, 1013, 1009)  # the first that does not divide the size
_WIDE_SUM = 1 << 18  # summing up several periods side by side is faster from here on

_weights: dict[torch.device, Tensor] = {}


def bits_of(tensor: Tensor) -> int | Tensor | None:
    """Return a sum of a tensor's bits that depends on their positions; ``None`` if it has no values.

    Args:
        tensor: of any type and layout, on any device.

    Returns:
        A number in [-2^63, 2^63), equal for equal bits of the same type and shape; on devices that are not waited for
        it is a tensor, 0-D int64.

    Example:
        >>> import torch
        >>> from recollect.frames import bits_of
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> bits_of(x) == bits_of(x.clone()), bits_of(x) == bits_of(x.flip(0))
        (True, False)
        >>> bits_of(x.to("meta")) is None
        True
    """
    values, _ = values_of(tensor.detach() if tensor.requires_grad else tensor)
    return None if values is None else sum_of_bits(values)


def sum_of_bits(values: Tensor, of: Callable[[Tensor], Tensor] | None = None) -> int | Tensor:
    """Return the sum of the elements' bits, each times a pseudo-random odd number of its position, modulo 2^64.

    Elements count in words of 32 bits (of 64, where they have as many): small ones several to a word. Words whose
    positions are equal modulo four periods are first summed up in their own width, which converts nothing.

    Args:
        values: a strided tensor.
        of: the bits of ``of(values)``, whole numbers, instead.
    """
    device = values.device
    if of is not None:
        taken = (of(piece).to(torch.int64) for piece in pieces_of(values, limit_of(values)))
        period = _period_of(values.numel())
        columns = _folded_pieces(taken, torch.zeros(period, dtype=torch.int64, device=device))
    else:
        wide, several = values.element_size() == 8, _in_a_word(values)
        number = -(-values.numel() // several)
        period, words = 4 * _period_of(number), _words_of(values, several)
        kind = torch.int64 if wide else torch.int32
        if number <= period:
            pieces = list(words)
            columns = pieces[0] if len(pieces) == 1 else torch.cat([torch.zeros(0, dtype=kind, device=device), *pieces])
        else:
            columns = _folded_pieces(words, torch.zeros(period, dtype=kind, device=device))
        if wide:  # an odd number keeps the highest bit where it is, and two of them would cancel
            columns = columns ^ ((columns >> 29) & (2**35 - 1))
    total = (columns * bit_weights_on(device)[: columns.numel()]).sum()
    return int(total) if forms_of(device).reads_at_once else total


def _in_a_word(values: Tensor) -> int:
    """Return how many elements make one word."""
    return max(4 // values.element_size(), 1)


def _words_of(values: Tensor, several: int) -> Iterator[Tensor]:
    """Yield the bits of a strided tensor's elements as integers in rows, the last word filled up with zeros."""
    kind = torch.int64 if values.element_size() == 8 else torch.int32
    limit = limit_of(values)
    left = None
    for piece in pieces_of(values, max(values.numel(), 1) if values.is_contiguous() else limit):
        row = piece if left is None else torch.cat([left, piece])
        end = row.numel() - row.numel() % several
        left = row[end:] if end < row.numel() else None
        if end:
            row = row[:end].contiguous()
            yield (row.clone() if row.storage_offset() % several else row).view(kind)
    if left is not None:
        yield torch.cat([left, left.new_zeros(several - left.numel())]).view(kind)


def bit_weights_on(device: torch.device) -> Tensor:
    weights = _weights.get(device)
    if weights is None:
        with torch.inference_mode(False), torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(-(2**62), 2**62, (4 * _PERIOD,), generator=generator)
            weights = _weights[device] = (2 * drawn + 1).to(device)
    return weights


def _folded_pieces(pieces: Iterable[Tensor], columns: Tensor) -> Tensor:
    """Add the elements of rows that follow on one another to the sums over the period, and return these."""
    period, position = columns.numel(), 0
    for piece in pieces:
        start, size = position % period, piece.numel()
        head = min(period - start, size) if start else 0
        if head:
            columns[start : start + head].add_(piece[:head])
        if size - head >= period:
            columns += _folded_rows(piece[head:], period)
        elif size > head:
            columns[: size - head].add_(piece[head:])
        position += size
    return columns


def _folded_rows(flat: Tensor, period: int) -> Tensor:
    side_by_side = period * 4 if flat.numel() >= _WIDE_SUM else period
    rows = flat.numel() // side_by_side
    columns = flat[: rows * side_by_side].view(rows, side_by_side).sum(0, dtype=flat.dtype)
    rest = flat[rows * side_by_side :]
    if side_by_side > period:
        columns = columns.view(-1, period).sum(0, dtype=flat.dtype)
        rows = rest.numel() // period
        if rows:
            columns += rest[: rows * period].view(rows, period).sum(0, dtype=flat.dtype)
            rest = rest[rows * period :]
    if rest.numel():
        columns[: rest.numel()].add_(rest)  # as += would also write the slice back
    return columns


def _period_of(size: int) -> int:
    return next((period for period in _PERIODS if size % period), _PERIODS[-1])


# Now, so that nobody takes the weights for what a frame keeps.
sum_of_bits(torch.zeros(1, dtype=torch.int8, device="cpu"))
