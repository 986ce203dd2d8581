"""Layers over sequences: recurrent ones and attention."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ._member import WIDTH, Member, member


class Sequences(Member):
    """Three positions: [batch, 3, 6], or [3, batch, 6] where the batch dimension is 1."""

    batch_dims = (0, None)

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return (self.draw(3, batch, WIDTH) if batch_dim == 1 else self.draw(batch, 3, WIDTH),), {}

    def losses(self, output: Tensor) -> Tensor:
        return super().losses(output.flatten(1))


class LastDim(Sequences):
    """The batch is dimension 1 throughout, one loss for each position and element."""

    batch_dims = (1, None)

    def inputs(self, batch: int, batch_dim: int | None) -> Any:
        return super().inputs(batch, 1)

    def losses(self, output: Tensor) -> Tensor:
        return Member.losses(self, output)


@member
class RNN(Sequences):
    """A tanh RNN and one with ReLU, the batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.tanh = nn.RNN(WIDTH, 4, batch_first=True)
        self.relu = nn.RNN(4, 3, nonlinearity="relu", bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.tanh(x)[0])[0]


@member
class LSTM(Sequences):
    """A bidirectional LSTM of two layers; its last state is used, its output is not."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 3, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, c) = self.lstm(x)
        return (h * c).transpose(0, 1)


@member
class ProjectedLSTM(LastDim):
    """An LSTM with projections and dropout between its layers, the batch in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 4, num_layers=2, proj_size=2, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@member
class GRU(LastDim):
    """A GRU with a trained initial state, the batch in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(WIDTH, 4)
        self.gru = nn.GRU(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x, self.start(x[:1]).tanh())[0]


@member
class RecurrentCells(Member):
    """LSTM, GRU and RNN cells, called again and again."""

    batch_dims = (0, None)

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(WIDTH, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 3)
        for _ in range(3):
            h, c = self.lstm(x, (h, c))
            h = self.rnn(self.gru(h, c), h)
        return h


@member
class Attention(Sequences):
    """Self-attention with several heads, a mask, and its weights asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
        y, weights = self.attention(x, x, x, attn_mask=mask, average_attn_weights=True)
        return y * (1 + weights[:, :, :1])


@member
class CrossAttention(LastDim):
    """Attention with keys and values of other widths, a bias row and no bias, the batch in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 3, bias=False, add_bias_kv=True, kdim=4, vdim=5, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :4], value=x[..., 1:], need_weights=False)[0]


@member
class TransformerLayer(Sequences):
    """A Transformer encoder layer with dropout: attention whose output projection is used by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 5, dropout=0.2, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@member
class TransformerDecoder(LastDim):
    """A Transformer decoder layer on a memory that is computed, the batch in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(WIDTH, WIDTH)
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 5, dropout=0.0, activation="gelu", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.memory(x[:2]).tanh())


@member
class TransformerEncoder(Sequences):
    """A small Transformer as it is used: embedded positions, two layers, mean, head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.1, batch_first=True)
        self.positions = nn.Parameter(torch.rand(3, WIDTH))
        with warnings.catch_warnings():  # nested tensors need another kind of layer
            warnings.simplefilter("ignore")
            self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x + self.positions).mean(1))
