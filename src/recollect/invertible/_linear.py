"""The linear layer with an inverse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.invertible._matrix import MatrixModule, Parametrization

__all__ = ["Linear"]


class Linear(MatrixModule, nn.Linear):
    r"""The linear layer y = W x + b, whose inverse is x = W⁺ (y - b).

    ==================  ================================  =======================  =====================
    ``parametrization`` W                                 W⁺                       log\|det W\|
    ==================  ================================  =======================  =====================
    ``"orthogonal"``    Q, or with ``scaled``             Qᵀ, or                   0, or
                        Q diag(exp(s))                    diag(exp(-s)) Qᵀ         sum s
    ``"lu"``            P L (U + diag(sign exp(log_s)))   two triangular solves    sum log_s
    ``None``            a free parameter                  inverse or QR            from an LU of it
    ==================  ================================  =======================  =====================

    An orthogonal weight keeps lengths, in both directions: deep stacks neither explode nor drift. It stands for
    rotations and reflections only; ``scaled`` adds a positive scale for each input. The LU form is that of Glow
    (Kingma & Dhariwal 2018, arXiv 1807.03039, equation 10): P and the signs stay what they are at the beginning, all
    else is learned, so that the determinant never becomes zero. As with a free weight and with scales, nothing bounds
    the condition number, by which each layer multiplies rounding errors: watch ``last_drift`` in deep stacks.

    Square orthogonal weights are Cayley transforms of a skew-symmetric matrix; with more outputs than inputs, Q is
    that of a QR decomposition.

    The weight begins with orthonormal columns. It is computed where it is used, in at least float32, and kept by
    nobody: a training step computes it in the forward pass, in the inverse and in the rebuild.

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y, at least ``in_features``.
        bias: whether there is a b.
        parametrization: ``"orthogonal"``, ``"lu"`` (square only) or ``None``.
        scaled: whether an orthogonal weight has scales; they begin as one.
        device: of the parameters.
        dtype: of the parameters.
        **options: ``anchor_every`` and ``drift_threshold``; see :class:`Module`.

    Shapes:
        - x: [*, in_features]; y: [*, out_features].
        - log-determinant: [batch] for x [batch, *, in_features]: prod(*) log\|det W\|. Square weights only.

    Raises:
        ValueError: fewer outputs than inputs; a parametrisation that does not exist or does not fit.

    Example:
        >>> import torch
        >>> from recollect.invertible import Linear
        >>> layer = Linear(4, 4, parametrization="lu")
        >>> x = torch.randn(8, 4)
        >>> y, log_det = layer.forward_and_log_det(x)
        >>> torch.allclose(layer.inverse(y), x, atol=1e-5), log_det.shape
        (True, torch.Size([8]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        parametrization: Parametrization = "orthogonal",
        scaled: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if not 1 <= in_features <= out_features:
            raise ValueError(
                "an invertible Linear needs at least one input, and at least as many outputs as inputs (got "
                f"in_features={in_features}, out_features={out_features}): fewer do not tell all inputs apart"
            )
        super().__init__(
            in_features,
            out_features,
            bias,
            matrices=(1, out_features, in_features),
            parametrization=parametrization,
            scaled=scaled,
            device=device,
            dtype=dtype,
            **options,
        )

    def function(self, x: Tensor) -> Tensor:
        """Return W x + b."""
        return F.linear(x, self.weight, self.bias)

    def _apply_dual(self, y: Tensor, dual: Tensor) -> Tensor:
        return F.linear(y, dual.mT)

    def _positions(self, y: Tensor) -> int:
        if y.dim() < 2:
            raise ValueError(
                f"the log-determinant of a Linear needs a batch dimension: [batch, *, features] (got {list(y.shape)})"
            )
        return math.prod(y.shape[1:-1])
