"""The works that `bench.objectives` measures: a network, its inputs, and many losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch_geometric.nn
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


@dataclass(frozen=True)
class Work:
    """A network and its losses.

    Attributes:
        kind: "mlp", "cnn", and so on.
        size: what it is measured at, for tables.
        model: with its weights; each system gets a copy.
        losses: of a copy, one forward pass: [m].
        objectives: m.
        batch_dim: of the losses; None where they do not belong to independent elements.
        by_rows: whether systems that hold the Jacobian are measured too: in a deep network they take minutes.
    """

    kind: str
    size: str
    model: nn.Module
    losses: Callable[[nn.Module], Tensor]
    objectives: int
    batch_dim: int | None = 0
    by_rows: bool = True

    def __str__(self) -> str:
        return f"{self.kind}, {self.size}"


def classified(kind: str, size: str, model: nn.Module, x: Tensor, by_rows: bool = True) -> Work:
    """Instance-wise losses of a classifier: one cross entropy for each element of the batch."""
    labels = torch.randint(CLASSES, (len(x),), device=x.device)
    model = model.to(x.device)

    def losses(copy: nn.Module) -> Tensor:
        return F.cross_entropy(copy(x), labels, reduction="none")

    return Work(kind, size, model, losses, len(x), by_rows=by_rows)


def mlp(batch: int, width: int, device: torch.device, inputs: int = 784) -> Work:
    """A perceptron with three hidden layers."""
    widths = [inputs, width, width, width]
    hidden = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(width, CLASSES))
    size = f"{inputs}-{width}-{width}-{width}-{CLASSES}, B = {batch}"
    return classified("mlp", size, model, torch.randn(batch, inputs, device=device))


def cnn(batch: int, channels: int, device: torch.device) -> Work:
    """Three convolutions on images of 3 x 32 x 32, each with pooling, and two linear layers."""
    widths = [3, channels, 2 * channels, 4 * channels]
    convs = [
        layer for a, b in pairwise(widths) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    head = [nn.Linear(16 * widths[-1], 4 * channels), nn.ReLU(), nn.Linear(4 * channels, CLASSES)]
    model = nn.Sequential(*convs, nn.Flatten(), *head)
    size = f"{channels}-{2 * channels}-{4 * channels} channels, B = {batch}"
    return classified("cnn", size, model, torch.randn(batch, 3, 32, 32, device=device))


class _Transformer(nn.Module):
    """Encoder layers without dropout, which one of the peers does not allow in them; mean over positions; head."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(layers)
            )
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x).mean(1))
        return logits


def transformer(batch: int, width: int, layers: int, positions: int, device: torch.device) -> Work:
    """A Transformer encoder with feed-forward layers four times as wide."""
    size = f"{layers} x {width}, T = {positions}, B = {batch}"
    x = torch.randn(batch, positions, width, device=device)
    return classified("transformer", size, _Transformer(width, layers), x)


class _TaskGNN(nn.Module):
    """Residual SAGE layers with layer norm, and one logit for each task and node."""

    def __init__(self, features: int, channels: int, layers: int, tasks: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(layers))
        self.convs = nn.ModuleList(torch_geometric.nn.SAGEConv(channels, channels) for _ in range(layers))
        self.last = nn.Linear(channels, tasks)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.first(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(norm(x).relu(), edge_index)
        logits: Tensor = self.last(x)
        return logits


def gnn(nodes: int, edges: int, channels: int, layers: int, tasks: int, device: torch.device) -> Work:
    """Many tasks on one graph, as on ogbn-proteins: one loss for each, the mean over all nodes."""
    x = torch.randn(nodes, 8, device=device)
    edge_index = torch.randint(nodes, (2, edges), device=device)
    labels = torch.randint(2, (nodes, tasks), device=device).to(x.dtype)

    def losses(model: nn.Module) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x, edge_index), labels, reduction="none").mean(0)

    size = f"{tasks} losses, {layers} layers x {channels}, {nodes:,} nodes, {edges:,} edges"
    return Work("gnn", size, _TaskGNN(8, channels, layers, tasks).to(device), losses, tasks, None)
