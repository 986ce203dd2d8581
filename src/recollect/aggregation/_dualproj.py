"""DualProj: the average gradient, projected so that it minds no objective."""

from __future__ import annotations

from torch import Tensor

from recollect.aggregation._projecting import ProjectingWeighting

__all__ = ["DualProjWeighting"]


class DualProjWeighting(ProjectingWeighting):
    """Project the preferred combination of gradients onto the dual cone of all of them.

    Equation 11 of "Gradient Episodic Memory for Continual Learning" (Lopez-Paz and Ranzato 2017, arXiv 1706.08840),
    where the gradient of the present task is projected; here it is Jᵀ p for a preference p.

    Args:
        pref_vector: p ``[m]``, finite and not negative; None: 1 / m each.
        reg_eps: added to the diagonal of G / trace(G), so that the program has one solution; see
            :class:`UPGradWeighting`.

    Attributes:
        last_residual: how far from optimal the last call's program was, relative; rounding leaves about 1e-12. Above
            1e-6 the call warns. None before the first call.

    Raises:
        TypeError: ``pref_vector`` is no tensor.
        ValueError: a wrong ``pref_vector`` or a negative ``reg_eps``.

    Example:
        >>> import torch
        >>> from recollect.aggregation import DualProjWeighting
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> jacobian @ jacobian.mean(0)  # the mean gradient is bad for the first objective
        tensor([-2.,  8.])
        >>> weights = DualProjWeighting(reg_eps=0.0)(jacobian @ jacobian.T)
        >>> weights
        tensor([0.6111, 0.5000])
        >>> bool((jacobian @ (weights @ jacobian))[0].abs() < 1e-5)  # this update does not change it
        True
    """

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        return self.project(gramian, self.preference(gramian)[None])[0]
