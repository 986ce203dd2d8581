"""Small real networks: images, words, and tasks on one graph, whose nodes are not independent."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ._layers import Images
from ._member import WIDTH, Member, member

with warnings.catch_warnings():  # torch_geometric warns on its own import
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated", category=DeprecationWarning)
    import torch_geometric.nn as geometric

from recollect.messages import propagate, sparse_csr, with_weights
from recollect.models import RevGNN


@member
class CNN(Images):
    """A small convolutional network with dropout."""

    size = (3, 8, 8)

    def body(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(6, 5),
        )


class ResidualBlock(nn.Module):
    """Two convolutions with GroupNorm and a shortcut of 1 x 1."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.last = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(2, out), nn.GroupNorm(2, out)])
        self.shortcut = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norms[0](self.first(x)))
        h = self.norms[1](self.last(h))
        h += self.shortcut(x)
        return self.relu(h)


@member
class ResNet(Images):
    """A residual network with GroupNorm and in-place sums."""

    size = (3, 6, 6)

    def body(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            ResidualBlock(4, 4, 1),
            ResidualBlock(4, 6, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )


NODES = 12


class OnGraph(Member):
    """Two convolutions on a graph with a self-loop, an isolated node and a double edge; a loss for each node."""

    batch_dims = (None,)
    batches = (NODES,)

    def conv(self, width: int, out: int) -> nn.Module:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([self.conv(WIDTH, 4), self.conv(4, 3)])

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        edges = self.draw_index(NODES - 1, 2, 30)  # the last node has none
        extra = torch.tensor([[2, 4, 4], [2, 5, 5]])
        return (self.draw(NODES, WIDTH), torch.cat([edges, extra], 1)), {}

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.convs[1](self.convs[0](x, edge_index).relu(), edge_index)


@member
class GCN(OnGraph):
    """GCNConv: torch_geometric's linear layer without bias, and a bias of the convolution's own."""

    def conv(self, width: int, out: int) -> nn.Module:
        return geometric.GCNConv(width, out)


@member
class SAGE(OnGraph):
    """SAGEConv: two linear layers, one on the mean of neighbours."""

    def conv(self, width: int, out: int) -> nn.Module:
        return geometric.SAGEConv(width, out)


@member
class GAT(OnGraph):
    """GATConv: attention vectors that are parameters of the convolution."""

    def conv(self, width: int, out: int) -> nn.Module:
        return geometric.GATConv(width, out, heads=2, concat=False, dropout=0.2)


@member
class GATv2(OnGraph):
    """GATv2Conv with one weight for both ends of an edge: a layer used twice."""

    def conv(self, width: int, out: int) -> nn.Module:
        return geometric.GATv2Conv(width, out, share_weights=True)


@member
class GIN(OnGraph):
    """GINConv: a network of the user's inside, and a trained eps."""

    def conv(self, width: int, out: int) -> nn.Module:
        mlp = nn.Sequential(nn.Linear(width, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, out))
        return geometric.GINConv(mlp, train_eps=True)


@member
class EdgeGate(OnGraph):
    """Weights of edges that are learnt, as parameters and from features of the edges; columns are in no order."""

    def conv(self, width: int, out: int) -> nn.Module:
        return nn.Linear(width, out)

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(2, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 33, dtype=torch.float64))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        row, order = edge_index[1].sort(stable=True)
        rowptr = torch.cat([row.new_zeros(1), row.bincount(minlength=NODES).cumsum(0)])
        adj_t = sparse_csr(rowptr, edge_index[0][order], torch.ones(33, dtype=x.dtype), (NODES, NODES))
        weights = self.gate(self.draw(33, 2)).squeeze(1).sigmoid() * self.scale
        for conv in self.convs:
            x = propagate(with_weights(adj_t, weights), conv(x)).tanh()
        return x


@member
class MultiTaskGraph(OnGraph):
    """One loss for each task, the mean over all nodes, behind reversible layers."""

    def conv(self, width: int, out: int) -> nn.Module:
        return nn.Identity()

    def __init__(self) -> None:
        super().__init__()
        self.net = RevGNN(WIDTH, 8, 5, num_layers=3, num_groups=2, conv="sage", dropout=0.1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.net(x, edge_index)

    def losses(self, output: Tensor) -> Tensor:
        return super().losses(output.T)


@member
class LateConvolutions(OnGraph):
    """A multi-layer perceptron on the nodes, then convolutions that have no parameters."""

    def conv(self, width: int, out: int) -> nn.Module:
        return geometric.Linear(width, out, weight_initializer="glorot")

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).tanh()
        return geometric.APPNP(3, 0.1)(x, edge_index)
