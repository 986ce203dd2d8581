"""Fingerprints of tensors: of fixed size, and of every element.

A fingerprint is four projections on pseudo-random directions (for floating-point types), or a weighted sum of bits
(for all others, and where bits are to be equal). Elements are weighted by their position, so that tensors that
hold the same values in another order differ. For two tensors a and b, the root mean square of the difference of their
projections estimates ||a - b|| (Johnson and Lindenstrauss 1984).

Positions have a period: the values are first summed up over it, which reads a tensor once. What is not one block of
numbers of the right type is read piece by piece, so that there is never a copy of the whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect._devices import FORMS, forms_of
from recollect._torch import is_in_transform, without_overrides

__all__ = [
    "PROJECTIONS", "Fingerprint", "bits_of", "difference", "error_between", "fingerprint", "is_finite",
    "is_late", "late_parts", "norm_of", "on_host",
]  # fmt: skip

# A prime, so that whole rows or samples never fall on one another.
_PERIOD = 1021
_PERIODS = (_PERIOD, 1019, 1013, 1009)  # the first that does not divide the size
PROJECTIONS = 4

# Sampled elements, where reading all of them would cost more than it proves, and what is read in whole all the same.
_SAMPLES = _PERIOD
_MANY = 4 * _PERIOD

_TAME = 1e6
"""Projections above it may be of large numbers such as those of masks."""
_LONG = 1 << 22  # products are summed up in their own precision
_WIDE_SUM = 1 << 18  # summing up several periods side by side is faster from here on

_CPU = torch.device("cpu")
_directions: dict[tuple[torch.dtype, torch.device], Tensor] = {}


Order = tuple[int, ...] | None


class Fingerprint(NamedTuple):
    """What is kept of a tensor: numbers on the CPU, tensors on other devices, so that nothing waits for them."""

    # Four, and the norm where it was taken for an error; empty for types that are not floating-point.
    projections: list[float] | Tensor
    bits: int | Tensor  # 0 where they do not count
    order: Order = None  # of the dimensions, in which the elements were read; None: as they are
    finite: Fingerprint | None = None  # of a tensor with infinities or NaN: its other values, and where those stand
    exact: bool = False  # whether the bits decide


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
        exact: take its bits, which then decide.
        sample: of more than some thousand elements take a part, as floating-point numbers.
        apart: on the CPU, where there are infinities, NaN or numbers so large that they would hide the others, take
            where those that are not finite stand, and logarithms of the others.
        like: that of the forward pass, to be compared with: elements are read in its order, and the norm, to which
            errors are relative, is taken where there is an error.
    """
    order = None if like is None else like.order
    if not exact:
        few = _few_of(tensor, order)
        if few is not None and not (apart and _is_apart(few[0], tensor, like)):
            return Fingerprint(few[0], 0, few[1])
    values, order = _values_of(tensor.detach() if tensor.requires_grad else tensor, order)
    if values is None:
        return None
    if sample:  # of a tensor that may differ by rounding, and bits that follow from it by few
        values = _sample_of(values) if values.numel() > _MANY else values
        values = values.contiguous() if values.is_floating_point() else values.float()
    bits: int | Tensor = 0
    if exact or not values.is_floating_point():
        bits = _bits_of(values)
    for indices in _indices_of(tensor):
        bits = bits * 31 + _bits_of(indices)
    if exact or not values.is_floating_point():
        return Fingerprint([], bits, order, None, exact)
    projections = _project(values, like)
    if apart and isinstance(projections, list) and _is_apart(projections, values, like):
        finite = _project(values, None if like is None else like.finite, _logarithms_of)
        where = _bits_of(values, _kinds_of)
        return Fingerprint(projections, bits, order, Fingerprint(finite, where), exact)
    return Fingerprint(projections, bits, order, None, exact)


