"""Where a tensor has the losses of a backward pass, each with entries of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Axis", "Layout"]


class Axis(NamedTuple):
    """An axis of the losses in a tensor: entry i of its axis ``dim`` belongs to loss (i // inner) % size."""

    dim: int
    size: int
    inner: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor's entries belong to the losses of a backward pass, which are counted along all of these axes.

    Attributes:
        axes: the losses' axes, the first one outermost.
    """

    axes: tuple[Axis, ...]

    @property
    def batch(self) -> int:
        """The number of losses, B."""
        return math.prod(axis.size for axis in self.axes)

    def left(self, shape: Sequence[int]) -> list[int]:
        """Return the shape of what belongs to one loss."""
        left = list(shape)
        for axis in self.axes:
            left[axis.dim] //= axis.size
        return left

    def rows(self, tensor: Tensor) -> Tensor:
        """Return what belongs to each loss, [B, *shape], where the axes have become shorter by the losses'."""
        done: list[Axis] = []
        for axis in self.axes:
            dim = axis.dim + len(done)
            inside = [other for other in done if other.dim == axis.dim and other.inner < axis.inner]
            inner = axis.inner // math.prod(other.size for other in inside)
            if tensor.shape[dim] == axis.size:
                tensor = (tensor if dim == len(done) else tensor.movedim(dim, len(done))).unsqueeze(dim + 1)
            else:
                tensor = torch.unflatten(tensor, dim, (-1, axis.size, inner)).movedim(dim + 1, len(done))
                tensor = tensor.flatten(dim + 1, dim + 2)
            done.append(axis)
        return tensor.flatten(0, len(done) - 1) if len(done) > 1 else tensor

    def owners(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return which loss each entry belongs to: integers that broadcast to the shape."""
        owners = torch.zeros((), dtype=torch.long, device=device)
        for axis in self.axes:
            places = torch.arange(shape[axis.dim], device=device) // axis.inner % axis.size
            owners = owners * axis.size + places.view([-1 if d == axis.dim else 1 for d in range(len(shape))])
        return owners

    def mask(self, tensor: Tensor, row: int) -> Tensor:
        """Return the tensor with zeros in place of what belongs to all losses but one."""
        return torch.where(self.owners(tensor.shape, tensor.device) == row, tensor, 0)

    def masks(self, tensor: Tensor) -> Tensor:
        """Return the tensor once for each loss, with zeros in place of what belongs to others, [B, *shape]."""
        owners = self.owners(tensor.shape, tensor.device)
        each = torch.arange(self.batch, device=tensor.device).view(-1, *[1] * tensor.dim())
        return torch.where(owners == each, tensor, 0)
