"""PNA with histories, and with jumping knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recollect.models._pna_layer import PNALayer
from recollect.models._stack import ConvStack, State

__all__ = ["PNA", "PNA_JK"]


class PNA(ConvStack):
    """Principal neighbourhood aggregation (Corso et al., arXiv 2004.05718); see :class:`PNALayer` for the formula.

    Args:
        num_nodes: of the whole graph, N.
        in_channels: of the features.
        hidden_channels: of the layers; also a number for each layer but the last.
        out_channels: classes, or labels.
        num_layers: convolutions, L.
        aggregators: of ``max``, ``mean``, ``min``, ``std``, ``sum``, ``var``.
        scalers: of ``identity``, ``amplification``, ``attenuation``, ``linear``, ``inverse_linear``.
        deg: the in-degree of every node of the training graph, which may be another than the N nodes, for the scalers'
            means: ``adj_t.crow_indices().diff()``. (Not a histogram, as torch_geometric's PNAConv takes.)
        dropout: probability in [0, 1), before each layer.
        drop_input: apply dropout to the features too.
        batch_norm: normalise each convolution's output, but not the logits.
        residual: add a layer's input to the convolution's output, where they are of the same width.
        pool_size: as ``buffer_size`` and ``device`` of :class:`~recollect.autoscale.ScalableGNN`.
        buffer_size: see there.
        device: see there.
        edge_dim: features of each edge. Calls then take ``edge_attr=`` [num_edges, edge_dim], in the adjacency's order.
        **options: of :class:`~recollect.autoscale.ScalableGNN`, by name.

    Raises:
        ValueError: a number is out of its range, or a name unknown.

    Example:
        >>> from recollect.autoscale import get_data
        >>> from recollect.models import PNA
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> degrees = data.adj_t.crow_indices().diff()
        >>> options = {"aggregators": ["mean", "max"], "scalers": ["identity", "amplification"], "deg": degrees}
        >>> model = PNA(data.num_nodes, in_channels, 8, out_channels, num_layers=2, **options)
        >>> model(data.x, data.adj_t).shape
        torch.Size([34, 4])
    """

    sums_over_edges = False
    _head = False

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        out_channels: int,
        num_layers: int,
        aggregators: Sequence[str],
        scalers: Sequence[str],
        deg: Tensor,
        dropout: float = 0.0,
        drop_input: bool = True,
        batch_norm: bool = False,
        residual: bool = False,
        pool_size: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        *,
        edge_dim: int | None = None,
        **options: Any,
    ) -> None:
        if deg.dim() != 1:
            raise ValueError(
                f"deg has shape {list(deg.shape)}, but must be [nodes]: the in-degree of each node of the training "
                "graph, adj_t.crow_indices().diff()"
            )
        super().__init__(
            num_nodes,
            in_channels,
            hidden_channels,
            out_channels,
            num_layers,
            make_conv=lambda _, channels_in, channels_out: PNALayer(
                channels_in, channels_out, aggregators, scalers, deg, edge_dim
            ),
            dropout=dropout,
            drop_input=drop_input,
            batch_norm=batch_norm,
            residual=residual,
            head=self._head,
            pool_size=pool_size,
            buffer_size=buffer_size,
            device=device,
            **options,
        )
        self.inputs = () if edge_dim is None else ("edge_attr",)

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """See :class:`PNALayer`."""
        out: Tensor = self.convs[layer](x, adj_t, state.get("edge_attr"))
        return out


class PNA_JK(PNA):  # noqa: N801  # the name that it has in the paper's code
    """PNA between two linear maps, the last of which sees all layers (jumping knowledge, Xu et al., arXiv 1806.03536).

    It takes the arguments of :class:`PNA`; ``hidden_channels`` is one number.

    Example:
        >>> from recollect.autoscale import get_data
        >>> from recollect.models import PNA_JK
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> degrees = data.adj_t.crow_indices().diff()
        >>> options = {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": degrees}
        >>> model = PNA_JK(data.num_nodes, in_channels, 8, out_channels, num_layers=2, **options)
        >>> model(data.x, data.adj_t).shape, model.lins[1].in_features  # of 3 times 8 channels
        (torch.Size([34, 4]), 24)
    """

    _head = True

    def make_head(self, in_channels: int, hidden_channels: int, out_channels: int) -> list[nn.Module]:
        """Return a map to the first layer, with a ReLU, and one from the first layer's input and all outputs."""
        norm = nn.BatchNorm1d(hidden_channels) if self.batch_norm else nn.Identity()
        return [
            nn.Sequential(nn.Linear(in_channels, hidden_channels), norm, nn.ReLU()),
            nn.Linear((self.num_layers + 1) * hidden_channels, out_channels),
        ]

    def enter(self, x: Tensor, num_targets: int, state: State) -> Tensor:
        """Return the first map's output."""
        out: Tensor = self.lins[0](self.drop(x) if self.drop_input else x)
        state["layers"] = (out[:num_targets],)
        return out

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """See :class:`~recollect.autoscale.ScalableGNN`."""
        out = super().forward_layer(layer, x, adj_t, state)
        if layer < self.num_layers - 1:
            state["layers"] = (*state["layers"], out)
        return out

    def leave(self, x: Tensor, state: State) -> Tensor:
        """Return the logits, of all layers."""
        out: Tensor = self.lins[1](self.drop(torch.cat([*state["layers"], x], dim=-1)))
        return out
