"""Where a tensor has the batch: found from which of its elements have a gradient when only some losses have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout", "find_layouts", "has_batch_size", "prefer"]


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

    def mask(self, tensor: Tensor, batch: int, row: int) -> Tensor:
        """Return the tensor with zeros in place of all elements of the batch but one."""
        masked = torch.zeros_like(tensor)
        self.rows(masked, batch)[row].copy_(self.rows(tensor, batch)[row])
        return masked


def has_batch_size(shape: Sequence[int], batch: int) -> bool:
    """Whether a tensor of this shape could have the batch in it."""
    return any(n % batch == 0 and n > 0 for n in shape)


def find_layouts(grad: Tensor, batch: int, chosen: Tensor) -> set[Layout] | None:
    """Return all layouts by which no element but the chosen ones has a gradient; None: any, for there is no gradient.

    Args:
        grad: the gradient of losses of the chosen elements only.
        batch: B.
        chosen: [B], boolean.
    """
    size = grad.abs()
    largest = size.max() if size.numel() else size.sum()
    if not bool(largest > 0) or not bool(torch.isfinite(largest)):
        return None
    there = size > torch.finfo(grad.dtype).eps * largest
    found = set()
    for dim, n in enumerate(grad.shape):
        if n % batch:
            continue
        entries = there.movedim(dim, 0).flatten(1).any(1) if there.dim() > 1 else there
        if not bool((entries.view(batch, -1).any(1) & ~chosen).any()):
            found.add(Layout(dim))
        if n > batch and not bool((entries.view(-1, batch).any(0) & ~chosen).any()):
            found.add(Layout(dim, outer=False))
    return found


def prefer(layouts: set[Layout], shape: Sequence[int], batch: int, batch_dim: int) -> Layout:
    """Return the likeliest of several: the batch alone in an axis, in the output's axis, in an early one."""
    return min(layouts, key=lambda at: (shape[at.dim] != batch, at.dim != batch_dim, at.dim, not at.outer))
