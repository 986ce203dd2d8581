"""Checks once that the elements of a batch are independent, and finds where each tensor of the graph has the batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.autogram._layout import Layout, find_layouts, is_scattered, prefer, slice_sizes
from recollect.autogram._moves import cut, moves, moving, numbers
from recollect.autogram._steady import is_steady
from recollect.autogram._walk import Graph

__all__ = ["Layouts", "probe"]


class Layouts:
    """Where the outputs of each node of a graph have the batch.

    Attributes:
        found: for each node that had a gradient, the layout of each of its outputs; None where one had no gradient, or
            zeros.
        free: the nodes whose gradient mixes the elements of the batch.
        scattered: those of them in which every entry still belongs to one element, but in no regular order.
        doubtful: the nodes for which several layouts fitted, as where only some of the losses have a gradient.
        crossed: those of them in which these were along several axes.
        idle: those of the free nodes whose gradient was zero, in a shape that has no place for the batch.
        alone: the nodes in which the batch had an axis for itself: that does not tell how it would share one.
        cuts: for each node that takes parts of the batch, or pads it, where these begin and end.
        moved: for each node that moves the elements of the batch, the tensors that say where to.
        certain: whether every node's layout was seen from its gradient, and nothing but these tensors moves the batch.
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[Layout | None, ...]] = {}
        self.free: set[int] = set()
        self.scattered: set[int] = set()
        self.doubtful: set[int] = set()
        self.crossed: set[int] = set()
        self.idle: set[int] = set()
        self.alone: set[int] = set()
        self.cuts: dict[int, tuple[Any, ...]] = {}
        self.moved: dict[int, dict[int, Tensor]] = {}
        self.certain = True

    def without_zeros(self, node: int, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Leave those of a node's gradients out that have no batch, where the others do: they are zero."""
        return tuple(None if layout is None else grad for grad, layout in zip(grads, self.found[node], strict=True))

    def fit(self, graph: Graph, batch: int, nodes: Iterable[int]) -> bool:
        """Whether these nodes of a graph of the same form must have a batch of this size in the same places."""
        if any(numbers(graph.nodes[node]) != expected for node, expected in self.cuts.items()):
            return False
        for node in nodes:
            for k, layout in enumerate(self.found.get(node, ())):
                if layout is None:
                    continue
                shape = graph.shape(node, k)
                if not layout.fits(shape, batch) or (node in self.alone and shape[layout.dim] != batch):
                    return False
        return True


class _Watch:
    """Notes for one node how large the slices of its outputs' gradients are, and where it moves what."""

    def __init__(self, batch: int, node: Any) -> None:
        self.batch = batch
        self.shapes: dict[int, torch.Size] = {}
        self.outputs = 0
        self.sizes: dict[int, list[dict[int, Tensor]]] = {}
        self.moved: tuple[Tensor | None, ...] = ()
        self._node = node

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        self.outputs = len(grads)
        for k, grad in enumerate(grads):
            if grad is not None:
                self.shapes[k] = grad.shape
                self.sizes.setdefault(k, []).append(slice_sizes(grad, self.batch))
        if not self.moved:
            self.moved = tuple(index if index is None else index.clone() for index in moves(self._node))


def probe(output: Tensor, graph: Graph, inputs: Sequence[Tensor], batch_dim: int) -> Layouts:
    """Return where the batch is: losses of different elements are scaled differently, until no two went alike.

    The factors are powers of two, which change no rounding, and far apart, so that what little an element has of
    another shows.

    Args:
        output: the losses, with a batch of at least two elements in ``batch_dim``.
        graph: the output's.
        inputs: the leaves that the gradient is taken down to.
        batch_dim: of the output.
    """
    batch = output.shape[batch_dim]
    watches = {k: _Watch(batch, graph.nodes[k]) for k, name in enumerate(graph.names) if name != "AccumulateGrad"}
    handles = [graph.nodes[k].register_prehook(watch) for k, watch in watches.items()]
    generator = torch.Generator().manual_seed(batch)
    weights = torch.rand(output.shape, generator=generator, device="cpu") + 0.5
    base = 8 if _has_float16(graph) else 16  # what fits its range
    factors: list[Tensor] = []
    try:
        _differentiate(output, inputs, weights)
        # Each element's number, whose digits are its exponents.
        numbers = torch.randperm(batch, generator=generator, device="cpu")
        while batch > base ** len(factors):
            digits = numbers // base ** len(factors) % base
            exponents = digits * ((base - 1) // int(digits.max()))
            _differentiate(output, inputs, weights * torch.exp2(exponents).view(_along(output, batch_dim)))
            factors.append(torch.exp2(2 * exponents).double())
    finally:
        for handle in handles:
            handle.remove()
    return _conclude(graph, watches, factors, batch, batch_dim)


def _has_float16(graph: Graph) -> bool:
    metadata = (out for node in graph.nodes for out in getattr(node, "_input_metadata", ()))
    return any(out.dtype == torch.float16 for out in metadata)


def _along(output: Tensor, dim: int) -> list[int]:
    return [-1 if other == dim else 1 for other in range(output.dim())]


def _differentiate(output: Tensor, inputs: Sequence[Tensor], weights: Tensor) -> None:
    torch.autograd.grad(output, inputs, weights.to(output), retain_graph=True, allow_unused=True)


def _conclude(
    graph: Graph, watches: dict[int, _Watch], factors: Sequence[Tensor], batch: int, batch_dim: int
) -> Layouts:
    layouts = Layouts()
    for node, watch in watches.items():
        if watch.sizes:
            layouts.found[node] = tuple(_conclude_node(layouts, node, watch, factors, batch_dim))
    placed = layouts.scattered - layouts.idle
    for node in layouts.found:
        moved = watches[node].moved
        if moved and (indices := moving(graph, node, moved, layouts.found, layouts.scattered)):
            layouts.moved[node] = indices
        if parts := cut(graph, node, layouts.found, layouts.scattered):
            layouts.cuts[node] = parts
        if not is_steady(graph, node, layouts.found, placed):
            layouts.certain = False
    return layouts


def _conclude_node(
    layouts: Layouts, node: int, watch: _Watch, factors: Sequence[Tensor], batch_dim: int
) -> list[Layout | None]:
    found: list[Layout | None] = [None] * watch.outputs
    scattered = True
    for k, shape in watch.shapes.items():
        sizes, batch = watch.sizes[k], watch.batch
        whole = len(sizes) == len(factors) + 1
        candidates = find_layouts(sizes, factors) if whole else set()
        if candidates is None:  # all zeros, which go on as no gradient, for this time
            layouts.certain = False
        elif candidates:
            best = found[k] = prefer(candidates, shape, batch, batch_dim)
            if len(candidates) > 1:
                layouts.doubtful.add(node)
            if len({layout.dim for layout in candidates}) > 1:
                layouts.crossed.add(node)
            if shape[best.dim] == batch:
                layouts.alone.add(node)
        else:
            layouts.free.add(node)
            if not any(bool(size.any()) for size in sizes[0].values()):
                layouts.idle.add(node)
            scattered = scattered and whole and is_scattered(sizes, factors)
    if node in layouts.free and scattered:
        layouts.scattered.add(node)
    return found
