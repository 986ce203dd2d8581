"""The Jacobian of some objectives with respect to one parameter, held in the form in which a layer gives it.

A layer seldom gives its Jacobian as numbers to be stored: a linear layer's is an outer product of its input and its
output's gradient, an embedding's is nearly all zeros. Each kind says the same, J [m, *shape of the parameter], and
:mod:`recollect.autogram._contract` finds its Gramian from it, by whichever way costs least.

Letters: m objectives, r rows of inputs (1: all objectives share them, or m), T positions, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Blocks", "Factor", "NotCovered", "Outer", "Picked", "Rows"]


class NotCovered(Exception):  # noqa: N818  (raised to hand a call on, as StopIteration is; nobody sees it)
    """A rule does not cover how its layer was called; the exact fallback takes the call."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The Jacobian itself: for biases and scales, whose rows are small.

    Attributes:
        values: [m, *shape of the parameter].
    """

    values: Tensor

    @property
    def num_rows(self) -> int:
        """The number of objectives, m."""
        return self.values.shape[0]

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape."""
        return self.values.shape[1:]


@dataclass(frozen=True, slots=True, eq=False)
class Outer:
    """Sums over positions of outer products: J[i] = sum_t left[i, t, g, :] right[i, t, g, :]ᵀ, of shape [G, a, b].

    A linear layer's weight [out, in] has its output's gradient on the left, its input on the right, and one group.
    One of the sides may have a single row, which all objectives share.

    Attributes:
        left: [m or 1, T, G, a].
        right: [m or 1, T, G, b].
        shape: the parameter's shape, whose elements are those of [G, a, b] in order.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    @property
    def num_rows(self) -> int:
        """The number of objectives, m."""
        return max(self.left.shape[0], self.right.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Picked:
    """Rows of a table that were looked up: J[i, index[i, t], :] is the sum of grad[i, t, :] over such t.

    Attributes:
        grad: [m, T, d].
        index: [m or 1, T], of integers below ``num_entries``. A lookup whose gradient is dropped (padding) has zeros
            in ``grad``.
        num_entries: how many rows of d elements the parameter [num_entries, d] has.
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
class Blocks:
    """A Jacobian that is formed a piece at a time, for where the whole, or what leads to it, is too much to hold.

    Attributes:
        num_rows: the number of objectives, m.
        shape: the parameter's shape.
        form: takes a slice of the objectives and one of an axis of the parameter (both with a start and a stop, and no
            step) and returns these rows for this part, [rows, *shape] where that axis is the part's. It may be called
            several times with the same slices, and holds little beside what it returns.
        row_elements: how many elements forming one whole row takes, its result included: bounds how many are formed at
            once.
        axis: which axis of the parameter parts are of.
        sources: how many elements it is formed from, for all objectives; None: unknown. Where they are few, few
            are formed at once.
    """

    num_rows: int
    shape: torch.Size
    form: Callable[[slice, slice], Tensor]
    row_elements: int
    axis: int = 0
    sources: int | None = None


Factor = Rows | Outer | Picked | Blocks
