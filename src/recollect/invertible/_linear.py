"""The linear layer with an inverse, and what it shares with convolutions: matrices on patches of the input."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.invertible._algebra import (
    LU,
    Cayley,
    Matrices,
    OrthonormalColumns,
    dual_of,
    log_abs_det_of,
    precisely,
    random_orthonormal,
)
from recollect.invertible._module import Module

__all__ = ["Linear", "MatrixModule", "Parametrization"]

Parametrization = Literal["orthogonal", "lu"] | None


class MatrixModule(Module):
    """y = W x + b for W of one matrix per group, and x from y by Wᵀ's, or rather its dual's, transpose.

    Subclasses extend one of torch's layers too, and say how matrices are applied.

    Args:
        *args: of the torch class.
        matrices: groups, rows, columns of what the torch class names ``weight``.
        parametrization: of the weight.
        scaled: whether an orthogonal weight has a scale per column.
        **kwargs: of :class:`Module` and the torch class.
    """

    matrices: Matrices | None
    bias: Any  # a tensor or None: torch's own layers do not agree on its type

    def __init__(
        self,
        *args: Any,
        matrices: tuple[int, int, int],
        parametrization: Parametrization,
        scaled: bool,
        **kwargs: Any,
    ) -> None:
        self._check(matrices, parametrization, scaled)
        super().__init__(*args, **kwargs)
        self.parametrization = parametrization
        self._shape = matrices
        weight = self._parameters["weight"]
        assert weight is not None
        if weight.is_complex():
            raise ValueError(f"{type(self).__name__} needs a real dtype (got {weight.dtype})")
        self._weight_shape = weight.shape
        made: Matrices | None = None
        if parametrization == "orthogonal":
            kind = Cayley if matrices[1] == matrices[2] else OrthonormalColumns
            made = kind(matrices, weight.device, weight.dtype, scaled)
        elif parametrization == "lu":
            made = LU(matrices, weight.device, weight.dtype)
        if made is not None:
            del self._parameters["weight"]
        self.matrices = made
        self.reset_parameters()

    @classmethod
    def _check(cls, matrices: tuple[int, int, int], parametrization: Any, scaled: bool) -> None:
        _, rows, columns = matrices
        if parametrization not in ("orthogonal", "lu", None):
            raise ValueError(
                f'{cls.__name__}: parametrization must be "orthogonal", "lu" or None (got {parametrization!r})'
            )
        if parametrization == "lu" and rows != columns:
            raise ValueError(
                f'{cls.__name__}: parametrization="lu" needs a square weight (got {rows} x {columns}); use '
                '"orthogonal" or None'
            )
        if scaled and parametrization != "orthogonal":
            raise ValueError(
                f'{cls.__name__}: scaled=True belongs to parametrization="orthogonal" (got {parametrization!r}, which '
                "has scales of its own)"
            )

    # The weight.

    @property
    def weight(self) -> Tensor:
        """The weight, of the torch layer's shape.

        A parameter without parametrisation; else computed, which costs about as much as multiplying two such
        matrices. Assigning to it changes what it is computed from.
        """
        matrices = self._modules.get("matrices")
        if matrices is not None:
            weight: Tensor = matrices()
            return weight.reshape(self._weight_shape)
        held = self._parameters.get("weight")
        if held is None:
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        return held

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._check_weight(value)
        assert self.matrices is not None  # else the weight is a parameter, and torch assigns it
        self.matrices.take(value.detach().reshape(self._shape))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.__dict__.get("_modules", {}).get("matrices") is not None:
            object.__setattr__(self, name, value)  # torch would register a parameter of that name
        else:
            super().__setattr__(name, value)

    # State dicts of torch's layers.

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *messages: Any
    ) -> None:
        weight, own = state_dict.get(f"{prefix}weight"), f"{prefix}matrices."
        if self.matrices is not None and weight is not None and not any(key.startswith(own) for key in state_dict):
            del state_dict[f"{prefix}weight"]
            state = self.matrices.state_dict()
            try:
                state = self._matrices_of(weight).state_dict()
            except ValueError as error:
                messages[-1].append(f"{prefix}weight: {error}")
            state_dict.update({f"{own}{name}": value for name, value in state.items()})
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *messages)

    def _matrices_of(self, weight: Tensor) -> Matrices:
        """Return matrices of the layer's kind that equal a weight of torch's layer."""
        assert self.matrices is not None
        self._check_weight(weight)
        made = copy.deepcopy(self.matrices).to_empty(device=weight.device)
        made.take(weight.detach().reshape(self._shape))
        return made

    def _check_weight(self, value: Any) -> None:
        if not isinstance(value, Tensor) or value.shape != self._weight_shape:
            found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{type(self).__name__}: weight must be a tensor of shape {list(self._weight_shape)} (got {found})"
            )

    def torch_state_dict(self) -> dict[str, Tensor]:
        """Return weight and bias for torch's layer of the same name, whatever the parametrisation.

        The other way, ``load_state_dict`` takes the state of torch's layer: a weight that the parametrisation cannot
        become is an error. Without parametrisation ``state_dict`` itself is that of torch's layer.
        """
        state = {"weight": self.weight.detach()}
        return state if self.bias is None else {**state, "bias": self.bias.detach()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a weight with orthonormal columns in each group, uniformly, and torch's bias: uniform, 1/√columns."""
        if not hasattr(self, "matrices"):  # the torch class's __init__ comes first
            return
        reference = self.bias if self.bias is not None else next(self.parameters())
        drawn = random_orthonormal(self._shape, reference.device, reference.dtype)
        if self.matrices is None:
            self.weight.copy_(drawn.reshape(self._weight_shape))
        elif not reference.is_meta:
            self.matrices.take(drawn)
        if self.bias is not None:
            bound = 1 / math.sqrt(self._shape[2])
            nn.init.uniform_(self.bias, -bound, bound)

    # The direction back.

    def _apply_dual(self, y: Tensor, dual: Tensor) -> Tensor:
        """Return what the transpose of ``dual``, of the weight's shape, makes of the outputs less the bias."""
        raise NotImplementedError

    def _positions(self, y: Tensor) -> int:
        """Return to how many places of one batch element the matrices are applied."""
        raise NotImplementedError

    def _spread(self, bias: Tensor) -> Tensor:
        """Return the bias in a shape that fits the outputs."""
        return bias

    @property
    def reversible(self) -> bool:
        """Whether the matrices are square."""
        return self._shape[1] == self._shape[2]

    def inverse(self, y: Tensor) -> Tensor:
        """Return x for y = W x + b; for other y and more outputs than inputs, the least-squares solution.

        Under autocast it runs in float32 all the same.
        """
        with precisely(y.device):
            dual = self.matrices.dual() if self.matrices is not None else dual_of(self.weight.reshape(self._shape))
            rest = y.to(torch.promote_types(y.dtype, dual.dtype))
            if self.bias is not None:
                rest = rest - self._spread(self.bias.to(dual.dtype))
            x = self._apply_dual(rest, dual.reshape(self._weight_shape))
        return x.to(torch.promote_types(y.dtype, next(self.parameters()).dtype))

    def function_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, and the number of positions times the sum of log|det W| over groups, of shape [batch]."""
        y: Tensor = self.function(x)
        return y, self._log_det(y)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the inverse's log|det| of shape [batch]."""
        return self.inverse(y), -self._log_det(y)

    def _log_det(self, y: Tensor) -> Tensor:
        _, rows, columns = self._shape
        if rows != columns:
            raise NotImplementedError(
                f"{type(self).__name__} has no log-determinant: its weight is not square ({rows} x {columns})"
            )
        positions = self._positions(y)
        if self.matrices is not None:
            one = self.matrices.log_abs_det()
        else:
            one = log_abs_det_of(self.weight.reshape(self._shape))
        return (positions * one).repeat(y.size(0))

    def extra_repr(self) -> str:
        """Return the torch class's settings, the parametrisation and the flags."""
        return f"parametrization={self.parametrization!r}, {super().extra_repr()}"


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
