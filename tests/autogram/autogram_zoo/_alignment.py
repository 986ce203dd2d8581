"""Hazards of where the batch is: losses and rows that do not line up, sizes that can be mistaken for the batch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from ._member import WIDTH, Member, member


class Twice(Member):
    """Inputs with two rows for each element of the batch, and two layers."""

    batch_dims = (0, None)
    aligned = False
    rows = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.draw(self.rows * batch, WIDTH),), {}

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@member
class PairLosses(Twice):
    """The losses of neighbouring rows are added."""

    def losses(self, output: Tensor) -> Tensor:
        return super().losses(output).view(-1, 2).sum(1)


@member
class TwoViews(Twice):
    """Two views of each element go through the network in one batch, the second ones behind the first."""

    def losses(self, output: Tensor) -> Tensor:
        first, second = output.chunk(2)
        return super().losses(first * second)


@member
class FewerLosses(Twice):
    """Every other row has no loss."""

    def losses(self, output: Tensor) -> Tensor:
        return super().losses(output)[::2]


@member
class TwoPasses(Twice):
    """The halves of the batch go through the network one after the other."""

    batches = (2, 6, 32)
    rows = 1

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layers(half) for half in x.chunk(2)])


@member
class FlippedPass(Twice):
    """Two passes, one of them through the batch in reverse; the losses are added in the right order."""

    rows = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.layers(x.flip(0)).sin().flip(0)


@member
class PermutedLosses(FlippedPass):
    """The losses stand in another order than the elements."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).roll(1, 0)


@member
class ShuffledInside(FlippedPass):
    """The batch is shuffled between two layers, and put in order again."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[:2](x).flip(0)
        return self.layers[2:](h).flip(0)


@member
class OneByOne(FlippedPass):
    """The network is called for one element at a time, without a batch dimension."""

    batches = (1, 3, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.layers(element) for element in x])


@member
class OneLossForAll(FlippedPass):
    """All losses come from one element, which has no batch dimension left."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x[:1]) * x[:, :3]


@member
class Experts(FlippedPass):
    """A mixture of experts: each sees those elements that its gate chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(1)
        chosen = gates.argmax(1)
        y = self.layers(x)
        for k, expert in enumerate(self.experts):
            index = (chosen == k).nonzero().flatten()
            y = y.index_add(0, index, expert(x[index]) * gates[index, k : k + 1])
        return y


@member
class HalfForEach(FlippedPass):
    """Each half of the batch has a network of its own; with a batch of two, each sees one element."""

    batches = (2, 6)

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return torch.cat([self.layers(first), self.others(second)])


class Positions(Member):
    """Four positions for each element."""

    batch_dims = (0, None)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.draw(batch, 4, WIDTH),), {}

    def losses(self, output: Tensor) -> Tensor:
        return super().losses(output.flatten(1))


@member
class FlattenedPositions(Positions):
    """The layers see batch and positions as one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(0, 1)).view(len(x), 4, 3)


@member
class PositionsFirst(Positions):
    """The layers see positions and batch as one dimension, the batch running fastest; one sees the batch second."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[:2](x.transpose(0, 1).flatten(0, 1))
        return self.layers[2:](h.view(4, len(x), 5)).transpose(0, 1)


@member
class AllSizesEqual(Positions):
    """Batch, channels, height and width are all of one size."""

    batches = (WIDTH,)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH)

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.draw(batch, WIDTH, WIDTH, WIDTH),), {}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).transpose(0, 2).tanh()).transpose(0, 2)


@member
class ClassToken(Positions):
    """A trained token goes before the positions of every element, and trained positions are added."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.rand(1, 1, WIDTH)), nn.Parameter(torch.rand(1, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.layers(h * h.mean(1, keepdim=True))[:, 0]


@member
class SharedQueries(Positions):
    """Trained queries go through a layer without any batch, and then meet every element."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.first = nn.Parameter(torch.rand(2, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.first(self.queries) @ x.transpose(1, 2)).softmax(-1)
        return self.layers(weights @ x)


@member
class Hypernetwork(Positions):
    """A layer without any batch makes the weights that every element meets."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.weights = nn.Parameter(torch.rand(2)), nn.Linear(2, WIDTH * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x @ self.weights(self.code).view(WIDTH, WIDTH)).tanh())


@member
class WeightsForEach(Positions):
    """Every element has a convolution of its own: the batch is folded into groups."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.rand(4, 4, 3)), nn.Linear(4 * WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weight * self.style(x.flatten(1))[:, None, :, None]
        flat = x.reshape(1, -1, WIDTH)
        y = nn.functional.conv1d(flat, weights.flatten(0, 1), padding=1, groups=len(x))
        return self.layers(y.view(x.shape))


@member
class MaskedPositions(Positions):
    """Elements have different numbers of positions, and the layers see those alone."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(4) <= torch.arange(len(x))[:, None] % 4
        return x.new_zeros(len(x), 4, 3).masked_scatter(mask[..., None], self.layers(x[mask]))


@member
class GraphBatch(Positions):
    """A batch of graphs: nodes of all of them in one dimension, of different numbers, summed for each graph."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(4) <= torch.arange(len(x))[:, None] % 4
        owners = mask.nonzero()[:, 0]
        return x.new_zeros(len(x), 3).index_add(0, owners, self.layers(x[mask]))


@member
class PackedSequences(Positions):
    """Sequences of different lengths, packed, through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(x, torch.arange(len(x)) % 4 + 1, batch_first=True, enforce_sorted=False)
        padded, _ = rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=4)
        return self.layers(padded)
