"""Fingerprints of tensors: of fixed size, and of every element.

A fingerprint is four projections on pseudo-random directions (for floating-point types), or a weighted sum of bits
(for all others, and where bits are to be equal). Elements are weighted by their position, so that tensors that
hold the same values in another order differ. For two tensors a and b, the root mean square of the difference of their
projections estimates ||a - b|| (Johnson and Lindenstrauss 1984).

Longer tensors are laid out in rows, which are summed up with a weight each before that: it reads a tensor once. For
bits, positions have a period. What is not one block of numbers of the right type is read piece by piece, so that there
is never a copy of the whole. What is about as small as a fingerprint needs none: :func:`few_bytes_of` is a copy of it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recollect._devices import FORMS, forms_of
from recollect._torch import is_in_transform
from recollect.frames._bits import sum_of_bits
from recollect.frames._reading import (
    AS_IT_IS,
    GROUP,
    MANY,
    Order,
    indices_of,
    limit_of,
    order_of,
    pieces_of,
    sample_of,
    step_of,
    values_of,
)

__all__ = [
    "PROJECTIONS", "Fingerprint", "difference", "difference_of_few", "error_between", "few_bytes_of", "fingerprint",
    "is_finite", "is_late", "late_parts", "norm_of", "on_host",
]  # fmt: skip

PROJECTIONS = 4
_DIRECT = 4096  # elements that each have a direction of their own; more are laid out in rows
_WIDTH = 1024  # of these
_ROWS = 4096  # so many have a weight of their own


_TAME = 1e6
"""Projections above it may be of large numbers such as those of masks."""
_LONG = 1 << 22  # products are summed up in their own precision
_SLIGHT = 16  # units of rounding: as a relative error by the norm of the projections, it is one by any other
_FEW = 1024  # bytes; numbers of Python in a list take some hundred
_bytes_at: Callable[[int, int], bytes] = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_OF_FEW = frozenset((
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
))  # fmt: skip

_CODES = {torch.float32: "f", torch.float64: "d"}

_CPU = torch.device("cpu")
_directions: dict[tuple[torch.dtype, torch.device], Tensor] = {}


Sample = tuple[str, bytes]
"""Some elements of a tensor: the code of their type, and their bytes."""


class Fingerprint(NamedTuple):
    """What is kept of a tensor: numbers on the CPU, tensors on other devices, so that nothing waits for them."""

    # Four, and the norm where it was taken for an error; empty with a sample, and where bits count instead.
    projections: list[float] | Tensor
    bits: int | Tensor  # 0 where they do not count
    order: Order = None  # of the dimensions, in which the elements were read; None: as they are
    finite: Fingerprint | None = None  # of a tensor with infinities or NaN: its other values, and where those stand
    exact: bool = False  # whether the bits decide
    sample: Sample | None = None  # instead of projections, on the CPU


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
        sample: of more than some thousand elements take a part, as floating-point numbers: on the CPU the elements
            themselves.
        apart: on the CPU, where there are infinities, NaN or numbers so large that they would hide the others, take
            where those that are not finite stand, and logarithms of the others.
        like: that of the forward pass, to be compared with: elements are read in its order, and the norm, to which
            errors are relative, is taken where there is an error.
    """
    order = _order_like(like)
    if sample and not exact and tensor.numel() > MANY:
        found = _quick_sample(tensor, order)
        if found is not None:
            return Fingerprint([], 0, order, sample=found)
    elif not exact:
        plain = _plain_of(tensor, order)
        if plain is not None and not (apart and _is_apart(plain[0], tensor, like)):
            return Fingerprint(_with_norm(plain, like), 0, plain[1])
    values, order = values_of(tensor.detach() if tensor.requires_grad else tensor, order)
    if values is None:
        return None
    bits: int | Tensor = 0
    if sample:  # of a tensor that may differ by rounding, and bits that follow from it by few
        if values.numel() > MANY:
            if not exact and forms_of(values.device).reads_at_once:
                for indices in indices_of(tensor):
                    bits = bits * 31 + sum_of_bits(indices)
                return Fingerprint([], bits, order, sample=_sample_in(values))
            values = sample_of(values)
        values = values.contiguous() if values.is_floating_point() else values.float()
    if exact or not values.is_floating_point():
        bits = sum_of_bits(values)
    for indices in indices_of(tensor):
        bits = bits * 31 + sum_of_bits(indices)
    if exact or not values.is_floating_point():
        return Fingerprint([], bits, order, None, exact)
    projections = _project(values, like)
    if apart and isinstance(projections, list) and _is_apart(projections, values, like):
        finite = _project(values, None if like is None else like.finite, _logarithms_of)
        where = sum_of_bits(values, _kinds_of)
        return Fingerprint(projections, bits, order, Fingerprint(finite, where), exact)
    return Fingerprint(projections, bits, order, None, exact)


