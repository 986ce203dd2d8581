"""Slow and obvious: every set of active constraints is tried."""

from __future__ import annotations

from itertools import chain, combinations

import torch
from torch import Tensor


def subsets(m: int) -> list[list[int]]:
    return [list(s) for s in chain.from_iterable(combinations(range(m), k) for k in range(m + 1))]


def complementary(matrix: Tensor, offset: Tensor) -> Tensor:
    """Find the z >= 0 with H z + q >= 0 and zᵀ (H z + q) = 0, for one q, among all 2^m sets of positive entries."""
    best, violation = torch.zeros_like(offset), torch.inf
    for positive in subsets(len(offset)):
        z = torch.zeros_like(offset)
        if positive:
            z[positive] = torch.linalg.solve(matrix[positive][:, positive], -offset[positive])
        worst = float(-torch.minimum(z, matrix @ z + offset).amin())
        if worst < violation:
            best, violation = z, worst
    return best


def projection(gramian: Tensor, vector: Tensor, reg_eps: float = 1e-4) -> Tensor:
    """Minimise vᵀ G v over v >= u, with G normalised and regularised."""
    matrix = gramian / gramian.diagonal().sum() + reg_eps * torch.eye(len(gramian)).double()
    return vector + complementary(matrix, matrix @ vector)


def shortest(gramian: Tensor) -> Tensor:
    """Minimise wᵀ G w over w >= 0 with sum 1."""
    best, value = torch.zeros(len(gramian)).double(), torch.inf
    for support in subsets(len(gramian))[1:]:
        k = len(support)
        system = torch.ones(k + 1, k + 1).double()
        system[:k, :k] = gramian[support][:, support]
        system[k, k] = 0
        target = torch.zeros(k + 1).double()
        target[k] = 1
        w = torch.zeros(len(gramian)).double()
        w[support] = torch.linalg.lstsq(system, target, driver="gelsd").solution[:k]
        if (w >= -1e-9).all() and abs(w.sum() - 1) < 1e-6 and w @ gramian @ w < value:
            best, value = w, float(w @ gramian @ w)
    return best
