"""GIN with histories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.models._layers import GINLayer
from recollect.models._stack import ConvStack, State

__all__ = ["GIN"]


class GIN(ConvStack):
    """Graph isomorphism network (Xu et al., arXiv 1810.00826, equation 4.1), with GNNAutoScale's regularisation.

    An expressive layer may magnify the error of a history. To keep it from that, GNNAutoScale adds to the loss how far
    each layer's output moves when its input is disturbed a little, ||f(h) - f(h + eps)||, from the second layer on
    (arXiv 2106.05609, section 4). Train with ``loss + weight * model.lipschitz_loss()``.

    Args:
        num_nodes: of the whole graph, N.
        in_channels: of the features.
        hidden_channels: of the layers.
        out_channels: classes, or labels.
        num_layers: convolutions, L.
        noise: standard deviation of eps in each channel; 0: no regularisation is computed.
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
        >>> from recollect.autoscale import get_data
        >>> from recollect.models import GIN
        >>> data, in_channels, out_channels = get_data(None, "karate")
        >>> model = GIN(data.num_nodes, in_channels, 8, out_channels, num_layers=2, noise=0.01)
        >>> out = model(data.x, data.adj_t)
        >>> out.shape, model.lipschitz_loss().item() > 0
        (torch.Size([34, 4]), True)
    """

    sums_over_edges = False

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        noise: float = 0.0,
        dropout: float = 0.0,
        drop_input: bool = False,
        batch_norm: bool = False,
        residual: bool = False,
        pool_size: int | None = None,
        buffer_size: int | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        if noise < 0:
            raise ValueError(f"noise must not be negative (got {noise})")
        super().__init__(
            num_nodes,
            in_channels,
            hidden_channels,
            out_channels,
            num_layers,
            make_conv=lambda _, channels_in, channels_out: GINLayer(channels_in, channels_out),
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
        self.noise = noise
        self._lipschitz: Tensor | None = None

    def lipschitz_loss(self) -> Tensor:
        """Return the regularisation of the last forward pass, a scalar: the mean over nodes, averaged over layers.

        It can be taken once, so that the model does not hold the pass's graph.

        Raises:
            RuntimeError: there is none: the last pass was not in training mode, ``noise`` is 0, or it was taken.
        """
        found, self._lipschitz = self._lipschitz, None
        if found is None:
            raise RuntimeError(
                "there is no Lipschitz loss: it comes from a forward pass in training mode of a GIN with noise > 0 "
                "and at least two layers, and can be taken once"
            )
        return found

    def conclude(self, state: State) -> None:
        """Take the regularisation of a pass."""
        self._lipschitz = state.get("lipschitz")

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """Convolve, and once more with noise in the input."""
        out = super().convolve(layer, x, adj_t, state)
        if layer and self.training and self.noise:
            moved = super().convolve(layer, x + self.noise * torch.randn_like(x), adj_t, state)
            distance = (moved - out).norm(dim=-1).mean() / (self.num_layers - 1)
            state["lipschitz"] = state["lipschitz"] + distance if "lipschitz" in state else distance
        return out