def _few_of(tensor: Tensor, order: Order) -> tuple[list[float], Order] | None:
    """Return the projections of a small tensor on the CPU, and the order in which it was read.

    The same as those of :func:`_project` in fewer steps: small regions spend their time on these.
    """
    size, dtype = tensor.numel(), tensor.dtype
    if (
        size > _PERIOD
        or (dtype is not torch.float32 and dtype is not torch.float64)
        or type(tensor) is not Tensor
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or tensor.is_neg()
        or tensor.is_nested
        or is_in_transform()
        or not FORMS["cpu"].reads_at_once
        or tensor.untyped_storage().nbytes() == 0  # somebody has taken the memory away
    ):
        return None
    flat = tensor.detach() if tensor.requires_grad else tensor
    contiguous = flat.is_contiguous()
    if order is None and not contiguous:
        order = _order_of(flat)
    if order is not None:
        flat = flat.permute(order).reshape(-1)
    elif flat.dim() != 1:
        flat = flat.view(-1)
    numbers: list[float] = torch.mv(_columns(dtype, _CPU, size), flat).tolist()
    return numbers, order


def _kinds_of(values: Tensor) -> Tensor:
    """Return which elements are finite (0), infinite (1, 2) and NaN (3)."""
    return values.eq(math.inf).byte() + 2 * values.eq(-math.inf).byte() + 3 * values.isnan().byte()


def _is_tame(projections: list[float], tensor: Tensor) -> bool:
    """Whether no element can be so large that others do not count beside it."""
    most = (_TAME if tensor.dtype is not torch.float16 else _TAME / 1e3) + 10 * tensor.numel()
    a, b, c, d = projections[:PROJECTIONS]
    return -most < a < most and -most < b < most and -most < c < most and -most < d < most


def _is_apart(projections: list[float], tensor: Tensor, like: Fingerprint | None) -> bool:
    """Whether logarithms are taken too: as of the tensor that it is compared with, if there is one."""
    return not _is_tame(projections, tensor) if like is None else like.finite is not None


def _logarithms_of(values: Tensor) -> Tensor:
    """Return logarithms of logarithms with the values' signs, about equal to small values; 0 for what is not finite."""
    return values.nan_to_num(0.0, 0.0, 0.0).abs().log1p_().log1p_().copysign_(values)


# Two fingerprints.


def difference(
    then: Fingerprint | None, tensor: Tensor, *, exact: bool = False, sample: bool = False, apart: bool = False
) -> float:
    """Return the relative error of a tensor whose fingerprint was taken then; 0.0 where there is none."""
    if then is None:
        return 0.0
    if not exact and then.finite is None:  # what comes most often
        few = _few_of(tensor, then.order)
        if few is not None and few[0] == then.projections:
            return 0.0
        if few is not None and _is_tame(few[0], tensor):
            return error_between(then, Fingerprint(few[0], 0))
    now = fingerprint(tensor, exact=exact, sample=sample, apart=apart, like=then)
    return 0.0 if now is None else error_between(then, now)


def error_between(then: Fingerprint, now: Fingerprint) -> float:
    """Return the estimate of ||now - then|| / ||then||; infinite where bits that count differ, 0.0 if all is equal."""
    if int(then.bits) != int(now.bits):
        return math.inf
    if then.exact:
        return 0.0  # sums of the same numbers are not: rows with gaps between them are summed up by pieces
    if then.finite is not None:
        return math.inf if now.finite is None else error_between(then.finite, now.finite)
    a, b = _numbers(then.projections), _numbers(now.projections)
    if not a or a == b[:PROJECTIONS]:
        return 0.0
    if not is_finite(then):
        return 0.0  # an overflow in the forward pass: there is nothing to prove
    square = sum(
        (p - q) * (p - q)  # a power raises where this overflows
        for p, q in zip(a, b, strict=False)
        if not (math.isnan(p) and math.isnan(q)) and p != q
    )
    if square == 0.0:
        return 0.0  # NaN where NaN was
    # The norm of the later tensor is as good: where the two norms differ, the error is as large as the larger. That
    # of values whose squares overflow is infinite, and that of small tensors is not taken.
    norm = b[-1] if len(b) > PROJECTIONS and math.isfinite(b[-1]) else _root_mean_square(a)
    error = math.sqrt(square / PROJECTIONS)
    if not math.isfinite(error) or norm == 0.0:
        return math.inf
    return error / norm


def is_late(mark: Fingerprint | None) -> bool:
    """Return whether reading a fingerprint would wait for its device."""
    return mark is not None and (isinstance(mark.projections, Tensor) or isinstance(mark.bits, Tensor))


def late_parts(mark: Fingerprint) -> list[Tensor]:
    """Return what of a fingerprint is on a device."""
    return [part for part in (mark.projections, mark.bits) if isinstance(part, Tensor)]


