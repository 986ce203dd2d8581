"""Linear algebra on batches of matrices, in at least float32 whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["dual_of", "log_abs_det_of", "orthonormalise", "precisely", "random_orthonormal", "wide"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that linear algebra runs in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def precisely(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off for the body."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def random_orthonormal(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return [groups, rows, columns] matrices with orthonormal columns, uniformly distributed."""
    return orthonormalise(torch.randn(shape, device=device, dtype=wide(dtype)))


def orthonormalise(matrices: Tensor) -> Tensor:
    """Return the Q of the QR decomposition whose R has a positive diagonal: there is one."""
    q, r = torch.linalg.qr(matrices)
    negative: Tensor = r.diagonal(dim1=-2, dim2=-1) < 0
    flipped: Tensor = torch.where(negative.unsqueeze(-2), -q, q)
    return flipped


def dual_of(matrices: Tensor) -> Tensor:
    """Return D with Dᵀ W = I, the transpose of the (pseudo-)inverse, of free matrices W [groups, rows, columns]."""
    with precisely(matrices.device):
        matrices = matrices.to(wide(matrices.dtype))
        if matrices.size(-2) == matrices.size(-1):
            inverse: Tensor = torch.linalg.inv(matrices)
            return inverse.mT
        # W⁺ = R⁻¹ Qᵀ does not square the condition number as (WᵀW)⁻¹ Wᵀ would.
        q, r = torch.linalg.qr(matrices)
        dual: Tensor = torch.linalg.solve_triangular(r.mT, q, upper=False, left=False)
        return dual


def log_abs_det_of(matrices: Tensor) -> Tensor:
    """Return the sum over groups of log|det W| of free square matrices."""
    with precisely(matrices.device):
        logarithms: Tensor = torch.linalg.slogdet(matrices.to(wide(matrices.dtype))).logabsdet
        return logarithms.sum()
