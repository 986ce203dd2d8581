"""Convolutions and transposed convolutions in any number of dimensions.

A convolution is a linear layer at each output position, whose input is what the kernel sees there. What it sees holds
the input many times over, so it is unfolded for a few rows at a time, while their Jacobian is formed. Only where
positions are few and kernels large, it is held whole, and no row is formed at all. In a transposed convolution, the
input and the output's gradient change places.

Letters: m objectives, r rows of inputs (m, or 1 where all objectives share them), N elements of one call, C channels,
O output channels, G groups, K elements of a kernel, S and S' the spatial sizes of input and output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.autogram._factors import Blocks, Factor, Outer
from recollect.autogram.rules._view import bias_rows, needs, wide

__all__ = ["conv"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# How many bytes are unfolded at once: in the cache of a CPU's core, a launch's worth on a GPU.
_UNFOLDED = {"cpu": 2**20, "cuda": 2**26}


def conv(layer: Conv, inputs: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> dict[str, Factor]:
    """``torch.nn.Conv1d`` to ``ConvTranspose3d``.

    Args:
        layer: the layer.
        inputs: x [r, N, C, *S] or [r, C, *S]; of a transposed one, perhaps its ``output_size``.
        grads: g [m, N, O, *S'] or [m, O, *S'].
    """
    (grad,) = grads
    if grad is None:
        return {}
    spatial = len(layer.kernel_size)
    factors = bias_rows(layer, grad, -spatial - 1)
    if needs(layer, "weight"):
        x, grad = (t if t.ndim == spatial + 3 else t.unsqueeze(1) for t in (inputs[0], grad))
        near, far = (x, grad) if layer.transposed else (grad, x)
        call = _Call(layer, near, far, layer.groups)
        factors["weight"] = call.outer() if call.few_positions() else call.blocks()
    return factors


@dataclass(frozen=True, slots=True)
class _Call:
    """A convolution, or some of its groups and channels, as it was called.

    Attributes:
        layer: the layer.
        near: of the input and the output's gradient, the one whose elements meet a whole kernel each,
            [m or 1, N, A, *], where A is the weight's first axis.
        far: the one that is seen through the kernel.
        groups: how many.
    """

    layer: Conv
    near: Tensor
    far: Tensor
    groups: int

    @property
    def num_rows(self) -> int:
        """The number of objectives, m."""
        return max(len(self.near), len(self.far))

    @property
    def grain(self) -> int:
        """How many elements of the weight's first axis see the same channels; all of them where there is one group."""
        return self.layer.weight.shape[0] // self.layer.groups

    def few_positions(self) -> bool:
        """Whether products of positions take fewer operations than forming rows and multiplying these."""
        m, shape = self.num_rows, self.layer.weight.shape
        positions = self.near[0, :, 0].numel()
        products = m * m * positions**2 * (shape[0] + shape[1:].numel() * self.groups)
        return products < (2 * m * positions + m * m) * shape.numel()

    def outer(self) -> Outer:
        """Return the Jacobian as that of the linear layer which it is after unfolding."""
        left, right = self._left(slice(0, len(self.near))), self._right(slice(0, len(self.far)))
        return Outer(left.permute(0, 3, 1, 2), right.permute(0, 3, 1, 2), self.layer.weight.shape)

    def blocks(self) -> Blocks:
        """Return the Jacobian as pieces that are formed when they are wanted."""
        shape = self.layer.weight.shape
        grain = 1 if self.groups == 1 else self.grain
        return Blocks(self.num_rows, shape, self._form, shape.numel() + self._unfolded(), grain)

    def _unfolded(self) -> int:
        """Return how many elements one row has when it is unfolded."""
        return self.layer.weight.shape[1:].numel() * self.groups * self.near[0, :, 0].numel()

    def _form(self, rows: slice, part: slice) -> Tensor:
        some = self._cut(part)
        shape = self.layer.weight.shape[1:]
        size = (some.groups, (part.stop - part.start) // some.groups, shape.numel())
        formed = wide(self.far[:0]).new_empty(rows.stop - rows.start, *size)
        bound = _UNFOLDED["cpu" if self.far.device.type == "cpu" else "cuda"]
        step = max(1, bound // max(1, some._unfolded() * formed.itemsize))
        for start in range(0, len(formed), step):
            out = formed[start : start + step]
            chosen = slice(rows.start + start, rows.start + start + len(out))
            left, right = (side.expand(len(out), -1, -1, -1) for side in (some._left(chosen), some._right(chosen)))
            torch.bmm(left.flatten(0, 1), right.flatten(0, 1).mT, out=out.flatten(0, 1))
        return formed.view(len(formed), part.stop - part.start, *shape)

    def _cut(self, part: slice) -> _Call:
        """Return what this part of the weight's first axis, whole groups if there are several, has to do with."""
        if self.groups == 1:
            return replace(self, near=self.near[:, :, part])
        first, last = part.start // self.grain, part.stop // self.grain
        channels = self.far.shape[2] // self.groups
        far = self.far[:, :, first * channels : last * channels]
        return replace(self, near=self.near[:, :, part], far=far, groups=last - first)

    def _left(self, rows: slice) -> Tensor:
        """Return what stands at each position, [rows, G, A/G, positions]."""
        near = wide(self.near if len(self.near) == 1 else self.near[rows]).transpose(1, 2)
        return near.reshape(len(near), self.groups, near.shape[1] // self.groups, near[0, 0].numel())

    def _right(self, rows: slice) -> Tensor:
        """Return what the kernel sees at each position, [rows, G, channels of a group · K, positions]."""
        layer, spatial = self.layer, len(self.layer.kernel_size)
        far = wide(self.far if len(self.far) == 1 else self.far[rows])
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(far.flatten(0, 1), _paddings(layer), mode=mode)
        windows = padded.view(*far.shape[:2], *padded.shape[1:])
        for k, (size, stride, step) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
            windows = windows.unfold(3 + k, step * (size - 1) + 1, stride)[..., ::step]
            windows = windows.narrow(3 + k, 0, self.near.shape[3 + k])  # an output may go on behind what is reached
        positions, kernel = range(3, 3 + spatial), range(3 + spatial, 3 + 2 * spatial)
        windows = windows.permute(0, 2, *kernel, 1, *positions)
        return windows.reshape(len(far), self.groups, layer.weight.shape[1:].numel(), self.near[0, :, 0].numel())


def _paddings(layer: Conv) -> list[int]:
    """Return what is padded before and after each spatial dimension, the last one first."""
    if isinstance(layer.padding, str):
        same = layer.padding == "same"
        whole = [step * (size - 1) * same for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in whole]
    else:
        sides = [(size, size) for size in layer.padding]
    return [size for side in reversed(sides) for size in side]
