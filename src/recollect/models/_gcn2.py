"""GCNII with histories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.models._layers import GCN2Layer
from recollect.models._stack import ConvStack, State, check_alpha

__all__ = ["GCN2"]


class GCN2(ConvStack):
    """GCNII, a graph convolutional network that may be deep (Chen et al., arXiv 2007.02133, equation 5).

    Its adjacency is normalised once, up front: ``data.adj_t = normalize(data.adj_t)``.

    Args:
        num_nodes: of the whole graph, N.
        in_channels: of the features.
        hidden_channels: of the layers.
        out_channels: classes, or labels.
        num_layers: convolutions, L.
        alpha: share of the first layer's input in each layer.
        theta: of the strength log(theta / layer + 1) of a layer's weight.
        shared_weights: the neighbours and the first layer's input have one weight in each layer.
        dropout: probability in [0, 1).
        drop_input: apply dropout to the features too.
        batch_norm: normalise each convolution's output.
        residual: add a layer's input to the convolution's output.
        pool_size: as ``buffer_size`` and ``device`` of :class:`~recollect.autoscale.ScalableGNN`.
        buffer_size: see there.
        device: see there.
        **options: its others, by name.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> from recollect.autoscale import get_data, normalize
        >>> from recollect.models import GCN2
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> adj_t = normalize(data.adj_t)
        >>> model = GCN2(data.num_nodes, in_channels, hidden_channels=8, out_channels=out_channels, num_layers=16)
        >>> model(data.x, adj_t).shape
        torch.Size([34, 4])
    """

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        alpha: float = 0.1,
        theta: float = 0.5,
        shared_weights: bool = True,
        dropout: float = 0.0,
        drop_input: bool = True,
        batch_norm: bool = False,
        residual: bool = False,
        pool_size: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        check_alpha(alpha)
        if theta <= 0:
            raise ValueError(f"theta must be above 0 (got {theta})")
        super().__init__(
            num_nodes,
            in_channels,
            hidden_channels,
            out_channels,
            num_layers,
            make_conv=lambda layer, channels, _: GCN2Layer(channels, alpha, theta, layer + 1, shared_weights),
            dropout=dropout,
            drop_input=drop_input,
            batch_norm=batch_norm,
            residual=residual,
            head=True,
            pool_size=pool_size,
            buffer_size=buffer_size,
            device=device,
            **options,
        )
        self.alpha = alpha
        self.theta = theta

    def enter(self, x: Tensor, num_targets: int, state: State) -> Tensor:
        """Keep the first layer's input, before dropout, for all layers."""
        if self.drop_input:
            x = self.drop(x)
        x = self.activation(self.lins[0](x))
        state["x_0"] = x[:num_targets]
        return self.drop(x)

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """See :class:`GCN2Layer`."""
        out: Tensor = self.convs[layer](x, state["x_0"], adj_t)
        return out
