"""The networks of the benchmark of memory budgets: each a ``Sequential``, so that torch's segments can be beside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recollect.messages import propagate
from recollect.reversible import GroupAddRev

__all__ = ["Work", "networks"]


@dataclass(frozen=True)
class Work:
    """A network, and the first input of its units.

    Args:
        make: returns the network.
        x: its input.
        inverts: whether its layers bring their inputs back by an inverse if they are left as they are.
    """

    make: Callable[[], nn.Sequential]
    x: Tensor
    inverts: bool = False


class Attention(nn.Module):
    """A block of a transformer: tokens [batch, length, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        y: Tensor = x + self.mlp(self.norms[1](x))
        return y


class Residual(nn.Module):
    """A block of a ResNet: images [batch, width, height, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (x + self.body(x)).relu()
        return y


class Patches(nn.Module):
    """Images [batch, 3, 32, 32] as tokens [batch, 64, width], with an embedding of their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.places = nn.Parameter(0.02 * torch.randn(64, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return y


class Convolution(nn.Module):
    """A layer of a GCN with a norm and a residual: nodes [nodes, width]."""

    def __init__(self, width: int, adj_t: Tensor) -> None:
        super().__init__()
        self.adj_t = adj_t
        self.norm, self.lin = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + propagate(self.adj_t, self.lin(self.norm(x).relu()))
        return y


class OfGroup(nn.Module):
    """What a reversible layer applies to a group: the layer above without its residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor, adj_t: Tensor) -> Tensor:
        return propagate(adj_t, self.lin(self.norm(x).relu()))


class Reversible(GroupAddRev):
    """A layer of RevGNN in two groups, on one graph."""

    def __init__(self, width: int, adj_t: Tensor) -> None:
        super().__init__(OfGroup(width // 2), num_groups=2)
        self.adj_t = adj_t

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.adj_t)


def _graph(nodes: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(nodes, (2, 5 * nodes), generator=generator)
    values = torch.full((edges.size(1),), 0.2)
    adj_t = torch.sparse_coo_tensor(edges, values, (nodes, nodes), check_invariants=False).coalesce()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that CSR is new
        return adj_t.to_sparse_csr()


def networks(quick: bool) -> dict[str, Work]:
    """Return the networks by name."""
    depth, width, batch = (6, 32, 2) if quick else (16, 128, 8)
    layers, nodes, channels = (8, 60, 16) if quick else (64, 2000, 64)
    adj_t = _graph(nodes)

    def mlp() -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))

    def vit() -> nn.Sequential:
        blocks = [Attention(width) for _ in range(depth)]
        return nn.Sequential(Patches(width), *blocks, nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10)))

    images, features = torch.randn(batch, 3, 32, 32), torch.randn(nodes, channels)
    return {
        "GPT": Work(lambda: nn.Sequential(*[Attention(width) for _ in range(depth)]), torch.randn(batch, 64, width)),
        "ViT": Work(vit, images),
        "ResNet": Work(
            lambda: nn.Sequential(*[Residual(width // 4) for _ in range(depth)]),
            torch.randn(batch, width // 4, 32, 32),
        ),
        "MLP": Work(lambda: nn.Sequential(*[mlp() for _ in range(2 * depth)]), torch.randn(256 * batch, width)),
        "GCN": Work(lambda: nn.Sequential(*[Convolution(channels, adj_t) for _ in range(layers)]), features),
        "RevGNN": Work(
            lambda: nn.Sequential(*[Reversible(channels, adj_t) for _ in range(layers)]), features, inverts=True
        ),
    }
