"""Entries of a table that were looked up: only these have a gradient.

Either every objective has as many lookups, or each lookup names the objective that it is of, so that bags of different
lengths need no padding, whose length the host would have to read from the device.

Letters: m objectives, r rows of indices (1: all objectives share them, or m), T lookups of an objective, K of all, d
elements in an entry.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect.autogram._square import wide

__all__ = [
    "Lookups",
    "Picked",
    "entries_of",
    "form_lookups",
    "join_lookups",
    "laid_out",
    "lookup_pieces",
    "merge_lookups",
    "padded",
    "places_of",
]


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """Rows of a table that were looked up: J[i, index[i, t], :] is the sum of grad[i, t, :] over such t.

    Attributes:
        grad: [m, T, d].
        index: [m or 1, T], of integers below ``num_entries``. A lookup whose gradient is dropped (padding) has zeros
            in ``grad``.
        num_entries: how many rows of d elements the parameter [num_entries, d] has.

    Example:
        >>> import torch
        >>> from recollect.autogram import Picked
        >>> words = torch.tensor([[0, 3], [2, 2]])  # which rows of a table of 7 each of 2 losses has looked up
        >>> factor = Picked(torch.ones(2, 2, 4), words, num_entries=7)
        >>> factor.num_rows, factor.shape
        (2, torch.Size([7, 4]))
    """

    grad: Tensor
    index: Tensor
    num_entries: int

    @property
    def num_rows(self) -> int:
        """The number of objectives, m."""
        return self.grad.shape[0]

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape."""
        return torch.Size((self.num_entries, self.grad.shape[-1]))


