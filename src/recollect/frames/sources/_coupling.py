"""The grouped coupling: inverse and rebuild in one evaluation of each block.

For groups X_1..X_C (Li et al. 2021, arXiv 2106.07476, equations 3 and 4)::

    X'_0 = X_2 + ... + X_C,    X'_i = X_i + f_i(X'_{i-1}),    i = 1..C

Evaluating f_i once more at X'_{i-1}, with autograd watching, gives back both X_i = X'_i - f_i(X'_{i-1}) and
everything that autograd had saved in f_i. The same holds for X'_i = T(X_i, f_i(X'_{i-1})) with any T that can be solved
for its first argument, such as the affine one of RealNVP (Dinh et al. 2017, arXiv 1605.08803, equations 7 and 8).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from recollect._arguments import Certify, check_certify
from recollect._torch import is_recorded
from recollect.frames._certificate import (
    Certificate,
    certificate_of_process,
    check_block,
    is_gross,
    judge,
    tolerance_of,
)
from recollect.frames._chain import Parts, Slot, Stage, slot_of, whole
from recollect.frames._drift import DriftGauge
from recollect.frames._errors import RebuildError, naming
from recollect.frames._fingerprint import Fingerprint, difference, fingerprint, is_late
from recollect.frames._frame import Frame
from recollect.frames._lattice import Lattice
from recollect.frames._modes import aside, frames_apply, local
from recollect.frames._region import Region
from recollect.frames._transform import Add, NewGroup, Transform, Transformed
from recollect.frames.sources._inverse import amplified, moved
from recollect.frames.sources._kept import Kept, Layout, storage_of, unchanged
from recollect.frames.sources._source import Arguments, Held, Source

__all__ = ["couple", "couple_by", "uncouple", "uncouple_by"]

Block = Callable[..., Any]
Extras = list[tuple[Tensor, ...]]
Keywords = Sequence[Mapping[str, Any]] | None
Sources = Sequence[Source | None] | None

_KEPT = Kept()


def couple(
    blocks: Sequence[Block],
    x: Tensor,
    args: Sequence[tuple[Any, ...]],
    *,
    kwargs: Keywords = None,
    sizes: Sequence[int] | None = None,
    dim: int = -1,
    gauge: DriftGauge | None = None,
    anchor_every: int | None = None,
    enabled: bool = True,
    seed: bool = True,
    certify: Certify = True,
    certificate: Certificate | None = None,
    exact: int | None = None,
    sources: Sources = None,
) -> Tensor:
    """Apply the additive coupling so that, with grad enabled, a chain of them keeps nothing but its last output.

    Args:
        blocks: f_1..f_C; each is called as ``f_i(z, *args[i], **kwargs[i])`` and returns a tensor of ``z``'s shape.
        x: a tensor whose size along ``dim`` is divisible by C.
        args: for each block its further arguments.
        kwargs: for each block its keyword arguments; ``None``: none.
        sizes: of the groups along ``dim``, which sum up to its size; ``None``: equal ones. Two groups may differ: f_1
            then maps the second group's size to the first's, and f_2 the first's to the second's.
        dim: the dimension that is split into groups.
        gauge: where a chain's drift is recorded.
        anchor_every: keep the chain's every s-th activation.
        enabled: with ``False``, plain autograd: everything is kept.
        seed: replay random state in rebuilds.
        certify: what is accepted of a rebuild; see :func:`~recollect.checkpoint`.
        certificate: where it is counted.
        exact: k, for a stream on the multiples of 2^-k, which comes back bit for bit; ``None``: a stream that rounds.
        sources: for each block, what brings its further arguments (``args[i]`` and ``kwargs[i]``) back in backward;
            ``None``: they are kept.

    Returns:
        X'_1 || ... || X'_C, of the shape of ``x``; in float32 where autocast is on and ``x`` in half precision.

    Raises:
        ValueError: the groups do not divide the size, or a block's output has another shape than it must.
        InPlaceError: a block changed its input in place.

    Example:
        >>> import torch
        >>> from recollect.frames import couple, uncouple
        >>> blocks = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
        >>> x = torch.randn(5, 4, requires_grad=True)
        >>> y = couple(blocks, x, [(), ()])
        >>> first = x[:, :2] + blocks[0](x[:, 2:])
        >>> torch.equal(y, torch.cat([first, x[:, 2:] + blocks[1](first)], dim=1))
        True
    """
    return couple_by(
        Add() if exact is None else Lattice(exact),
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
        sources=sources,
    )[0]


def uncouple(
    blocks: Sequence[Block],
    y: Tensor,
    args: Sequence[tuple[Any, ...]],
    *,
    kwargs: Keywords = None,
    sizes: Sequence[int] | None = None,
    dim: int = -1,
    exact: int | None = None,
) -> Tensor:
    """Return x of ``y = couple(blocks, x, args)``: the exact algebraic inverse, through plain autograd.

    Args:
        blocks: as in :func:`couple`, and all that follow.
        y: of the shape of x.
        args: for each block its further arguments.
        kwargs: for each block its keyword arguments.
        sizes: of the groups.
        dim: that the groups lie in.
        exact: k of the stream.

    Returns:
        x, of the shape of ``y``; up to rounding, and bit for bit with ``exact``.

    Raises:
        ValueError: the groups do not divide the size.

    Example:
        >>> import torch
        >>> from recollect.frames import couple, uncouple
        >>> blocks, x = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], torch.randn(5, 4)
        >>> y = couple(blocks, x, [(), ()])
        >>> torch.allclose(uncouple(blocks, y, [(), ()]), x, atol=1e-6)
        True
    """
    transform = Add() if exact is None else Lattice(exact)
    return uncouple_by(transform, blocks, y, args, kwargs=kwargs, sizes=sizes, dim=dim)[0]


def couple_by(
    transform: Transform | Sequence[Transform],
    blocks: Sequence[Block],
    x: Tensor,
    args: Sequence[tuple[Any, ...]],
    *,
    kwargs: Keywords = None,
    sizes: Sequence[int] | None = None,
    dim: int = -1,
    flip: bool = False,
    gauge: DriftGauge | None = None,
    anchor_every: int | None = None,
    enabled: bool = True,
    seed: bool = True,
    keep: Iterable[Tensor] = (),
    certify: Certify = True,
    certificate: Certificate | None = None,
    sources: Sources = None,
) -> tuple[Tensor, Extras]:
    """Apply the coupling X'_i = T(X_i, f_i(X'_{i-1})); see :func:`couple`.

    Args:
        transform: T; or one for each block.
        blocks: as in :func:`couple`; their outputs are ``transform.factor`` times as large as the group they change.
        x: as in :func:`couple`.
        args: as in :func:`couple`.
        kwargs: as in :func:`couple`.
        sizes: as in :func:`couple`.
        dim: as in :func:`couple`.
        flip: count the groups from the other end.
        gauge: as in :func:`couple`.
        anchor_every: as in :func:`couple`.
        enabled: as in :func:`couple`.
        seed: as in :func:`couple`.
        keep: tensors that :func:`~recollect.eager_release` leaves alone.
        certify: as in :func:`couple`.
        certificate: as in :func:`couple`.
        sources: as in :func:`couple`.

    Returns:
        X'_1 || ... || X'_C, and for each group what else the transform returned.

    Example:
        >>> import torch
        >>> from recollect.frames import Add, couple, couple_by
        >>> blocks, x = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], torch.randn(5, 4)
        >>> y, extras = couple_by(Add(), blocks, x, [(), ()])
        >>> torch.equal(y, couple(blocks, x, [(), ()])), extras
        (True, [(), ()])
    """
    check_certify(certify)
    if x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(x.device.type):
        x = x.float()  # the blocks compute in half precision, and the stream keeps what they add
    sizes = _sizes(x, len(blocks), dim, sizes)
    transforms = _each(transform, len(blocks))
    lattice = _lattice_of(transforms)
    if lattice is not None:
        x = lattice.enter(x)
        certify = certify and "exact"
    groups = _split(x, sizes, dim, flip)
    regions = [Transformed(block, own, dim) for block, own in zip(blocks, transforms, strict=True)]
    keywords = [{} for _ in blocks] if kwargs is None else kwargs
    if not enabled or not frames_apply():
        y, extras = _forward(regions, groups, args, keywords, dim, flip)
        if lattice is not None:
            _check_range(lattice, regions, x, y, _split(y, sizes, dim, flip))
        return y, extras
    stage = _CouplingStage(dim, flip, sizes, seed, certify, certificate or certificate_of_process)
    given = [None] * len(regions) if sources is None else sources
    runs = [functools.partial(stage.run, region, source) for region, source in zip(regions, given, strict=True)]
    y, extras = _forward(runs, groups, args, keywords, dim, flip)
    if lattice is not None:
        _check_range(lattice, regions, x, y, _split(y, sizes, dim, flip))
    if y.requires_grad:
        stage.close(x, groups, y, gauge, anchor_every, None if lattice is None else lattice.digits)
        del groups  # views of x
        if local.policy is not None and storage_of(x) not in map(storage_of, keep):
            outputs = [y, *(tensor for extra in extras for tensor in extra)]
            local.policy.closed(stage, [x], outputs, regions[0].name)
    return y, extras


def uncouple_by(
    transform: Transform | Sequence[Transform],
    blocks: Sequence[Block],
    y: Tensor,
    args: Sequence[tuple[Any, ...]],
    *,
    kwargs: Keywords = None,
    sizes: Sequence[int] | None = None,
    dim: int = -1,
) -> tuple[Tensor, Extras]:
    """Return x of ``y, _ = couple_by(transform, blocks, x, args)``, and what else the inverse transform returned.

    Args:
        transform: T, or one for each block.
        blocks: as in :func:`couple_by`, and all that follow.
        y: of the shape of x.
        args: for each block its further arguments.
        kwargs: for each block its keyword arguments.
        sizes: of the groups.
        dim: that the groups lie in.

    Raises:
        ValueError: the groups do not divide the size.

    Example:
        >>> import torch
        >>> from recollect.frames import Lattice, couple_by, uncouple_by
        >>> blocks, x = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)], torch.randn(5, 4)
        >>> x = (x * 2**16).round() / 2**16
        >>> y, _ = couple_by(Lattice(16), blocks, x, [(), ()])
        >>> torch.equal(uncouple_by(Lattice(16), blocks, y, [(), ()])[0], x)  # bit for bit
        True
    """
    transforms = _each(transform, len(blocks))
    lattice = _lattice_of(transforms)
    if lattice is not None:
        y = lattice.enter(y)
    groups = _split(y, _sizes(y, len(blocks), dim, sizes), dim)
    keywords = [{} for _ in blocks] if kwargs is None else kwargs
    extras: Extras = []
    for i in reversed(range(len(blocks))):
        z = groups[i - 1] if i > 0 else _sum(groups[1:])
        groups[i], *extra = transforms[i].inverse(groups[i], blocks[i](z, *args[i], **keywords[i]))
        extras.append(tuple(extra))
    x = torch.cat(groups, dim)
    if lattice is not None:
        lattice.check(x, groups, blocks, "the inverse of {}")
    return x, extras


def _each(transform: Transform | Sequence[Transform], number: int) -> list[Transform]:
    return list(transform) if isinstance(transform, Sequence) else [transform] * number


def _lattice_of(transforms: Sequence[Transform]) -> Lattice | None:
    return next((transform for transform in transforms if isinstance(transform, Lattice)), None)


def _check_range(
    lattice: Lattice, regions: Sequence[Transformed], x: Tensor, y: Tensor, groups: Sequence[Tensor]
) -> None:
    before = None if is_recorded() else slot_of(x)
    form = "{}" if before is None else f"{{}}, after {before.position} couplings"
    lattice.check(y, groups, [region.owner for region in regions], form)


def _sizes(x: Tensor, number: int, dim: int, sizes: Sequence[int] | None) -> list[int]:
    """Return the groups' sizes, or raise a ValueError."""
    size = x.size(dim)
    if sizes is None:
        if size % number:
            raise ValueError(
                f"a coupling of {number} groups needs a size that they divide in dimension {dim} (got "
                f"{list(x.shape)}); sizes=(...) makes two groups of different sizes"
            )
        return [size // number] * number
    sizes = list(sizes)
    if len(sizes) != number or sum(sizes) != size or min(sizes) < 1:
        raise ValueError(
            f"sizes={tuple(sizes)} must be {number} positive numbers, one for each block, whose sum is the size of x "
            f"in dimension {dim} (got {list(x.shape)})"
        )
    if number > 2 and len(set(sizes)) > 1:
        raise ValueError(
            f"sizes={tuple(sizes)}: more than two groups must be of one size, because the first block's input is the "
            "sum of all other groups; use two groups, or equal ones"
        )
    return sizes


def _split(x: Tensor, sizes: Sequence[int], dim: int, flip: bool = False) -> list[Tensor]:
    equal = len(set(sizes)) == 1
    groups = list(torch.chunk(x, len(sizes), dim) if equal else torch.split(x, list(sizes), dim))
    return groups[::-1] if flip else groups


def _sum(groups: Sequence[Tensor]) -> Tensor:
    # A lone group is a strided view of the input; a copy is what a sum would be, and blocks run faster on it.
    return functools.reduce(torch.add, groups) if len(groups) > 1 else groups[0].clone()


def _forward(
    regions: Sequence[Callable[..., tuple[Tensor, ...]]],
    groups: Sequence[Tensor],
    args: Sequence[tuple[Any, ...]],
    kwargs: Sequence[Mapping[str, Any]],
    dim: int,
    flip: bool,
) -> tuple[Tensor, Extras]:
    z = _sum(groups[1:])
    outputs: list[Tensor] = []
    extras: Extras = []
    for region, group, arguments, keywords in zip(regions, groups, args, kwargs, strict=True):
        z, *extra = region(z, group, *arguments, **keywords)
        outputs.append(z)
        extras.append(tuple(extra))
    return torch.cat(outputs[::-1] if flip else outputs, dim), extras


class _Block:
    """What a stage knows of one of its blocks."""

    __slots__ = ("arguments", "given", "gross", "group", "input", "region", "returned", "transformed")

    def __init__(self, transformed: Transformed, region: Region, z: Tensor, group: Tensor) -> None:
        self.transformed = transformed
        self.region = region  # the transformed block
        self.input = Layout(z)
        self.group = (group.dtype, group.requires_grad)
        self.arguments: Held  # brings the further ones back
        self.given: Fingerprint | None = None  # of the block's input, and of its output
        self.returned: Fingerprint | None = None
        self.gross = 0.0  # how far what autograd saved in it was off in the last rebuild


class _OfBlock(Held):
    """What the frame of one block holds of the stage."""

    __slots__ = ("_index", "_stage", "lock")
    whole = True
    drifts = True
    makes_leaves = True

    def __init__(self, stage: _CouplingStage, index: int) -> None:
        self._stage = stage
        self._index = index
        self.lock = stage.lock

    def begins(self, region: Region) -> None:
        self._stage.blocks[self._index].arguments.begins(region)

    def returned(self, output: Any) -> None:
        self._stage.blocks[self._index].arguments.returned(output)

    def inputs(self) -> Arguments:
        return self._stage.inputs(self._index)

    def compared(self, error: float) -> None:
        self._stage.blocks[self._index].gross = error

    def evaluated(self, output: Any) -> None:
        self._stage.evaluated(self._index)


class _CouplingStage(Stage):
    """One coupling of a chain: a region for each block, over common groups."""

    __slots__ = (
        "_certificate", "_certify", "_dim", "_flip", "_groups", "_level", "_new", "_seed", "_sizes", "blocks",
    )  # fmt: skip

    def __init__(
        self, dim: int, flip: bool, sizes: list[int], seed: bool, certify: Certify, certificate: Certificate
    ) -> None:
        super().__init__()
        self._dim = dim
        self._flip = flip
        self._sizes = sizes
        self._seed = seed
        self._certify = certify
        self._certificate = certificate
        self.blocks: list[_Block] = []
        # In a rebuild: groups at and above the level are inputs X_i again, those below are still outputs X'_i.
        self._groups: list[Tensor] = []
        self._level = 0
        self._new: NewGroup | None = None  # the group that the running rebuild solves for

    # Forward.

    def run(
        self, transformed: Transformed, source: Source | None, z: Tensor, group: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run the next block and its transform under a frame; the source brings its further arguments back."""
        region = Region(transformed, self._seed)
        block = _Block(transformed, region, z, group)
        block.arguments = (source or _KEPT).keep(args, kwargs)
        # Of what it is given a part tells how far it drifts; of what it returns, every element counts.
        block.given = self._fingerprint(z, sample=True)
        held = _OfBlock(self, len(self.blocks))
        self.blocks.append(block)
        frame = Frame(region, held, certify=self._certify, certificate=self._certificate)
        if block.given is not None:
            frame.expect(z, block.given)
        arguments = (z, group, *args), kwargs

        def see(output: Tensor) -> None:
            with aside():
                block.returned = self._fingerprint(output)

        transformed.seen = see if self._certify else None
        try:
            return frame.run(arguments)
        finally:
            transformed.seen = None

    def _fingerprint(self, tensor: Tensor, sample: bool = False) -> Fingerprint | None:
        return fingerprint(tensor, exact=self._certify == "exact", sample=sample) if self._certify else None

    def close(
        self,
        x: Tensor,
        groups: Sequence[Tensor],
        y: Tensor,
        gauge: DriftGauge | None,
        anchor_every: int | None,
        digits: int | None,
    ) -> None:
        """Take the stage's place in the chain, when all blocks have run."""
        function = self.blocks[-1].region.function
        position = self.join(
            [x], samples=groups, gauge=gauge, anchor_every=anchor_every, digits=digits, function=function
        )
        slot = Slot(y, position + 1, function)
        slot.digits = digits
        self.outputs = [slot]

    # Backward: what the blocks' frames hold.

    def inputs(self, index: int) -> Arguments:
        """Return block ``index``'s arguments, inverting the blocks after it where that has not been done."""
        if self._groups and self._level <= index:  # its group was inverted already: begin again from the output
            self._groups = []
        self._load()
        while self._level > index + 1:
            self._invert_one()
        groups, block = self._groups, self.blocks[index]
        z = block.input.fresh(self._given(index))
        self._new = NewGroup(groups[index], *block.group)
        args, kwargs = unchanged(block.arguments, block.region.function)
        return (z, self._new, *args), kwargs

    def evaluated(self, index: int) -> None:
        """Take the old group that was found, and pass the input on when it is complete."""
        new, self._new = self._new, None
        block = self.blocks[index]
        if new is None or new.old is None or new.returned is None:
            raise RebuildError(f"{block.region.name}: the coupling was not solved for its input")
        self._check(index, new.returned)
        self._groups[index] = new.old
        self._level = index
        if index == 0:
            groups, self._groups = self._groups, []
            parts = groups[::-1] if self._flip else groups
            self.hand_back([Parts(parts, self._dim)], groups)

    def _load(self) -> None:
        if self._groups:
            return
        if not self.outputs:
            raise RuntimeError("a coupling was asked for gradients before its forward pass ended")
        value = self.outputs[0].take()
        sizes = self._sizes
        if (
            isinstance(value, Parts)
            and value.dim == self._dim
            and [part.size(self._dim) for part in value.tensors] == sizes
        ):
            self._groups = value.tensors[::-1] if self._flip else value.tensors
        else:
            self._groups = _split(whole(value), sizes, self._dim, self._flip)
        self._level = len(self._groups)

    def _invert_one(self) -> None:
        index = self._level - 1
        block, arguments = self.blocks[index], self.inputs(index)
        block.gross = 0.0
        block.region.again(arguments, self.scope, nullcontext(), block.transformed.invert)
        self.evaluated(index)

    # Backward: the stage of the slots.

    def holds_outputs(self) -> bool:
        """Whether the groups were taken already."""
        return bool(self._groups)

    def solve(self) -> None:
        """Bring the input back; see :class:`~recollect.frames._chain.Stage`."""
        self._load()
        while self._groups:
            self._invert_one()

    # Proof.

    def _check(self, index: int, output: Tensor) -> None:
        """Raise unless a block returned what it did in the forward, but for the drift of its input."""
        block = self.blocks[index]
        if block.returned is None:
            return
        exact = self._certify == "exact"
        if is_late(block.returned):
            self._check_late(index, output)
            return
        returned = difference(block.returned, output, exact=exact)
        tolerance = max(tolerance_of(output.dtype), block.region.tolerance)
        if returned <= (0.0 if exact else tolerance) and block.gross <= (0.0 if exact else tolerance):
            self._certificate.figures.note(returned)
            return
        z = self._input_of(index)
        given = difference(block.given, z, exact=exact, sample=True)
        name = block.region.name
        if is_gross(block.gross, given, tolerance):
            check_block(name, given, block.gross, tolerance, None, self._certify, self._certificate.figures)

        def amplification() -> float | None:
            args, kwargs = unchanged(block.arguments, block.region.function)

            def evaluate(by: float) -> Tensor:
                arguments = (moved(z, by), *args), kwargs
                again: Tensor = block.region.again(arguments, self.scope, nullcontext(), block.transformed.evaluate)
                return again

            return amplified(output, evaluate, max(given, tolerance))

        check_block(
            name,
            given,
            returned,
            tolerance,
            amplification,
            self._certify,
            self._certificate.figures,
        )

    def _check_late(self, index: int, output: Tensor) -> None:
        """Do the same on a device that is not waited for."""
        block, exact = self.blocks[index], self._certify == "exact"
        tolerance = max(tolerance_of(output.dtype), block.region.tolerance)
        given = fingerprint(self._input_of(index), exact=exact, sample=True, like=block.given)
        returned = fingerprint(output, exact=exact, like=block.returned)
        # What judges does not hold the stage, or what that keeps would live until then.
        name, certify, figures = naming(block.region.function), self._certify, self._certificate.figures
        judge(
            [(block.given, given), (block.returned, returned)],
            lambda errors: check_block(name(), errors[0], errors[1], tolerance, None, certify, figures),
        )

    def _input_of(self, index: int) -> Tensor:
        return self.blocks[index].input.give(self._given(index))

    def _given(self, index: int) -> Tensor:
        """Return what a block is given, for the groups as they are now."""
        groups = self._groups
        if index > 0 or len(groups) == 2:
            return groups[index - 1] if index > 0 else groups[1]
        with torch.no_grad():
            return functools.reduce(torch.add, groups[1:])
