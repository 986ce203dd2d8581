"""Gauss-Newton steps for residuals, solved in the space of the residuals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from recollect.aggregation._gramian import check_tensor, checked, cholesky
from recollect.aggregation._settings import FRACTION, NOT_NEGATIVE, Configurable
from recollect.aggregation._weighting import checked_weights, fitted

__all__ = ["GaussNewtonWeighting", "ResidualWeighting"]

# A matrix of such a trace, or of its inverse, has no products beyond the range of float64.
_LEAST = 1e-100
# What rounding may leave of a pivot that is zero, for each row, in terms of the diagonal's entry.
_ROUNDING = torch.finfo(torch.float64).eps


class ResidualWeighting(Configurable, ABC):
    """A callable from the Gramian of m residuals' gradients, and the residuals, to m weights.

    Where a :class:`Weighting` knows how gradients lie, this also knows how large the objectives are. To write a method
    of your own, extend this class and define :meth:`weigh`.

    Attributes:
        takes_residuals: True: that is how callers tell these from weightings that take the Gramian alone.

    Example:
        >>> import torch
        >>> from recollect.aggregation import ResidualWeighting
        >>> class LeastSquares(ResidualWeighting):
        ...     def weigh(self, gramian, residuals, projection=None):
        ...         return residuals  # the gradient of half the sum of squares
        >>> LeastSquares()(torch.eye(2), torch.tensor([3.0, -1.0]))
        tensor([ 3., -1.])
    """

    takes_residuals: ClassVar[bool] = True

    if TYPE_CHECKING:  # a module's own takes and returns anything

        def __call__(self, gramian: Tensor, residuals: Tensor, projection: Tensor | None = None) -> Tensor: ...

    @torch.no_grad()
    def forward(self, gramian: Tensor, residuals: Tensor, projection: Tensor | None = None) -> Tensor:
        """Return the weights ``[m]``, in the Gramian's type and on its device, as :class:`Weighting` does.

        Args:
            gramian: J Jᵀ ``[m, m]``.
            residuals: r ``[m]``.
            projection: J φ ``[m]`` for the update φ before this one, for methods with momentum.

        Raises:
            TypeError: one of them is no tensor.
            ValueError: what a :class:`Weighting` refuses; residuals or a projection of another shape than [m], or not
                finite.
        """
        host, residuals, projection = self.on_host(gramian, residuals, projection)
        check_tensor("the Gramian", host)
        matrix = checked(host)
        given = [_checked_vector("residuals", residuals, matrix)]
        if projection is not None:
            given.append(_checked_vector("projection", projection, matrix))
        with torch.autocast("cpu", enabled=False):
            weights = self.weigh(matrix, *given)
        return fitted(checked_weights(weights, len(matrix), f"{type(self).__name__}.weigh"), gramian)

    @abstractmethod
    def weigh(self, gramian: Tensor, residuals: Tensor, projection: Tensor | None = None) -> Tensor:
        """Return the weights ``[m]`` for what has passed the checks, in host memory; the vectors are in float64."""


def _checked_vector(name: str, value: Tensor, gramian: Tensor) -> Tensor:
    check_tensor(name, value)
    if value.shape != gramian.shape[:1]:
        raise ValueError(f"{name} has the shape {list(value.shape)}; the Gramian is of {len(gramian)} objectives")
    if not value.is_floating_point() or not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite numbers of floating point; found {value.tolist()}")
    return value.double()


class GaussNewtonWeighting(ResidualWeighting, settings={"damping": NOT_NEGATIVE, "momentum": FRACTION}):
    r"""Make the update the Gauss-Newton step of :math:`\tfrac12 \|r\|^2`, damped as by Levenberg and Marquardt.

    :math:`w = (G + \lambda I)^{-1} r`, so that :math:`J^\top w = (J^\top J + \lambda I)^{-1} J^\top r`: the step of
    Levenberg (1944, equation 12) and Marquardt (1963), by a system of m equations in place of one for each parameter.
    For residuals that are the objectives, gradient descent with the learning rate 1 takes it.

    With a momentum μ it is the step of SPRING ("A Kaczmarz-inspired approach to accelerate the optimization of neural
    network wavefunctions", Goldshlager, Abrahamsen and Lin 2024, arXiv 2401.10190): :math:`w = (G + \lambda I)^{-1} (r
    - \mu J \varphi)` for the update φ before this one, and the new one is :math:`J^\top w + \mu \varphi`. The
    momentum buffer of ``torch.optim.SGD(momentum=μ)`` is this φ; what it projects onto the new gradients must be given.

    The system is solved by Cholesky's factors in float64. Without a damping, or where rounding has made the matrix
    singular, it is solved with the eigenvalues that are not zero up to the rounding of the Gramian's type: w is then
    the shortest of the solutions.

    Args:
        damping: λ, in the unit of squared gradient norms; may be assigned anew between steps, as a trust region does.
        momentum: μ, from 0 to below 1.

    Raises:
        TypeError: a setting is no number.
        ValueError: ``damping`` is negative or not finite, or ``momentum`` is not from 0 to below 1; at the call, a
            momentum without a projection.

    Example:
        >>> import torch
        >>> from recollect.aggregation import GaussNewtonWeighting
        >>> parameters = torch.zeros(2, requires_grad=True)
        >>> jacobian = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> residuals = jacobian @ parameters - torch.tensor([3.0, 1.0])
        >>> residuals.backward(GaussNewtonWeighting(damping=0.0)(jacobian @ jacobian.T, residuals))
        >>> torch.round(parameters - parameters.grad, decimals=3)  # where all residuals are zero
        tensor([1., 1.], grad_fn=<RoundBackward1>)
    """

    def __init__(self, damping: float, momentum: float = 0.0) -> None:
        super().__init__()
        self.damping = damping
        self.momentum = momentum

    def weigh(self, gramian: Tensor, residuals: Tensor, projection: Tensor | None = None) -> Tensor:
        """Return the weights ``[m]``."""
        if self.momentum:
            if projection is None:
                raise ValueError(
                    f"momentum is {self.momentum}: give projection, the product J φ of the new Jacobian with the "
                    "update before this one; before the first one, zeros"
                )
            residuals = residuals - self.momentum * projection
        trace = gramian.diagonal().sum(dtype=torch.float64).item()
        size = max(trace, self.damping) or 1.0
        if self.damping:
            unit = 1.0 if _LEAST < size < 1 / _LEAST else size
            factor, failed = cholesky(gramian, unit, self.damping / unit, torch.float64)
            # Pivots of rounding alone are not failures to the algorithm; what is solved with them is noise. Each is
            # what is left of its own entry: rows of another size have other pivots.
            entries = (gramian.diagonal().double() + self.damping) / unit
            if not failed and bool((factor.diagonal().square() > _ROUNDING * len(factor) * entries).all()):
                return torch.cholesky_solve(residuals[:, None], factor)[:, 0] / unit
        values, vectors = torch.linalg.eigh(gramian.double() / size)
        values = values.clamp(min=0) + self.damping / size
        there = values > len(values) * torch.finfo(gramian.dtype).eps * values[-1]
        found: Tensor = vectors @ torch.where(there, vectors.T @ residuals / values, 0.0) / size
        return found
