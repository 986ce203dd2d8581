"""Which backward passes give a Gramian: one for each loss, several at once, or one for many losses that are apart.

What passes bring has to be held until the last of them, for every pair of rows meets in the Gramian. Passes that run
at once bring all rows of a layer together, which can be squared and forgotten, but hold each layer's gradient for all
losses. Where neither fits a bound, the losses are taken in groups, and each pair of groups in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recollect.autogram._capture import Recorder
from recollect.autogram._choice import Choice
from recollect.autogram._gather import Gather
from recollect.autogram._groups import in_groups
from recollect.autogram._plan import Plan, plan_rows
from recollect.autogram._square import SquareSum, of_device, wide
from recollect.autogram._sweep import Sweep
from recollect.autogram._walk import Anatomy, Graph

__all__ = ["Declines", "Job", "Known", "gramian_of", "gramian_of_features"]

# Where no layer has as many elements for one loss, calls cost a GPU more than the work, and all losses go at once. On a
# CPU one after the other is as fast.
_SMALL = {"cpu": 0, "cuda": 2**20}

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
        calls: how many there were.
        tolerance: by how much a Gramian of such a graph may differ from the gradient.
        anatomy: of such a graph.
    """

    declined: Declines = frozenset()
    in_turn: bool = False
    settled: bool = False
    choices: dict[tuple[Declines, frozenset[int]], Choice] = field(default_factory=dict)
    calls: int = 0
    tolerance: float | None = None
    anatomy: Anatomy | None = None


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
    rest = {key: job.parameters[key] for key in choice.plan.by_rows}
    if len(rest) == len(job.graph.uses):
        return _all_rows(job, rest)
    gramian = _all_passes(job, choice, retain=bool(rest))
    if not rest or not isinstance(gramian, Tensor):
        return gramian
    others = _all_rows(job, rest)
    return gramian + others if isinstance(others, Tensor) else others


def _all_rows(job: Job, parameters: Mapping[int, Tensor]) -> Tensor | Declines:
    m, device = job.output.numel(), job.output.device
    lean = plan_rows(job.graph, parameters, job.declined)
    held = _held_elements(job, lean) * job.dtype.itemsize
    small = job.elements() < of_device(_SMALL, device)
    at_once = m * 3 * job.elements() * job.dtype.itemsize
    if m > 1 and (small or m * held > job.bound) and at_once <= job.bound and not job.known.in_turn:
        eager = plan_rows(job.graph, parameters, job.declined, prefer_rules=True)
        if m * sum(job.parameters[k].numel() for k in eager.dense) * job.dtype.itemsize <= job.bound:
            try:
                return _rows_at_once(job, eager)
            except RuntimeError:  # something in the graph is only made for one gradient: a function of the user's
                job.known.in_turn = True
    return in_groups(m, job.bound // max(held, 1), device, job.dtype, lambda rows: _rows_in_turn(job, lean, rows))


def _held_elements(job: Job, plan: Plan) -> int:
    """Return how many elements one row takes until all rows are there."""
    dense = sum(job.parameters[k].numel() for k in plan.dense)
    factors: int = sum(job.graph.nodes[capture].call.elements for capture in plan.rules)
    return dense + factors


def _rows_at_once(job: Job, plan: Plan) -> Tensor | Declines:
    m = job.output.numel()
    total = SquareSum(m, job.dtype, job.output.device)
    gather = Gather(total, job.parameters, plan.events(), 1, m)
    sweep = Sweep(job.graph, plan, job.parameters, gather, None)
    cotangents = torch.eye(m, dtype=job.output.dtype, device=job.output.device).view(m, *job.output.shape)
    grads = sweep.run(job.output, job.recorder, cotangents, at_once=m)
    if sweep.declined:
        return frozenset(sweep.declined)
    for grad in grads:
        if grad is not None:
            total.add_product(grad.reshape(m, -1))
    gather.finish()
    return total.total()


def _rows_in_turn(job: Job, plan: Plan, rows: Sequence[int]) -> Tensor | Declines:
    """Return the Gramian of these rows, a backward pass for each."""
    total = SquareSum(len(rows), job.dtype, job.output.device)
    gather = Gather(total, job.parameters, plan.events(), len(rows), 1)
    sweep = Sweep(job.graph, plan, job.parameters, gather, None)
    dense = [total.new_rows(job.parameters[k].numel()) for k in plan.dense]
    for i, row in enumerate(rows):
        cotangent = torch.zeros_like(job.output, memory_format=torch.contiguous_format)  # some gradients may be it
        cotangent.view(-1)[row] = 1
        is_last = i == len(rows) - 1 and len(rows) == job.output.numel()
        grads = sweep.run(job.output, job.recorder, cotangent, retain=job.retains(plan, is_last))
        if sweep.declined:
            return frozenset(sweep.declined)
        for values, grad in zip(dense, grads, strict=True):
            if grad is not None:
                values[i] = (grad.to_dense() if grad.layout != torch.strided else grad).reshape(-1)
    while dense:
        total.add_product(dense.pop())
    gather.finish()
    return total.total()


def _all_passes(job: Job, choice: Choice, retain: bool) -> Tensor | Declines:
    """Return the Gramian from passes for many losses each.

    Args:
        job: the Gramian.
        choice: which passes.
        retain: whether the graph must stay for passes that follow.
    """
    plan, layouts, sizes = choice.plan, choice.layouts, choice.structure.sizes
    others = tuple(axis for axis in range(len(sizes)) if axis not in layouts.axes)
    order = (*others, *layouts.axes)
    back = [order.index(axis) for axis in range(len(sizes))]
    laid = [sizes[axis] for axis in order]
    passes, batch = choice.passes, layouts.batch
    held = job.dtype.itemsize * sum(job.graph.nodes[capture].call.elements for capture in plan.rules)

    def some(chosen: Sequence[int]) -> Tensor | Declines:
        total = SquareSum(len(chosen) * batch, job.dtype, job.output.device)
        gather = Gather(total, job.parameters, plan.events(), len(chosen), batch)
        sweep = Sweep(job.graph, plan, job.parameters, gather, layouts)
        for task in chosen:
            ones = job.output.new_zeros(passes, batch)
            ones[task] = 1
            cotangent = ones.view(laid).permute(back).reshape(job.output.shape)
            sweep.run(job.output, job.recorder, cotangent, retain=retain or job.retains(plan, passes == 1))
            if sweep.declined:
                return frozenset(sweep.declined)
        gather.finish()
        return total.total()

    gramian = in_groups(passes, job.bound // max(held, 1), job.output.device, job.dtype, some, batch)
    if not isinstance(gramian, Tensor):
        return gramian
    both = [*back, *(len(sizes) + axis for axis in back)]
    return gramian.view(*laid, *laid).permute(both).reshape(len(gramian), len(gramian))


def gramian_of_features(output: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Return the Gramian [m, m] of the losses' gradients with respect to tensors of their graph."""
    rows = []
    for k in range(output.numel()):
        one = torch.zeros_like(output, memory_format=torch.contiguous_format)
        one.view(-1)[k] = 1
        grads = torch.autograd.grad(output, features, one, retain_graph=True, allow_unused=True)
        pairs = zip(grads, features, strict=True)
        rows.append(torch.cat([torch.zeros_like(z).flatten() if g is None else g.flatten() for g, z in pairs]))
    jacobian = torch.stack(rows)
    jacobian = jacobian.to(wide(jacobian.dtype))
    return (jacobian @ jacobian.T).to(output.dtype)
