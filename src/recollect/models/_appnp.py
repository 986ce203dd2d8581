"""APPNP with histories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recollect._arguments import as_count
from recollect.autoscale import ScalableGNN, propagate
from recollect.models._dropout import dropout
from recollect.models._stack import State, check_alpha, check_dropout, check_features

__all__ = ["APPNP"]


class APPNP(ScalableGNN):
    """Predict, then propagate by personalised PageRank (Gasteiger et al., arXiv 1810.05997, equation 5).

    H_0 = f(X) with two linear maps; H_l = (1 - alpha) A H_(l-1) + alpha H_0. Its histories are as wide as its output.
    Its adjacency is normalised once, up front: ``data.adj_t = normalize(data.adj_t)``.

    Args:
        num_nodes: of the whole graph, N.
        in_channels: of the features.
        hidden_channels: between the two linear maps.
        out_channels: classes, or labels.
        num_layers: propagations, L.
        alpha: probability of returning to the node itself.
        dropout: probability in [0, 1), before each linear map.
        pool_size: as ``buffer_size`` and ``device`` of :class:`~recollect.autoscale.ScalableGNN`.
        buffer_size: see there.
        device: see there.
        **options: its others, by name.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> from recollect.autoscale import get_data, normalize
        >>> from recollect.models import APPNP
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> adj_t = normalize(data.adj_t)
        >>> model = APPNP(data.num_nodes, in_channels, hidden_channels=8, out_channels=out_channels, num_layers=10)
        >>> model(data.x, adj_t).shape, model.histories[0].embedding_dim
        (torch.Size([34, 4]), 4)
    """

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        alpha: float = 0.1,
        dropout: float = 0.0,
        pool_size: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        out_channels = as_count("out_channels", out_channels)
        super().__init__(num_nodes, out_channels, num_layers, pool_size, buffer_size, device, **options)
        check_dropout(dropout)
        check_alpha(alpha)
        self.in_channels = in_channels = as_count("in_channels", in_channels)
        hidden_channels = as_count("hidden_channels", hidden_channels)
        self.out_channels = out_channels
        self.alpha = alpha
        self.dropout = dropout
        self.lins = nn.ModuleList([nn.Linear(in_channels, hidden_channels), nn.Linear(hidden_channels, out_channels)])

    @property
    def reg_modules(self) -> nn.ModuleList:
        """What the paper's code regularises by weight decay: the first linear map."""
        return nn.ModuleList(self.lins[:1])

    @property
    def nonreg_modules(self) -> nn.ModuleList:
        """The other one."""
        return nn.ModuleList(self.lins[1:])

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """See :class:`~recollect.autoscale.ScalableGNN`."""
        if layer == 0:
            check_features(x, self.in_channels)
            x = self.lins[0](dropout(x, self.dropout, self.training)).relu()
            x = self.lins[1](dropout(x, self.dropout, self.training))
            state["x_0"] = x[: adj_t.size(0)]
        x_0: Tensor = state["x_0"]
        return (1 - self.alpha) * propagate(adj_t, x) + self.alpha * x_0
