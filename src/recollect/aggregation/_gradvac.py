"""GradVac: gradients are turned until they agree as much as they usually do."""

from __future__ import annotations

import torch
from torch import Tensor

from recollect._transfer import sent
from recollect.aggregation._gramian import correlations
from recollect.aggregation._pcgrad import random_orders
from recollect.aggregation._settings import POSITIVE, UNIT
from recollect.aggregation._settings import generator as a_generator
from recollect.aggregation._weighting import StatefulWeighting

__all__ = ["GradVacWeighting"]


class GradVacWeighting(StatefulWeighting, settings={"beta": UNIT, "eps": POSITIVE, "generator": a_generator}):
    r"""Add to each gradient of each other one what lifts their cosine to its moving average, one after the other; sum.

    Algorithm 1 of "Gradient Vaccine" (Wang et al. 2021, arXiv 2010.05874). Where the cosine :math:`\phi` between a
    gradient, as changed so far, and :math:`g_j` is below its target :math:`\hat\phi`, equation 3 adds
    :math:`\|g\| (\hat\phi \sqrt{1 - \phi^2} - \phi \sqrt{1 - \hat\phi^2}) / (\|g_j\| \sqrt{1 - \hat\phi^2})` times
    :math:`g_j`. Then :math:`\hat\phi` becomes :math:`(1 - \beta) \hat\phi + \beta \phi`. The others come in a random
    order, a new one for each gradient. All gradients take their steps together, m - 1 of them.

    Targets are zero at first. Those of a gradient that is zero stay as they are.

    Args:
        beta: how much of a target is new after a call, from 0 to 1.
        eps: the least sine of the angle to a target: targets near 1 would ask for weights without bounds.
        generator: where the orders come from, and the device on which they are drawn and steps are taken; None:
            torch's own, on the CPU.

    Attributes:
        state: the targets ``[m, m]``, a row for each gradient that is changed; None before the first call.

    Raises:
        TypeError: a setting is of another type.
        ValueError: ``beta`` is not from 0 to 1, or ``eps`` is not positive; at the call, another number of objectives
            than in the calls before.

    Example:
        >>> import torch
        >>> from recollect.aggregation import GradVacWeighting
        >>> jacobian = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> weighting = GradVacWeighting(beta=0.5)
        >>> weighting(jacobian @ jacobian.T)  # the first targets are zero: as PCGrad
        tensor([2.0000, 1.5000])
        >>> weighting.state[0, 1]  # half of the cosine, -0.7071
        tensor(-0.3536, dtype=torch.float64)
    """

    def __init__(self, beta: float = 0.5, eps: float = 1e-8, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.beta = beta
        self.eps = eps
        self.generator = generator

    def weigh(self, gramian: Tensor) -> Tensor:
        """Return the weights ``[m]``, and move the targets."""
        count = len(gramian)
        orders = random_orders(count, self.generator, without_self=True)
        cosines, norms = (sent(part, orders.device) for part in correlations(gramian))
        targets = self.recalled(torch.zeros_like(cosines)).clone()
        there = norms > 0
        rows = torch.arange(count, device=cosines.device)
        shares = torch.eye(count, dtype=cosines.dtype, device=cosines.device)  # of unit gradients, in each row's own
        products = cosines.clone()
        for others in orders:
            length = (shares * products).sum(1).clamp(min=0).sqrt()
            cosine = (products[rows, others] / torch.where(length > 0, length, 1.0)).clamp(-1, 1)
            target = targets[rows, others]
            both = there & there[others]
            sine, wanted = (1 - cosine**2).sqrt(), (1 - target**2).clamp(min=0).sqrt().clamp(min=self.eps)
            steps = torch.where(cosine < target, length * (target * sine / wanted - cosine), 0.0)
            shares[rows, others] += steps
            products += steps[:, None] * cosines[others]
            targets[rows, others] = torch.where(both, target + self.beta * (cosine - target), target)
        self.state = targets
        ratios = torch.where(there, norms / torch.where(there, norms, 1.0)[:, None], 0.0)
        return torch.where(there, (shares.T * ratios).sum(1), 1.0)
