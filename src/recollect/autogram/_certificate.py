"""A certificate for Gramians: wᵀ G w = ‖Jᵀ w‖² for any weights w of the losses.

The left side is of the Gramian; the right one is the squared norm of a gradient, which autograd computes without any
rule or plan. They are compared relative to (Σ |w_i| √G_ii)², the largest that either can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recollect.autogram._walk import Graph

__all__ = ["Certificate", "GramianError", "norm_of", "random_weights", "squared_norm", "tolerance_of"]

# By how much both sides may differ: rounding of gradients, which is that of the lowest precision in the graph.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}
_LOW_PRECISION = 5e-2


class GramianError(RuntimeError):
    """A Gramian does not fit the gradient that it was made to weigh."""


@dataclass(slots=True)
class Certificate:
    """How well an engine's Gramians fitted gradients, so far.

    Attributes:
        checks: how many were compared.
        skipped: how many could not be: numbers that are not finite, hooks on parameters, parameters whose gradient
            comes in several parts.
        last: the last one's difference, relative to (Σ |w_i| √G_ii)²; None before the first.
        largest: the largest of all.
    """

    checks: int = 0
    skipped: int = 0
    last: float | None = None
    largest: float = 0.0
    _waiting: list[tuple[Tensor, float, str, tuple[str, str, str]]] = field(default_factory=list, repr=False)

    def compare(self, gramian: Tensor, weights: Tensor, squared: Tensor | None, tolerance: float, rules: str) -> None:
        """Compare both sides; on devices other than the CPU the verdict comes with the next call.

        Args:
            gramian: G ``[m, m]``.
            weights: w ``[m]``.
            squared: ‖Jᵀ w‖², 0-D; None if it is not known.
            tolerance: the largest relative difference.
            rules: names of the layers whose rules were asked, for the error.

        Raises:
            GramianError: they differ.
        """
        exact, w = gramian.double(), weights.flatten().double()
        bound = (w.abs() @ exact.diagonal().clamp(min=0).sqrt()).square()
        sides = None if squared is None else (w @ exact @ w, squared, bound)
        self.compare_sides(sides, tolerance, rules, ("wᵀ G w", "‖Jᵀ w‖²", "(Σ |w_i| √G_ii)²"))

    def compare_sides(
        self, sides: tuple[Tensor, Tensor, Tensor] | None, tolerance: float, rules: str, names: tuple[str, str, str]
    ) -> None:
        """Compare what was found with what a gradient says; see :meth:`compare`.

        Args:
            sides: both, and what their difference is relative to, 0-D; None if they are not known.
            tolerance: the largest relative difference.
            rules: names of the layers whose rules were asked, for the error.
            names: of the three, for the error.

        Raises:
            GramianError: they differ.
        """
        self.settle()
        if sides is None:
            self.skipped += 1
            return
        device = sides[0].device
        self._waiting.append((torch.stack([side.double().to(device) for side in sides]), tolerance, rules, names))
        if device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Give the verdicts that have not been given.

        Raises:
            GramianError: a Gramian did not fit.
        """
        while self._waiting:
            sides, tolerance, rules, names = self._waiting.pop(0)
            found, expected, bound = sides.tolist()
            if not math.isfinite(found + expected + bound):
                self.skipped += 1
                continue
            difference = abs(found - expected)
            self.checks += 1
            self.last = difference / bound if bound else float(difference > 0)
            self.largest = max(self.largest, self.last)
            if self.last > tolerance:
                raise GramianError(
                    f"the Gramian does not fit the gradient: {names[0]} is {found:g} and {names[1]} is {expected:g}, "
                    f"apart by {self.last:.1e} of {names[2]}, and {tolerance:.0e} is allowed. Look at rules of your "
                    f"own (asked were those of {rules or 'no layer'}), at functions that declare independent_axes, and "
                    "at hooks that change gradients; Engine(..., batch_dim=None) takes a backward pass for each loss. "
                    "Gradients that were accumulated by this call are right"
                )


@dataclass(slots=True)
class SquaredNorm:
    """The squared norm of a gradient, summed up as the backward pass brings its parts.

    Attributes:
        counts: for each parameter, how often a part of its gradient came.
    """

    counts: dict[int, int] = field(default_factory=dict)
    _parts: list[Tensor] = field(default_factory=list)

    def add(self, grad: Tensor, parameter: int) -> None:
        """Take the gradient of a parameter."""
        self.counts[parameter] = self.counts.get(parameter, 0) + 1
        self._parts.append(_norm(grad))

    def total(self) -> Tensor | None:
        """Return the squared norm; None if the gradient of a parameter came in parts, whose sum nobody saw."""
        if any(count > 1 for count in self.counts.values()):
            return None
        return torch.stack(self._parts).square().sum() if self._parts else torch.zeros((), dtype=torch.float64)

    def hook(self, parameter: int) -> Callable[[tuple[Tensor | None, ...]], None]:
        """Return what is called with a parameter's gradient."""

        def note(grads: tuple[Tensor | None, ...]) -> None:
            if grads[0] is not None:
                self.add(grads[0], parameter)

        return note


@contextmanager
def squared_norm(graph: Graph, leaves: Mapping[int, int]) -> Iterator[SquaredNorm]:
    """Sum up the squared norm of the gradient that a backward pass accumulates within.

    Args:
        graph: the losses'.
        leaves: the accumulators' numbers, and the ids of their parameters.
    """
    norm = SquaredNorm()
    handles = [
        graph.nodes[number].register_prehook(norm.hook(parameter))
        for number, parameter in leaves.items()
        if graph.kinds[number] == "AccumulateGrad"
    ]
    try:
        yield norm
    finally:
        for handle in handles:
            handle.remove()


def norm_of(output: Tensor, parameters: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the squared norm of the gradient of weighted losses; their graph stays."""
    norm = SquaredNorm()
    grads = torch.autograd.grad(output, parameters, weights, retain_graph=True, allow_unused=True)
    for key, grad in enumerate(grads):
        if grad is not None:
            norm.add(grad, key)
    total = norm.total()
    assert total is not None
    return total


def random_weights(output: Tensor, seed: int) -> Tensor:
    """Return weights of the losses' shape, which no random number of anybody else's depends on."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(output.shape, generator=generator, device="cpu").to(output)


def tolerance_of(graph: Graph) -> float:
    """Return by how much both sides may differ in a graph of these types."""
    numbers = (k for k, kind in enumerate(graph.kinds) if kind != "AccumulateGrad" or k in graph.leaves)
    dtypes = {out.dtype for k in numbers for out in graph.nodes[k]._input_metadata}
    return max((_TOLERANCES.get(dtype, _LOW_PRECISION) for dtype in dtypes if dtype.is_floating_point), default=1e-8)


def _norm(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        grad = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad.values()
    dtype = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else None
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=dtype)
    return norm.double()
