"""Matrices with orthonormal columns: their inverse is their transpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from recollect.invertible._algebra import orthonormalise, precisely, wide
from recollect.invertible._parametrize import Matrices

__all__ = ["Cayley", "OrthonormalColumns"]


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
