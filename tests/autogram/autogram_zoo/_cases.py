"""Which members are tried how, and the oracle for each."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from ._member import MEMBERS, Member, build, explicit_gramian, run, trained

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the relative error
EXACT = LIMITS[torch.float64]

each_member = pytest.mark.parametrize("kind", MEMBERS.values(), ids=MEMBERS)
each_refused = pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=name) for name, kind in MEMBERS.items() if kind.refused is not None]
)
each_way = pytest.mark.parametrize(
    ("kind", "batch_dim"),
    [pytest.param(kind, dim, id=f"{name}-{dim}") for name, kind in MEMBERS.items() for dim in kind.batch_dims],
)
each_case = pytest.mark.parametrize(
    ("kind", "batch", "batch_dim", "dtype"),
    [
        pytest.param(kind, batch, dim, dtype, id=f"{name}-{batch}-{dim}-{str(dtype).removeprefix('torch.')}")
        for name, kind in MEMBERS.items()
        for dim in kind.batch_dims
        for batch in kind.batches
        for dtype in LIMITS
        if dtype is torch.float64 or batch == max(kind.batches)  # where most is rounded
    ],
)


def few(kind: type[Member]) -> int:
    """A batch of several elements, as small as the member allows."""
    return next(batch for batch in kind.batches if batch > 1)


def by_hand(kind: type[Member], batch: int, batch_dim: int | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Gramian of the explicit Jacobian, of a member of its own."""
    return _by_hand(kind, batch, 1 if batch_dim == 1 else 0, dtype)  # no dimension: the inputs are those of 0


@cache
def _by_hand(kind: type[Member], batch: int, batch_dim: int, dtype: torch.dtype) -> Tensor:
    made = build(kind, dtype)
    return explicit_gramian(run(made, batch, batch_dim), trained(made.targets()))
