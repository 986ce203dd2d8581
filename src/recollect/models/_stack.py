"""What message-passing networks with histories have in common: everything but the convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recollect._arguments import as_count
from recollect.autoscale import ScalableGNN
from recollect.models._dropout import dropout
from recollect.models._layers import GCNLayer

__all__ = ["ConvStack"]

State = dict[str, Any]

_relu_backward = torch.ops.aten.threshold_backward.default
"""Of a gradient, what goes into or comes out of the ReLU, and 0; by autograd it takes one pass over memory more."""


class ConvStack(ScalableGNN):
    """Layers of (dropout, convolution, batch norm, residual, activation), alone or between two linear maps.

    Without a head the first convolution takes the features and the last one returns the logits, bare. With a head the
    convolutions all have ``hidden_channels`` and the whole of these steps; a linear map and an activation come before
    the first, dropout and a linear map after the last.

    Args:
        num_nodes: of the whole graph, N.
        in_channels: of the features.
        hidden_channels: of the layers; without a head also a number for each layer but the last.
        out_channels: classes, or labels.
        num_layers: convolutions, L.
        make_conv: makes the convolution of a layer (its number, channels in and out).
        dropout: probability in [0, 1).
        drop_input: apply dropout to the features too.
        batch_norm: normalise each convolution's output but a bare one's.
        residual: add a layer's input to the convolution's output, where they are of the same width.
        head: see above.
        activation: of every layer but a bare one.
        **options: from ``pool_size`` on, by name, of :class:`~recollect.autoscale.ScalableGNN`.

    Raises:
        ValueError: a number is out of its range.

    Attributes:
        sums_over_edges: whether a convolution is one, of something of each source, plus something of the target. With
            ``compensate=True`` the activation then stands at the beginning of the next layer.
    """

    sums_over_edges = True

    def __init__(
        self,
        num_nodes: int,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        out_channels: int,
        num_layers: int,
        *,
        make_conv: Callable[[int, int, int], nn.Module],
        dropout: float = 0.0,
        drop_input: bool = True,
        batch_norm: bool = False,
        residual: bool = False,
        head: bool = False,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        **options: Any,
    ) -> None:
        super().__init__(num_nodes, hidden_channels, num_layers, **options)
        check_dropout(dropout)
        self.in_channels = in_channels = as_count("in_channels", in_channels)
        self.out_channels = out_channels = as_count("out_channels", out_channels)
        self.dropout = dropout
        self.drop_input = drop_input
        self.batch_norm = batch_norm
        self.residual = residual
        self.activation = activation
        # Layers are then sums over edges, and histories hold what goes into the activation.
        self._activates_next = self.compensate and self.sums_over_edges
        self.lins = nn.ModuleList()
        if head:
            if not isinstance(self.hidden_channels, int):
                raise ValueError(
                    f"hidden_channels={self.hidden_channels}: between two linear maps all layers have the same width"
                )
            widths = [self.hidden_channels] * (self.num_layers + 1)
            self.lins.extend(self.make_head(in_channels, self.hidden_channels, out_channels))
        else:
            widths = [in_channels, *(history.embedding_dim for history in self.tables), out_channels]
        self.convs = nn.ModuleList(make_conv(layer, *pair) for layer, pair in enumerate(pairwise(widths)))
        normed = widths[1:] if head else widths[1:-1]
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for width in normed if batch_norm)

    @property
    def reg_modules(self) -> nn.ModuleList:
        """What the paper's code regularises by weight decay: convolutions, but a bare one, and norms."""
        return nn.ModuleList([*(self.convs if self.lins else self.convs[:-1]), *self.bns])

    @property
    def nonreg_modules(self) -> nn.ModuleList:
        """The others: the linear maps, or the bare convolution."""
        return nn.ModuleList(self.lins if self.lins else self.convs[-1:])

    def make_head(self, in_channels: int, hidden_channels: int, out_channels: int) -> list[nn.Module]:
        """Return the linear maps before the first convolution and after the last."""
        return [nn.Linear(in_channels, hidden_channels), nn.Linear(hidden_channels, out_channels)]

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """See :class:`~recollect.autoscale.ScalableGNN`."""
        if layer == 0:
            check_features(x, self.in_channels)
            x = self.enter(x, adj_t.size(0), state)
        else:
            x = self.drop(self.activation(x) if self._activates_next else x)
        out = self.convolve(layer, x, adj_t, state)
        last = layer == self.num_layers - 1
        if last and not self.lins:
            return out
        if self.batch_norm:
            out = self.bns[layer](out)
        if self.residual and out.size(-1) == x.size(-1):
            out = out + x[: out.size(0)]
        return out if self._activates_next else self.activation(out)

    def send_back(self, layer: int, x: Tensor, given: Tensor) -> Tensor | None:
        """See :class:`~recollect.autoscale.ScalableGNN`: written for a GCN's layers that nothing was added to."""
        conv = self.convs[layer]
        more = self.batch_norm or self.residual or (self.training and self.dropout > 0)
        if more or not (layer and self._activates_next and isinstance(conv, GCNLayer) and conv.is_bare):
            return None
        if any(getattr(getattr(self, name), "__func__", None) is not usual for name, usual in _USUAL.items()):
            return None
        given = conv.send_back(given)
        if self.activation is torch.relu:
            found: Tensor = _relu_backward(given, x, 0)
            return found
        with torch.enable_grad():
            rows = x.detach().requires_grad_()
            return torch.autograd.grad(self.activation(rows), rows, given)[0]

    def readout(self, x: Tensor, state: State) -> Tensor:
        """Return the logits."""
        if not self.lins:
            return x
        return self.leave(self.activation(x) if self._activates_next else x, state)

    def convolve(self, layer: int, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        """Return the convolution of all sources for the targets."""
        out: Tensor = self.convs[layer](x, adj_t)
        return out

    def enter(self, x: Tensor, num_targets: int, state: State) -> Tensor:
        """Return the first convolution's input."""
        if self.drop_input:
            x = self.drop(x)
        return self.drop(self.activation(self.lins[0](x))) if self.lins else x

    def leave(self, x: Tensor, state: State) -> Tensor:
        """Return the logits, of the last layer's output, where there is a head."""
        out: Tensor = self.lins[1](self.drop(x))
        return out

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout in training."""
        return dropout(x, self.dropout, self.training)


_USUAL = {name: getattr(ConvStack, name) for name in ("forward_layer", "convolve", "drop")}
"""What `send_back` is right for."""


def check_dropout(dropout: float) -> None:
    """Raise a ValueError unless it is a probability below 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1) (got {dropout})")


def check_alpha(alpha: float) -> None:
    """Raise a ValueError unless it is a share."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1] (got {alpha})")


def check_features(x: Tensor, in_channels: int) -> None:
    """Raise a ValueError unless there are so many of each node."""
    if x.dim() != 2 or x.size(1) != in_channels:
        raise ValueError(
            f"x has shape {list(x.shape)}, but must be [nodes, {in_channels}]: the network was made with "
            f"in_channels={in_channels}"
        )
