"""Checks once that the elements of a batch are independent, and finds where each tensor of the graph has the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.autogram._layout import Layout, find_layouts, prefer
from recollect.autogram._walk import Graph

__all__ = ["Layouts", "probe"]

# How often the losses of another half of the batch are taken where the first left several layouts open.
_TRIES = 3


class Layouts:
    """Where the outputs of each node of a graph have the batch.

    Attributes:
        batch: B of the last graph that they were right for.
        found: for each node that had a gradient, the layout of each of its outputs; None where one had no gradient.
        free: the nodes whose gradient mixes the elements of the batch.
        certain: whether every node's layout was seen from its gradient.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.found: dict[int, tuple[Layout | None, ...]] = {}
        self.free: set[int] = set()
        self.certain = True

    def fit(self, graph: Graph, batch: int) -> bool:
        """Whether a graph of the same form may have a batch of this size in the same places."""
        if batch != self.batch:
            for node, layouts in self.found.items():
                for k, layout in enumerate(layouts):
                    if layout is not None and not layout.fits(graph.shape(node, k), batch):
                        return False
            self.batch = batch
        return True


class _Watch:
    """Notes for one node which layouts its outputs' gradients allow."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.chosen = torch.zeros(0, dtype=torch.bool)
        self.seen = False
        self.shapes: list[torch.Size | None] = []
        self.layouts: list[set[Layout] | None] = []

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        if not self.seen:
            self.seen = True
            self.shapes = [None] * len(grads)
            self.layouts = [None] * len(grads)
        for k, grad in enumerate(grads):
            if grad is None:
                continue
            self.shapes[k] = grad.shape
            layouts = find_layouts(grad, self.batch, self.chosen.to(grad.device))
            known = self.layouts[k]
            if layouts is not None:
                self.layouts[k] = layouts if known is None else known & layouts

    @property
    def is_open(self) -> bool:
        """Whether another look may tell more."""
        return any(len(layouts) > 1 for layouts in self.layouts if layouts is not None)


def probe(output: Tensor, graph: Graph, inputs: Sequence[Tensor], batch_dim: int) -> Layouts:
    """Return where the batch is, from gradients of random sums of the losses of half of the batch.

    Args:
        output: the losses, with a batch of at least two elements in ``batch_dim``.
        graph: the output's.
        inputs: the leaves that the gradient is taken down to.
        batch_dim: of the output.
    """
    batch = output.shape[batch_dim]
    generator = torch.Generator().manual_seed(batch)
    watches = {k: _Watch(batch) for k, name in enumerate(graph.names) if name != "AccumulateGrad"}
    handles = [graph.nodes[k].register_prehook(watch) for k, watch in watches.items()]
    try:
        for _ in range(_TRIES):
            chosen = torch.zeros(batch, dtype=torch.bool)
            chosen[torch.randperm(batch, generator=generator)[: batch // 2]] = True
            for watch in watches.values():
                watch.chosen = chosen
            _differentiate(output, inputs, batch_dim, chosen, generator)
            if not any(watch.is_open for watch in watches.values()):
                break
    finally:
        for handle in handles:
            handle.remove()
    return _conclude(watches, batch, batch_dim)


def _differentiate(
    output: Tensor, inputs: Sequence[Tensor], batch_dim: int, chosen: Tensor, generator: torch.Generator
) -> None:
    weights = (torch.rand(output.shape, generator=generator) + 0.5).to(output)
    shape = [-1 if dim == batch_dim else 1 for dim in range(output.dim())]
    weights *= chosen.to(output.device).view(shape)
    torch.autograd.grad(output, inputs, weights, retain_graph=True, allow_unused=True)


def _conclude(watches: dict[int, Any], batch: int, batch_dim: int) -> Layouts:
    layouts = Layouts(batch)
    for node, watch in watches.items():
        if not watch.seen:
            continue
        found: list[Layout | None] = [None] * len(watch.shapes)
        for k, (shape, candidates) in enumerate(zip(watch.shapes, watch.layouts, strict=True)):
            if shape is None:
                continue
            if candidates is None:  # all zeros: a guess for this time
                layouts.certain = False
                candidates = {Layout(dim) for dim, n in enumerate(shape) if n % batch == 0}
            if candidates:
                found[k] = prefer(candidates, shape, batch, batch_dim)
            else:
                layouts.free.add(node)
        layouts.found[node] = tuple(found)
    return layouts
