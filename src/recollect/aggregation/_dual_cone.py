"""Projections onto the cone of directions that no objective minds, from the Gramian alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recollect.aggregation._complementarity import solve
from recollect.aggregation._gramian import correlations, normalized, regularized

__all__ = ["Projection", "equilibrated", "project"]

_LEAST = 1e-12  # least addition to the diagonal, so that rounding cannot make the matrix singular


@dataclass(frozen=True)
class Projection:
    """Projections of several vectors, as weights.

    Attributes:
        weights: V ``[r, m]`` in float64; Jᵀ V[k] is the projection of Jᵀ u[k].
        residual: how far the worst row is from optimal: the largest ``|min(v - u, G v)|`` in units in which every
            gradient has norm 1, relative to the row's largest entry. Rounding leaves about 1e-12.
    """

    weights: Tensor
    residual: float


def project(gramian: Tensor, vectors: Tensor, reg_eps: float) -> Projection:
    r"""Project Jᵀ u onto the dual cone of the rows of J, for every row u of ``vectors``, given G = J Jᵀ.

    Proposition 1 of "Jacobian Descent for Multi-Objective Optimization" (Quinton and Rey 2024, arXiv 2406.16232): the
    projection is Jᵀ v for the v that solves

    .. math:: \min_v v^\top G v \quad \text{subject to} \quad u \preceq v.

    G is divided by its trace, and ``reg_eps`` is added to its diagonal; where that is less than 1e-12, so much of each
    gradient's own square is added instead. All rows are solved together, in float64.

    Args:
        gramian: G ``[m, m]``, already checked.
        vectors: u ``[r, m]`` in float64, not negative.
        reg_eps: added to the diagonal of G / trace(G).

    Returns:
        The weights v, and how well they solve the programs.
    """
    matrix, factor, scale = equilibrated(gramian, reg_eps)
    lower = vectors / scale
    largest = lower.amax(1, keepdim=True)
    lower = lower / torch.where(largest > 0, largest, 1.0)
    above, residual = solve(matrix, factor, lower @ matrix)
    return Projection((lower + above) * largest * scale, residual)


def equilibrated(gramian: Tensor, reg_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise and regularise a Gramian, and scale it to a diagonal of ones.

    Returns:
        M ``[m, m]``, its Cholesky factor, and d ``[m]``: G / trace(G) + reg_eps I = diag(1 / d) M diag(1 / d). For
        v = d p, vᵀ G v is pᵀ M p.
    """
    if reg_eps < _LEAST:  # of the trace, even that would hide gradients which are much shorter than the longest
        cosines, norms = correlations(normalized(gramian))
        there = norms > 0
        matrix, factor = regularized(cosines + torch.diag(~there).to(cosines), _LEAST)
        return matrix, factor, 1 / torch.where(there, norms, 1.0)
    matrix, factor = regularized(normalized(gramian), reg_eps)
    scale = matrix.diagonal().rsqrt()
    across = scale[:, None]
    return matrix * across * scale, factor * across, scale
