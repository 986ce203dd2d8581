"""What can be said of weights without knowing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from weight_inputs import gram

Weigh = Callable[[Tensor], Tensor]


def cosines(gramian: Tensor, weights: Tensor) -> Tensor:
    """Between the update and each gradient; 0 where one of them is zero."""
    lengths = gramian.diagonal().sqrt() * (weights @ gramian @ weights).clamp(min=0).sqrt()
    return torch.where(lengths > 0, gramian @ weights / lengths, 0.0)


def assert_no_conflict(weigh: Weigh, jacobian: Tensor, tolerance: float) -> None:
    """No objective minds the update: no product below -tolerance, with norms as in a Jacobian of norm 1."""
    gramian = gram(jacobian / jacobian.norm())
    weights = weigh(gramian)
    assert bool((gramian @ weights >= -tolerance * weights.abs().amax()).all())


def assert_permutes(weigh: Weigh, jacobian: Tensor, tolerance: float = 1e-8) -> None:
    """Objectives in another order have the same weights in that order."""
    order = torch.randperm(len(jacobian), generator=torch.Generator().manual_seed(0))
    expected = weigh(gram(jacobian))[order]
    torch.testing.assert_close(weigh(gram(jacobian[order])), expected, rtol=tolerance, atol=tolerance)


def assert_scale_free(weigh: Weigh, jacobian: Tensor, tolerance: float = 1e-8) -> None:
    """Other units for all gradients change nothing."""
    expected = weigh(gram(jacobian))
    for factor in (1e-30, 1e-3, 1e30):
        torch.testing.assert_close(weigh(gram(factor * jacobian)), expected, rtol=tolerance, atol=tolerance)


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.calls.values())


@contextmanager
def counting() -> Iterator[Count]:
    with Count() as count:
        yield count
