"""Convolutions on a rectangular adjacency: all sources in, targets out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recollect._parameters import reset_parameters
from recollect.autoscale import propagate

__all__ = ["GCN2Layer", "GCNLayer", "GINLayer"]


class GCNLayer(nn.Module):
    """Graph convolution, A X W + b, with A as it is given (Kipf & Welling, arXiv 1609.02907, equation 2).

    A is multiplied by X or by X W, whichever has fewer channels.

    Args:
        in_channels: of X.
        out_channels: of the result.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight by Glorot & Bengio's uniform rule; the bias is zero."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, adj_t: Tensor) -> Tensor:
        """Return [num_targets, out_channels].

        Args:
            x: [num_sources, in_channels].
            adj_t: sparse CSR, normalised [num_targets, num_sources].
        """
        narrow = self.weight.size(0) > self.weight.size(1)
        out = propagate(adj_t, x @ self.weight) if narrow else propagate(adj_t, x) @ self.weight
        return out + self.bias

    @property
    def is_bare(self) -> bool:
        """Whether calling it is this class's formula, and nothing that was hung onto it."""
        hung = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return type(self) is GCNLayer and "forward" not in vars(self) and not hung

    def send_back(self, given: Tensor) -> Tensor:
        """Return v_j Wᵀ, what the source j gets if v_j is the sum of what A takes back to it [R, in_channels]."""
        return given @ self.weight.t()


class GCN2Layer(nn.Module):
    r"""GCNII's layer with initial residual and identity mapping (Chen et al., arXiv 2007.02133, equation 5).

    With H = (1 - alpha) A X + alpha X_0, where both share one weight: (1 - beta) H + beta H W; otherwise each of the
    two addends has its own. beta = log(theta / layer + 1).

    Args:
        channels: of X, X_0 and the result.
        alpha: share of X_0.
        theta: of beta.
        layer: from 1.
        shared_weights: see above.
    """

    def __init__(self, channels: int, alpha: float, theta: float, layer: int, shared_weights: bool = True) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = math.log(theta / layer + 1)
        self.weight1 = nn.Parameter(torch.empty(channels, channels))
        self.weight2 = None if shared_weights else nn.Parameter(torch.empty(channels, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights by Glorot & Bengio's uniform rule."""
        nn.init.xavier_uniform_(self.weight1)
        if self.weight2 is not None:
            nn.init.xavier_uniform_(self.weight2)

    def forward(self, x: Tensor, x_0: Tensor, adj_t: Tensor) -> Tensor:
        """Return [num_targets, channels].

        Args:
            x: [num_sources, channels].
            x_0: [num_targets, channels].
            adj_t: sparse CSR, normalised [num_targets, num_sources].
        """
        own, first = (1 - self.alpha) * propagate(adj_t, x), self.alpha * x_0
        both = own + first
        if self.weight2 is None:
            return torch.addmm(both, both, self.weight1, beta=1 - self.beta, alpha=self.beta)
        out = torch.addmm(both, own, self.weight1, beta=1 - self.beta, alpha=self.beta)
        return torch.addmm(out, first, self.weight2, alpha=self.beta)


class GINLayer(nn.Module):
    """Graph isomorphism: f((1 + eps) X + A X), with a trained eps (Xu et al., arXiv 1810.00826, equation 4.1).

    Args:
        in_channels: of X.
        out_channels: of the result, and between f's two linear maps.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_channels, out_channels), nn.ReLU(), nn.Linear(out_channels, out_channels))
        self.eps = nn.Parameter(torch.zeros(()))

    def reset_parameters(self) -> None:
        """Draw f anew; eps is zero."""
        reset_parameters(self.mlp)
        nn.init.zeros_(self.eps)

    def forward(self, x: Tensor, adj_t: Tensor) -> Tensor:
        """Return [num_targets, out_channels].

        Args:
            x: [num_sources, in_channels]; the targets come first.
            adj_t: sparse CSR [num_targets, num_sources].
        """
        out: Tensor = self.mlp((1 + self.eps) * x[: adj_t.size(0)] + propagate(adj_t, x))
        return out
