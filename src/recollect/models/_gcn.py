"""GCN with histories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recollect.models._layers import GCNLayer
from recollect.models._stack import ConvStack

__all__ = ["GCN"]


class GCN(ConvStack):
    """Graph convolutional network (Kipf & Welling, arXiv 1609.02907, equation 2).

    A layer is H_l = relu(A H_(l-1) W_l + b_l) for the normalised adjacency A; logits have no ReLU.

    Its adjacency is normalised once, up front: ``data.adj_t = normalize(data.adj_t)``.

    Args:
        num_nodes: of the whole graph, N.
        in_channels: of the features.
        hidden_channels: of the layers; without ``linear`` also a number for each layer but the last.
        out_channels: classes, or labels.
        num_layers: convolutions, L.
        dropout: probability in [0, 1), before each layer.
        drop_input: apply dropout to the features too.
        batch_norm: normalise each convolution's output, but not the logits.
        residual: add a layer's input to the convolution's output, where they are of the same width.
        linear: a linear map before the first convolution and one after the last.
        pool_size: as ``buffer_size`` and ``device`` of :class:`~recollect.autoscale.ScalableGNN`.
        buffer_size: see there.
        device: see there.
        **options: its others, by name.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> from recollect.autoscale import get_data, normalize
        >>> from recollect.models import GCN
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> adj_t = normalize(data.adj_t)
        >>> model = GCN(data.num_nodes, in_channels, hidden_channels=8, out_channels=out_channels, num_layers=2)
        >>> model(data.x, adj_t).shape  # of the whole graph
        torch.Size([34, 4])
    """

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        out_channels: int,
        num_layers: int,
        dropout: float = 0.0,
        drop_input: bool = True,
        batch_norm: bool = False,
        residual: bool = False,
        linear: bool = False,
        pool_size: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            num_nodes,
            in_channels,
            hidden_channels,
            out_channels,
            num_layers,
            make_conv=lambda _, channels_in, channels_out: GCNLayer(channels_in, channels_out),
            dropout=dropout,
            drop_input=drop_input,
            batch_norm=batch_norm,
            residual=residual,
            head=linear,
            pool_size=pool_size,
            buffer_size=buffer_size,
            device=device,
            **options,
        )
