"""Embeddings and bags of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._member import Member, member


class Words(Member):
    """Sentences of four words."""

    batch_dims = (0, None)

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.draw_index(7, *((4, batch) if batch_dim == 1 else (batch, 4))),), {}


@member
class Embeddings(Words):
    """Embedding with a padding index; a word stands in a sentence twice, and the embedding is used twice."""

    batch_dims = (0, 1, None)

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.layer(self.words(words).tanh()) * self.words(6 - words).mean(-1, keepdim=True)


@member
class ScaledEmbedding(Words):
    """Embedding whose gradient is scaled by how often a word stands in the batch, which no Jacobian has rows for."""

    batch_dims = (None,)

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, scale_grad_by_freq=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.words(words).tanh().flatten(1)


@member
class SparseEmbedding(Words):
    """Embedding whose gradient is a sparse tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.layer(self.words(words).tanh()).flatten(1)


@member
class EmbeddingBags(Words):
    """EmbeddingBag by mean, sum and maximum, with a padding index."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.sum = nn.EmbeddingBag(7, 3, mode="mean", padding_idx=1), nn.EmbeddingBag(7, 3, mode="sum")
        self.max = nn.EmbeddingBag(7, 3, mode="max")

    def forward(self, words: Tensor) -> Tensor:
        return self.mean(words) * self.sum(words).tanh() + self.max(words).sin()


@member
class WeightedBags(Words):
    """EmbeddingBag of bags of different lengths with a weight for each word: offsets are no batch."""

    batch_dims = (None,)

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.layer = nn.EmbeddingBag(7, 3, mode="sum"), nn.Linear(3, 2)

    def forward(self, words: Tensor) -> Tensor:
        offsets = 3 * words.new_tensor(range(len(words)))
        words = words.flatten()
        return self.layer(self.bag(words, offsets, per_sample_weights=self.draw(len(words))))
