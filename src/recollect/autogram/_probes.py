"""Certificates for what is no whole Gramian: the norm of one loss, and the product of two gradients.

‖g_i‖² of a random loss is what its own gradient has; and uᵀ C v of the products C of two lists of losses is the scalar
product (Jᵀ u)·(Kᵀ v) of the gradients that random weights make of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.autogram._certificate import Certificate, norm_of, random_weights, tolerance_of
from recollect.autogram._choice import Choice
from recollect.autogram._passes import Job

__all__ = ["CrossProbe", "NormProbe", "probe_cross", "probe_norms"]

# What norms far below the largest are compared by: rounding is no better.
_SMALL = 1e-6


@dataclass(frozen=True, slots=True)
class NormProbe:
    """One loss, and the squared norm of its gradient; None: it cannot be known."""

    place: int
    squared: Tensor | None

    def judge(self, certificate: Certificate, squares: Tensor, job: Job, choice: Choice) -> None:
        """Compare it with what was found.

        Raises:
            GramianError: it is another.
        """
        bound = torch.maximum(squares[self.place], _SMALL * squares.max())
        certificate.compare_sides(
            None if self.squared is None else (squares[self.place], self.squared, bound),
            *_circumstances(job, choice),
            ("‖g_i‖² of a loss", "that of its gradient", "it"),
        )


@dataclass(frozen=True, slots=True)
class CrossProbe:
    """Random weights of two lists of losses, and the product and norms of their gradients; None: they are not known."""

    rows: Tensor
    columns: Tensor
    product: Tensor | None = None
    bound: Tensor | None = None

    def judge(
        self, certificate: Certificate, found: Tensor, jobs: tuple[Job, Job], choices: tuple[Choice, Choice]
    ) -> None:
        """Compare it with what was found.

        Raises:
            GramianError: it is another.
        """
        sides = None
        if self.product is not None and self.bound is not None:
            u, v = self.rows.flatten().to(found), self.columns.flatten().to(found)
            sides = (u @ found @ v, self.product, self.bound)
        (one, rules), (other, more) = map(_circumstances, jobs, choices)
        rules = rules if rules == more else f"{rules}, {more}"
        certificate.compare_sides(sides, max(one, other), rules, ("uᵀ C v", "(Jᵀ u)·(Kᵀ v)", "‖Jᵀ u‖ ‖Kᵀ v‖"))


def probe_norms(job: Job, every: int) -> NormProbe | None:
    """Return a probe for norms if it is time for one: at the first call of each form, and at every so many calls."""
    calls = job.known.count("norms")
    if not every or (calls - 1) % every or not job.graph.uses:
        return None
    generator = torch.Generator("cpu").manual_seed(calls)
    place = int(torch.randint(job.output.numel(), (), generator=generator))
    if job.hooked:
        return NormProbe(place, None)
    weights = torch.zeros_like(job.output, memory_format=torch.contiguous_format)
    weights.view(-1)[place] = 1
    return NormProbe(place, norm_of(job.output, [job.parameters[key] for key in job.graph.uses], weights))


def probe_cross(rows: Job, columns: Job, every: int) -> CrossProbe | None:
    """Return a probe for the products of two lists of losses, if it is time for one."""
    calls = rows.known.count("rows"), columns.known.count("columns")
    if not every or all((count - 1) % every for count in calls):
        return None
    u, v = random_weights(rows.output, 2 * calls[0]), random_weights(columns.output, 2 * calls[1] + 1)
    if rows.hooked or columns.hooked:
        return CrossProbe(u, v)
    first, second = _gradient(rows, u), _gradient(columns, v)
    product, *squares = (torch.zeros((), dtype=torch.float64, device=rows.output.device) for _ in range(3))
    for key in first.keys() & second.keys():
        product += torch.dot(first[key], second[key].to(first[key].dtype)).double()
    for square, grads in zip(squares, (first, second), strict=True):
        for grad in grads.values():
            square += torch.linalg.vector_norm(grad).double().square()
    return CrossProbe(u, v, product, (squares[0] * squares[1]).sqrt())


def _gradient(job: Job, weights: Tensor) -> dict[int, Tensor]:
    """Return the gradient of weighted losses, flat, by parameter; their graph stays."""
    keys = list(job.graph.uses)
    if not keys:
        return {}
    grads = torch.autograd.grad(
        job.output, [job.parameters[key] for key in keys], weights, retain_graph=True, allow_unused=True
    )
    dense = ((key, grad.to_dense()) for key, grad in zip(keys, grads, strict=True) if grad is not None)
    return {key: grad.flatten().to(job.dtype) for key, grad in dense}


def _circumstances(job: Job, choice: Choice) -> tuple[float, str]:
    """Return by how much both sides may differ, and the names of the layers whose rules were asked."""
    if job.known.tolerance is None:
        job.known.tolerance = tolerance_of(job.graph)
    layers = (job.graph.nodes[capture].call.layer for capture in choice.plan.rules)
    return job.known.tolerance, ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
