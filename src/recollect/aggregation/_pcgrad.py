"""PCGrad: every gradient gives way to those it conflicts with."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._gramian import normalized
from recollect.aggregation._weighting import Weighting

__all__ = ["PCGradWeighting"]


class PCGradWeighting(Weighting):
    """Project each gradient onto the normal plane of every other that it conflicts with, one after the other; sum.

    Algorithm 1 of "Gradient Surgery for Multi-Task Learning" (Yu et al. 2020, arXiv 2001.06782). The others come in a
    random order, a new one for each gradient. All gradients take their steps together: m steps, not m².

    Args:
        generator: where the orders come from, and the device on which they are drawn; None: torch's own, on the CPU.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        matrix = normalized(gramian)
        count = len(matrix)
        device = "cpu" if self.generator is None else self.generator.device
        draws = [torch.randperm(count, generator=self.generator, device=device) for _ in range(count)]
        orders = torch.stack(draws, dim=1).to(matrix.device)
        rows = torch.arange(count, device=matrix.device)
        squares = matrix.diagonal()
        weights = torch.eye(count, dtype=matrix.dtype, device=matrix.device)
        products = matrix.clone()  # of each changed gradient with each original one
        for others in orders:
            conflict = products[rows, others].clamp(max=0)
            conflict = torch.where((others == rows) | (squares[others] == 0), 0.0, conflict)
            steps = torch.where(conflict < 0, -conflict / squares[others], 0.0)
            weights[rows, others] += steps
            products += steps[:, None] * matrix[others]
        return weights.sum(0)
