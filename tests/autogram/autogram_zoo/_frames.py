"""Layers inside regions whose saved tensors are dropped and rebuilt, and inside compiled ones."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

import recollect
from recollect import invertible
from recollect.reversible import GroupAddRev

from ._member import WIDTH, Member, member

SMALL = (1, 3, 8)  # the oracle rebuilds every frame for every row


def block(width: int, out: int | None = None) -> nn.Sequential:
    """A norm, a layer, dropout and a layer."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, out or width)
    )


class Framed(Member):
    """Three blocks, each inside a frame."""

    batches = SMALL

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def frame(self, layer: nn.Module, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = x + self.frame(layer, x)
        return self.head(x)


@member
class InCheckpoint(Framed):
    """Layers inside `recollect.checkpoint`."""

    def frame(self, layer: nn.Module, x: Tensor) -> Tensor:
        return recollect.checkpoint(layer, x)


@member
class InTorchCheckpoint(Framed):
    """Layers inside torch's own checkpoint, which runs them again."""

    reruns = True

    def frame(self, layer: nn.Module, x: Tensor) -> Tensor:
        return torch_checkpoint.checkpoint(layer, x, use_reentrant=False)


class OnGraph(nn.Module):
    """A block as `GroupAddRev` calls it, with a graph that it does not use."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = block(width)

    def forward(self, x: Tensor, graph: Any) -> Tensor:
        return self.block(x)


@member
class InGroupAddRev(Member):
    """A chain of reversible layers in two groups: only the last output is kept."""

    batches = SMALL

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GroupAddRev(OnGraph(WIDTH // 2), num_groups=2) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        graph = torch.zeros(2, 0, dtype=torch.long)
        for layer in self.layers:
            x = layer(x, graph)
        return self.head(x)


@member
class InCouplings(Member):
    """Additive and affine couplings in an invertible sequence with invertible layers that have weights."""

    batch_dims = (0, None)
    batches = SMALL

    def __init__(self) -> None:
        super().__init__()
        half = WIDTH // 2
        self.flow = invertible.Sequential(
            invertible.AdditiveCoupling(block(half), block(half)),
            invertible.Linear(WIDTH, WIDTH),
            invertible.AffineCoupling(block(half, WIDTH), block(half, WIDTH)),
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flow(x))


@member
class Compiled(Member):
    """A compiled block between two that are not."""

    batch_dims = (0, None)
    batches = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.block = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, WIDTH))
        with warnings.catch_warnings():  # of torch.jit, and the like
            warnings.simplefilter("ignore")
            self.block.compile(backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.last(self.block(self.first(x)).sin())
