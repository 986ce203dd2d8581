"""Convolutions and transposed convolutions in any number of dimensions.

A convolution is a linear layer at each output position, whose input is what the kernel sees there. What it sees holds
the input many times over, so it is unfolded for a few rows at a time, while their Jacobian is formed. Only where
positions are few and kernels large, it is held whole, and no row is formed at all. On a CPU, torch's own gradient of a
convolution with a group of channels for each row needs no unfolding, and is faster where it has whole vectors to work
on. In a transposed convolution, the input and the output's gradient change places.

Letters: m objectives, r rows of inputs (m, or 1 where all objectives share them), N elements of one call, C channels,
O output channels, G groups, K elements of a kernel, S and S' the spatial sizes of input and output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect._devices import forms_of
from recollect.autogram._factors import Blocks, Factor, Outer
from recollect.autogram._products import batched_product, is_at_full_speed
from recollect.autogram._square import padded_rows
from recollect.autogram.rules._view import bias_rows, needs, wide

__all__ = ["conv"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# How many elements a processor multiplies at once.
_VECTOR = 8
# How many positions a convolution has at least that is not unfolded. (Measured on an AMD EPYC, 3 x 3 kernels, 32 rows:
# at 256 positions 2 to 3 times as fast as unfolding, in three dimensions 4 times, at 64 positions 1.4 to 1.8 times, at
# 16 a third slower; with channels that are no whole vectors up to twice as slow, with 1 x 1 kernels as fast.)
_POSITIONS = 64
# The same where other products are at full speed. (Measured on an Intel Xeon, 32 to 256 rows: at 1,024 positions 1.7
# times as fast as unfolding, at 256 and 400 positions up to 1.5 times, at 144 as fast, at 64 half as fast.)
_POSITIONS_AT_FULL_SPEED = 144


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
        some, shape = self._cut(part), self.layer.weight.shape
        sizes = (shape[0], part.stop - part.start, *shape[2:])
        if some._is_fast_by_groups(sizes) and some._is_reached():
            return some._form_by_groups(rows, sizes)
        return some._form_unfolded(rows, sizes)

    def _is_fast_by_groups(self, sizes: tuple[int, ...]) -> bool:
        """Whether torch's own gradient, with a group for each row, is fast for weights of these sizes."""
        near, has_fast = self.near, torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if not (has_fast and forms_of(near.device).onednn) or wide(near[:0]).dtype != torch.float32:
            return False
        height, width = sizes[0] // self.layer.groups, sizes[1]
        whole, single = height % _VECTOR == 0 and width % _VECTOR == 0, height == width == 1
        least = _POSITIONS_AT_FULL_SPEED if is_at_full_speed() and not single else _POSITIONS
        return (whole or single) and math.prod(sizes[2:]) > 1 and math.prod(near.shape[3:]) >= least

    def _is_reached(self) -> bool:
        """Whether each place where the kernel fits is a position: an output may go on behind what is reached."""
        layer, spatial = self.layer, self.far.shape[3:]
        spans = [step * (size - 1) + 1 for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        room = [size + sum(sides) - span for size, sides, span in zip(spatial, _sides(layer), spans, strict=True)]
        places = [size // stride + 1 for size, stride in zip(room, layer.stride, strict=True)]
        return self.near.shape[1] > 0 and places == list(self.near.shape[3:])

    def _form_by_groups(self, rows: slice, sizes: tuple[int, ...]) -> Tensor:
        layer, n = self.layer, rows.stop - rows.start
        sides, mode = _sides(layer), layer.padding_mode
        plain = mode == "zeros" and all(before == after for before, after in sides)
        padding = [before if plain else 0 for before, _ in sides]
        form = torch.ops.aten.convolution_backward
        formed = self._memory(n, (1, *sizes)).squeeze(1)
        step = max(1, forms_of(self.far.device).grouped_bytes // max(1, formed[:1].nbytes))
        for start in range(0, n, step):
            out = formed[start : start + step]
            chosen = slice(rows.start + start, rows.start + start + len(out))
            near, far = (
                wide(side if len(side) == 1 else side[chosen]).expand(len(out), *side.shape[1:])
                for side in (self.near, self.far)
            )
            near, far = (side.transpose(0, 1).flatten(1, 2) for side in (near, far))  # [N, rows · channels, *]
            far = far if plain else F.pad(far, _paddings(layer), mode="constant" if mode == "zeros" else mode)
            weight = out.new_empty(len(out) * sizes[0], *sizes[1:])  # for its form: nobody reads it
            how = (layer.stride, padding, layer.dilation, False, [0] * len(padding), len(out) * layer.groups)
            out.copy_(form(near, far, weight, None, *how, [False, True, False])[1].view_as(out))
        return formed

    def _form_unfolded(self, rows: slice, sizes: tuple[int, ...]) -> Tensor:
        groups = self.layer.groups
        n, positions = rows.stop - rows.start, self.near[0, :, 0].numel()
        height, width = sizes[0] // groups, math.prod(sizes[1:])
        turned = width % _VECTOR > 0 and height % _VECTOR == 0  # rows of whole vectors take a third less time
        formed = self._memory(n, (groups, *((width, height) if turned else (height, width))))
        bound = forms_of(self.far.device).unfolded_bytes
        step = max(1, bound // max(1, groups * width * positions * formed.itemsize))
        for start in range(0, n, step):
            out = formed[start : start + step]
            chosen = slice(rows.start + start, rows.start + start + len(out))
            left, right = (side.expand(len(out), -1, -1, -1) for side in (self._left(chosen), self._seen(chosen)))
            first, second = (right.mT, left) if turned else (left, right.mT)
            batched_product(first.flatten(0, 1), second.flatten(0, 1), out.flatten(0, 1))
        laid = torch.unflatten(formed.mT if turned else formed, 3, (*sizes[2:], sizes[1]))  # [n, G, A/G, *kernel, C/G]
        return laid.movedim(-1, 3).flatten(1, 2)

    def _memory(self, n: int, sizes: tuple[int, ...]) -> Tensor:
        """Return [n, *sizes], to be written, the first size of which is one if rows are to lie well."""
        dtype, device = wide(self.far[:0]).dtype, self.far.device
        if sizes[0] > 1:
            return torch.empty(n, *sizes, dtype=dtype, device=device)
        return torch.unflatten(padded_rows(n, math.prod(sizes), dtype, device), 1, sizes)

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
        far, spatial = self._padded(rows), range(3, 3 + len(self.layer.kernel_size))
        windows = self._windows(far)  # [rows, N, C, *positions, *kernel]
        kernel = range(spatial.stop, windows.dim())
        laid = windows.permute(0, 2, *kernel, 1, *spatial)
        seen = far.shape[2] // self.layer.groups * self.layer.weight.shape[2:].numel()
        return laid.reshape(len(far), self.layer.groups, seen, self.near[0, :, 0].numel())

    def _seen(self, rows: slice) -> Tensor:
        """Return the same as [rows, G, positions, K · channels of a group], in memory as it is copied fastest.

        What the kernel sees in a line is in one piece if channels come last, and a line of positions is if they do.
        """
        far, spatial = self._padded(rows), len(self.layer.kernel_size)
        by_group = torch.unflatten(far, 2, (self.layer.groups, -1)).movedim(3, -1)  # [rows, N, G, *, C/G]
        channels_last = self.layer.kernel_size[-1] * by_group.shape[-1] >= self.near.shape[-1]
        windows = self._windows(by_group.contiguous() if channels_last else by_group)
        positions, channels, kernel = range(3, 3 + spatial), 3 + spatial, range(4 + spatial, 4 + 2 * spatial)
        held, seen = self.near[0, :, 0].numel(), by_group.shape[-1] * self.layer.weight.shape[2:].numel()
        sizes = len(far), self.layer.groups
        if channels_last:
            return windows.permute(0, 2, 1, *positions, *kernel, channels).reshape(*sizes, held, seen)
        return windows.permute(0, 2, *kernel, channels, 1, *positions).reshape(*sizes, seen, held).mT

    def _padded(self, rows: slice) -> Tensor:
        """Return what is seen through the kernel, as the layer pads it."""
        far = wide(self.far if len(self.far) == 1 else self.far[rows])
        mode = "constant" if self.layer.padding_mode == "zeros" else self.layer.padding_mode
        return torch.unflatten(F.pad(far.flatten(0, 1), _paddings(self.layer), mode=mode), 0, far.shape[:2])

    def _windows(self, far: Tensor) -> Tensor:
        """Return what the kernel sees of the dimensions from the fourth on: its own come last."""
        layer, windows = self.layer, far
        for k, (size, stride, step) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
            windows = windows.unfold(3 + k, step * (size - 1) + 1, stride)[..., ::step]
            windows = windows.narrow(3 + k, 0, self.near.shape[3 + k])  # an output may go on behind what is reached
        return windows


def _sides(layer: Conv) -> list[tuple[int, int]]:
    """Return what is padded before and after each spatial dimension."""
    if isinstance(layer.padding, str):
        same = layer.padding == "same"
        whole = [step * (size - 1) * same for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in whole]
    return [(size, size) for size in layer.padding]


def _paddings(layer: Conv) -> list[int]:
    """Return what is padded before and after each spatial dimension, the last one first."""
    return [size for side in reversed(_sides(layer)) for size in side]