def on_host(mark: Fingerprint, numbers: Iterator[list[Any]]) -> Fingerprint:
    """Return a fingerprint on the host, made with the numbers of :func:`late_parts`, which are next."""
    projections = next(numbers) if isinstance(mark.projections, Tensor) else mark.projections
    bits = next(numbers)[0] if isinstance(mark.bits, Tensor) else mark.bits
    return mark._replace(projections=projections, bits=bits)


def norm_of(mark: Fingerprint | None) -> float:
    """Return the estimate of a tensor's norm; infinite where there is none."""
    numbers = [] if mark is None else _numbers(mark.projections)
    return _root_mean_square(numbers) if numbers else math.inf


def is_finite(mark: Fingerprint) -> bool:
    """Return whether a tensor was free of infinities and NaN, as far as its fingerprint shows."""
    return all(map(math.isfinite, _numbers(mark.projections)[:PROJECTIONS]))


def _root_mean_square(projections: list[float]) -> float:
    return math.hypot(*projections[:PROJECTIONS]) / math.sqrt(PROJECTIONS)


def _numbers(projections: list[float] | Tensor) -> list[float]:
    if isinstance(projections, Tensor):
        numbers: list[float] = projections.tolist()
        return numbers
    return projections


# What a tensor holds.

Values = tuple[Tensor | None, Order]


def _values_of(tensor: Tensor, order: Order = None) -> Values:
    """Return a strided tensor with a tensor's values in the order in which they are read, and that order.

    Args:
        tensor: any, without history.
        order: of the dimensions, to read it in; ``None``: that of its memory.
    """
    if is_in_transform() or tensor.device.type == "meta":
        return None, None
    kind = type(tensor)
    if kind is not Tensor and kind is not torch.nn.Parameter:
        return _values_of_subclass(tensor, order)
    if tensor.layout is not torch.strided:
        return _values_of_sparse(tensor)
    if tensor.is_nested:
        return _values_of(tensor.contiguous().values())
    if tensor.numel() and tensor.untyped_storage().nbytes() == 0:  # somebody has taken the memory away
        return None, None
    if tensor.is_complex():
        real = torch.view_as_real(tensor.resolve_conj())
        if order is None and not real.is_contiguous():
            order = (*_order_of(tensor), tensor.dim())
        return (real if order is None else real.permute(order)), order
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if order is None and not tensor.is_contiguous():
        order = _order_of(tensor)
    return (tensor if order is None else tensor.permute(order)), order


