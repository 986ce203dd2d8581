"""PCGrad: every gradient gives way to those it conflicts with."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect._transfer import sent
from recollect.aggregation._gramian import normalized
from recollect.aggregation._settings import generator as a_generator
from recollect.aggregation._weighting import Weighting

__all__ = ["PCGradWeighting", "random_orders"]


class PCGradWeighting(Weighting, settings={"generator": a_generator}):
    """Project each gradient onto the normal plane of every other that it conflicts with, one after the other; sum.

    Algorithm 1 of "Gradient Surgery for Multi-Task Learning" (Yu et al. 2020, arXiv 2001.06782). The others come in a
    random order, a new one for each gradient. All gradients take their steps together: m steps, not m².

    Args:
        generator: where the orders come from, and the device on which they are drawn and steps are taken; None:
            torch's own, on the CPU.

    Raises:
        TypeError: ``generator`` is none.

    Example:
        >>> import torch
        >>> from recollect.aggregation import PCGradWeighting
        >>> jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> weights = PCGradWeighting()(jacobian @ jacobian.T)
        >>> weights @ jacobian  # [0.5, 0.5] of the first, [0, 1] of the second
        tensor([0.5000, 1.5000])
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        count = len(gramian)
        orders = random_orders(count, self.generator)
        matrix = sent(normalized(gramian), orders.device)
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


def random_orders(count: int, generator: torch.Generator | None, *, without_self: bool = False) -> Tensor:
    """Draw an order of all objectives, or of all others, for each of them.

    Returns:
        ``[count, count]``, or ``[count - 1, count]``; a column for each objective, on the generator's device.
    """
    device = "cpu" if generator is None else generator.device
    length = count - without_self
    orders = torch.stack([torch.randperm(length, generator=generator, device=device) for _ in range(count)], dim=1)
    return orders + (orders >= torch.arange(count, device=device)) if without_self else orders