def _order_like(then: Fingerprint | None) -> Order:
    """Return the order in which a tensor is read that is compared with another."""
    return None if then is None else then.order or AS_IT_IS


def _block_of(tensor: Tensor, order: Order) -> tuple[Tensor, Order] | None:
    """Return a tensor of numbers on the CPU that are read as they are, its dimensions in the order in which they are.

    What is one block of memory is contiguous then.
    """
    dtype = tensor.dtype
    if (
        (dtype is not torch.float32 and dtype is not torch.float64)
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
    block = tensor.detach() if tensor.requires_grad else tensor
    if order is None and not block.is_contiguous():
        order = order_of(block)
    return (block.permute(order) if order else block), order


_Plain = tuple[list[float], Order, Tensor]


def _plain_of(tensor: Tensor, order: Order) -> _Plain | None:
    """Return the projections of a tensor that is one block of numbers on the CPU, its order, and what was read of it.

    The same as those of :func:`_project` in fewer steps, which is where small regions spend their time.
    """
    found = _block_of(tensor, order)
    if found is None:
        return None
    flat, order = found
    size, dtype = flat.numel(), flat.dtype
    # The CPU's autocast leaves the products of this as they are.
    if size > _DIRECT:
        if not flat.is_contiguous():
            return None  # it is read piece by piece
        number, left = divmod(size, _WIDTH)
        if left or number > _ROWS:
            flat = flat.view(-1)
            row = _summed_rows(flat, 0)
        else:  # the same in fewer steps
            flat = flat.view(number, _WIDTH)
            row = torch.mv(flat.t(), _first_weights(dtype, number))
    else:
        row = flat = flat if flat.dim() == 1 else flat.reshape(-1)
    numbers: list[float] = torch.mv(_columns(dtype, _CPU, row.numel()), row).tolist()
    return numbers, order, flat


def _quick_sample(tensor: Tensor, order: Order) -> Sample | None:
    """Return a sample of a tensor that is one block of numbers on the CPU, without an operation of torch."""
    size = tensor.element_size()
    if (
        (order is not None and order != AS_IT_IS)
        or type(tensor) is not Tensor
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or tensor.dtype not in _CODES
        or not tensor.is_contiguous()
        or tensor.is_neg()
        or tensor.is_nested
        or not FORMS["cpu"].reads_at_once
    ):
        return None
    try:
        place = tensor.data_ptr()
    except RuntimeError:  # under transforms there is none
        return None
    if not place:  # somebody has taken the memory away
        return None
    groups = tensor.numel() // GROUP
    return _CODES[tensor.dtype], memoryview(_groups_of(size, groups).from_address(place))[:: step_of(groups)].tobytes()


@functools.lru_cache(maxsize=256)
def _groups_of(size: int, number: int) -> type[ctypes.Array[Any]]:
    """Return the type of an array of so many groups of elements, each of ``size`` bytes."""
    group: Any = type("Group", (ctypes.Structure,), {"_fields_": [("elements", ctypes.c_char * (size * GROUP))]})
    array: type[ctypes.Array[Any]] = group * number
    return array


def _sample_in(values: Tensor) -> Sample:
    """Return a sample of a tensor on the CPU, whatever it is like."""
    values = sample_of(values)
    if values.dtype not in _CODES:
        values = values.float()
    values = values.contiguous()
    return _CODES[values.dtype], _bytes_at(values.data_ptr(), values.nbytes)


def _with_norm(plain: _Plain, like: Fingerprint | None) -> list[float]:
    """Return the projections, and the norm where they are not those of ``like``: of few elements it is not taken."""
    numbers, _, flat = plain
    if like is None or flat.numel() <= _DIRECT or numbers == like.projections:
        return numbers
    return [*numbers, _norm_of(flat, flat.dtype, None).item()]


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
    if not exact and then.finite is None and then.sample is None:  # what comes most often
        plain = _plain_of(tensor, _order_like(then))
        if plain is not None and plain[0] == then.projections:
            return 0.0
        if plain is not None and _is_tame(plain[0], tensor):
            error = error_between(then, Fingerprint(plain[0], 0))
            if error <= _SLIGHT * torch.finfo(tensor.dtype).eps:
                return error
            return error_between(then, Fingerprint(_with_norm(plain, then), 0))
    now = fingerprint(tensor, exact=exact, sample=sample, apart=apart, like=then)
    return 0.0 if now is None else error_between(then, now)


def few_bytes_of(tensor: Tensor) -> bytes | None:
    """Return a copy of a small tensor's bytes, in the order of its dimensions, if it is a plain one on the CPU."""
    if (
        type(tensor) is not Tensor
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or tensor.dtype not in _OF_FEW
        or (size := tensor.nbytes) > _FEW
        or tensor.is_neg()
        or tensor.is_nested
        or not FORMS["cpu"].reads_at_once
    ):
        return None
    try:
        if tensor.untyped_storage().nbytes() == 0:  # somebody has taken the memory away
            return None
        place = (tensor if tensor.is_contiguous() else (tensor := tensor.detach().contiguous())).data_ptr()
    except RuntimeError:  # under transforms there is none
        return None
    return _bytes_at(place, size) if place else None


def difference_of_few(then: bytes, tensor: Tensor, *, exact: bool = False) -> float:
    """Return the relative error of a tensor of which these were the bytes, as :func:`difference` does."""
    if few_bytes_of(tensor) == then:
        return 0.0
    now = tensor.detach().contiguous()
    if exact or now.nbytes != len(then):
        return math.inf
    first = fingerprint(torch.frombuffer(bytearray(then), dtype=now.dtype).view(now.shape), apart=True)
    return difference(first, now, apart=True)


def error_between(then: Fingerprint, now: Fingerprint) -> float:
    """Return the estimate of ||now - then|| / ||then||; infinite where bits that count differ, 0.0 if all is equal."""
    if int(then.bits) != int(now.bits):
        return math.inf
    if then.sample is not None:
        return 0.0 if then.sample == now.sample else _error_between_samples(then.sample, now.sample)
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


def _error_between_samples(then: Sample, now: Sample | None) -> float:
    if now is None or len(then[1]) != len(now[1]):
        return math.inf
    a, b = _elements_of(then), _elements_of(now)
    distance = math.dist(a, b)
    if not math.isfinite(distance):
        # After an overflow in the forward pass there is nothing to prove.
        return math.inf if all(map(math.isfinite, a)) else 0.0
    if distance == 0.0:
        return 0.0
    norm = math.hypot(*a)
    return distance / norm if norm > 0.0 else math.inf


def _elements_of(sample: Sample) -> tuple[float, ...]:
    code, elements = sample
    return struct.unpack(f"{len(elements) // struct.calcsize(code)}{code}", elements)


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
    if mark is not None and mark.sample is not None:
        return math.hypot(*_elements_of(mark.sample))
    numbers = [] if mark is None else _numbers(mark.projections)
    return _root_mean_square(numbers) if numbers else math.inf


def is_finite(mark: Fingerprint) -> bool:
    """Return whether a tensor was free of infinities and NaN, as far as its fingerprint shows."""
    numbers = _numbers(mark.projections)[:PROJECTIONS] if mark.sample is None else _elements_of(mark.sample)
    return all(map(math.isfinite, numbers))


def _root_mean_square(projections: list[float]) -> float:
    return math.hypot(*projections[:PROJECTIONS]) / math.sqrt(PROJECTIONS)


def _numbers(projections: list[float] | Tensor) -> list[float]:
    if isinstance(projections, Tensor):
        numbers: list[float] = projections.tolist()
        return numbers
    return projections


# Projections.


def _project(
    values: Tensor, like: Fingerprint | None, of: Callable[[Tensor], Tensor] | None = None
) -> list[float] | Tensor:
    """Return the projections of values, or of ``of(values)``, and their norm where they are not those of ``like``."""
    device, size = values.device, values.numel()
    wide = torch.float64 if values.dtype is torch.float64 else torch.float32
    if size <= _DIRECT:
        row = values.reshape(-1).to(wide)
        projections = _onto_directions(row if of is None else of(row))
    else:
        projections = _onto_directions(_summed(values, wide, of))
    with_norm = like is not None and size > _DIRECT
    if not forms_of(device).reads_at_once:
        return torch.cat([projections, _norm_of(values, wide, of).view(1)]) if with_norm else projections
    numbers: list[float] = projections.tolist()
    if with_norm and like is not None and numbers != like.projections:
        numbers.append(_norm_of(values, wide, of).item())
    return numbers


def _onto_directions(row: Tensor) -> Tensor:
    return _product(_columns(row.dtype, row.device, row.numel()), row)


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` in their own type, also under autocast."""
    kind = vector.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return torch.mv(matrix, vector)
    return torch.mv(matrix, vector)


# Sums over rows.


def _summed(values: Tensor, dtype: torch.dtype, of: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return the weighted sum of the rows in which the elements, or ``of(elements)``, are laid out."""
    if of is None and values.dtype is dtype and values.is_contiguous():
        return _summed_rows(values.view(-1), 0)
    # In double precision: many sums of pieces are added up.
    forms = forms_of(values.device)
    wide = torch.float64 if dtype is torch.float32 and forms.double_sums else dtype
    columns = torch.zeros(_WIDTH, dtype=wide, device=values.device)
    position = 0
    for piece in pieces_of(values, limit_of(values)):
        flat = (piece if of is None else of(piece)).to(dtype)
        begun, size = position % _WIDTH, flat.numel()
        head = min(_WIDTH - begun, size) if begun else 0
        if head:
            columns[begun : begun + head].add_(flat[:head], alpha=_weight_of(position // _WIDTH))
        if size > head:
            columns.add_(_summed_rows(flat[head:], (position + head) // _WIDTH))
        position += size
    return columns.to(dtype)


def _summed_rows(flat: Tensor, first: int) -> Tensor:
    """Return the weighted sum of rows that follow on one another, the last of them perhaps shorter.

    Args:
        flat: the elements, one dimension.
        first: number of the first row.
    """
    number, left = divmod(flat.numel(), _WIDTH)
    whole = flat[: number * _WIDTH] if left else flat
    rows, weights = whole.view(number, _WIDTH).t(), _row_weights(flat.dtype, flat.device)
    begin = first % _ROWS
    if begin + number <= _ROWS:
        columns = _product(rows, weights[begin : begin + number])
    else:
        columns = flat.new_zeros(_WIDTH)
        at = 0
        while at < number:
            begin = (first + at) % _ROWS
            some = min(number - at, _ROWS - begin)
            columns.add_(_product(rows[:, at : at + some], weights[begin : begin + some]))
            at += some
    if left:
        columns[:left].add_(flat[-left:], alpha=_weight_of(first + number))
    return columns


def _weight_of(row: int) -> float:
    return _weights_of_rows()[1][row % _ROWS]


@functools.cache
def _weights_of_rows() -> tuple[Tensor, list[float]]:
    """Return weights of mean square 1, none of them small: a row must not be hidden by its weight."""
    with torch.inference_mode(False), torch.device("cpu"):
        generator = torch.Generator().manual_seed(1)
        sizes, signs = torch.rand(2, _ROWS, generator=generator, dtype=torch.float64)
        weights = (0.5 + sizes) * (signs - 0.5).sign() / math.sqrt(13 / 12)
    return weights, weights.tolist()


@functools.lru_cache(maxsize=64)
def _row_weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _weights_of_rows()[0].to(device, dtype)


def _norm_of(values: Tensor, dtype: torch.dtype, of: Callable[[Tensor], Tensor] | None) -> Tensor:
    if of is None and values.dtype is dtype and values.is_contiguous():
        flat = values.view(-1)
        if not forms_of(flat.device).dot_norms:
            norm: Tensor = torch.linalg.vector_norm(flat)
            return norm
        squares = [torch.dot(piece, piece) for piece in torch.split(flat, _LONG)]
        return torch.stack(squares).sum().sqrt()
    pieces = pieces_of(values, limit_of(values))
    norms = [torch.linalg.vector_norm((piece if of is None else of(piece)).to(dtype)) for piece in pieces]
    return torch.stack(norms).square().sum().sqrt()


@functools.lru_cache(maxsize=1024)
def _first_weights(dtype: torch.dtype, number: int) -> Tensor:
    return _row_weights(dtype, _CPU)[:number]


@functools.lru_cache(maxsize=1024)
def _columns(dtype: torch.dtype, device: torch.device, size: int) -> Tensor:
    """Return the first columns of a device's directions."""
    return _direction(dtype, device)[:, :size]


def _direction(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return pseudo-random directions [projections, elements], the same in every process."""
    known = _directions.get((dtype, device))
    if known is None:
        with torch.inference_mode(False), torch.device("cpu"):
            generator = torch.Generator().manual_seed(0)
            known = torch.randn(PROJECTIONS, _DIRECT, generator=generator, dtype=torch.float64).to(device, dtype)
        _directions[dtype, device] = known
    return known


for _type in (torch.float32, torch.float64):  # now, so that nobody takes them for what a frame keeps
    _direction(_type, torch.device("cpu"))
    _row_weights(_type, torch.device("cpu"))
