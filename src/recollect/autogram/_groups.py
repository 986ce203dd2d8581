"""The Gramian of more rows than can be held: of groups of them, each pair of groups in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["in_groups"]

Other = TypeVar("Other")


def in_groups(
    passes: int,
    fit: int,
    device: torch.device,
    dtype: torch.dtype,
    gramian: Callable[[Sequence[int]], Tensor | Other],
    rows: int = 1,
) -> Tensor | Other:
    """Return the Gramian of all passes, of which only some can be held at once.

    Args:
        passes: how many there are.
        fit: how many may be held; two are, at the least.
        device: of the Gramian.
        dtype: of the Gramian.
        gramian: returns that of some of the passes; anything else ends it, and is returned.
        rows: in each pass.
    """
    if passes <= max(fit, 2):
        return gramian(range(passes))
    half = max(1, fit // 2)
    groups = [range(start, min(start + half, passes)) for start in range(0, passes, half)]
    whole = torch.zeros(passes, rows, passes, rows, dtype=dtype, device=device)
    for first, second in itertools.combinations(groups, 2):
        chosen = [*first, *second]
        index = torch.tensor(chosen, device=device)
        part = gramian(chosen)
        if not isinstance(part, Tensor):
            return part
        part = part.view(len(chosen), rows, len(chosen), rows)
        whole[index[:, None], :, index] = part.transpose(1, 2)
    return whole.view(passes * rows, passes * rows)
