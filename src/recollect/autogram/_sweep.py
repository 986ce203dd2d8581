"""Backward passes in which each layer's Jacobian is taken where its output's gradient comes by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from recollect._torch import graph_task_id
from recollect.autogram._capture import Recorder
from recollect.autogram._factors import Factor, NotCovered, Outer, Rows, form_rows
from recollect.autogram._inputs import shared, with_rows
from recollect.autogram._plan import Plan
from recollect.autogram._registry import check_factor
from recollect.autogram._sites import Target, rows_at
from recollect.autogram._structure import Layouts
from recollect.autogram._sums import Gather
from recollect.autogram._walk import Graph, forget

__all__ = ["Sweep"]

Take = Callable[[int, Tensor], None]
"""Takes a parameter's id, and its gradient."""


class Sweep:
    """One backward pass, or several.

    Args:
        graph: the output's.
        plan: who accounts for which parameter.
        parameters: by id.
        gather: takes the factors.
        layouts: where the losses of a pass are apart; None: each pass has one row, which is everything.

    Attributes:
        declined: captures, and names of parameters, for which a rule gave nothing after all: then what was gathered is
            not the whole.
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        parameters: Mapping[int, Tensor],
        gather: Gather,
        layouts: Layouts | None,
    ) -> None:
        self.declined: set[tuple[int, str]] = set()
        self._graph = graph
        self._plan = plan
        self._parameters = parameters
        self._gather = gather
        self._layouts = layouts
        self._batch = 1 if layouts is None else layouts.batch
        self._numbers = {graph.nodes[capture]: capture for capture in plan.rules}
        self._at_once: int | None = None
        self._beyond: dict[tuple[int, int], tuple[Target, Tensor]] = {}

    def run(
        self,
        output: Tensor,
        recorder: Recorder,
        cotangent: Tensor,
        at_once: int | None = None,
        retain: bool = True,
        take: Take | None = None,
    ) -> list[Tensor | None]:
        """Run one pass, and return the gradients of the parameters whose rows autograd computes.

        Args:
            output: the losses.
            recorder: whose captures are to be visited.
            cotangent: the losses' gradients.
            at_once: how many cotangents there are, one behind the other, whose passes run at once.
            retain: whether the graph stays.
            take: is given each of these gradients when it is there, after which it is not held, nor returned. (Autograd
                itself holds all of them until the pass is over.)
        """
        self._at_once = at_once
        targets = self._plan.targets(self._graph)
        if not retain and not targets:
            for node in self._graph.idle:
                forget(self._graph.nodes[node])
        inputs = [recorder.leaf, *(self._parameters[k] for k in targets)]
        with self._watching(recorder), self._taking(take):
            grads = torch.autograd.grad(
                output, inputs, cotangent, retain_graph=retain, allow_unused=True, is_grads_batched=at_once is not None
            )
        self._go_beyond()
        self._gather.end_pass()
        if take is not None:
            return []
        return list(grads[1 : 1 + len(self._plan.dense)])

    @contextmanager
    def _taking(self, take: Take | None) -> Iterator[None]:
        """Hand on gradients of parameters as the pass brings them."""
        task: list[int] = []  # this pass: a hook on a parameter is called in those of other threads, and within, too
        handles: list[Any] = []

        def began(grads: Any) -> None:
            task[:] = [graph_task_id()]

        def hook(parameter: int, grad: Tensor) -> Tensor | None:
            if [graph_task_id()] != task or take is None:
                return None
            take(parameter, grad)
            return grad.new_zeros(()).expand(grad.shape) if grad.layout == torch.strided else None

        try:
            if take is not None:
                handles.append(self._graph.nodes[0].register_prehook(began))
                for parameter in self._plan.dense:
                    leaf: Any = self._parameters[parameter]
                    handles.append(leaf.register_hook(partial(hook, parameter)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _watching(self, recorder: Recorder) -> Iterator[None]:
        handles = []
        try:
            for node, targets in self._plan.sites.items():
                handles.append(self._graph.nodes[node].register_prehook(self._at_site(node, targets)))
            recorder.visit = self._visit
            yield
        finally:
            recorder.visit = None
            for handle in handles:
                handle.remove()

    def _visit(self, node: Any, grads: tuple[Tensor | None, ...]) -> None:
        capture = self._numbers.get(node)
        if capture is None:
            return
        names = self._plan.rules[capture]
        if all(grad is None for grad in grads):
            for parameter in names.values():
                self._gather.add(parameter, None)
            return
        factors = self._factors(capture, node, grads)
        missing = [name for name in names if name not in factors]
        if missing:
            self.declined.update((capture, name) for name in missing)
            return
        rows = self._batch if self._at_once is None else self._at_once
        for name, parameter in names.items():
            check_factor(node.call.layer, name, factors[name], rows, self._parameters[parameter])
            self._gather.add(parameter, factors[name])

    def _factors(self, capture: int, node: Any, grads: tuple[Tensor | None, ...]) -> Mapping[str, Factor]:
        try:
            return self._apply(capture, node, grads)
        except NotCovered:
            return {}

    def _apply(self, capture: int, node: Any, grads: tuple[Tensor | None, ...]) -> Mapping[str, Factor]:
        call = node.call
        inputs, output = call.kept(node)
        whole = shared((output,))
        if self._layouts is None:
            rows = shared(inputs)
            grads = tuple(None if grad is None else self._with_rows(grad) for grad in grads)
        else:
            split = self._plan.inputs[capture]
            rows = shared(inputs) if split is None else with_rows(inputs, split)
            if split is not None and output is not None:
                layout = self._layouts.found[capture][0]
                whole = (None if layout is None else layout.rows(output),)
            grads = tuple(
                None if grad is None or layout is None else layout.masks(grad) if split is None else layout.rows(grad)
                for grad, layout in zip(grads, self._layouts.found[capture], strict=True)
            )
        more = whole if call.has_output else ()
        factors: Mapping[str, Factor] = call.entry.rule(call.layer, rows, grads, *more)
        return factors

    def _with_rows(self, grad: Tensor) -> Tensor:
        """Give a gradient the axis of rows, which is hidden while several passes run at once."""
        if self._at_once is None:
            return grad.unsqueeze(0)
        return torch._remove_batch_dim(grad, 1, self._at_once, 0)

    def _at_site(self, node: int, targets: Sequence[Target]) -> Callable[[tuple[Tensor | None, ...]], None]:
        def note(grads: tuple[Tensor | None, ...]) -> None:
            if self._layouts is None:
                return
            wanted = [(target.position, target.shape) for target in targets]
            found = rows_at(self._graph.nodes[node], grads, self._layouts.found[node], self._batch, wanted)
            for target, factor in zip(targets, found, strict=True):
                self._take(target, factor)

        return note

    def _take(self, target: Target, factor: Factor | None) -> None:
        if factor is None:
            for parameter in target.parameters:
                self._gather.add(parameter, None)
        elif target.direct:
            self._gather.add(target.parameters[0], factor)
        elif target.transposed:
            self._gather.add(target.parameters[0], _transposed(factor))
        else:
            rows = _dense(factor, self._batch)
            place = (target.child, target.index)
            known = self._beyond.get(place)
            self._beyond[place] = (target, rows if known is None else known[1] + rows)

    def _go_beyond(self) -> None:
        """Take rows that stopped at something computed from parameters alone down to the parameters."""
        while self._beyond:
            (child, index), (target, rows) = self._beyond.popitem()
            edge = GradientEdge(self._graph.nodes[child], index)
            leaves = [self._parameters[parameter] for parameter in target.parameters]
            found = [torch.autograd.grad([edge], leaves, [row], retain_graph=True, allow_unused=True) for row in rows]
            for k, parameter in enumerate(target.parameters):
                zero = torch.zeros_like(leaves[k])
                self._gather.add(parameter, Rows(torch.stack([zero if g[k] is None else g[k] for g in found])))


def _transposed(factor: Factor) -> Factor:
    if isinstance(factor, Outer):
        return Outer(factor.right, factor.left, torch.Size(reversed(factor.shape)))
    if isinstance(factor, Rows):
        return Rows(factor.values.mT)
    raise TypeError(f"rows of a node come as Outer or Rows, not as {type(factor).__name__}")


def _dense(factor: Factor, batch: int) -> Tensor:
    return form_rows([factor], slice(0, batch)).view(batch, *factor.shape)
