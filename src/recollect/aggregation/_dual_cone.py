"""Projections onto the cone of directions that no objective minds, from the Gramian alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.aggregation._complementarity import solve
from recollect.aggregation._gramian import normalized

__all__ = ["Projection", "project"]

_NOTABLE = 1e-6  # residuals above this are told
_LEAST = 1e-12  # always added to the diagonal, so that rounding cannot make the matrix singular


@dataclass(frozen=True)
class Projection:
    """Projections of several vectors, as weights.

    Attributes:
        weights: V ``[r, m]`` in float64; Jᵀ V[k] is the projection of Jᵀ u[k].
        residual: how far the worst row is from optimal: the largest ``|min(v - u, H v)|`` in units in which every
            gradient has norm 1, relative to the row's largest entry. Rounding leaves about 1e-12.
    """

    weights: Tensor
    residual: float


def project(gramian: Tensor, vectors: Tensor, reg_eps: float) -> Projection:
    r"""Project Jᵀ u onto the dual cone of the rows of J, for every row u of ``vectors``, given G = J Jᵀ.

    Proposition 1 of "Jacobian Descent for Multi-Objective Optimization" (Quinton and Rey 2024, arXiv 2406.16232): the
    projection is Jᵀ v for the v that solves

    .. math:: \min_v v^\top G v \quad \text{subject to} \quad u \preceq v.

    G is divided by its trace, and ``reg_eps`` is added to its diagonal. All rows are solved together, in float64, on
    the Gramian's device.

    Args:
        gramian: G ``[m, m]``, already checked.
        vectors: u ``[r, m]`` in float64, not negative.
        reg_eps: added to the diagonal of G / trace(G).

    Returns:
        The weights v, and how well they solve the programs.
    """
    matrix = _regularized(normalized(gramian), reg_eps)
    # With v = d p, p solves the same program for a matrix whose diagonal is all ones and for u / d.
    scale = matrix.diagonal().rsqrt()
    matrix = matrix * scale[:, None] * scale
    lower = vectors / scale
    largest = lower.amax(1, keepdim=True)
    lower = lower / torch.where(largest > 0, largest, 1.0)
    above, residuals = solve(matrix, lower @ matrix)
    residual = float(residuals.amax())
    if residual > _NOTABLE:
        warnings.warn(
            f"the projection onto the dual cone is optimal only up to {residual:.1e} (rounding leaves 1e-12): the "
            f"Gramian is nearly singular; a reg_eps larger than {reg_eps:g} helps",
            RuntimeWarning,
            stacklevel=2,
        )
    return Projection((lower + above) * largest * scale, residual)


def _regularized(gramian: Tensor, reg_eps: float) -> Tensor:
    """Add ``reg_eps`` to the diagonal; a Gramian that rounding has left indefinite is mended first."""
    added = max(reg_eps, _LEAST)
    matrix = gramian + added * torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)
    if not bool(torch.linalg.cholesky_ex(matrix)[1]):
        return matrix
    values, vectors = torch.linalg.eigh(gramian)
    mended: Tensor = (vectors * (values.clamp(min=0) + added)) @ vectors.T
    return mended
