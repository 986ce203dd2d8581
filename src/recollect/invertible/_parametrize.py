"""Matrices that are computed from parameters, so that the inverse and the determinant come with them.

torch.nn.utils.parametrize is not used: modules that it has changed cannot be pickled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recollect.invertible._algebra import precisely, wide

__all__ = ["LU", "Matrices"]


class Matrices(nn.Module):
    """A parametrised batch of matrices W [groups, rows, columns]; calling it returns W.

    Args:
        shape: groups, rows, columns; rows are at least columns.
        device: of the parameters.
        dtype: of the parameters and of W.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape

    def forward(self) -> Tensor:
        """Return W, of the parameters' dtype."""
        raise NotImplementedError

    def dual(self) -> Tensor:
        """Return D with Dᵀ W = I, in at least float32."""
        raise NotImplementedError

    def log_abs_det(self) -> Tensor:
        """Return the sum over groups of log|det W|, in at least float32."""
        raise NotImplementedError

    def take(self, weight: Tensor) -> None:
        """Make W equal ``weight``.

        Raises:
            ValueError: it cannot.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the shape."""
        return "groups={}, rows={}, columns={}".format(*self.shape)


class LU(Matrices):
    """W = P L (U + diag(sign * exp(log_s))) (Glow, Kingma & Dhariwal 2018, arXiv 1807.03039, equation 10).

    P is a fixed permutation, L unit lower triangular, U strictly upper triangular, sign fixed. They are packed into
    one parameter, as LAPACK packs them: L below the diagonal, log_s on it, U above. The log-determinant is sum log_s.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(shape, device, dtype)
        self.packed = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("permutation", torch.zeros(shape[:2], device=device, dtype=torch.int64))
        self.register_buffer("sign", torch.ones(shape[:2], device=device, dtype=dtype))

    def _factors(self) -> tuple[Tensor, Tensor]:
        packed = self.packed.to(wide(self.packed.dtype))
        identity = torch.eye(self.shape[2], device=packed.device, dtype=packed.dtype)
        diagonal = self.sign * packed.diagonal(dim1=-2, dim2=-1).exp()
        return packed.tril(-1) + identity, packed.triu(1) + torch.diag_embed(diagonal)

    def forward(self) -> Tensor:
        """Return P L (U + diag(sign * exp(log_s)))."""
        with precisely(self.packed.device):
            lower, upper = self._factors()
            return (lower @ upper).take_along_dim(self.permutation.unsqueeze(-1), dim=-2).to(self.packed.dtype)

    def dual(self) -> Tensor:
        """Return W⁻ᵀ, by two triangular solves."""
        with precisely(self.packed.device):
            lower, upper = self._factors()
            identity = torch.eye(self.shape[2], device=lower.device, dtype=lower.dtype)
            half = torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)
            inverse: Tensor = torch.linalg.solve_triangular(upper, half, upper=True)  # of L U, which is Pᵀ W
            return inverse.mT.take_along_dim(self.permutation.unsqueeze(-1), dim=-2)

    def log_abs_det(self) -> Tensor:
        """Return the sum of log_s."""
        return self.packed.diagonal(dim1=-2, dim2=-1).to(wide(self.packed.dtype)).sum()

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Make W equal ``weight``, which must be invertible."""
        pivots, lower, upper = torch.linalg.lu(weight.to(wide(self.packed.dtype)))
        diagonal = upper.diagonal(dim1=-2, dim2=-1)
        if not bool((diagonal != 0).all()):
            raise ValueError("an LU parametrization cannot become a singular weight (its determinant is 0)")
        packed = lower.tril(-1) + upper.triu(1) + torch.diag_embed(diagonal.abs().log())
        self.packed.copy_(packed)
        self.permutation.copy_(pivots.argmax(-1))
        self.sign.copy_(diagonal.sign())