@dataclass(frozen=True, slots=True, eq=False)
class Lookups:
    """The same where objectives have lookups in different numbers: J[owner[k], index[k], :] is the sum of grad[k, :].

    Attributes:
        grad: [K, d].
        index: [K], of integers below ``num_entries``.
        owner: [K], the objective of each lookup, an integer below ``num_rows``.
        num_rows: the number of objectives, m.
        num_entries: how many rows of d elements the parameter [num_entries, d] has.
    """

    grad: Tensor
    index: Tensor
    owner: Tensor
    num_rows: int
    num_entries: int

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape."""
        return torch.Size((self.num_entries, self.grad.shape[-1]))


def laid_out(factor: Picked | Lookups) -> Lookups:
    """Return a factor with the objective of each lookup."""
    if isinstance(factor, Lookups):
        return factor
    m, T, d = factor.grad.shape
    owner = torch.arange(m, device=factor.index.device).repeat_interleave(T, output_size=m * T)
    index = factor.index.expand(m, T).flatten()
    return Lookups(factor.grad.reshape(m * T, d), index, owner, m, factor.num_entries)


def padded(factor: Lookups) -> Picked:
    """Return the same with as many lookups of each objective; how many that are is read."""
    owner, order = factor.owner.sort(stable=True)
    starts = torch.searchsorted(owner, torch.arange(factor.num_rows, device=owner.device))
    within = torch.arange(len(owner), device=owner.device) - starts[owner]
    longest = int(within.max()) + 1 if len(owner) else 0

    def split(values: Tensor) -> Tensor:
        return values.new_zeros(factor.num_rows, longest, *values.shape[1:]).index_put((owner, within), values[order])

    return Picked(split(factor.grad), split(factor.index), factor.num_entries)


def merge_lookups(first: Picked | Lookups, second: Picked | Lookups) -> Picked | Lookups:
    """Return the sum of two factors of one parameter: the lookups of both."""
    if isinstance(first, Picked) and isinstance(second, Picked):
        rows = max(len(first.index), len(second.index))
        index = torch.cat([first.index.expand(rows, -1), second.index.expand(rows, -1)], 1)
        return Picked(torch.cat([first.grad, second.grad], 1), index, first.num_entries)
    return _together([laid_out(first), laid_out(second)], [0, 0], first.num_rows)


def join_lookups(parts: Sequence[Picked | Lookups]) -> Picked | Lookups:
    """Return the factor of all objectives from those of consecutive groups of them."""
    picked = [part for part in parts if isinstance(part, Picked)]
    widths = {part.grad.shape[1] for part in picked}
    if len(picked) == len(parts) and len(widths) == 1:
        index = torch.cat([part.index.expand(part.num_rows, -1) for part in picked])
        return Picked(torch.cat([part.grad for part in picked]), index, picked[0].num_entries)
    starts = [0, *itertools.accumulate(part.num_rows for part in parts)]
    return _together([laid_out(part) for part in parts], starts[:-1], starts[-1])


def _together(parts: Sequence[Lookups], starts: Sequence[int], num_rows: int) -> Lookups:
    owner = torch.cat([part.owner + start for part, start in zip(parts, starts, strict=True)])
    grad, index = torch.cat([part.grad for part in parts]), torch.cat([part.index for part in parts])
    return Lookups(grad, index, owner, num_rows, parts[0].num_entries)


def form_lookups(factor: Picked | Lookups, rows: slice) -> Tensor:
    """Return these rows of the Jacobian, [n, number of the parameter's elements], in at least float32."""
    if isinstance(factor, Picked):
        index = factor.index if len(factor.index) == 1 else factor.index[rows]
        flat = laid_out(Picked(factor.grad[rows], index, factor.num_entries))
        return _sums(flat, flat.owner, flat.num_rows).view(flat.num_rows, -1)
    n = rows.stop - rows.start
    inside = (factor.owner >= rows.start) & (factor.owner < rows.stop)
    # What is of other rows goes to one that is left out: to take it out, the host would wait for how much it is.
    return _sums(factor, (factor.owner - rows.start).where(inside, n), n + 1)[: n * factor.num_entries].view(n, -1)


def _sums(factor: Lookups, row: Tensor, num_rows: int) -> Tensor:
    formed = factor.grad.new_zeros(num_rows * factor.num_entries, factor.shape[1], dtype=wide(factor.grad.dtype))
    return formed.index_add_(0, factor.index + factor.num_entries * row, factor.grad.to(formed.dtype))


def entries_of(*factors: Picked | Lookups) -> list[Picked | Lookups]:
    """Return lookups of one parameter with no entries but those that any of them looked up.

    On other devices than the CPU with no more entries than lookups: how many were looked up would have to be read.
    """
    index = torch.cat([factor.index.flatten() for factor in factors])
    if not forms_of(index.device).reads_at_once and factors[0].num_entries <= index.numel():
        return list(factors)
    number, places = places_of(index)
    parts = torch.split(places, [factor.index.numel() for factor in factors])
    return [
        dataclasses.replace(factor, index=part.view_as(factor.index), num_entries=number)
        for factor, part in zip(factors, parts, strict=True)
    ]


def places_of(keys: Tensor) -> tuple[int, Tensor]:
    """Number the distinct keys [K] of integers in ascending order, from 0.

    Returns:
        How many there are, or on other devices than the CPU, where that would have to be read, K; and the number of
        each key [K].
    """
    if forms_of(keys.device).reads_at_once:
        found, places = torch.unique(keys, return_inverse=True)
        return len(found), places
    ordered, order = keys.sort()
    return keys.numel(), torch.empty_like(keys).scatter_(0, order, ordered.diff(prepend=ordered[:1]).ne(0).cumsum(0))


def lookup_pieces(factor: Picked | Lookups, step: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield J [m, columns] for so many of the entries at a time."""
    flat = laid_out(factor)
    if not forms_of(flat.grad.device).reads_at_once:
        yield from _unread_pieces(flat, max(1, min(step, flat.num_entries)), dtype)
        return
    m, d = flat.num_rows, flat.shape[1]
    order = flat.index.argsort(stable=True)
    places = flat.index[order]
    starts = torch.arange(0, flat.num_entries + step, step, device=places.device)
    bounds = torch.searchsorted(places, starts).tolist()
    for k, (low, high) in enumerate(itertools.pairwise(bounds)):
        chosen = order[low:high]
        slab = flat.grad.new_zeros(m * step, d, dtype=dtype)
        slab.index_add_(0, flat.owner[chosen] * step + places[low:high] - k * step, flat.grad[chosen].to(dtype))
        yield slab.view(m, -1)


def _unread_pieces(flat: Lookups, step: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Do the same without reading which lookups are of a piece: each takes all, and zeros of those of others."""
    m, d, grads = flat.num_rows, flat.shape[1], flat.grad.to(dtype)
    for start in range(0, flat.num_entries, step):
        inside = flat.index.div(step, rounding_mode="floor") == start // step
        slab = grads.new_zeros(m * step, d)
        slab.index_add_(0, flat.owner * step + flat.index % step, grads * inside.unsqueeze(1))
        yield slab.view(m, -1)
