"""The grouped additive coupling: inverse and rebuild in one evaluation of each block.

For groups X_1..X_C (Li et al. 2021, arXiv 2106.07476, equations 3 and 4)::

    X'_0 = X_2 + ... + X_C,    X'_i = X_i + f_i(X'_{i-1}),    i = 1..C

Evaluating f_i once more at X'_{i-1}, with autograd watching, gives back both X_i = X'_i - f_i(X'_{i-1}) and
everything that autograd had saved in f_i.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recollect.frames._chain import Parts, Slot, slot_of
from recollect.frames._describe import describe
from recollect.frames._drift import DriftGauge, DriftProbe
from recollect.frames._eager import Released, release
from recollect.frames._errors import InPlaceError
from recollect.frames._frame import Frame
from recollect.frames._keep import KeptArguments, devices_of, laid_out
from recollect.frames._modes import enclosing, frames_apply, local, save_nothing
from recollect.frames._modules import version_of
from recollect.frames._region import Region

__all__ = ["couple", "uncouple"]

Block = Callable[..., Tensor]


def couple(
    blocks: Sequence[Block],
    x: Tensor,
    args: Sequence[tuple[Any, ...]],
    *,
    dim: int = -1,
    gauge: DriftGauge | None = None,
    anchor_every: int | None = None,
    enabled: bool = True,
    seed: bool = True,
) -> Tensor:
    """Apply the coupling so that, with grad enabled, a chain of them keeps nothing but its last output.

    Args:
        blocks: f_1..f_C; each is called as ``f_i(z, *args[i])`` and returns a tensor of ``z``'s shape.
        x: a tensor whose size along ``dim`` is divisible by C.
        args: for each block its further arguments.
        dim: the dimension that is split into groups.
        gauge: where a chain's drift is recorded.
        anchor_every: keep the chain's every s-th activation.
        enabled: with ``False``, plain autograd: everything is kept.
        seed: replay random state in rebuilds.

    Returns:
        X'_1 || ... || X'_C, of the shape of ``x``.

    Raises:
        ValueError: the groups do not divide the size, or a block's output has another shape than its input.
        InPlaceError: a block changed its input in place.
    """
    if x.size(dim) % len(blocks):
        raise ValueError(
            f"a coupling of {len(blocks)} groups needs a size that they divide in dimension {dim} (got {list(x.shape)})"
        )
    groups = torch.chunk(x, len(blocks), dim)
    if not enabled or not frames_apply():
        return _forward(blocks, groups, args, dim)
    stage = _CouplingStage(dim, seed)
    y = _forward([functools.partial(stage.run, block) for block in blocks], groups, args, dim)
    if y.requires_grad:
        stage.close(x, groups, y, gauge, anchor_every)
        del groups  # views of x
        if local.eager:
            stage.released = release(x, describe(blocks[0]))
    return y


def uncouple(blocks: Sequence[Block], y: Tensor, args: Sequence[tuple[Any, ...]], *, dim: int = -1) -> Tensor:
    """Return x of ``y = couple(blocks, x, args)``: the exact algebraic inverse, through plain autograd."""
    groups = list(torch.chunk(y, len(blocks), dim))
    for i in reversed(range(len(blocks))):
        z = groups[i - 1] if i > 0 else _sum(groups[1:])
        groups[i] = groups[i] - blocks[i](z, *args[i])
    return torch.cat(groups, dim)


def _sum(groups: Sequence[Tensor]) -> Tensor:
    # A lone group is a strided view of the input; a copy is what a sum would be, and blocks run faster on it.
    return functools.reduce(torch.add, groups) if len(groups) > 1 else groups[0].clone()


def _forward(blocks: Sequence[Block], groups: Sequence[Tensor], args: Sequence[tuple[Any, ...]], dim: int) -> Tensor:
    z = _sum(groups[1:])
    outputs = []
    for block, group, extra in zip(blocks, groups, args, strict=True):
        version = version_of(z)
        output = block(z, *extra)
        if not isinstance(output, Tensor) or output.shape != z.shape:
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{_name(block)}: a block of a coupling must return a tensor of its input's shape "
                f"{list(z.shape)}, got {found}; give it as many output as input channels"
            )
        if version_of(z) != version:
            raise InPlaceError(
                f"{_name(block)}: the block changed its own input in place, which is also another group's output; "
                "use the out-of-place form of its first operation (ReLU(inplace=False), x = x + 1)"
            )
        z = group + output
        outputs.append(z)
    return torch.cat(outputs, dim)


def _name(block: Block) -> str:
    return describe(block.args[0] if isinstance(block, functools.partial) else block)


class _CouplingStage:
    """One coupling of a chain: a region for each block, over common groups. Serves as its frames' source."""

    __slots__ = (
        "__weakref__", "_args", "_dim", "_dtypes", "_groups", "_input", "_layouts", "_level", "_lock", "_output",
        "_probe", "_regions", "_scope", "_seed", "released",
    )  # fmt: skip

    def __init__(self, dim: int, seed: bool) -> None:
        self._dim = dim
        self._seed = seed
        self._scope = enclosing()
        self._lock = threading.RLock()
        self._regions: list[Region] = []
        self._args: list[KeptArguments] = []
        self._layouts: list[tuple[tuple[int, ...], torch.dtype, bool]] = []  # of blocks' inputs; requires_grad last
        self._dtypes: list[torch.dtype] = []
        self._input: weakref.ref[Slot] | None = None
        self._output: Slot | None = None
        self._probe: DriftProbe | None = None
        self.released: Released | None = None
        # In a rebuild: groups at and above the level are inputs X_i again, those below are still outputs X'_i.
        self._groups: list[Tensor] = []
        self._level = 0

    # Forward.

    def run(self, block: Block, z: Tensor, *args: Any) -> Tensor:
        """Run the next block under a frame."""
        region = Region(block, self._seed)
        frame = Frame(region, self, len(self._regions), self._lock)
        self._regions.append(region)
        self._args.append(KeptArguments(args))
        self._layouts.append((z.stride(), z.dtype, z.requires_grad))
        output: Tensor = frame.run((z, *args), devices_of((z, *args)))
        return output

    def close(
        self,
        x: Tensor,
        groups: Sequence[Tensor],
        y: Tensor,
        gauge: DriftGauge | None,
        anchor_every: int | None,
    ) -> None:
        """Take the stage's place in the chain, when all blocks have run."""
        self._dtypes = [group.dtype for group in groups]
        before = slot_of(x)
        position = before.position if before is not None else 0
        anchored = before is not None and anchor_every is not None and position % anchor_every == 0
        if before is not None:
            before.link(self, keep=anchored)
            self._input = weakref.ref(before)
        if gauge is not None and (before is None or anchored):
            self._probe = DriftProbe(groups, gauge)
        self._output = Slot(y, position + 1, self._regions[-1].function)

    # Backward: the source of the frames.

    def inputs(self, index: int) -> tuple[Any, ...]:
        """Return block ``index``'s arguments, inverting the blocks after it where that has not been done."""
        if self._groups and self._level <= index:  # its group was inverted already: begin again from the output
            self._groups = []
        self._load()
        while self._level > index + 1:
            self._invert_one()
        groups = self._groups
        strides, dtype, requires_grad = self._layouts[index]
        with torch.no_grad():
            z = groups[index - 1] if index > 0 else functools.reduce(torch.add, groups[1:])
        z = laid_out(z, strides, dtype)
        return (z.detach().requires_grad_(requires_grad), *self._args[index].get(self._regions[index].function))

    def evaluated(self, index: int, output: Tensor) -> None:
        """Subtract what the block gives, and pass the input on when it is complete."""
        with torch.no_grad():
            group = self._groups[index] - output.detach()
            self._groups[index] = group.to(self._dtypes[index])
        self._level = index
        if index == 0:
            groups, self._groups = self._groups, []
            if self._probe is not None:
                self._probe.measure(groups)
            if self.released is not None:
                self.released.restore(torch.cat(groups, self._dim))
            wanted = self._input() if self._input is not None else None
            if wanted is not None and wanted.maker is self:
                wanted.offer(Parts(groups, self._dim))

    def _load(self) -> None:
        if self._groups:
            return
        if self._output is None:
            raise RuntimeError("a coupling was asked for gradients before its forward pass ended")
        value = self._output.take()
        if isinstance(value, Parts) and value.dim == self._dim and len(value.tensors) == len(self._regions):
            self._groups = value.tensors
        else:
            whole = value.whole() if isinstance(value, Parts) else value
            self._groups = list(torch.chunk(whole, len(self._regions), self._dim))
        self._level = len(self._groups)

    def _invert_one(self) -> None:
        index = self._level - 1
        self.evaluated(index, self._regions[index].again(self.inputs(index), self._scope, save_nothing()))

    # Backward: the stage of the slots.

    def missing(self) -> list[Slot]:
        """See :class:`~recollect.frames._chain.Stage`."""
        return [self._output] if not self._groups and self._output is not None else []

    def invert(self) -> None:
        """See :class:`~recollect.frames._chain.Stage`."""
        with self._lock:
            self._load()
            while self._groups:
                self._invert_one()
