"""Weights that do not look at the gradients: mean, sum, constant, random."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect.aggregation._settings import Vector
from recollect.aggregation._settings import generator as a_generator
from recollect.aggregation._weighting import Weighting

__all__ = ["ConstantWeighting", "MeanWeighting", "RandomWeighting", "SumWeighting"]


class MeanWeighting(Weighting):
    """1 / m for each objective: what training on the mean loss does.

    Example:
        >>> import torch
        >>> from recollect.aggregation import MeanWeighting
        >>> MeanWeighting()(torch.eye(4))
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        return torch.full_like(gramian[0], 1 / len(gramian))


class SumWeighting(Weighting):
    """1 for each objective: what training on the sum of the losses does.

    Example:
        >>> import torch
        >>> from recollect.aggregation import SumWeighting
        >>> SumWeighting()(torch.eye(3))
        tensor([1., 1., 1.])
    """

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        return torch.ones_like(gramian[0])


class ConstantWeighting(Weighting, settings={"weights": Vector(negative=True, optional=False)}):
    """Weights that were chosen beforehand (scalarisation).

    Args:
        weights: ``[m]``, finite.

    Raises:
        TypeError: they are no tensor.
        ValueError: another shape, or numbers that are not finite; at the call, a Gramian of another size.

    Example:
        >>> import torch
        >>> from recollect.aggregation import ConstantWeighting
        >>> ConstantWeighting(torch.tensor([0.3, 0.7]))(torch.eye(2))
        tensor([0.3000, 0.7000])
    """

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        if len(self.weights) != len(gramian):
            raise ValueError(f"weights are for {len(self.weights)} objectives; the Gramian has {len(gramian)}")
        return self.weights


class RandomWeighting(Weighting, settings={"generator": a_generator}):
    """Other positive weights at each call, which sum to one: the softmax of normal numbers.

    Random gradient weighting, algorithm 2 of "Reasonable Effectiveness of Random Weighting" (Lin et al. 2022, arXiv
    2111.10603).

    Args:
        generator: where the numbers come from, and the device on which they are drawn; None: torch's own, on the CPU.

    Raises:
        TypeError: ``generator`` is none.

    Example:
        >>> import torch
        >>> from recollect.aggregation import RandomWeighting
        >>> weighting = RandomWeighting(torch.Generator().manual_seed(0))
        >>> first, second = weighting(torch.eye(3)), weighting(torch.eye(3))
        >>> round(first.sum().item(), 6), bool((first > 0).all()), bool((first == second).any())
        (1.0, True, False)
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``."""
        device = "cpu" if self.generator is None else self.generator.device
        dtype = torch.promote_types(gramian.dtype, torch.float32)
        return torch.randn(len(gramian), generator=self.generator, device=device, dtype=dtype).softmax(0)
