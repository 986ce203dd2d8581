"""Several uses of one parameter as one factor, and several objectives' factors as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recollect.autogram._factors import Factor, Outer, Picked, Rows

__all__ = ["alike", "join", "merge"]


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
    if isinstance(first, Picked) and isinstance(second, Picked):
        return Picked(
            torch.cat([first.grad, second.grad], 1), _lay_behind(first.index, second.index), first.num_entries
        )
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
    if all(isinstance(part, Picked) for part in parts):
        picked = [part for part in parts if isinstance(part, Picked)]
        index = torch.cat([part.index.expand(part.num_rows, -1) for part in picked])
        return Picked(torch.cat([part.grad for part in picked]), index, picked[0].num_entries)
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
