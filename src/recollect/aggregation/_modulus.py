"""A fast, rough answer to many linear complementarity problems at once: one matrix product a step."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._gramian import cholesky

__all__ = ["modulus"]

_BETWEEN = 5  # steps between two looks at what has changed: a look takes as long as a step or two


def modulus(matrix: Tensor, offset: Tensor, shift: Tensor, most: int = 40, unsettled: float = 0.05) -> Tensor:
    """Iterate towards ``z >= 0, y = H z + q >= 0, zᵀ y = 0`` for every row q, and return ``t`` with ``z = max(t, 0)``.

    With z = (|t| + t) / 2 and y = ρ (|t| - t) / 2 the conditions become (H + ρ) t = (ρ - H) |t| - 2 q, which is
    iterated as it stands: the modulus-based iteration of Bai 2010, equation 2.4 ("Modulus-based matrix splitting
    iteration methods for linear complementarity problems"), and also Peaceman-Rachford splitting (ADMM without
    relaxation) on the quadratic program. It converges for every positive definite H and ρ > 0.

    Args:
        matrix: H ``[m, m]``, symmetric positive definite.
        offset: q, one problem a row, ``[r, m]``.
        shift: ρ, 0-D; the geometric mean of H's eigenvalues does well.
        most: steps at most.
        unsettled: share of rows whose set of positive entries may have changed since the last look, to stop.

    Returns:
        t ``[r, m]``.
    """
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cholesky_inverse(cholesky(matrix, added=shift)[0])
    step = 2 * shift * inverse - identity
    constant = -2 * offset @ inverse
    t, size = constant.clone(), torch.empty_like(constant)
    positive = t > 0
    for done in range(1, most + 1):
        torch.abs(t, out=size)
        torch.addmm(constant, size, step, out=t)
        if done % _BETWEEN == 0:
            before, positive = positive, t > 0
            if int((before != positive).any(1).count_nonzero()) <= unsettled * len(t):
                break
    return t
