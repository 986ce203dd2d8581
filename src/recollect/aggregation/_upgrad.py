"""UPGrad: the average of all gradients, each projected so that it minds no objective."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._projecting import ProjectingWeighting

__all__ = ["UPGradWeighting"]


class UPGradWeighting(ProjectingWeighting):
    r"""Project every objective's gradient onto the dual cone of all of them, and average.

    :math:`w = \sum_i p_i v_i`, where :math:`J^\top v_i` is the projection :math:`\pi_J(g_i)` of gradient i onto the
    directions that lower no objective's descent: the aggregator UPGrad of "Jacobian Descent for Multi-Objective
    Optimization" (Quinton and Rey 2024, arXiv 2406.16232), with the projection of its equation 3 in the form of
    proposition 1. The update conflicts with no objective, scales linearly with each gradient (:math:`A(\mathrm{diag}(c)
    J)` is linear in :math:`c > 0`), and lies in the span of the gradients.

    All m quadratic programs are solved together, in float64.

    Args:
        pref_vector: p ``[m]``, finite and not negative; None: 1 / m each.
        reg_eps: added to the diagonal of G / trace(G), so that the programs have one solution each. The directions are
            free of conflict up to this: an objective whose squared gradient norm is less than this share of all is
            hardly protected. Below 1e-12, so much of each gradient's own square is added instead, and all objectives
            are protected, however small.

    Attributes:
        last_residual: how far from optimal the last call's worst program was, relative; rounding leaves about 1e-12.
            Above 1e-6 the call warns. None before the first call.

    Raises:
        TypeError: ``pref_vector`` is no tensor.
        ValueError: a wrong ``pref_vector`` or a negative ``reg_eps``.

    Example:
        >>> import torch
        >>> from recollect.aggregation import UPGradWeighting
        >>> jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> weights = UPGradWeighting()(jacobian @ jacobian.T)
        >>> bool((jacobian @ (weights @ jacobian) > 0).all())  # neither objective gets worse
        True
    """

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        # Programs are homogeneous: the one for p_i e_i has p_i times the solution for e_i.
        each = torch.eye(len(gramian), dtype=torch.float64, device=gramian.device)
        return self.preference(gramian) @ self.project(gramian, each)
