"""Hazards of a parameter that is used several times: cross terms count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._member import WIDTH, Member, member


@member
class CalledTwice(Member):
    """A module is called several times, one time on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(WIDTH, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(self.first(x).tanh())
        return self.last(self.again(h.sigmoid()) + h) * self.last(h)


@member
class CalledOnOtherShapes(Member):
    """A module is called on tensors of different shapes, and on one that has no batch."""

    batch_dims = (None,)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.layer(x).tanh())
        wide = self.norm(self.layer(torch.stack([h, x], -2)))
        return wide.mean(-2) * self.layer(torch.ones(WIDTH, dtype=x.dtype))


@member
class OneModuleTwoNames(Member):
    """One module is a child of two parents."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(WIDTH, WIDTH)
        self.left, self.right = nn.Sequential(shared, nn.Tanh()), nn.Sequential(nn.Sigmoid(), shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@member
class SharedWeight(Member):
    """Two layers share a weight, and have biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


@member
class SharedAcrossKinds(Member):
    """One vector is the scale of a norm, the bias of a linear layer, and a factor of the parent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last.bias = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x).tanh()) * self.norm.weight


@member
class TiedEmbedding(Member):
    """The softmax layer has the embedding's weight, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.draw_index(7, *((4, batch) if batch_dim == 1 else (batch, 4))),), {}

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(words)).tanh()).log_softmax(-1)


@member
class TiedTransposed(Member):
    """A decoder is the encoder's weight transposed, through a function."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(WIDTH, 4)
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encoder(x).tanh(), self.encoder.weight.T, self.shift) - x
