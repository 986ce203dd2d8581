"""Networks whose batch elements are not independent, which a batch dimension must refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._layers import Images
from ._member import WIDTH, Member, member
from ._sequences import Sequences


class Dependent(Member):
    """`culprit` mixes the elements of a batch."""

    batch_dims = (None,)
    refused = "culprit"

    def make(self) -> nn.Module:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.first, self.culprit, self.last = nn.Linear(WIDTH, 4), self.make(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.culprit(self.first(x)).tanh())


@member
class BatchNorm(Dependent):
    """BatchNorm in training: mean and variance are of the whole batch."""

    batches = (3, 32)

    def make(self) -> nn.Module:
        return nn.BatchNorm1d(4)


@member
class BatchNormImages(Images):
    """BatchNorm2d in training, inside a block, without running statistics."""

    batch_dims = (None,)
    refused = r"layers\.1\.culprit"

    def body(self) -> nn.Module:
        inner = nn.Sequential()
        inner.add_module("culprit", nn.BatchNorm2d(4, track_running_stats=False))
        return nn.Sequential(nn.Conv2d(4, 4, 2), inner, nn.Conv2d(4, 2, 2))


class Center(nn.Module):
    """Takes off the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x - x.mean(0))


@member
class BatchMean(Dependent):
    """A module of no known kind takes the batch's mean."""

    batches = (3, 32)

    def make(self) -> nn.Module:
        return Center()


class Shuffle(nn.Module):
    """Gives each element its neighbour's features."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 0)


@member
class Neighbours(Dependent):
    """A module without parameters mixes the elements."""

    batches = (3, 32)
    refused = ""

    def make(self) -> nn.Module:
        return Shuffle()


@member
class WrongAttention(Sequences):
    """Attention takes the batch for the sequence."""

    batch_dims = (None,)
    batches = (3, 32)
    refused = ""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@member
class Contrast(Member):
    """The network is independent, the losses are not: each compares an element with all others."""

    batch_dims = (None,)
    batches = (3, 32)
    refused = ""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())

    def losses(self, output: Any) -> Tensor:
        return (output @ output.T).softmax(1).diagonal().log()
