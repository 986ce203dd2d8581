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
from recollect.autogram._square import of_device
from recollect.autogram.rules._view import bias_rows, needs, wide

__all__ = ["conv"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# How many bytes are unfolded at once: in a CPU's cache and some rows for each core, a launch's worth on a GPU.
_UNFOLDED = {"cpu": 2**22, "cuda": 2**26}
# How many elements a processor multiplies at once.
_VECTOR = 8


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
        call = _Call(layer, near, far)
        factors["weight"] = call.outer() if call.few_positions() else call.blocks()
    return factors


@dataclass(frozen=True, slots=True)
class _Call:
    """A convolution, or some of its channels, as it was called.

    Attributes:
        layer: the layer.
        near: of the input and the output's gradient, the one whose elements meet a whole kernel each,
            [m or 1, N, A, *], where A is the weight's first axis.
        far: the one that is seen through the kernel.
    """

    layer: Conv
    near: Tensor
    far: Tensor

    @property
    def num_rows(self) -> int:
        """The number of objectives, m."""
        return max(len(self.near), len(self.far))

    def few_positions(self) -> bool:
        """Whether products of positions take fewer operations than forming rows and multiplying these."""
        m, shape = self.num_rows, self.layer.weight.shape
        positions = self.near[0, :, 0].numel()
        products = m * m * positions**2 * (shape[0] + shape[1:].numel() * self.layer.groups)
        return products < (2 * m * positions + m * m) * shape.numel()

    def outer(self) -> Outer:
        """Return the Jacobian as that of the linear layer which it is after unfolding."""
        left, right = self._left(slice(0, len(self.near))), self._right(slice(0, len(self.far)))
        return Outer(left.permute(0, 3, 1, 2), right.permute(0, 3, 1, 2), self.layer.weight.shape)

    def blocks(self) -> Blocks:
        """Return the Jacobian as pieces that are formed when they are wanted: by channels of what the kernel sees."""
        shape = self.layer.weight.shape
        sources = self.near.numel() + self.far.numel()
        return Blocks(self.num_rows, shape, self._form, shape.numel(), axis=1, sources=sources)

    def _form(self, rows: slice, part: slice) -> Tensor:
        some = self._cut(part)
        groups, shape = self.layer.groups, self.layer.weight.shape
        n, kernel, positions = rows.stop - rows.start, shape[2:], self.near[0, :, 0].numel()
        height, width = shape[0] // groups, (part.stop - part.start) * kernel.numel()
        turned = width % _VECTOR > 0 and height % _VECTOR == 0  # rows of whole vectors take a third less time
        sides = (width, height) if turned else (height, width)
        formed = wide(self.far[:0]).new_empty(n, groups, *sides)
        bound = of_device(_UNFOLDED, self.far.device)
        step = max(1, bound // max(1, groups * width * positions * formed.itemsize))
        for start in range(0, n, step):
            out = formed[start : start + step]
            chosen = slice(rows.start + start, rows.start + start + len(out))
            left, right = (side.expand(len(out), -1, -1, -1) for side in (some._left(chosen), some._right(chosen)))
            first, second = (right, left) if turned else (left, right)
            torch.bmm(first.flatten(0, 1), second.flatten(0, 1).mT, out=out.flatten(0, 1))
        return (formed.mT if turned else formed).reshape(n, shape[0], part.stop - part.start, *kernel)

    def _cut(self, part: slice) -> _Call:
        """Return what has to do with these channels, of every group, of what the kernel sees."""
        far = self.far
        if part.stop - part.start < self.layer.weight.shape[1]:
            groups = far.view(*far.shape[:2], self.layer.groups, -1, *far.shape[3:])
            far = groups[:, :, :, part].flatten(2, 3)
        return replace(self, far=far)

    def _left(self, rows: slice) -> Tensor:
        """Return what stands at each position, [rows, G, A/G, positions]."""
        near, groups = wide(self.near if len(self.near) == 1 else self.near[rows]).transpose(1, 2), self.layer.groups
        return near.reshape(len(near), groups, near.shape[1] // groups, near[0, 0].numel())

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
        seen = far.shape[2] // layer.groups * layer.weight.shape[2:].numel()
        return windows.reshape(len(far), layer.groups, seen, self.near[0, :, 0].numel())


def _paddings(layer: Conv) -> list[int]:
    """Return what is padded before and after each spatial dimension, the last one first."""
    if isinstance(layer.padding, str):
        same = layer.padding == "same"
        whole = [step * (size - 1) * same for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in whole]
    else:
        sides = [(size, size) for size in layer.padding]
    return [size for side in reversed(sides) for size in side]
