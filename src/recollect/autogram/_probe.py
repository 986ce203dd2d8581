"""Checks once that the elements of a batch are independent, and finds where each tensor of the graph has the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recollect.autogram._layout import Layout, find_layouts, prefer, slice_sizes
from recollect.autogram._walk import Graph

__all__ = ["Layouts", "probe"]


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
        for node in self.found if batch != self.batch else graph.captures:
            for k, layout in enumerate(self.found.get(node, ())):
                if layout is not None and not layout.fits(graph.shape(node, k), batch):
                    return False
        self.batch = batch
        return True


class _Watch:
    """Notes for one node how large the slices of its outputs' gradients are."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.shapes: dict[int, torch.Size] = {}
        self.outputs = 0
        self.sizes: dict[int, list[dict[int, Tensor]]] = {}

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        self.outputs = len(grads)
        for k, grad in enumerate(grads):
            if grad is not None:
                self.shapes[k] = grad.shape
                self.sizes.setdefault(k, []).append(slice_sizes(grad, self.batch))


def probe(output: Tensor, graph: Graph, inputs: Sequence[Tensor], batch_dim: int) -> Layouts:
    """Return where the batch is: losses of different elements are scaled differently, until no two went alike.

    The factors are powers of two, which change no rounding.

    Args:
        output: the losses, with a batch of at least two elements in ``batch_dim``.
        graph: the output's.
        inputs: the leaves that the gradient is taken down to.
        batch_dim: of the output.
    """
    batch = output.shape[batch_dim]
    watches = {k: _Watch(batch) for k, name in enumerate(graph.names) if name != "AccumulateGrad"}
    handles = [graph.nodes[k].register_prehook(watch) for k, watch in watches.items()]
    generator = torch.Generator().manual_seed(batch)
    weights = torch.rand(output.shape, generator=generator) + 0.5
    base = 8 if output.dtype == torch.float16 else 16
    factors: list[Tensor] = []
    try:
        _differentiate(output, inputs, weights)
        numbers = torch.randperm(batch, generator=generator)  # each element's, whose digits are its exponents
        while batch > base ** len(factors):
            exponents = numbers // base ** len(factors) % base
            _differentiate(output, inputs, weights * torch.exp2(exponents).view(_along(output, batch_dim)))
            factors.append(torch.exp2(2 * exponents).double())
    finally:
        for handle in handles:
            handle.remove()
    return _conclude(watches, factors, batch, batch_dim)


def _along(output: Tensor, dim: int) -> list[int]:
    return [-1 if other == dim else 1 for other in range(output.dim())]


def _differentiate(output: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    torch.autograd.grad(output, inputs, weights.to(output), retain_graph=True, allow_unused=True)


def _conclude(watches: dict[int, _Watch], factors: Sequence[Tensor], batch: int, batch_dim: int) -> Layouts:
    layouts = Layouts(batch)
    for node, watch in watches.items():
        if not watch.sizes:
            continue
        found: list[Layout | None] = [None] * watch.outputs
        for k, shape in watch.shapes.items():
            sizes = watch.sizes[k]
            candidates = find_layouts(sizes, factors) if len(sizes) == len(factors) + 1 else set()
            if candidates is None:  # all zeros: a guess for this time
                layouts.certain = False
                candidates = {Layout(dim) for dim in sizes[0]}
            if candidates:
                found[k] = prefer(candidates, shape, batch, batch_dim)
            else:
                layouts.free.add(node)
        layouts.found[node] = tuple(found)
    return layouts
