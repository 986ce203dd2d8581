"""The Jacobian of some objectives with respect to one parameter, held in the form in which a layer gives it.

A layer seldom gives its Jacobian as numbers to be stored: a linear layer's is an outer product of its input and its
output's gradient, an embedding's is nearly all zeros. Each kind says the same, J [m, *shape of the parameter], and
:mod:`recollect.autogram._contract` finds its Gramian from it, by whichever way costs least.

Letters: m objectives, r rows of inputs (1: all objectives share them, or m), T positions, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.autogram._lookups import Lookups, Picked, form_lookups, join_lookups, merge_lookups
from recollect.autogram._square import wide

__all__ = [
    "Blocks",
    "Factor",
    "Lookups",
    "NotCovered",
    "Outer",
    "Picked",
    "Rows",
    "alike",
    "as_rows",
    "form_rows",
    "held_elements",
    "join",
    "merge",
    "row_elements",
]


class NotCovered(Exception):  # noqa: N818  (raised to hand a call on, as StopIteration is; nobody sees it)
    """A rule does not cover how its layer was called; the exact fallback takes the call.

    Example:
        >>> import torch
        >>> from recollect.autogram import Engine, NotCovered, register_rule
        >>> class Stretch(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> def rule(layer, inputs, grads):
        ...     raise NotCovered
        >>> register_rule(Stretch, rule)
        >>> layer, x = Stretch(), torch.randn(4, 3)
        >>> torch.allclose(Engine(layer).compute_gramian(layer(x).sum(1)), x @ x.T)  # found without the rule
        True
    """


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The Jacobian itself: for biases and scales, whose rows are small.

    Attributes:
        values: [m, *shape of the parameter].

    Example:
        >>> import torch
        >>> from recollect.autogram import Rows
        >>> grads = torch.randn(5, 3)  # of a layer's outputs: what it adds to them has the same gradient
        >>> factor = Rows(grads)
        >>> factor.num_rows, factor.shape
        (5, torch.Size([3]))
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

    Example:
        >>> import torch
        >>> from recollect.autogram import Outer
        >>> layer, x = torch.nn.Linear(3, 2, bias=False), torch.randn(5, 3)
        >>> grads = torch.randn(5, 2)  # of the layer's output, for each of 5 losses
        >>> factor = Outer(grads.view(5, 1, 1, 2), x.view(5, 1, 1, 3), layer.weight.shape)
        >>> factor.num_rows
        5
        >>> jacobian = torch.einsum("itga,itgb->igab", factor.left, factor.right).view(5, *factor.shape)
        >>> (third,) = torch.autograd.grad(layer(x[2]) @ grads[2], layer.weight)
        >>> torch.allclose(jacobian[2], third)
        True
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    @property
    def num_rows(self) -> int:
        """The number of objectives, m."""
        return max(self.left.shape[0], self.right.shape[0])


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

    Example:
        >>> import torch
        >>> from recollect.autogram import Blocks
        >>> grads, x = torch.randn(5, 2), torch.randn(5, 3)  # of a linear layer without bias
        >>> def form(rows, part):  # a part of the axis 0, which is that of grads
        ...     return grads[rows, part, None] * x[rows, None, :]
        >>> factor = Blocks(5, torch.Size((2, 3)), form, row_elements=6)
        >>> factor.form(slice(0, 4), slice(1, 2)).shape
        torch.Size([4, 1, 3])
    """

    num_rows: int
    shape: torch.Size
    form: Callable[[slice, slice], Tensor]
    row_elements: int
    axis: int = 0
    sources: int | None = None


Factor = Rows | Outer | Picked | Lookups | Blocks
"""One of the forms in which a rule gives a parameter's Jacobian."""


def merge(factors: Sequence[Factor]) -> list[Factor]:
    """Return as few factors with the same sum: outer products and lookups are laid behind one another, rows are added.

    Cross terms between the uses of a parameter come of themselves: a parameter that is used twice at T positions has
    the Jacobian of one that is used once at 2 T.
    """
    kept: list[Factor] = []
    for factor in factors:
        for place, other in enumerate(kept):
            both = _merge_two(other, factor)
            if both is not None:
                kept[place] = both
                break
        else:
            kept.append(factor)
    return kept


def _merge_two(first: Factor, second: Factor) -> Factor | None:
    if isinstance(first, Rows) and isinstance(second, Rows):
        return Rows(first.values + second.values)
    if isinstance(first, Picked | Lookups) and isinstance(second, Picked | Lookups):
        return merge_lookups(first, second)
    if isinstance(first, Outer) and isinstance(second, Outer) and alike(first, second):
        left, right = _lay_behind(first.left, second.left), _lay_behind(first.right, second.right)
        return Outer(left, right, first.shape)
    return None


def alike(first: Outer, second: Outer) -> bool:
    """Whether both have as many groups, and as many elements on each side."""
    pairs = ((first.left, second.left), (first.right, second.right))
    return all(one.shape[2:] == other.shape[2:] for one, other in pairs)


def _lay_behind(first: Tensor, second: Tensor) -> Tensor:
    """Lay the positions (axis 1) of the second behind the first's; one row stands for as many as the other has."""
    m = max(first.shape[0], second.shape[0])
    return torch.cat([side.expand(m, *side.shape[1:]) for side in (first, second)], 1)


def join(parts: Sequence[Factor]) -> Factor | None:
    """Return the factor of all objectives from those of consecutive groups of them, or None if they differ in kind.

    What all groups share, the inputs of a layer, is not repeated.
    """
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Rows) for part in parts):
        return Rows(torch.cat([part.values for part in parts if isinstance(part, Rows)]))
    if all(isinstance(part, Outer) for part in parts):
        outers = [part for part in parts if isinstance(part, Outer)]
        if all(alike(outers[0], outer) for outer in outers):
            lefts, rights = [outer.left for outer in outers], [outer.right for outer in outers]
            if _is_shared(rights):
                return Outer(_stack(lefts, outers), rights[0], outers[0].shape)
            left = lefts[0] if _is_shared(lefts) else _stack(lefts, outers)
            return Outer(left, _stack(rights, outers), outers[0].shape)
    if all(isinstance(part, Picked | Lookups) for part in parts):
        return join_lookups([part for part in parts if isinstance(part, Picked | Lookups)])
    return None