def _order_of(tensor: Tensor) -> tuple[int, ...]:
    """Return the dimensions in the order of memory."""
    strides = [tensor.stride(i) if tensor.size(i) > 1 else 0 for i in range(tensor.dim())]
    return tuple(sorted(range(tensor.dim()), key=strides.__getitem__, reverse=True))


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
        return _values_of(tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        return _values_of(tensor.values())
    return None, None


def _values_of_subclass(tensor: Tensor, order: Order) -> Values:
    """Return the values of a subclass that is a plain tensor underneath; of others nothing is known."""
    if tensor.layout is torch.jagged:
        return _values_of(tensor.values())
    local = getattr(tensor, "_local_tensor", None)  # DTensor: this rank's part
    if isinstance(local, Tensor):
        return _values_of(local, order)
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        with without_overrides():
            return _values_of(tensor.as_subclass(Tensor), order)
    return None, None


@functools.lru_cache(maxsize=256)
def _step_of(size: int) -> int:
    """Return the distance of samples: prime to the size, so that all rows and columns are met equally often."""
    step = -(-size // _SAMPLES)
    while math.gcd(step, size) != 1:
        step += 1
    return step


def _sample_of(values: Tensor) -> Tensor:
    """Return elements at equal distances, of a strided tensor."""
    step = _step_of(values.numel())
    if values.is_contiguous():
        return values.view(-1)[::step]
    places = torch.arange(0, values.numel(), step, device=values.device)
    offsets, extent = torch.zeros_like(places), 1
    for size, stride in zip(reversed(values.shape), reversed(values.stride()), strict=True):
        offsets += places.remainder(size).mul_(stride)
        places = places.div_(size, rounding_mode="floor")
        extent += (size - 1) * stride
    return values.as_strided((extent,), (1,)).index_select(0, offsets)


# Sums over the period.


def _limit_of(values: Tensor) -> int:
    """Return how many elements are copied at a time: of wide types fewer."""
    return forms_of(values.device).piece * 4 // max(values.element_size(), 4)


def _pieces_of(values: Tensor, limit: int) -> Iterator[Tensor]:
    """Yield the elements of a strided tensor in rows, in their order; what is copied of it is not above the limit."""
    if values.is_contiguous():
        yield from torch.split(values.view(-1), limit)
    elif values.numel() <= limit:
        yield values.reshape(-1)
    else:
        within = values[0].numel()
        if within > limit:
            for part in values:
                yield from _pieces_of(part, limit)
        else:
            for part in torch.split(values, max(limit // within, 1)):
                yield part.reshape(-1)


def _folded(values: Tensor, period: int, dtype: torch.dtype, of: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the sums of the elements whose positions are equal modulo the period; of ``of(elements)``, if given."""
    if of is None and values.dtype is dtype and values.is_contiguous():
        return _folded_rows(values.view(-1), period)
    # In double precision: many sums of pieces are added up.
    forms = forms_of(values.device)
    wide = torch.float64 if dtype is torch.float32 and forms.double_sums else dtype
    pieces = _pieces_of(values, _limit_of(values))
    taken = ((piece if of is None else of(piece)).to(dtype) for piece in pieces)
    return _folded_pieces(taken, torch.zeros(period, dtype=wide, device=values.device)).to(dtype)


def _folded_pieces(pieces: Iterable[Tensor], columns: Tensor) -> Tensor:
    """Add the elements of rows that follow on one another to the sums over the period, and return these."""
    period, position = columns.numel(), 0
    for piece in pieces:
        start, size = position % period, piece.numel()
        head = min(period - start, size) if start else 0
        if head:
            columns[start : start + head] += piece[:head]
        if size - head >= period:
            columns += _folded_rows(piece[head:], period)
        elif size > head:
            columns[: size - head] += piece[head:]
        position += size
    return columns


def _folded_rows(flat: Tensor, period: int) -> Tensor:
    side_by_side = period * 4 if flat.numel() >= _WIDE_SUM else period
    rows = flat.numel() // side_by_side
    columns = flat[: rows * side_by_side].view(rows, side_by_side).sum(0, dtype=flat.dtype)
    rest = flat[rows * side_by_side :]
    if side_by_side > period:
        columns = columns.view(-1, period).sum(0, dtype=flat.dtype)
        rows = rest.numel() // period
        if rows:
            columns += rest[: rows * period].view(rows, period).sum(0, dtype=flat.dtype)
            rest = rest[rows * period :]
    if rest.numel():
        columns[: rest.numel()] += rest
    return columns


def _period_of(size: int) -> int:
    return next((period for period in _PERIODS if size % period), _PERIODS[-1])


def _project(
    values: Tensor, like: Fingerprint | None, of: Callable[[Tensor], Tensor] | None = None
) -> list[float] | Tensor:
    """Return the projections of values, or of ``of(values)``, and their norm where they are not those of ``like``."""
    device, size = values.device, values.numel()
    wide = torch.float64 if values.dtype is torch.float64 else torch.float32
    if size <= _PERIOD:
        columns = values.reshape(-1).to(wide)
        columns = columns if of is None else of(columns)
    else:
        columns = _folded(values, _period_of(size), wide, of)
    number = columns.numel()
    projections = torch.mv(_columns(wide, device, number), columns)
    with_norm = like is not None and size > _PERIOD
    if not forms_of(device).reads_at_once:
        return torch.cat([projections, _norm_of(values, wide, of).view(1)]) if with_norm else projections
    numbers: list[float] = projections.tolist()
    if with_norm and like is not None and numbers != like.projections:
        numbers.append(_norm_of(values, wide, of).item())
    return numbers


def _norm_of(values: Tensor, dtype: torch.dtype, of: Callable[[Tensor], Tensor] | None) -> Tensor:
    if of is None and values.dtype is dtype and values.is_contiguous():
        flat = values.view(-1)
        if not forms_of(flat.device).dot_norms:
            norm: Tensor = torch.linalg.vector_norm(flat)
            return norm
        squares = [torch.dot(piece, piece) for piece in torch.split(flat, _LONG)]
        return torch.stack(squares).sum().sqrt()
    pieces = _pieces_of(values, _limit_of(values))
    norms = [torch.linalg.vector_norm((piece if of is None else of(piece)).to(dtype)) for piece in pieces]
    return torch.stack(norms).square().sum().sqrt()


@functools.lru_cache(maxsize=1024)
def _columns(dtype: torch.dtype, device: torch.device, size: int) -> Tensor:
    """Return the first columns of a device's directions."""
    return _direction(dtype, device)[:, :size]


def _direction(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return pseudo-random directions [projections, period], the same in every process."""
    known = _directions.get((dtype, device))
    if known is None:
        with torch.inference_mode(False), torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            known = torch.randn(PROJECTIONS, _PERIOD, generator=generator, dtype=torch.float64).to(device, dtype)
        _directions[dtype, device] = known
    return known


# Bits.

_weights: dict[torch.device, Tensor] = {}


def bits_of(tensor: Tensor) -> int | Tensor | None:
    """Return a sum of a tensor's bits that depends on their positions; ``None`` if it has no values.

    Args:
        tensor: of any type and layout, on any device.

    Returns:
        A number in [-2^63, 2^63), equal for equal bits of the same type and shape; on devices that are not waited for
        it is a tensor, 0-D int64.

    Example:
        >>> import torch
        >>> from recollect.frames import bits_of
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> bits_of(x) == bits_of(x.clone()), bits_of(x) == bits_of(x.flip(0))
        (True, False)
        >>> bits_of(x.to("meta")) is None
        True
    """
    values, _ = _values_of(tensor.detach() if tensor.requires_grad else tensor)
    return None if values is None else _bits_of(values)


def _bits_of(values: Tensor, of: Callable[[Tensor], Tensor] | None = None) -> int | Tensor:
    """Return the sum of the elements' bits, each times a pseudo-random odd number of its position, modulo 2^64.

    Elements count in words of 32 bits (of 64, where they have as many): small ones several to a word. Words whose
    positions are equal modulo four periods are first summed up in their own width, which converts nothing.

    Args:
        values: a strided tensor.
        of: the bits of ``of(values)``, whole numbers, instead.
    """
    device = values.device
    if of is not None:
        columns = _folded(values, _period_of(values.numel()), torch.int64, of)
    else:
        wide, several = values.element_size() == 8, _in_a_word(values)
        number = -(-values.numel() // several)
        period, words = 4 * _period_of(number), _words_of(values, several)
        kind = torch.int64 if wide else torch.int32
        if number <= period:
            pieces = list(words)
            columns = pieces[0] if len(pieces) == 1 else torch.cat([torch.zeros(0, dtype=kind, device=device), *pieces])
        else:
            columns = _folded_pieces(words, torch.zeros(period, dtype=kind, device=device))
        if wide:  # an odd number keeps the highest bit where it is, and two of them would cancel
            columns = columns ^ ((columns >> 29) & (2**35 - 1))
    total = (columns * _weights_on(device)[: columns.numel()]).sum()
    return int(total) if forms_of(device).reads_at_once else total


def _in_a_word(values: Tensor) -> int:
    """Return how many elements make one word."""
    return max(4 // values.element_size(), 1)


def _words_of(values: Tensor, several: int) -> Iterator[Tensor]:
    """Yield the bits of a strided tensor's elements as integers in rows, the last word filled up with zeros."""
    kind = torch.int64 if values.element_size() == 8 else torch.int32
    limit = _limit_of(values)
    left = None
    for piece in _pieces_of(values, max(values.numel(), 1) if values.is_contiguous() else limit):
        row = piece if left is None else torch.cat([left, piece])
        end = row.numel() - row.numel() % several
        left = row[end:] if end < row.numel() else None
        if end:
            row = row[:end].contiguous()
            yield (row.clone() if row.storage_offset() % several else row).view(kind)
    if left is not None:
        yield torch.cat([left, left.new_zeros(several - left.numel())]).view(kind)


def _weights_on(device: torch.device) -> Tensor:
    weights = _weights.get(device)
    if weights is None:
        with torch.inference_mode(False), torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(-(2**62), 2**62, (4 * _PERIOD,), generator=generator)
            weights = _weights[device] = (2 * drawn + 1).to(device)
    return weights


for _type in (torch.float32, torch.float64):  # now, so that nobody takes them for what a frame keeps
    _direction(_type, torch.device("cpu"))
_bits_of(torch.zeros(1, dtype=torch.int8, device="cpu"))
