"""The grouped coupling: inverse and rebuild in one evaluation of each block.

For groups X_1..X_C (Li et al. 2021, arXiv 2106.07476, equations 3 and 4)::

    X'_0 = X_2 + ... + X_C,    X'_i = X_i + f_i(X'_{i-1}),    i = 1..C

Evaluating f_i once more at X'_{i-1}, with autograd watching, gives back both X_i = X'_i - f_i(X'_{i-1}) and
everything that autograd had saved in f_i. The same holds for X'_i = T(X_i, f_i(X'_{i-1})) with any T that can be solved
for its first argument, such as the affine one of RealNVP (Dinh et al. 2017, arXiv 1605.08803, equations 7 and 8).
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from recollect.frames._certificate import Certificate, Certify
from recollect.frames._chain import Parts, Slot, slot_of
from recollect.frames._describe import describe
from recollect.frames._drift import DriftGauge, DriftProbe
from recollect.frames._eager import Released, release, restore_after_backward
from recollect.frames._errors import RebuildError
from recollect.frames._frame import Frame
from recollect.frames._keep import KeptArguments, devices_of, laid_out, storage_of
from recollect.frames._modes import enclosing, frames_apply, local
from recollect.frames._region import Region
from recollect.frames._transform import Add, NewGroup, Transform, Transformed

__all__ = ["couple", "couple_by", "uncouple", "uncouple_by"]

Block = Callable[..., Any]
Layout = tuple[tuple[int, ...], torch.dtype, bool]  # strides, dtype, requires_grad
Extras = list[tuple[Tensor, ...]]


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
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    sizes: Sequence[int] | None = None,
    certify: Certify = True,
    certificate: Certificate | None = None,
) -> Tensor:
    """Apply the additive coupling so that, with grad enabled, a chain of them keeps nothing but its last output.

    Args:
        blocks: f_1..f_C; each is called as ``f_i(z, *args[i])`` and returns a tensor of ``z``'s shape.
        x: a tensor whose size along ``dim`` is divisible by C.
        args: for each block its further arguments.
        dim: the dimension that is split into groups.
        gauge: where a chain's drift is recorded.
        anchor_every: keep the chain's every s-th activation.
        enabled: with ``False``, plain autograd: everything is kept.
        seed: replay random state in rebuilds.
        kwargs: as in :func:`couple_by`.
        sizes: as in :func:`couple_by`.
        certify: as in :func:`couple_by`.
        certificate: as in :func:`couple_by`.

    Returns:
        X'_1 || ... || X'_C, of the shape of ``x``.

    Raises:
        ValueError: the groups do not divide the size, or a block's output has another shape than its input.
        InPlaceError: a block changed its input in place.
    """
    return couple_by(
        Add(),
        blocks,
        x,
        args,
        kwargs=kwargs,
        sizes=sizes,
        dim=dim,
        gauge=gauge,
        anchor_every=anchor_every,
        enabled=enabled,
        seed=seed,
        certify=certify,
        certificate=certificate,
    )[0]


def uncouple(
    blocks: Sequence[Block],
    y: Tensor,
    args: Sequence[tuple[Any, ...]],
    *,
    dim: int = -1,
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """Return x of ``y = couple(blocks, x, args)``: the exact algebraic inverse, through plain autograd."""
    return uncouple_by(Add(), blocks, y, args, dim=dim, kwargs=kwargs, sizes=sizes)[0]


def couple_by(
    transform: Transform,
    blocks: Sequence[Block],
    x: Tensor,
    args: Sequence[tuple[Any, ...]],
    *,
    dim: int = -1,
    flip: bool = False,
    gauge: DriftGauge | None = None,
    anchor_every: int | None = None,
    enabled: bool = True,
    seed: bool = True,
    keep: Iterable[Tensor] = (),
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    sizes: Sequence[int] | None = None,
    certify: Certify = True,
    certificate: Certificate | None = None,
) -> tuple[Tensor, Extras]:
    """Apply the coupling X'_i = T(X_i, f_i(X'_{i-1})); see :func:`couple`.

    Args:
        transform: T.
        blocks: as in :func:`couple`; their outputs are ``transform.factor`` times as large as their inputs.
        x: as in :func:`couple`.
        args: as in :func:`couple`.
        dim: as in :func:`couple`.
        flip: count the groups from the other end.
        gauge: as in :func:`couple`.
        anchor_every: as in :func:`couple`.
        enabled: as in :func:`couple`.
        seed: as in :func:`couple`.
        keep: tensors that :func:`~recollect.eager_release` leaves alone.
        kwargs: for each block its keyword arguments.
        sizes: of the groups along ``dim``, in their order; ``None``: equal ones. Two groups may differ in size: block i
            maps the other group's size to its own (times ``transform.factor``).
        certify: whether what is rebuilt is compared with the forward.
        certificate: where the figures of the comparison go.

    Returns:
        X'_1 || ... || X'_C, and for each group what else the transform returned.
    """
    sizes = _check_sizes(sizes, x, len(blocks), dim)
    blocks = _with_keywords(blocks, kwargs)
    groups = _split(x, sizes, dim, flip)
    regions = [Transformed(block, transform, dim, group.size(dim)) for block, group in zip(blocks, groups, strict=True)]
    if not enabled or not frames_apply():
        return _forward(regions, groups, args, dim, flip)
    stage = _CouplingStage(sizes, dim, flip, seed)
    y, extras = _forward([functools.partial(stage.run, region) for region in regions], groups, args, dim, flip)
    if y.requires_grad:
        stage.close(x, groups, y, gauge, anchor_every)
        del groups  # views of x
        if local.eager and storage_of(x) not in map(storage_of, keep):
            stage.released = release(x, describe(blocks[0]))
            restore_after_backward([y, *itertools.chain(*extras)], [stage.released], stage.invert)
    return y, extras


def uncouple_by(
    transform: Transform,
    blocks: Sequence[Block],
    y: Tensor,
    args: Sequence[tuple[Any, ...]],
    *,
    dim: int = -1,
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Extras]:
    """Return x of ``y, _ = couple_by(transform, blocks, x, args)``, and what else the inverse transform returned."""
    sizes = _check_sizes(sizes, y, len(blocks), dim)
    blocks = _with_keywords(blocks, kwargs)
    groups = _split(y, sizes, dim)
    extras: Extras = []
    for i in reversed(range(len(blocks))):
        z = groups[i - 1] if i > 0 else _sum(groups[1:])
        groups[i], *extra = transform.inverse(groups[i], blocks[i](z, *args[i]))
        extras.append(tuple(extra))
    return torch.cat(groups, dim), extras


def _check_sizes(sizes: Sequence[int] | None, x: Tensor, number: int, dim: int) -> list[int]:
    """Return the sizes of the groups in dimension ``dim`` of x."""
    whole = x.size(dim)
    if sizes is None:
        if whole % number:
            raise ValueError(
                f"a coupling of {number} groups needs a size that they divide in dimension {dim} (got "
                f"{list(x.shape)}); "
                "sizes=(...) allows two groups of different sizes"
            )
        return [whole // number] * number
    if len(sizes) != number or sum(sizes) != whole or min(sizes) < 1:
        raise ValueError(
            f"sizes={tuple(sizes)} must be {number} positive numbers, one for each block, whose sum is the size of x "
            f"in dimension {dim} (got shape {list(x.shape)})"
        )
    if number > 2 and len(set(sizes)) > 1:
        raise ValueError(
            f"sizes={tuple(sizes)}: the first block of a coupling gets the sum of all groups but the first, which "
            "groups of different sizes do not have; use two groups, or equal sizes"
        )
    return list(sizes)


def _with_keywords(blocks: Sequence[Block], kwargs: Sequence[Mapping[str, Any]] | None) -> list[Block]:
    if kwargs is None:
        return list(blocks)
    return [
        functools.partial(block, **keywords) if keywords else block
        for block, keywords in zip(blocks, kwargs, strict=True)
    ]


def _split(x: Tensor, sizes: Sequence[int], dim: int, flip: bool = False) -> list[Tensor]:
    groups = torch.split(x, list(sizes), dim)
    return list(reversed(groups) if flip else groups)


def _sizes_of(value: Parts) -> list[int]:
    return [tensor.size(value.dim) for tensor in value.tensors]


def _sum(groups: Sequence[Tensor]) -> Tensor:
    # A lone group is a strided view of the input; a copy is what a sum would be, and blocks run faster on it.
    return functools.reduce(torch.add, groups) if len(groups) > 1 else groups[0].clone()


def _forward(
    regions: Sequence[Callable[..., tuple[Tensor, ...]]],
    groups: Sequence[Tensor],
    args: Sequence[tuple[Any, ...]],
    dim: int,
    flip: bool,
) -> tuple[Tensor, Extras]:
    z = _sum(groups[1:])
    outputs: list[Tensor] = []
    extras: Extras = []
    for region, group, arguments in zip(regions, groups, args, strict=True):
        z, *extra = region(z, group, *arguments)
        outputs.append(z)
        extras.append(tuple(extra))
    return torch.cat(outputs[::-1] if flip else outputs, dim), extras


class _CouplingStage:
    """One coupling of a chain: a region for each block, over common groups. Serves as its frames' source."""

    __slots__ = (
        "__weakref__", "_args", "_dim", "_flip", "_groups", "_input", "_kinds", "_layouts", "_level", "_lock", "_new",
        "_output", "_probe", "_regions", "_scope", "_seed", "_sizes", "_transformed", "released",
    )  # fmt: skip

    def __init__(self, sizes: Sequence[int], dim: int, flip: bool, seed: bool) -> None:
        self._sizes = sizes
        self._dim = dim
        self._flip = flip
        self._seed = seed
        self._scope = enclosing()
        self._lock = threading.RLock()
        self._transformed: list[Transformed] = []
        self._regions: list[Region] = []  # of the transformed blocks
        self._args: list[KeptArguments] = []
        self._layouts: list[Layout] = []  # of the blocks' inputs
        self._kinds: list[tuple[torch.dtype, bool]] = []  # of the groups: dtype, requires_grad
        self._input: weakref.ref[Slot] | None = None
        self._output: Slot | None = None
        self._probe: DriftProbe | None = None
        self.released: Released | None = None
        # In a rebuild: groups at and above the level are inputs X_i again, those below are still outputs X'_i.
        self._groups: list[Tensor] = []
        self._level = 0
        self._new: NewGroup | None = None  # the group that the running rebuild solves for

    # Forward.

    def run(self, transformed: Transformed, z: Tensor, group: Tensor, *args: Any) -> Any:
        """Run the next block and its transform under a frame."""
        region = Region(transformed, self._seed)
        frame = Frame(region, self, len(self._regions), self._lock)
        self._transformed.append(transformed)
        self._regions.append(region)
        self._layouts.append((z.stride(), z.dtype, z.requires_grad))
        self._kinds.append((group.dtype, group.requires_grad))
        self._args.append(KeptArguments(args))
        return frame.run((z, group, *args), devices_of((z, *args)))

    def close(
        self,
        x: Tensor,
        groups: Sequence[Tensor],
        y: Tensor,
        gauge: DriftGauge | None,
        anchor_every: int | None,
    ) -> None:
        """Take the stage's place in the chain, when all blocks have run."""
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
        z = laid_out(z, strides, dtype).detach().requires_grad_(requires_grad)
        self._new = NewGroup(groups[index], *self._kinds[index])
        return (z, self._new, *self._args[index].get(self._regions[index].function))

    def evaluated(self, index: int, output: Any) -> None:
        """Take the old group that was found, and pass the input on when it is complete."""
        new, self._new = self._new, None
        if new is None or new.old is None:
            raise RebuildError(f"{self._regions[index].name}: the coupling was not solved for its input")
        self._groups[index] = new.old
        self._level = index
        if index == 0:
            groups, self._groups = self._groups, []
            if self._probe is not None:
                self._probe.measure(groups)
            groups = groups[::-1] if self._flip else groups
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
        if isinstance(value, Parts) and value.dim == self._dim and _sizes_of(value) == list(self._sizes):
            self._groups = value.tensors[::-1] if self._flip else value.tensors
        else:
            whole = value.whole() if isinstance(value, Parts) else value
            self._groups = _split(whole, self._sizes, self._dim, self._flip)
        self._level = len(self._groups)

    def _invert_one(self) -> None:
        index = self._level - 1
        inputs, invert = self.inputs(index), self._transformed[index].invert
        # What autograd saves is freed at once, with the graph; a block may take a gradient inside, which needs it.
        self.evaluated(index, self._regions[index].again(inputs, self._scope, nullcontext(), invert))

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
