"""Matrix products A Bᵀ, by the one of torch's two libraries for the CPU that takes less time.

torch computes dense products of float32 by the BLAS that it was built with, on x86 Intel's Math Kernel Library, and
convolutions and LSTMs by oneDNN. The former uses half of what processors of other makers can do. (Measured on an AMD
EPYC with AVX-512, one thread: 95 to 120 GFlop/s, where oneDNN does 200 to 255.) oneDNN has more to do in each call, and
lays one side anew; so it gets the large products there. On Intel's own processors it gets none. (Measured on a Xeon
with AVX-512, one thread: both 150 to 170 GFlop/s for large matrices; rows of 65 positions at 150 by the former and at
85 by oneDNN, copies included.) Sums are over the same numbers, and rounded no worse.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from recollect._devices import forms_of

__all__ = [
    "CALL",
    "batched_gain",
    "batched_product",
    "has_onednn",
    "is_at_full_speed",
    "is_by_onednn",
    "multiplier",
    "product",
]

# What oneDNN takes longer for, in multiplications that the time is worth. (Measured: a call 11 microseconds, an element
# of the right side that is laid anew 0.2 ns, or 0.4 ns where it is transposed. By the other library a multiplication
# takes 15 ps longer.)
CALL, _LAID, _TRANSPOSED = 3 * 2**18, 12, 28
# The same for an element that is copied to where it belongs, and for one of the left side that is made contiguous.
_COPIED, _TURNED = 24, 48


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return A Bᵀ [m, n] of matrices A [m, k] and B [n, k], with a vector [n] that is added to each row."""
    if is_by_onednn(left, right):
        return _onednn(left, right, bias)
    return left @ right.mT if bias is None else torch.addmm(bias, left, right.mT)


def multiplier(left: Tensor, right: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the :func:`product` with B as a function of A, for many matrices of the form of one."""
    if is_by_onednn(left, right):
        return functools.partial(_onednn, right=right)
    turned = right.mT
    return lambda matrix: matrix @ turned


def batched_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write A Bᵀ of each pair of matrices A [b, m, k] and B [b, n, k] to [b, m, n], and return it."""
    if not batched_gain(left, right):
        return torch.bmm(left, right.mT, out=out)
    for to, first, second in zip(out.unbind(), left.unbind(), right.unbind(), strict=True):
        to.copy_(_onednn(first, second))
    return out


def is_by_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether :func:`product` of these is by oneDNN."""
    if left.numel() * right.shape[0] <= CALL or not _has_onednn():
        return False
    return _is_for_onednn(left, right) and _gain(left, right) > 0


def batched_gain(left: Tensor, right: Tensor) -> int:
    """Return how many multiplications' time oneDNN saves for each pair of a :func:`batched_product`; 0: it is not used.

    Copying products to where they belong is counted.
    """
    if left.shape[1:].numel() * right.shape[1] <= CALL or not _is_for_onednn(left, right):
        return 0
    return max(0, _gain(left[0], right[0]) - _COPIED * left.shape[1] * right.shape[1])


def _gain(left: Tensor, right: Tensor) -> int:
    """Return how many multiplications the time is worth that oneDNN saves in a product."""
    (m, k), n = left.shape, len(right)
    if not _is_dense(right):
        return -1
    laid = (_LAID if right.mT.is_contiguous() else _TRANSPOSED) * n * k
    turned = 0 if left.is_contiguous() else (_LAID if left.stride(1) == 1 else _TURNED) * m * k
    return m * n * k - CALL - laid - turned


def has_onednn(tensor: Tensor) -> bool:
    """Whether large products of tensors like this one are by oneDNN."""
    return _is_for_onednn(tensor, tensor)


def _is_for_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether these are plain tensors of the kind that oneDNN multiplies, and it is there."""
    plain = type(left) is Tensor and type(right) is Tensor and len(right) > 0
    differentiated = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if not plain or differentiated or not (forms_of(left.device).onednn and forms_of(right.device).onednn):
        return False
    return left.dtype == right.dtype == torch.float32 and _has_onednn()


def _is_dense(matrix: Tensor) -> bool:
    """Whether the matrix, or its transpose, has its elements one behind the other: with others oneDNN is very slow."""
    return matrix.is_contiguous() or matrix.mT.is_contiguous()


def _has_onednn() -> bool:
    return _has_operation() and not is_at_full_speed() and bool(torch.backends.mkldnn.enabled)


@functools.cache
def is_at_full_speed() -> bool:
    """Whether torch's other products are by Intel's library on Intel's processor."""
    known = Path("/proc/cpuinfo")  # on other systems than Linux, Python's word for the processor has its maker
    processor = known.read_text(errors="replace") if known.exists() else platform.processor()
    has_mkl: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return has_mkl and "GenuineIntel" in processor


@functools.cache
def _has_operation() -> bool:
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    has = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return vectors and has and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(left, right, bias, "none", [], "")
    return found
