"""Fingerprints of tensors, and the proof that what was rebuilt is what was computed.

A fingerprint reads every element and has a fixed size: four projections on pseudo-random directions and the norm
(for floating-point types), or a weighted sum of bits (for all others, and where bits are to be equal). Elements are
weighted by their position, so that tensors that hold the same values in another order differ. For two tensors a and b,
the root mean square of the difference of their projections estimates ||a - b|| (Johnson and Lindenstrauss 1984).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recollect._arguments import Certify
from recollect._torch import graph_task_id, is_in_transform, when_backward_ends, without_overrides
from recollect.frames._errors import FrameError, RebuildError
from recollect.frames._modes import local

__all__ = [
    "GROSS", "Certificate", "Fingerprint", "bits_of", "check_block", "difference",
    "error_between", "fingerprint", "is_finite", "is_gross", "is_late", "judge", "norm_of", "tolerance_of",
]  # fmt: skip

# Positions are weighted with this period: a prime, so that whole rows or samples never fall on one another.
_PERIOD = 1021
_OTHER_PERIOD = 1019  # where the first divides the size
_PROJECTIONS = 4

# Relative error (of the norm) that a repetition may have: what kernels that sum in another order every time may do.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}

# Sampled elements where reading all of them would cost more than it proves.
_SAMPLES = 4 * _PERIOD

# Devices whose values can be read without waiting for them. What is compared on others is judged when backward ends.
_READ_AT_ONCE = {"cpu"}

_directions: dict[tuple[torch.dtype, torch.device], Tensor] = {}


class Fingerprint(NamedTuple):
    """What is kept of a tensor: numbers on the CPU, tensors on other devices, so that nothing waits for them."""

    # Four, and the norm, which small tensors do without; empty for types that are not floating-point.
    projections: list[float] | Tensor
    bits: int | Tensor  # 0 where they do not count
    order: tuple[int, ...] | None = None  # of the dimensions, in which the elements were read; None: as they are
    finite: Fingerprint | None = None  # of a tensor with infinities or NaN: its other values, and where those stand


class Certificate:
    """Figures of what was certified since the last :meth:`reset`.

    Attributes:
        equal: how many rebuilt tensors had the fingerprint of the forward's.
        rounded: how many differed within the rounding of their dtype.
        largest: the largest relative error among the latter, as estimated from fingerprints; 0.0 if there was none.
    """

    __slots__ = ("equal", "largest", "rounded")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.equal = self.rounded = 0
        self.largest = 0.0

    def note(self, error: float) -> None:
        """Count a tensor that was accepted with this relative error."""
        if error == 0.0:
            self.equal += 1
        else:
            self.rounded += 1
            self.largest = max(self.largest, error)

    def __repr__(self) -> str:
        return f"Certificate(equal={self.equal}, rounded={self.rounded}, largest={self.largest:.1e})"


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative error that is rounding for a dtype."""
    return _TOLERANCES.get(dtype.to_real() if dtype.is_complex else dtype, _TOLERANCES[torch.float32])


