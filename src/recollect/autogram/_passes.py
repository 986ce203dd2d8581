"""Which backward passes bring the Jacobian: one for each loss, several at once, or one for many losses that are apart.

Where every pair of rows meets, as in the Gramian, what passes bring has to be held until the last of them. Passes that
run at once bring all rows of a layer together, which can be squared and forgotten, but hold each layer's gradient for
all losses. Where neither fits a bound, the losses are taken in groups, and each pair of groups in turn. For the
diagonal alone each pass is for itself, and nothing is held.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from recollect._devices import forms_of
from recollect.autogram._capture import Recorder
from recollect.autogram._choice import Choice
from recollect.autogram._factors import Rows
from recollect.autogram._groups import in_groups
from recollect.autogram._plan import Plan, plan_rows
from recollect.autogram._square import wide
from recollect.autogram._structure import Layouts
from recollect.autogram._sums import Gather, NormSum, Sum, WholeSum
from recollect.autogram._sweep import Sweep
from recollect.autogram._walk import Anatomy, Graph

__all__ = [
    "Declines",
    "Job",
    "Known",
    "Passes",
    "gramian_of",
    "norms_of",
    "passes_of",
    "rank_passes",
    "rows_of_features",
]

# Gradients of so many elements are taken one by one from a pass, which otherwise holds them a second time. (Below that
# it would save little, and a call for each parameter takes time.)
_ROW = 2**16

Declines = frozenset[tuple[int, str]]
"""Captures, and names of parameters of theirs, for which a rule gave nothing."""


@dataclass(slots=True)
class Known:
    """What was found out about graphs of one form.

    Attributes:
        declined: what rules do not cover.
        in_turn: whether passes do not run at once.
        settled: whether passes came to their end, and so will not have to be planned anew.
        choices: by what rules do not cover, and by which parameters have hooks.
        calls: how many there were for what.
        tolerance: by how much a Gramian of such a graph may differ from the gradient, and its unit of rounding.
        anatomy: of such a graph.
    """

    declined: Declines = frozenset()
    in_turn: bool = False
    settled: bool = False
    choices: dict[tuple[Declines, frozenset[int]], Choice] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    tolerance: tuple[float, float] | None = None
    anatomy: Anatomy | None = None

    def count(self, what: str) -> int:
        """Return how many calls there were for something, this one included."""
        self.calls[what] = self.calls.get(what, 0) + 1
        return self.calls[what]


@dataclass(frozen=True, slots=True)
class Job:
    """A Gramian to be computed.

    Attributes:
        output: the losses.
        graph: theirs.
        parameters: those that count, by id.
        recorder: whose captures are in the graph.
        known: of graphs of this form.
        declined: what rules do not cover.
        hooked: the ids of parameters with hooks.
        bound: how many bytes of rows may be held.
        retain: whether the graph must stay.
    """

    output: Tensor
    graph: Graph
    parameters: Mapping[int, Tensor]
    recorder: Recorder
    known: Known
    declined: Declines
    hooked: frozenset[int]
    bound: int
    retain: bool

    @property
    def dtype(self) -> torch.dtype:
        """What the Gramian is summed in."""
        return wide(self.output.dtype, *(p.dtype for p in self.parameters.values() if p.is_floating_point()))

    def retains(self, plan: Plan, is_last: bool) -> bool:
        """Whether the graph must stay after a pass: for the caller, the next pass, or another plan."""
        return self.retain or not is_last or not self.known.settled or bool(plan.sites)

    def elements(self) -> int:
        """Return how many elements the largest layer takes in and gives."""
        return max((self.graph.nodes[capture].call.elements for capture in self.graph.captures), default=0)


def gramian_of(job: Job, choice: Choice) -> Tensor | Declines:
    """Return the Gramian [m, m] of the losses, flattened; or what rules declined after all."""

    def whole(passes: Passes) -> Tensor | Declines:
        output = job.output

        def some(chosen: Sequence[int]) -> Tensor | Declines:
            return passes.sum(WholeSum, chosen)

        square = in_groups(passes.count, passes.fit, output.device, job.dtype, some, passes.rows)
        if not isinstance(square, Tensor) or passes.places is None:
            return square
        return square[passes.places[:, None], passes.places]

    return _added(job, choice, whole, holds=True)


def norms_of(job: Job, choice: Choice) -> Tensor | Declines:
    """Return the squared norms [m] of the losses' gradients, the Gramian's diagonal; or what rules declined."""

    def norms(passes: Passes) -> Tensor | Declines:
        squares = passes.sum(NormSum, range(passes.count))
        return squares if not isinstance(squares, Tensor) or passes.places is None else squares[passes.places]

    return _added(job, choice, norms, holds=False)


def _added(job: Job, choice: Choice, result: Callable[[Passes], Tensor | Declines], holds: bool) -> Tensor | Declines:
    """Return the sum of the results over all passes that there are; or what rules declined."""
    total: Tensor | None = None
    for passes in passes_of(job, choice, holds=holds):
        try:
            found = result(passes)
        except RuntimeError:  # something in the graph is only made for one gradient: a function of the user's
            if not isinstance(passes, _AtOnce):
                raise
            job.known.in_turn = True
            found = result(_InTurn(job, passes.parameters))
        if not isinstance(found, Tensor):
            return found
        total = found if total is None else total + found
    assert total is not None
    return total


def passes_of(job: Job, choice: Choice, *, holds: bool, at_once: bool = True) -> Iterator[Passes]:
    """Yield passes for many losses each, and passes for one loss each, as far as there are parameters for them.

    Args:
        job: what they are for.
        choice: which passes.
        holds: whether what passes bring has to be held until the last of them.
        at_once: whether passes for one loss each may run at once.
    """
    rest = {key: job.parameters[key] for key in choice.plan.by_rows}
    every = len(rest) == len(job.graph.uses)
    if not every:
        yield _Batch(job, choice, retain=bool(rest))
    if rest or every:
        eager = _AtOnce(job, rest)
        yield eager if at_once and eager.is_better(holds) else _InTurn(job, rest)


def rank_passes(job: Job, choice: Choice) -> Iterator[Passes]:
    """Yield passes that bring each parameter's Jacobian once, and whole.

    Passes for one loss each are for as many parameters together as the bound allows, and at the least for one.
    """
    rest = {key: job.parameters[key] for key in choice.plan.by_rows}
    if len(rest) < len(job.graph.uses):
        batch = _Batch(job, choice, retain=True)
        if batch.count <= max(1, batch.fit):
            yield batch
        else:
            rest = {key: job.parameters[key] for key in job.graph.uses}
    some: dict[int, Tensor] = {}
    for key, parameter in rest.items():
        elements = parameter.numel() + sum(other.numel() for other in some.values())
        if some and elements * job.output.numel() * job.dtype.itemsize > job.bound:
            yield _InTurn(job, some)
            some = {}
        some = {**some, key: parameter}
    if some:
        yield _InTurn(job, some)


class Passes(ABC):
    """Backward passes that are alike.

    Attributes:
        parameters: those of which they bring rows, by id.
        count: how many there are.
        rows: how many rows each brings.
        held: how many bytes of one pass are held where it has to wait for others.
        places: for each loss, its row among those of all passes one behind the other; None: they are in order.
    """

    parameters: Mapping[int, Tensor]
    count: int
    rows: int
    held: int
    places: Tensor | None = None

    def __init__(self, job: Job) -> None:
        self.job = job

    @property
    def fit(self) -> int:
        """How many may be held at once."""
        return self.job.bound // max(self.held, 1)

    @abstractmethod
    def run(self, total: Sum, chosen: Sequence[int]) -> Declines | None:
        """Run some of the passes; return what rules declined, or None if they brought everything."""

    def sum(self, kind: type[Sum], chosen: Sequence[int]) -> Tensor | Declines:
        """Return a sum over some of the passes, or what rules declined."""
        total = kind(self.job.parameters, len(chosen), self.rows, self.job.dtype, self.job.output.device)
        declined = self.run(total, chosen)
        return total.total() if declined is None else declined

    def _sweep(self, total: Sum, plan: Plan, layouts: Layouts | None) -> Sweep:
        job = self.job
        gather = Gather(total, job.parameters, plan.events(), self.rows)
        return Sweep(job.graph, plan, job.parameters, gather, layouts)


class _Batch(Passes):
    """Passes for many losses each.

    Args:
        job: what they are for.
        choice: which passes.
        retain: whether the graph must stay for passes that follow.
    """

    def __init__(self, job: Job, choice: Choice, retain: bool) -> None:
        super().__init__(job)
        self._plan, self._layouts, self._retain = choice.plan, choice.layouts, retain
        self.parameters = {key: job.parameters[key] for key in job.graph.uses if key not in choice.plan.by_rows}
        self.count, self.rows = choice.passes, choice.layouts.batch
        elements: int = sum(job.graph.nodes[capture].call.elements for capture in choice.plan.rules)
        self.held = job.dtype.itemsize * elements
        sizes, axes = choice.structure.sizes, choice.layouts.axes
        order = (*(axis for axis in range(len(sizes)) if axis not in axes), *axes)
        self._back = [order.index(axis) for axis in range(len(sizes))]
        self._laid = [sizes[axis] for axis in order]
        if self.count > 1 and self._back != sorted(self._back):
            rows = torch.arange(self.count * self.rows, device=job.output.device)
            self.places = rows.view(self._laid).permute(self._back).flatten()

    def run(self, total: Sum, chosen: Sequence[int]) -> Declines | None:
        job = self.job
        sweep = self._sweep(total, self._plan, self._layouts)
        for turn in chosen:
            ones = job.output.new_zeros(self.count, self.rows)
            ones[turn] = 1
            cotangent = ones.view(self._laid).permute(self._back).reshape(job.output.shape)
            retain = self._retain or job.retains(self._plan, self.count == 1)
            sweep.run(job.output, job.recorder, cotangent, retain=retain)
            if sweep.declined:
                return frozenset(sweep.declined)
        return None


class _InTurn(Passes):
    """Passes for one loss each, one after the other."""

    def __init__(self, job: Job, parameters: Mapping[int, Tensor]) -> None:
        super().__init__(job)
        self.parameters = parameters
        self.count, self.rows = job.output.numel(), 1
        self._plan = plan_rows(job.graph, parameters, job.declined)
        factors: int = sum(job.graph.nodes[capture].call.elements for capture in self._plan.rules)
        dense = sum(parameters[key].numel() for key in self._plan.dense)
        self.held = job.dtype.itemsize * (dense + factors)
        self._large = dense > _ROW

    def run(self, total: Sum, chosen: Sequence[int]) -> Declines | None:
        job = self.job
        sweep = self._sweep(total, self._plan, None)
        for turn, row in enumerate(chosen):
            cotangent = torch.zeros_like(job.output, memory_format=torch.contiguous_format)  # some gradients may be it
            cotangent.view(-1)[row] = 1
            is_last = turn == len(chosen) - 1 and len(chosen) == self.count
            take = partial(_take_row, total, turn) if self._large else None
            retain = job.retains(self._plan, is_last)
            grads = sweep.run(job.output, job.recorder, cotangent, retain=retain, take=take)
            if sweep.declined:
                return frozenset(sweep.declined)
            for key, grad in zip(self._plan.dense, grads, strict=take is None):
                if grad is not None:
                    total.take_row(key, turn, grad)
            del grads, cotangent  # before the next pass brings others
        return None


class _AtOnce(Passes):
    """Passes for one loss each, all of them as one pass of many rows."""

    def __init__(self, job: Job, parameters: Mapping[int, Tensor]) -> None:
        super().__init__(job)
        self.parameters = parameters
        self.count, self.rows, self.held = 1, job.output.numel(), 0
        self._plan = plan_rows(job.graph, parameters, job.declined, prefer_rules=True)

    def is_better(self, holds: bool) -> bool:
        """Whether they fit the bound, and one after the other is slower, or would have to be in groups."""
        job, m = self.job, self.rows
        if m <= 1 or job.known.in_turn or m * 3 * job.elements() * job.dtype.itemsize > job.bound:
            return False
        slow = job.elements() < forms_of(job.output.device).small_layer
        if not slow and not (holds and _InTurn(job, self.parameters).fit < m):
            return False
        return m * sum(job.parameters[key].numel() for key in self._plan.dense) * job.dtype.itemsize <= job.bound

    def run(self, total: Sum, chosen: Sequence[int]) -> Declines | None:
        return _rows_at_once(self.job, self._plan, self._sweep(total, self._plan, None), total)


def _take_row(total: Sum, turn: int, parameter: int, grad: Tensor) -> None:
    total.take_row(parameter, turn, grad)


def _rows_at_once(job: Job, plan: Plan, sweep: Sweep, total: Sum) -> Declines | None:
    m = job.output.numel()
    cotangents = torch.eye(m, dtype=job.output.dtype, device=job.output.device).view(m, *job.output.shape)
    grads = sweep.run(job.output, job.recorder, cotangents, at_once=m)
    if sweep.declined:
        return frozenset(sweep.declined)
    for key, grad in zip(plan.dense, grads, strict=True):
        if grad is not None:
            total.take(key, 0, [Rows(grad)])
    return None


def rows_of_features(output: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Return the gradients of losses with respect to tensors of their graph, flat, [m, n]."""
    rows = []
    for k in range(output.numel()):
        one = torch.zeros_like(output, memory_format=torch.contiguous_format)
        one.view(-1)[k] = 1
        grads = torch.autograd.grad(output, features, one, retain_graph=True, allow_unused=True)
        pairs = zip(grads, features, strict=True)
        rows.append(torch.cat([torch.zeros_like(z).flatten() if g is None else g.flatten() for g, z in pairs]))
    jacobian = torch.stack(rows)
    return jacobian.to(wide(jacobian.dtype))
