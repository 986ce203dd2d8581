"""Linear algebra in at least float32: log-determinants, and matrices whose inverse comes with them.

torch.nn.utils.parametrize is not used: modules that it has changed cannot be pickled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LU",
    "Cayley",
    "Matrices",
    "OrthonormalColumns",
    "channels_log_det",
    "dual_of",
    "log_abs_det_of",
    "orthonormalise",
    "precisely",
    "random_orthonormal",
    "values_log_det",
    "wide",
    "zero_log_det",
]


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


def zero_log_det(x: Tensor) -> Tensor:
    """Return that of what moves the values of x [batch, ...] without scaling them."""
    return torch.zeros(x.shape[:1], dtype=wide(x.dtype), device=x.device)


def values_log_det(log_slopes: Tensor) -> Tensor:
    """Return that of what scales each value alone, by the exponential of log_slopes [batch, ...]."""
    log_slopes = log_slopes.to(wide(log_slopes.dtype))
    return log_slopes.flatten(1).sum(1) if log_slopes.dim() > 1 else log_slopes


def channels_log_det(log_scales: Tensor, positions: int, batch: int) -> Tensor:
    """Return that of what scales each channel by the exponential of log_scales, at so many positions."""
    return (log_scales.sum(dtype=wide(log_scales.dtype)) * positions).expand(batch)


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


class _Orthogonal(Matrices):
    """W = Q diag(exp(log_scale)), where Q has orthonormal columns.

    Its pseudo-inverse is diag(exp(-log_scale)) Qᵀ. (With a scale of rows it would not be, for W that are not square.)

    Args:
        shape: groups, rows, columns.
        scaled: whether there is a scale; without, it is one.
        device: of the parameters.
        dtype: of the parameters.
    """

    log_scale: Tensor | None

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, scaled: bool = False
    ) -> None:
        super().__init__(shape, device, dtype)
        groups, _, columns = shape
        scale = nn.Parameter(torch.zeros(groups, columns, device=device, dtype=dtype)) if scaled else None
        self.register_parameter("log_scale", scale)

    def _orthonormal(self) -> Tensor:
        """Return Q, in at least float32."""
        raise NotImplementedError

    def _take_orthonormal(self, q: Tensor) -> None:
        raise NotImplementedError

    def forward(self) -> Tensor:
        """Return Q diag(exp(log_scale))."""
        return self._scaled(1).to(self._dtype)

    def dual(self) -> Tensor:
        """Return Q diag(exp(-log_scale))."""
        return self._scaled(-1)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _scaled(self, sign: int) -> Tensor:
        q = self._orthonormal()
        if self.log_scale is None:
            return q
        return q * (sign * self.log_scale.to(q.dtype)).exp().unsqueeze(-2)

    def log_abs_det(self) -> Tensor:
        """Return the sum of log_scale: |det Q| is one."""
        if self.log_scale is None:
            parameter = next(self.parameters())
            return torch.zeros((), device=parameter.device, dtype=wide(parameter.dtype))
        return self.log_scale.to(wide(self.log_scale.dtype)).sum()

    @torch.no_grad()
    def take(self, weight: Tensor) -> None:
        """Make W equal ``weight``, whose columns must be orthogonal, and of length one where there is no scale."""
        weight = weight.to(wide(self._dtype))
        scale = torch.linalg.vector_norm(weight, dim=-2) if self.log_scale is not None else None
        q = weight if scale is None else weight / scale.unsqueeze(-2)
        identity = torch.eye(self.shape[2], device=q.device, dtype=q.dtype)
        error = float((q.mT @ q - identity).abs().max())
        if not error <= torch.finfo(self._dtype).eps ** 0.5:
            found = "columns that are not orthonormal" if scale is None else "columns that are not orthogonal"
            other = "scaled=True for columns of any length, " if scale is None else ""
            raise ValueError(
                f"an orthogonal parametrization cannot become a weight with {found} (|WᵀW - I| is up to {error:.1e}); "
                f'use {other}parametrization="lu" for any invertible weight, or parametrization=None'
            )
        self._take_orthonormal(orthonormalise(q))
        if self.log_scale is not None and scale is not None:
            self.log_scale.copy_(scale.log())

    def extra_repr(self) -> str:
        """Return the shape and whether there is a scale."""
        return f"{super().extra_repr()}, scaled={self.log_scale is not None}"


class Cayley(_Orthogonal):
    """Square Q = B (I + A) (I - A)⁻¹ for A = (S - Sᵀ) / 2, S strictly lower triangular, and a fixed orthogonal base B.

    All orthogonal matrices with B's determinant, except those that turn B by exactly half a turn. Against the matrix
    exponential, torch's default, Q is orthogonal to the last digits at any size, and the gradient costs one more
    matrix product instead of an exponential of twice the size.
    """

    base: Tensor

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, scaled: bool = False
    ) -> None:
        super().__init__(shape, device, dtype, scaled)
        self.skew = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("base", torch.zeros(shape, device=device, dtype=wide(dtype)))

    def _orthonormal(self) -> Tensor:
        with precisely(self.skew.device):
            half = self.skew.to(wide(self.skew.dtype)).tril(-1) / 2
            identity = torch.eye(self.shape[2], device=half.device, dtype=half.dtype)
            # I - A has singular values of at least one: nothing to check, which on CUDA would wait for the device.
            inverse: Tensor = torch.linalg.inv_ex(identity - (half - half.mT)).inverse
            return self.base @ (2 * inverse - identity)  # (I + A)(I - A)⁻¹ = 2(I - A)⁻¹ - I

    @torch.no_grad()
    def _take_orthonormal(self, q: Tensor) -> None:
        self.base.copy_(q)
        self.skew.zero_()

    # Rounding to a narrower type and back leaves a base that is not orthogonal to the last digits any more, and then
    # the transpose of Q is not its inverse.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cayley:
        before = self.base
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.base
        if after.dtype != wide(after.dtype):
            source = after if before.is_meta else before
            self.base = source.to(device=after.device, dtype=wide(after.dtype))
        if self.base.dtype != before.dtype:
            self._mend()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._mend()

    @torch.no_grad()
    def _mend(self) -> None:
        if self.base.is_meta:
            return
        identity = torch.eye(self.shape[2], device=self.base.device, dtype=self.base.dtype)
        error = float((self.base.mT @ self.base - identity).abs().max())
        if error > 32 * torch.finfo(self.base.dtype).eps:
            self.base = orthonormalise(self.base)


class OrthonormalColumns(_Orthogonal):
    """Q of the QR decomposition of free columns C, for more rows than columns."""

    def __init__(
        self, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, scaled: bool = False
    ) -> None:
        super().__init__(shape, device, dtype, scaled)
        self.columns = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def _orthonormal(self) -> Tensor:
        with precisely(self.columns.device):
            return orthonormalise(self.columns.to(wide(self.columns.dtype)))

    @torch.no_grad()
    def _take_orthonormal(self, q: Tensor) -> None:
        self.columns.copy_(q)
