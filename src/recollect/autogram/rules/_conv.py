"""Convolutions and transposed convolutions in any number of dimensions.

A convolution is a linear layer at each of its T output positions, whose input is what the kernel sees there: the rule
could be the linear layer's after unfolding. That holds an input many times over, so it is done only where positions
are few and kernels large. Elsewhere rows are formed a few at a time, by the convolution's own weight gradient.
In a transposed convolution, the input and the output's gradient change places.

Letters: m objectives, r rows of inputs (m, or 1 where all objectives share them), N elements of one call, C channels,
O output channels, G groups, K elements of a kernel, S and S' the spatial sizes of input and output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.autogram._factors import Blocks, Factor, Outer
from recollect.autogram.rules._view import bias_rows, needs, wide

__all__ = ["conv"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


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
        call = _Call(layer, *_padded(layer, x), grad)
        factors["weight"] = call.outer() if call.few_positions() else call.blocks()
    return factors


def _padded(layer: Conv, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return x [r, N, C, *S] padded with all that equal zeros on both sides are not, and how many such zeros remain."""
    if isinstance(layer.padding, str):
        same = layer.padding == "same"
        whole = [step * (size - 1) * same for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in whole]
    else:
        sides = [(size, size) for size in layer.padding]
    if layer.padding_mode == "zeros" and all(before == after for before, after in sides):
        return x, tuple(before for before, _ in sides)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    flat = F.pad(x.flatten(0, 1), [size for side in reversed(sides) for size in side], mode=mode)
    return flat.view(*x.shape[:2], *flat.shape[1:]), (0,) * len(sides)


@dataclass(frozen=True, slots=True)
class _Call:
    """A convolution as it was called.

    Attributes:
        layer: the layer.
        x: [r, N, C, *S], padded as far as zeros on both sides alike do not do it.
        grad: [m, N, O, *S'].
        padding: the zeros that are still to be added on both sides of each spatial dimension.
    """

    layer: Conv
    x: Tensor
    padding: tuple[int, ...]
    grad: Tensor

    @property
    def near(self) -> Tensor:
        """Of the two, the one whose elements each meet a whole kernel."""
        return self.x if self.layer.transposed else self.grad

    @property
    def far(self) -> Tensor:
        """Of the two, the one that is seen through the kernel."""
        return self.grad if self.layer.transposed else self.x

    def few_positions(self) -> bool:
        """Whether products of positions take fewer operations than forming rows and multiplying these."""
        m, shape, groups = len(self.grad), self.layer.weight.shape, self.layer.groups
        positions, weights = self.near[0, :, 0].numel(), shape.numel()
        products = m * m * positions**2 * (shape[0] + shape[1:].numel() * groups)
        return products < (2 * m * positions + m * m) * weights

    def outer(self) -> Outer:
        """Return the Jacobian as that of the linear layer which it is after unfolding."""
        spatial, groups = len(self.padding), self.layer.groups
        left = wide(self.near).movedim(2, -1)
        left = left.reshape(len(left), -1, groups, left.shape[-1] // groups)
        windows = F.pad(wide(self.far), [size for size in reversed(self.padding) for _ in range(2)])
        steps = zip(self.layer.kernel_size, self.layer.stride, self.layer.dilation, strict=True)
        for dim, (size, stride, step) in enumerate(steps, 3):
            windows = windows.unfold(dim, step * (size - 1) + 1, stride)[..., ::step]
            windows = windows.narrow(dim, 0, self.near.shape[dim])  # an output may have more at its end than is reached
        windows = windows.movedim(2, 2 + spatial)  # [r, N, *S', C, *K]
        right = windows.reshape(len(windows), left.shape[1], groups, self.layer.weight.shape[1:].numel())
        return Outer(left, right, self.layer.weight.shape)

    def blocks(self) -> Blocks:
        """Return the Jacobian as rows that are formed when they are wanted."""
        shape = self.layer.weight.shape
        row = shape.numel() + self.x[0].numel() + self.grad[0].numel()
        return Blocks(len(self.grad), shape, self._form, row, self._grain)

    @property
    def _grain(self) -> int:
        """Of how many of the weight's first axis the second side needs the same channels."""
        return 1 if self.layer.groups == 1 else self.layer.weight.shape[0] // self.layer.groups

    def _form(self, rows: slice, part: slice) -> Tensor:
        near, far = (wide(side if len(side) == 1 else side[rows]) for side in (self.near, self.far))
        groups = self.layer.groups
        if groups > 1:
            each = far.shape[2] // groups
            far = far[:, :, part.start // self._grain * each : part.stop // self._grain * each]
            groups = (part.stop - part.start) // self._grain
        near = near[:, :, part]
        if near.shape[1] == 1 and len(near) == len(far):  # one element in each row: rows are groups of one convolution
            near, far = (side.flatten(0, 2).unsqueeze(0) for side in (near, far))
            return self._gradient(near, far, rows.stop - rows.start, groups)
        each = (
            self._gradient(near[i % len(near)], far[i % len(far)], 1, groups) for i in range(max(len(near), len(far)))
        )
        return torch.cat(list(each))

    def _gradient(self, near: Tensor, far: Tensor, copies: int, groups: int) -> Tensor:
        """Return the weights' gradients of ``copies`` convolutions side by side, [copies, *weight.shape]."""
        layer, shape = self.layer, self.layer.weight.shape[1:]
        grad, x = (far, near) if layer.transposed else (near, far)
        weight = x.new_empty(1).expand(near.shape[1], *shape)  # only its shape is looked at
        extra = [self._beyond(dim) if layer.transposed else 0 for dim in range(len(self.padding))]
        settings = (layer.stride, self.padding, layer.dilation, layer.transposed, extra, copies * groups)
        found: Tensor = torch.ops.aten.convolution_backward(grad, x, weight, None, *settings, [False, True, False])[1]
        return found.reshape(copies, -1, *shape)

    def _beyond(self, dim: int) -> int:
        """Return how much longer a transposed convolution's output is than its input makes necessary."""
        layer = self.layer
        reach = layer.dilation[dim] * (layer.kernel_size[dim] - 1) + 1
        least = (self.x.shape[3 + dim] - 1) * layer.stride[dim] - 2 * self.padding[dim] + reach
        return self.grad.shape[3 + dim] - least
