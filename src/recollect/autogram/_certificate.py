"""A certificate for Gramians: wᵀ G w = ‖Jᵀ w‖² for any weights w of the losses.

The left side is of the Gramian; the right one is the squared norm of a gradient, which autograd computes without any
rule or plan. They are compared relative to (Σ |w_i| √G_ii)², the largest that either can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recollect._devices import forms_of, widened, widest
from recollect._transfer import sent
from recollect._verdicts import later, settle
from recollect.autogram._choice import Choice
from recollect.autogram._passes import Job
from recollect.autogram._walk import Graph

__all__ = [
    "Certificate",
    "CrossProbe",
    "GramianError",
    "GramianProbe",
    "NormProbe",
    "circumstances",
    "judge_gramian",
    "probe_cross",
    "probe_gramian",
    "probe_norms",
    "random_weights",
    "squared_norm",
]

# By how much both sides may differ: rounding of gradients, which is that of the lowest precision in the graph. On other
# devices than the CPU, convolutions and products of float32 may be of TF32, with 10 bits.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
_LOW_PRECISION, _TF32 = 5e-2, 2e-3


Number = Tensor | float
"""A number of a device, 0-D, or one that the host has read, where that waits for nothing."""


class GramianError(RuntimeError):
    """A Gramian does not fit the gradient that it was made to weigh.

    Example:
        >>> import torch
        >>> from recollect.autogram import Engine, GramianError, Rows, register_rule
        >>> class Shift(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bias = torch.nn.Parameter(torch.zeros(3))
        ...     def forward(self, x):
        ...         return x + self.bias
        >>> register_rule(Shift, lambda layer, inputs, grads: {"bias": Rows(2 * grads[0].sum(1))})  # not 2
        >>> layer = Shift()
        >>> try:
        ...     Engine(layer).compute_gramian(layer(torch.randn(4, 3)).square().sum(1))
        ... except GramianError as error:
        ...     print(str(error).partition(":")[0])
        the Gramian does not fit the gradient
    """


@dataclass(slots=True)
class Certificate:
    """How well an engine's Gramians fitted gradients, so far.

    Attributes:
        checks: how many were compared.
        skipped: how many could not be: numbers that are not finite, gradients that are of rounding alone, hooks on
            parameters, parameters whose gradient comes in several parts.
        last: the last one's difference, relative to (Σ |w_i| √G_ii)², or to wᵀ G w, which is no larger, where it is
            small even so; None before the first.
        largest: the largest of all.
        failed: whether one did not fit; from then on every call is compared.

    Example:
        >>> import torch
        >>> from recollect.autogram import Engine
        >>> model = torch.nn.Linear(3, 2)
        >>> engine = Engine(model)
        >>> gramian = engine.compute_gramian(model(torch.randn(4, 3)).square().sum(1))
        >>> engine.certificate.settle()
        >>> engine.certificate.checks, engine.certificate.largest < 1e-4
        (1, True)
    """

    checks: int = 0
    skipped: int = 0
    last: float | None = None
    largest: float = 0.0
    failed: bool = False

    def compare(
        self, sides: tuple[Number, ...] | None, tolerance: float, names: tuple[str, str, str], advice: str
    ) -> None:
        """Compare what was found with what a gradient says; on other devices than the CPU the verdict comes later.

        Args:
            sides: both, what their difference is relative to, and how large both may be, 0-D; None if they are not
                known.
            tolerance: the largest relative difference.
            names: of the three, for the error.
            advice: what to look at, for the error.

        Raises:
            GramianError: they differ.
        """
        if sides is None:
            self.skipped += 1
            return
        device = next((side.device for side in sides if isinstance(side, Tensor)), None)
        if device is None or forms_of(device).reads_at_once:
            self._judge([float(_number(side)) for side in sides], tolerance, names, advice)
            return
        numbers = torch.stack([_on_device(side, device) for side in sides])

        def judge(numbers: list[list[float]]) -> None:
            self._judge(numbers[0], tolerance, names, advice)

        later([numbers], judge)

    def settle(self) -> None:
        """Wait for the devices, and give all verdicts; the same as :func:`recollect.frames.settle`.

        Raises:
            GramianError: a Gramian did not fit.
        """
        settle()

    def _judge(self, sides: list[float], tolerance: float, names: tuple[str, str, str], advice: str) -> None:
        found, expected, bound, size = sides
        if not math.isfinite(found + expected + bound + size):
            self.skipped += 1
            return
        difference = abs(found - expected)
        if difference <= tolerance * bound and tolerance * bound >= size / 2 > 0:
            self.skipped += 1  # gradients of rounding alone: that they fit shows nothing
            return
        self.checks += 1
        self.last = difference / bound if bound else float(difference > 0)
        self.largest = max(self.largest, self.last)
        if self.last > tolerance:
            self.failed = True
            raise GramianError(
                f"the Gramian does not fit the gradient: {names[0]} is {found:g} and {names[1]} is {expected:g}, "
                f"apart by {self.last:.1e} of {names[2]}, and {tolerance:.0e} is allowed. {advice}"
            )


def _advice(rules: str) -> str:
    return (
        f"Look at rules of your own (asked were those of {rules or 'no layer'}), at functions that declare "
        "independent_axes, and at hooks that change gradients; Engine(..., batch_dim=None) takes a backward pass for "
        "each loss. Gradients that were accumulated by this call are right"
    )


@dataclass(slots=True)
class SquaredNorm:
    """The squared norm of a gradient, summed up as the backward pass brings its parts.

    Attributes:
        counts: for each parameter, how often a part of its gradient came.
    """

    counts: dict[int, int] = field(default_factory=dict)
    _norms: list[Number] = field(default_factory=list)

    def add(self, grad: Tensor, parameter: int) -> None:
        """Take the gradient of a parameter."""
        self.counts[parameter] = self.counts.get(parameter, 0) + 1
        self._norms.append(_number(_norm(grad)))

    def total(self) -> Number | None:
        """Return the squared norm; None if the gradient of a parameter came in parts, whose sum nobody saw."""
        if any(count > 1 for count in self.counts.values()):
            return None
        total: Number = sum(norm * norm for norm in self._norms if not isinstance(norm, Tensor))
        on_device = [widened(norm) for norm in self._norms if isinstance(norm, Tensor)]
        if on_device:
            first = on_device[0].device
            total = torch.stack([norm.to(first) for norm in on_device]).square().sum() + total
        return total

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


def random_weights(output: Tensor, seed: int) -> Tensor:
    """Return weights of the losses' shape, which no random number of anybody else's depends on."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return sent(torch.randn(output.shape, generator=generator, device="cpu").to(output.dtype), output.device)


def tolerance_of(graph: Graph) -> tuple[float, float]:
    """Return by how much both sides may differ in a graph of these types, and how far apart its numbers are."""
    numbers = (k for k, kind in enumerate(graph.kinds) if kind != "AccumulateGrad" or k in graph.leaves)
    dtypes = {out.dtype for k in numbers for out in graph.nodes[k]._input_metadata}
    found = [dtype for dtype in dtypes if dtype.is_floating_point]
    tolerance = max((_TOLERANCES.get(dtype, _LOW_PRECISION) for dtype in found), default=1e-8)
    if torch.float32 in found and forms_of(graph.nodes[0]._input_metadata[0].device).tensor_floats:
        tolerance = max(tolerance, _TF32)
    return tolerance, max((torch.finfo(dtype).eps for dtype in found), default=2e-16)


def _norm(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        grad = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad.values()
    dtype = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else None
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=dtype)
    return norm


def _number(number: Number) -> Number:
    """Return a 0-D tensor's value if reading it waits for nothing, else the tensor."""
    if isinstance(number, Tensor) and forms_of(number.device).reads_at_once:
        return number.item()
    return number


def _on_device(number: Number, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device, widest(device))
    return torch.full((), number, dtype=widest(device), device=device)  # not a copy from the host, which may wait


# Norms far below the largest are compared relative to this share of it: rounding is no better.
_SMALL = 1e-6
# Sums over so many losses are few.
_FEW = 512
# Gradients that cancel leave about so many units of rounding of losses of size 1.
_NOISE = 30


@dataclass(frozen=True, slots=True)
class GramianProbe:
    """Random weights of the losses, and the squared norm of the gradient that they make; None: it cannot be known."""

    weights: Tensor
    squared: Number | None

    def judge(self, certificate: Certificate, gramian: Tensor, job: Job, choice: Choice) -> None:
        """Compare it with what was found.

        Raises:
            GramianError: it is another.
        """
        judge_gramian(certificate, gramian, self.weights, job.output, self.squared, circumstances(job, choice))


def judge_gramian(
    certificate: Certificate,
    gramian: Tensor,
    weights: Tensor,
    losses: Tensor,
    squared: Number | None,
    around: tuple[float, float, str],
) -> None:
    """Compare a Gramian with the gradient that weights make.

    Args:
        certificate: counts it.
        gramian: [m, m].
        weights: of the losses.
        losses: m of them.
        squared: the squared norm of the gradient; None: it cannot be known.
        around: as :func:`circumstances` returns it.

    Raises:
        GramianError: they do not fit.
    """
    tolerance, eps, rules = around
    w, values, sides = weights.detach().flatten(), losses.detach().flatten(), None
    if squared is not None:
        wide = gramian if gramian.dtype == torch.float32 else widened(gramian)
        w, squared = w.to(wide), _number(squared)
        form = _number(torch.dot(torch.mv(wide, w), w))
        if _fits(form, squared, w, values, tolerance, eps):
            sides = (form, squared, form, form)
        else:
            sizes = w.abs()
            norm = _number(torch.dot(sizes, wide.diagonal().clamp(min=0).sqrt()))
            noise = _noise(values, sizes, eps)
            sides = (form, squared, _bound((norm, norm), (noise, noise), tolerance), norm * norm)
    certificate.compare(sides, tolerance, ("wᵀ G w", "‖Jᵀ w‖²", "(Σ |w_i| √G_ii)²"), _advice(rules))


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
        tolerance, eps, rules = circumstances(job, choice)
        norm = widened(torch.maximum(squares[self.place], _SMALL * squares.max())).sqrt()
        noise = _NOISE * eps * widened(job.output.detach().flatten()[self.place].abs().clamp(min=1))
        bound = _bound((norm, norm), (noise, noise), tolerance)
        sides = None if self.squared is None else (squares[self.place], self.squared, bound, norm.square())
        certificate.compare(sides, tolerance, ("‖g_i‖² of a loss", "that of its gradient", "it"), _advice(rules))


@dataclass(frozen=True, slots=True)
class CrossProbe:
    """Random weights of two lists of losses, and the product and norms of their gradients; None: they are not known."""

    rows: Tensor
    columns: Tensor
    product: Tensor | None = None
    norms: tuple[Tensor, Tensor] | None = None

    def judge(
        self, certificate: Certificate, found: Tensor, jobs: tuple[Job, Job], choices: tuple[Choice, Choice]
    ) -> None:
        """Compare it with what was found.

        Raises:
            GramianError: it is another.
        """
        (one, eps, rules), (other, unit, more) = map(circumstances, jobs, choices)
        tolerance, rules = max(one, other), rules if rules == more else f"{rules}, {more}"
        sides = None
        if self.product is not None and self.norms is not None:
            u, v = self.rows.flatten().to(found), self.columns.flatten().to(found)
            noises = _noise(jobs[0].output, u.abs(), eps), _noise(jobs[1].output, v.abs(), unit)
            size = self.norms[0] * self.norms[1]
            sides = (u @ found @ v, self.product, _bound(self.norms, noises, tolerance), size)
        certificate.compare(sides, tolerance, ("uᵀ C v", "(Jᵀ u)·(Kᵀ v)", "‖Jᵀ u‖ ‖Kᵀ v‖"), _advice(rules))


def probe_gramian(job: Job, every: int) -> GramianProbe | None:
    """Return a probe for a Gramian if it is time for one: at the first call of each form, and every so many calls."""
    if not every or not job.graph.uses:
        return None
    calls = job.known.count("gramian")
    if (calls - 1) % every:
        return None
    weights = random_weights(job.output, calls)
    if job.hooked:
        return GramianProbe(weights, None)
    return GramianProbe(weights, _squared_norm(job, _gradient(job, weights)))


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
    return NormProbe(place, _squared_norm(job, _gradient(job, weights)))


def probe_cross(rows: Job, columns: Job, every: int) -> CrossProbe | None:
    """Return a probe for the products of two lists of losses, if it is time for one."""
    calls = rows.known.count("rows"), columns.known.count("columns")
    if not every or all((count - 1) % every for count in calls):
        return None
    u, v = random_weights(rows.output, 2 * calls[0]), random_weights(columns.output, 2 * calls[1] + 1)
    if rows.hooked or columns.hooked:
        return CrossProbe(u, v)
    first, second = _gradient(rows, u), _gradient(columns, v)
    norms = _squared_norm(rows, first).sqrt(), _squared_norm(columns, second).sqrt()
    product = torch.zeros((), dtype=widest(rows.output.device), device=rows.output.device)
    for key in first.keys() & second.keys():
        one, other = (grad.to_dense().flatten().to(rows.dtype) for grad in (first[key], second[key]))
        product += widened(torch.dot(one, other))
    return CrossProbe(u, v, product, norms)


def _gradient(job: Job, weights: Tensor) -> dict[int, Tensor]:
    """Return the gradient of weighted losses, by parameter; their graph stays."""
    keys = list(job.graph.uses)
    if not keys:
        return {}
    grads = torch.autograd.grad(
        job.output, [job.parameters[key] for key in keys], weights, retain_graph=True, allow_unused=True
    )
    return {key: grad for key, grad in zip(keys, grads, strict=True) if grad is not None}


def _squared_norm(job: Job, grads: Mapping[int, Tensor]) -> Tensor:
    total = torch.zeros((), dtype=widest(job.output.device), device=job.output.device)
    for grad in grads.values():
        total += widened(_norm(grad)).square().to(total.device)
    return total


def _fits(form: Number, squared: Number, weights: Tensor, losses: Tensor, tolerance: float, eps: float) -> bool:
    """Whether both sides are equal relative to wᵀ G w itself, which is no larger than what they are compared with.

    That takes less to compute. Where sums are few, they are Python's: an operation of torch's takes as long as a
    hundred of its additions when it was not called for long.
    """
    if isinstance(form, Tensor) or isinstance(squared, Tensor) or len(losses) > _FEW:
        return False
    values = losses.tolist()
    noise = _NOISE * eps * sum(map(abs, weights.tolist())) * max(1.0, *map(abs, values))
    return abs(form - squared) <= tolerance * form and form > (5 * noise) ** 2


def _noise(losses: Tensor, weights: Tensor, eps: float) -> Any:
    """Return what rounding alone may leave of the norm of the gradient of losses with weights of these sizes."""
    sizes = losses.detach().flatten().abs().clamp(min=1).to(weights.dtype)
    return _NOISE * eps * _number(torch.dot(weights, sizes))


def _bound(norms: tuple[Any, Any], noises: tuple[Any, Any], tolerance: float) -> Any:
    """Return what a difference is relative to: the product of norms, and more where these are of rounding alone."""
    (first, second), (one, other) = norms, noises
    return first * second + (first * other + second * one + one * other) / tolerance


def circumstances(job: Job, choice: Choice) -> tuple[float, float, str]:
    """Return by how much both sides may differ, the unit of rounding, and the layers whose rules were asked."""
    if job.known.tolerance is None:
        job.known.tolerance = tolerance_of(job.graph)
    plan = choice.plan
    if plan.names is None:
        layers = (job.graph.nodes[capture].call.layer for capture in plan.rules)
        plan.names = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
    return *job.known.tolerance, plan.names