def fingerprint(
    tensor: Tensor,
    *,
    exact: bool = False,
    sample: bool = False,
    apart: bool = False,
    like: Fingerprint | None = None,
) -> Fingerprint | None:
    """Return a tensor's fingerprint; ``None`` if it has no values (meta, fake) or hides them (transforms).

    Args:
        tensor: any.
        exact: take its bits too.
        sample: take at most some thousand elements, as floating-point numbers.
        apart: on the CPU, take infinities and NaN apart from the values that are finite.
        like: that of the forward pass, to be compared with: elements are read in its order, and the norm, to which
            errors are relative, is not taken again.
    """
    size, order = tensor.numel(), None if like is None else like.order
    if (
        size <= _PERIOD
        and type(tensor) is Tensor
        and tensor.is_cpu
        and "cpu" in _READ_AT_ONCE
        and not (exact or sample or order)
        and _is_simple(tensor)
    ):
        # The same as below in fewer steps: small regions spend their time on these.
        numbers: list[float] = torch.mv(_columns(tensor.dtype, size), tensor.detach().view(-1)).tolist()
        if not apart or math.isfinite(numbers[0]):
            return Fingerprint(numbers, 0)
    flat, order = values_of(tensor.detach() if tensor.requires_grad else tensor, order)
    if flat is None:
        return None
    if sample:  # of a tensor that may differ by rounding, and bits that follow from it by few
        flat = flat[:: flat.numel() // _SAMPLES + 1] if flat.numel() > _SAMPLES else flat
        flat = flat if flat.is_floating_point() else flat.float()
    bits: int | Tensor = 0
    if exact or not flat.is_floating_point():
        bits = _bits_of(flat)
    for indices in _indices_of(tensor):
        bits = bits * 31 + _bits_of(indices.reshape(-1))
    projections: list[float] | Tensor = []
    if flat.is_floating_point():
        with_norm = like is None and (sample or flat.numel() > _PERIOD)
        projections = _project(flat, with_norm)
        if apart and isinstance(projections, list) and not all(map(math.isfinite, projections)):
            where = flat.eq(math.inf).byte() + 2 * flat.eq(-math.inf).byte() + 3 * flat.isnan().byte()
            if where.any():  # else a sum has overflowed
                values = _project(flat.masked_fill(where.bool(), 0.0), with_norm)
                return Fingerprint(projections, bits, order, Fingerprint(values, _bits_of(where)))
    return Fingerprint(projections, bits, order)


def difference(
    then: Fingerprint | None, tensor: Tensor, *, exact: bool = False, sample: bool = False, apart: bool = False
) -> float:
    """Return the relative error of a tensor whose fingerprint was taken then; 0.0 where there is none."""
    if then is None:
        return 0.0
    now = fingerprint(tensor, exact=exact, sample=sample, apart=apart, like=then)
    return 0.0 if now is None else error_between(then, now)


def _is_simple(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU is one block of floating-point numbers that can be read here."""
    return (
        (tensor.dtype is torch.float32 or tensor.dtype is torch.float64)
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and not is_in_transform()
    )


def error_between(then: Fingerprint, now: Fingerprint) -> float:
    """Return the estimate of ||now - then|| / ||then||; infinite where bits that count differ, 0.0 if all is equal."""
    if not _equal(then.bits, now.bits):
        return math.inf
    if then.finite is not None:
        return math.inf if now.finite is None else error_between(then.finite, now.finite)
    a, b = _numbers(then.projections), _numbers(now.projections)
    if not a or a[:_PROJECTIONS] == b[:_PROJECTIONS]:
        return 0.0
    if not is_finite(then):
        return 0.0  # an overflow in the forward pass: there is nothing to prove
    square = sum(
        (p - q) * (p - q)  # a power raises where this overflows
        for p, q in zip(a[:_PROJECTIONS], b, strict=False)
        if not (math.isnan(p) and math.isnan(q)) and p != q
    )
    if square == 0.0:
        return 0.0  # NaN where NaN was
    # The norm of values whose squares overflow is infinite, and that of small tensors is not taken.
    norm = a[-1] if len(a) > _PROJECTIONS and math.isfinite(a[-1]) else _root_mean_square(a)
    error = math.sqrt(square / _PROJECTIONS)
    if not math.isfinite(error) or norm == 0.0:
        return math.inf
    return error / norm


def judge(
    pairs: Sequence[tuple[Fingerprint | None, Fingerprint | None]], verdict: Callable[[list[float]], None]
) -> None:
    """Give ``verdict`` the relative errors of pairs of fingerprints: at once, or on other devices as backward ends."""

    def read() -> None:
        verdict([0.0 if then is None or now is None else error_between(then, now) for then, now in pairs])

    if any(is_late(mark) for pair in pairs for mark in pair):
        _at_the_end(read)
    else:
        read()


def is_late(mark: Fingerprint | None) -> bool:
    """Return whether reading a fingerprint would wait for its device."""
    return mark is not None and (isinstance(mark.projections, Tensor) or isinstance(mark.bits, Tensor))


def _at_the_end(read: Callable[[], None]) -> None:
    """Call ``read`` when the backward pass ends that is running; now if there is none."""
    task = graph_task_id()
    if local.verdicts[0] != task:
        waiting: list[Callable[[], None]] = []

        def read_all() -> None:
            errors = []
            for one in waiting:
                try:
                    one()
                except FrameError as error:
                    errors.append(error)
            waiting.clear()
            local.verdicts = (-1, [])
            if errors:
                raise errors[0]

        try:
            when_backward_ends(read_all)
        except RuntimeError:
            read()
            return
        local.verdicts = (task, waiting)
    local.verdicts[1].append(read)


def norm_of(mark: Fingerprint | None) -> float:
    """Return the norm of a tensor, or its estimate; infinite where it is not known."""
    numbers = [] if mark is None else _numbers(mark.projections)
    if not numbers:
        return math.inf
    return numbers[_PROJECTIONS] if len(numbers) > _PROJECTIONS else _root_mean_square(numbers)


def _root_mean_square(projections: list[float]) -> float:
    return math.hypot(*projections[:_PROJECTIONS]) / math.sqrt(_PROJECTIONS)


def is_finite(mark: Fingerprint) -> bool:
    """Return whether a tensor was free of infinities and NaN."""
    numbers = _numbers(mark.projections)
    return all(map(math.isfinite, numbers[:_PROJECTIONS]))


def _equal(a: int | Tensor, b: int | Tensor) -> bool:
    return int(a) == int(b)


def _numbers(projections: list[float] | Tensor) -> list[float]:
    if isinstance(projections, Tensor):
        numbers: list[float] = projections.tolist()
        return numbers
    return projections


Order = tuple[int, ...] | None
Values = tuple[Tensor | None, Order]


def values_of(tensor: Tensor, order: Order = None) -> Values:
    """Return what a tensor holds along one dimension, and the order of the dimensions in which it was read.

    Args:
        tensor: any.
        order: to read it in; ``None``: that of its memory.
    """
    if is_in_transform() or tensor.device.type == "meta":
        return None, None
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        return _values_of_subclass(tensor, order)
    if tensor.layout is not torch.strided:
        return _values_of_sparse(tensor)
    if tensor.is_nested:
        return values_of(tensor.contiguous().values())
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:  # somebody has taken the memory away
        return None, None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    elif tensor.is_neg():
        tensor = tensor.resolve_neg()
    if order is None and not tensor.is_contiguous():
        strides = [tensor.stride(i) if tensor.size(i) > 1 else 0 for i in range(tensor.dim())]
        order = tuple(sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True))
    if order is not None:
        tensor = tensor.permute(order)
    return tensor.reshape(-1), order


def _indices_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return where the values of a sparse tensor stand."""
    if tensor.layout is torch.sparse_coo:
        return (tensor._indices(),)
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices()
    return ()


def _values_of_sparse(tensor: Tensor) -> Values:
    if tensor.layout is torch.sparse_coo:
        return values_of(tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return values_of(tensor.values())
    return None, None


def _values_of_subclass(tensor: Tensor, order: Order) -> Values:
    """Return the values of a subclass that is a plain tensor underneath; of others nothing is known."""
    if tensor.layout is torch.jagged:
        return values_of(tensor.values())
    local = getattr(tensor, "_local_tensor", None)  # DTensor: this rank's part
    if isinstance(local, Tensor):
        return values_of(local, order)
    if _kind_is_plain(type(tensor)):
        with without_overrides():
            return values_of(tensor.as_subclass(Tensor), order)
    return None, None


def _kind_is_plain(kind: type[Tensor]) -> bool:
    """Whether tensors of a subclass hold their values as tensors do."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def _project(flat: Tensor, with_norm: bool) -> list[float] | Tensor:
    device, size = flat.device, flat.numel()
    wide = flat.dtype if flat.dtype is torch.float64 else torch.float32
    if size <= _PERIOD:
        columns = flat if flat.dtype is wide else flat.to(wide)
    else:
        period = _PERIOD if size % _PERIOD else _OTHER_PERIOD
        rows = size // period
        columns = flat[: rows * period].view(rows, period).sum(0, dtype=wide)
        if rows * period < size:
            columns[: size - rows * period] += flat[rows * period :]
    projections = torch.mv(_direction(wide, device)[:, : columns.numel()], columns)
    norm = torch.linalg.vector_norm(flat, dtype=wide) if with_norm else None
    if device.type not in _READ_AT_ONCE:
        return projections if norm is None else torch.cat([projections, norm.view(1)])
    numbers: list[float] = projections.tolist()
    if norm is not None:
        numbers.append(norm.item())
    return numbers


@functools.lru_cache(maxsize=1024)
def _columns(dtype: torch.dtype, size: int) -> Tensor:
    """Return the first columns of the CPU's directions."""
    return _direction(dtype, torch.device("cpu"))[:, :size]


def _direction(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return pseudo-random directions [projections, period], the same in every process."""
    known = _directions.get((dtype, device))
    if known is None:
        with torch.inference_mode(False), torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            known = torch.randn(_PROJECTIONS, _PERIOD, generator=generator, dtype=torch.float64).to(device, dtype)
        _directions[dtype, device] = known
    return known


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_weights: dict[torch.device, Tensor] = {}


def bits_of(tensor: Tensor) -> int | Tensor | None:
    """Return a sum of a tensor's bits that depends on their positions; ``None`` if it has no values."""
    flat, _ = values_of(tensor.detach() if tensor.requires_grad else tensor)
    return None if flat is None else _bits_of(flat)


def _bits_of(flat: Tensor) -> int | Tensor:
    """Return the sum of the elements' bits, each times an odd number that depends on its position, modulo 2^64."""
    if flat.dtype is torch.bool:
        flat = flat.view(torch.uint8)
    elif flat.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        flat = flat.view(_INTEGERS[flat.element_size()])
    device, size = flat.device, flat.numel()
    weights = _weights.get(device)
    if weights is None:
        with torch.inference_mode(False):
            weights = _weights[device] = torch.arange(_PERIOD, device=device) * 2654435762 + 1
    if size <= _PERIOD:
        total = (flat * weights[:size]).sum()
    else:
        period = _PERIOD if size % _PERIOD else _OTHER_PERIOD
        rows = size // period
        columns = flat[: rows * period].view(rows, period).sum(0, dtype=torch.int64)
        columns[: size - rows * period] += flat[rows * period :]
        total = (columns * weights[:period]).sum()
    return int(total) if device.type in _READ_AT_ONCE else total


def check_block(
    name: str,
    given: float,
    returned: float,
    tolerance: float,
    amplification: Callable[[], float | None] | None,
    certify: Certify,
    certificate: Certificate,
) -> None:
    """Tell a repetition that drifts by rounding from one that computed something else.

    Args:
        name: whose repetition it is.
        given: relative error of what it was given.
        returned: relative error of what it returned.
        tolerance: relative error that is rounding.
        amplification: measures how many times larger the error of what is returned is than that of what is given, and
            returns ``None`` if it does not return the same twice; asked only where the errors alone do not tell.
        certify: what is accepted.
        certificate: where it is counted.

    Raises:
        RebuildError: it computed something else.
    """
    if certify == "exact":
        accepted = returned == 0.0
    else:
        # Where drift is out of hand nothing can be told; its gauge warns.
        accepted = returned <= tolerance or returned <= _ORDINARY * given or given > _DRIFTED
        if not accepted and amplification is not None and math.isfinite(returned):
            times = amplification()
            # Errors below the precision of the projections show as none.
            unseen = min(tolerance, max(tolerance / _ORDINARY, _TOLERANCES[torch.float32]))
            accepted = times is not None and returned <= _SAFETY * times * max(given, unseen)
    if not accepted:
        allowed = "certify='exact' allows none" if certify == "exact" else f"rounding: {tolerance:.0e}"
        raise RebuildError(
            f"{name}: running it again for backward differs from the forward pass: what it returns has a relative "
            f"error of {returned:.1e}, and what it was given one of {given:.1e} ({allowed}). It must compute the same "
            "again, and an inverse give back what its function was given. Most often it draws random numbers from "
            "somewhere other than torch's default generators (NumPy, random), or was called with seed=False, or reads "
            "something that was changed in between. Draw from torch, pass what changes as an argument, or use a "
            "checkpoint, which keeps the input"
        )
    certificate.note(returned)


def is_gross(error: float, given: float, tolerance: float) -> bool:
    """Return whether what a block saves differs by more than drift of its input explains.

    Args:
        error: relative error of what it saves.
        given: relative error of what it was given.
        tolerance: relative error that is rounding.
    """
    return given <= max(1e-4, tolerance) and error > min(_STEEP * max(given, tolerance), max(GROSS, 10 * given))


# How many times larger errors ordinary blocks make of small ones, and how uncertain a measured amplification is.
_ORDINARY = 10.0
_SAFETY = 30.0
# Relative error of flags and indices that a block saves, above which it is another block, and of other tensors in terms
# of the error of its input.
GROSS = 0.25
_STEEP = 1e3
_DRIFTED = 1e-2

for _type in (torch.float32, torch.float64):  # now, so that nobody takes them for what a frame keeps
    _direction(_type, torch.device("cpu"))
_bits_of(torch.zeros(1, dtype=torch.int8, device="cpu"))
