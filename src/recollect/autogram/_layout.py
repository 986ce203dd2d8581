"""Where a tensor has the batch: found from how its gradient grows when the losses of different elements do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout", "find_layouts", "is_scattered", "prefer", "slice_sizes"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The axis of a tensor that the batch is in, alone or laid out together with another one.

    Attributes:
        dim: the axis, of n = B q elements.
        outer: element i of the batch has the entries i q to i q + q; otherwise it has i, B + i, and so on.
    """

    dim: int
    outer: bool = True

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        """Whether a tensor of this shape can have a batch of this size there."""
        return self.dim < len(shape) and shape[self.dim] % batch == 0

    def rows(self, tensor: Tensor, batch: int) -> Tensor:
        """Return the elements of the batch, each as a batch of its own: [B, *shape], where n has become q."""
        dim = self.dim
        if tensor.shape[dim] == batch:
            return tensor.unsqueeze(1) if dim == 0 else tensor.movedim(dim, 0).unsqueeze(1 + dim)
        if self.outer:
            return torch.unflatten(tensor, dim, (batch, -1)).movedim(dim, 0)
        return torch.unflatten(tensor, dim, (-1, batch)).movedim(dim + 1, 0)

    def spread(self, values: Tensor, size: int) -> Tensor:
        """Return for each entry of an axis of this size the value of its element of the batch."""
        repeats = size // len(values)
        return values.repeat_interleave(repeats) if self.outer else values.repeat(repeats)

    def mask(self, tensor: Tensor, batch: int, row: int) -> Tensor:
        """Return the tensor with zeros in place of all elements of the batch but one."""
        masked = torch.zeros_like(tensor)
        self.rows(masked, batch)[row].copy_(self.rows(tensor, batch)[row])
        return masked


def slice_sizes(grad: Tensor, batch: int) -> dict[int, Tensor]:
    """Return the sum of squares of each slice of a gradient, along each axis that may have the batch in it.

    The first axis may have it whatever its size: elements of several sizes lie one behind another there.
    """
    if grad.layout != torch.strided:
        return {}
    grad = grad.abs() if grad.is_complex() else grad
    sizes = {}
    for dim, n in enumerate(grad.shape):
        if n > 0 and (n % batch == 0 or dim == 0):
            others = [other for other in range(grad.dim()) if other != dim]
            slices = torch.linalg.vector_norm(grad, dim=others, dtype=torch.float64) if others else grad.double()
            sizes[dim] = slices.square().cpu()
    return sizes


def find_layouts(sizes: Sequence[dict[int, Tensor]], factors: Sequence[Tensor]) -> set[Layout] | None:
    """Return all layouts by which each slice has grown as the losses of its element of the batch have.

    Args:
        sizes: of the gradient's slices (:func:`slice_sizes`), first as it is, and then with losses that were scaled.
        factors: for each of the scalings, what the squares of each element's gradient have grown by, [B].

    Returns:
        None if the gradient is zero: any layout would fit.
    """
    first, *scaled = sizes
    fitting = {dim: size for dim, size in first.items() if len(size) % len(factors[0]) == 0}
    if not any(bool(size.any()) for size in first.values()):
        return None if fitting else set()
    found = set()
    for dim, size in fitting.items():
        there, ratios = _growth(size, [other[dim] for other in scaled])
        alone = len(size) == len(factors[0])  # then it is both
        for layout in (Layout(dim),) if alone else (Layout(dim), Layout(dim, outer=False)):
            each = [layout.spread(factor, len(size))[there] for factor in factors]
            pairs = zip(ratios, each, strict=True)
            if all(torch.allclose(ratio, factor, rtol=1e-3, atol=0) for ratio, factor in pairs):
                found.add(layout)
    return found


def is_scattered(sizes: Sequence[dict[int, Tensor]], factors: Sequence[Tensor]) -> bool:
    """Whether along some axis each slice has grown as the losses of one element have, in whatever order.

    The arguments are those of :func:`find_layouts`.
    """
    first, *scaled = sizes
    elements = _keys(factors)
    for dim, size in first.items():
        _, ratios = _growth(size, [other[dim] for other in scaled])
        powers = [torch.exp2(2 * _exponents(ratio)) for ratio in ratios]
        exact = all(torch.allclose(a, b, rtol=1e-3, atol=0) for a, b in zip(ratios, powers, strict=True))
        if exact and bool(torch.isin(_keys(ratios), elements).all()):
            return True
    return False


def _growth(size: Tensor, scaled: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return which slices have a gradient, and what the squares of those have grown by."""
    there = size > size.max() * 1e-24
    return there, [other[there] / size[there] for other in scaled]


def _exponents(growth: Tensor) -> Tensor:
    """Return the powers of two of the scaling by which squares have grown."""
    return (growth.log2() / 2).round()


def _keys(growths: Sequence[Tensor]) -> Tensor:
    """Return one number for the exponents of all scalings, each of which is below 32."""
    keys = torch.zeros_like(growths[0])
    for growth in growths:
        keys = 32 * keys + _exponents(growth)
    return keys


def prefer(layouts: set[Layout], shape: Sequence[int], batch: int, batch_dim: int) -> Layout:
    """Return the likeliest of several: the batch alone in an axis, in the output's axis, in an early one."""
    return min(layouts, key=lambda at: (shape[at.dim] != batch, at.dim != batch_dim, at.dim, not at.outer))