def _stack(sides: list[Tensor], outers: list[Outer]) -> Tensor:
    return torch.cat([side.expand(o.num_rows, *side.shape[1:]) for side, o in zip(sides, outers, strict=True)])


def _is_shared(sides: list[Tensor]) -> bool:
    """Whether all are the same single row."""
    first = sides[0]
    return first.shape[0] == 1 and all(
        side.data_ptr() == first.data_ptr()
        and side.shape == first.shape
        and side.stride() == first.stride()
        and side.dtype == first.dtype
        for side in sides
    )


def form_rows(factors: Sequence[Factor], rows: slice) -> Tensor:
    """Return these rows of the sum of the factors, [n, number of the parameter's elements], in at least float32."""
    total = _form(factors[0], rows)
    for factor in factors[1:]:
        total = total + _form(factor, rows)
    return total


def as_rows(factors: Sequence[Factor], shape: torch.Size) -> Rows:
    """Return the sum of the factors of a parameter of this shape, formed."""
    num_rows = factors[0].num_rows
    return Rows(form_rows(factors, slice(0, num_rows)).view(num_rows, *shape))


def row_elements(factors: Sequence[Factor]) -> int:
    """Return how many elements forming one row takes, the row included."""
    return max(f.row_elements if isinstance(f, Blocks) else 2 * f.shape.numel() for f in factors)


def held_elements(factors: Sequence[Factor]) -> int:
    """Return how many elements are held by holding the factors, as far as it is known."""
    return sum(map(_held, factors))


def _held(factor: Factor) -> int:
    if isinstance(factor, Outer):
        return factor.left.numel() + factor.right.numel()
    if isinstance(factor, Picked | Lookups):
        return factor.grad.numel() + factor.index.numel()
    return factor.values.numel() if isinstance(factor, Rows) else factor.sources or 0


def _form(factor: Factor, rows: slice) -> Tensor:
    if isinstance(factor, Rows):
        formed = factor.values[rows]
        return formed.flatten(1).to(wide(formed.dtype)) if formed.dim() > 1 else formed.unsqueeze(1)
    if isinstance(factor, Blocks):
        formed = factor.form(rows, slice(0, factor.shape[factor.axis]))
        return formed.flatten(1).to(wide(formed.dtype))
    if isinstance(factor, Picked | Lookups):
        return form_lookups(factor, rows)
    return _form_outer(factor, rows)


def _form_outer(factor: Outer, rows: slice) -> Tensor:
    left, right = _pick(factor.left, rows), _pick(factor.right, rows)
    dtype = wide(left.dtype, right.dtype)
    product = left.to(dtype).permute(0, 2, 3, 1) @ right.to(dtype).transpose(1, 2)  # [n or 1, G, a, b]
    return product.flatten(1).expand(rows.stop - rows.start, -1)


def _pick(side: Tensor, rows: slice) -> Tensor:
    return side if side.shape[0] == 1 else side[rows]
