"""Which backward passes give a Gramian: one for each loss, several at once, or one for the whole batch.

What passes bring has to be held until the last of them, for every pair of rows meets in the Gramian. Passes that run
at once bring all rows of a layer together, which can be squared and forgotten, but hold each layer's gradient for all
losses. Where neither fits a bound, the losses are taken in groups, and each pair of groups in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.autogram._capture import Recorder
from recollect.autogram._gather import Gather
from recollect.autogram._groups import in_groups
from recollect.autogram._independence import Independence
from recollect.autogram._moves import MovedError
from recollect.autogram._plan import Plan, plan_rows
from recollect.autogram._recall import Known, plan_by_layouts
from recollect.autogram._square import SquareSum, of_device, wide
from recollect.autogram._sweep import DeclinedError, Sweep
from recollect.autogram._walk import Graph

__all__ = ["Job", "gramian_of_batch", "gramian_of_rows"]

# Where no layer has as many elements for one loss, calls cost a GPU more than the work, and all losses go at once. On a
# CPU one after the other is as fast.
_SMALL = {"cpu": 0, "cuda": 2**20}


@dataclass(frozen=True, slots=True)
class Job:
    """A Gramian to be computed.

    Attributes:
        output: the losses.
        graph: theirs.
        parameters: those that count, by id.
        recorder: whose captures are in the graph.
        known: of graphs of this form.
        changed: what rules do not cover, because a layer has changed since it was called.
        bound: how many bytes of rows may be held.
        retain: whether the graph must stay.
    """

    output: Tensor
    graph: Graph
    parameters: Mapping[int, Tensor]
    recorder: Recorder
    known: Known
    changed: Collection[tuple[int, str]]
    bound: int
    retain: bool

    @property
    def dtype(self) -> torch.dtype:
        """What the Gramian is summed in."""
        return wide(self.output.dtype, *(p.dtype for p in self.parameters.values() if p.is_floating_point()))

    @property
    def declined(self) -> Collection[tuple[int, str]]:
        """What rules do not cover."""
        return {*self.known.declined, *self.changed} if self.changed else self.known.declined

    def until_planned(self, compute: Callable[[], Tensor]) -> Tensor:
        """Compute once more as long as rules cover less than was planned for, or the batch is not where it was."""
        while True:
            try:
                gramian = compute()
                self.known.settled = True
                return gramian
            except DeclinedError as declined:
                self.known.declined.update(declined.pairs)
            except MovedError:
                self.known.layouts = None

    def retains(self, plan: Plan, is_last: bool) -> bool:
        """Whether the graph must stay after a pass: for the caller, the next pass, or another plan."""
        return self.retain or not is_last or not self.known.settled or bool(plan.sites)

    def elements(self) -> int:
        """Return how many elements the largest layer takes in and gives."""
        return max((self.graph.nodes[capture].call.elements for capture in self.graph.captures), default=0)


def gramian_of_rows(job: Job) -> Tensor:
    """Return the Gramian [m, m] of the losses, flattened."""
    return job.until_planned(lambda: _all_rows(job))


def gramian_of_batch(job: Job, batch_dim: int, independence: Independence) -> Tensor:
    """Return the Gramian [K B, K B] of K losses for each of B elements, the elements last."""
    return job.until_planned(lambda: _all_tasks(job, batch_dim, independence))


def _all_rows(job: Job) -> Tensor:
    m, device = job.output.numel(), job.output.device
    lean = plan_rows(job.graph, job.parameters, job.declined)
    held = _held_elements(job, lean) * job.dtype.itemsize
    small = job.elements() < of_device(_SMALL, device)
    at_once = m * 3 * job.elements() * job.dtype.itemsize
    if m > 1 and (small or m * held > job.bound) and at_once <= job.bound and not job.known.in_turn:
        eager = plan_rows(job.graph, job.parameters, job.declined, prefer_rules=True)
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


def _rows_at_once(job: Job, plan: Plan) -> Tensor:
    m = job.output.numel()
    total = SquareSum(m, job.dtype, job.output.device)
    gather = Gather(total, job.parameters, plan.events(), 1, m)
    sweep = Sweep(job.graph, plan, job.parameters, gather, None, 1)
    cotangents = torch.eye(m, dtype=job.output.dtype, device=job.output.device).view(m, *job.output.shape)
    grads = sweep.run(job.output, job.recorder, cotangents, at_once=m)
    for grad in grads:
        if grad is not None:
            total.add_product(grad.reshape(m, -1))
    gather.finish()
    return total.total()


def _rows_in_turn(job: Job, plan: Plan, rows: Sequence[int]) -> Tensor:
    """Return the Gramian of these rows, a backward pass for each."""
    total = SquareSum(len(rows), job.dtype, job.output.device)
    gather = Gather(total, job.parameters, plan.events(), len(rows), 1)
    sweep = Sweep(job.graph, plan, job.parameters, gather, None, 1)
    dense = [total.new_rows(job.parameters[k].numel()) for k in plan.dense]
    for i, row in enumerate(rows):
        cotangent = torch.zeros_like(job.output, memory_format=torch.contiguous_format)  # some gradients may be it
        cotangent.view(-1)[row] = 1
        is_last = i == len(rows) - 1 and len(rows) == job.output.numel()
        grads = sweep.run(job.output, job.recorder, cotangent, retain=job.retains(plan, is_last))
        for values, grad in zip(dense, grads, strict=True):
            if grad is not None:
                values[i] = (grad.to_dense() if grad.layout != torch.strided else grad).reshape(-1)
    while dense:
        total.add_product(dense.pop())
    gather.finish()
    return total.total()


def _all_tasks(job: Job, batch_dim: int, independence: Independence) -> Tensor:
    plan, layouts = plan_by_layouts(
        job.output, job.graph, job.parameters, job.recorder.leaf, job.known, job.declined, independence, batch_dim
    )
    batch = job.output.shape[batch_dim]
    tasks = job.output.numel() // batch
    held = job.dtype.itemsize * sum(job.graph.nodes[capture].call.elements for capture in plan.rules)
    rest = [n for dim, n in enumerate(job.output.shape) if dim != batch_dim]

    def some(chosen: Sequence[int]) -> Tensor:
        total = SquareSum(len(chosen) * batch, job.dtype, job.output.device)
        gather = Gather(total, job.parameters, plan.events(), len(chosen), batch)
        sweep = Sweep(job.graph, plan, job.parameters, gather, layouts, batch)
        for task in chosen:
            ones = job.output.new_zeros(tasks, batch)
            ones[task] = 1
            cotangent = ones.view(*rest, batch).movedim(-1, batch_dim)
            sweep.run(job.output, job.recorder, cotangent, retain=job.retains(plan, tasks == 1) or bool(layouts.moved))
        gather.finish()
        return total.total()

    return in_groups(tasks, job.bound // max(held, 1), job.output.device, job.dtype, some, batch)
