"""GAT with histories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect._arguments import as_count
from recollect.autoscale import edge_index_of
from recollect.models._stack import ConvStack, State

__all__ = ["GAT"]


class GAT(ConvStack):
    """Graph attention network (Veličković et al., arXiv 1710.10903, equations 3 to 6).

    Self-loops are added once, up front: ``data.adj_t = add_self_loops(data.adj_t)``. The weights of edges are not used.
    It needs torch_geometric.

    Args:
        num_nodes: of the whole graph, N.
        in_channels: of the features.
        hidden_channels: of each head of the layers but the last.
        hidden_heads: of the layers but the last; their outputs are concatenated.
        out_channels: classes, or labels. Without a default, though heads that come before it have one.
        out_heads: of the last layer; their outputs are averaged.
        num_layers: convolutions, L.
        dropout: probability in [0, 1), of each layer's input and of the attention.
        pool_size: as ``buffer_size`` and ``device`` of :class:`~recollect.autoscale.ScalableGNN`.
        buffer_size: see there.
        device: see there.
        batch_norm: normalise each convolution's output, but not the logits.
        residual: add a layer's input to the convolution's output, where they are of the same width.
        **options: of :class:`~recollect.autoscale.ScalableGNN`, by name.

    Raises:
        TypeError: there is no ``out_channels``.
        ValueError: a number is out of its range.
        ImportError: torch_geometric is missing.

    Example:
        >>> from recollect.autoscale import add_self_loops, get_data
        >>> from recollect.models import GAT
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> adj_t = add_self_loops(data.adj_t)
        >>> model = GAT(data.num_nodes, in_channels, hidden_channels=4, hidden_heads=2, out_channels=out_channels)
        >>> model(data.x, adj_t).shape
        torch.Size([34, 4])
    """

    sums_over_edges = False

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int,
        hidden_heads: int = 8,
        out_channels: int | None = None,
        out_heads: int = 1,
        num_layers: int = 2,
        dropout: float = 0.0,
        pool_size: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        *,
        batch_norm: bool = False,
        residual: bool = False,
        **options: Any,
    ) -> None:
        if out_channels is None:
            raise TypeError("GAT needs out_channels, the number of classes or labels")
        try:
            from torch_geometric.nn import GATConv
        except ImportError as error:
            raise ImportError("GAT needs torch_geometric: pip install 'torch-recollect[graph]'") from error

        hidden_heads, out_heads = as_count("hidden_heads", hidden_heads), as_count("out_heads", out_heads)

        def make_conv(layer: int, channels_in: int, channels_out: int) -> nn.Module:
            last = layer == num_layers - 1
            heads = out_heads if last else hidden_heads
            each = channels_out if last else channels_out // heads
            conv: nn.Module = GATConv(channels_in, each, heads, concat=not last, dropout=dropout, add_self_loops=False)
            return conv

        super().__init__(
            num_nodes,
            in_channels,
            as_count("hidden_channels", hidden_channels) * hidden_heads,
            out_channels,
            num_layers,
            make_conv=make_conv,
            dropout=dropout,
            batch_norm=batch_norm,
            residual=residual,
            activation=F.elu,
            pool_size=pool_size,
            buffer_size=buffer_size,
            device=device,
            **options,
        )

    @property
    def reg_modules(self) -> nn.ModuleList:
        """What the paper's code regularises by weight decay: all convolutions, and norms."""
        return nn.ModuleList([*self.convs, *self.bns])

    @property
    def nonreg_modules(self) -> nn.ModuleList:
        """Nothing."""
        return nn.ModuleList()

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """Attend from the targets to the sources."""
        targets = x[: adj_t.size(0)]
        out: Tensor = self.convs[layer]((x, targets), edge_index_of(adj_t), size=(x.size(0), targets.size(0)))
        return out
