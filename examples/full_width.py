"""A transformer whose layers are reversible at full width: trained by BDIA, it infers as the ordinary residual network.

    python examples/full_width.py

The task is to repeat: the second half of each sequence is its first half again. The branches of a pre-norm transformer
(attention and the network for each position, by turns) are those of a `recollect.reversible.BDIA`, which keeps the
last two activations, and of each layer one bit for each value. Gradients are those of the same network with everything
kept, bit for bit.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.memory import peak_memory
from recollect.reversible import BDIA


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        model: the trained network.
        accuracy: share of the tokens of second halves that evaluation mode predicts.
        peak_bytes: of a training step.
        kept_bytes: of one that keeps every activation.
        same: whether both have the same gradients, bit for bit.
    """

    model: Transformer
    accuracy: float
    peak_bytes: int
    kept_bytes: int
    same: bool


class Attention(nn.Module):
    """The branch of causal attention; [batch, length, channels]."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to x."""
        q, k, v = self.project(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(h.transpose(1, 2).flatten(2))
        return out


class Transformer(nn.Module):
    """Embedding, branches, and logits of the next token."""

    def __init__(self, tokens: int, length: int, channels: int = 64, layers: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, channels)
        self.position = nn.Parameter(0.02 * torch.randn(length, channels))
        branches: list[nn.Module] = []
        for _ in range(layers):
            mlp = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU())
            mlp.extend([nn.Linear(4 * channels, channels), nn.Dropout(dropout)])
            branches += [Attention(channels, 4), mlp]
        self.stack = BDIA(branches)
        self.head = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, length, tokens] for tokens [batch, length]."""
        logits: Tensor = self.head(self.stack(self.embedding(tokens) + self.position[: tokens.size(1)]))
        return logits

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross entropy of the tokens of second halves."""
        half = tokens.size(1) // 2
        return F.cross_entropy(self(tokens[:, :-1])[:, half - 1 :].flatten(0, 1), tokens[:, half:].flatten())


def sequences(number: int, half: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Return sequences of which the second half is the first again, [number, 2 half]."""
    return torch.randint(tokens, (number, half), generator=generator).repeat(1, 2)


def _gradients(model: Transformer, batch: Tensor, disable: bool) -> tuple[list[Tensor], int]:
    model.stack.disable = disable
    torch.manual_seed(0)
    with peak_memory() as memory:
        gradients = torch.autograd.grad(model.loss(batch), list(model.parameters()))
    model.stack.disable = False
    return list(gradients), memory.peak_bytes


def train(iterations: int = 300, layers: int = 8, half: int = 8, tokens: int = 12, dropout: float = 0.0) -> Result:
    """Train, and compare a step with one that keeps everything."""
    torch.manual_seed(0)
    model = Transformer(tokens, 2 * half, layers=layers, dropout=dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(iterations):
        optimizer.zero_grad()
        model.loss(sequences(64, half, tokens, generator)).backward()
        optimizer.step()
    batch = sequences(256, half, tokens, generator)
    (found, peak), (kept, kept_peak) = (_gradients(model, batch, disable) for disable in (False, True))
    model.eval()
    with torch.no_grad():
        right = model(batch[:, :-1])[:, half - 1 :].argmax(-1) == batch[:, half:]
    return Result(model, float(right.float().mean()), peak, kept_peak, all(map(torch.equal, found, kept)))


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    result = train(options.iterations, options.layers)
    print(f"tokens of second halves that are right, in evaluation mode: {result.accuracy:.1%}")
    print(f"peak of a step: {result.peak_bytes / 2**20:.1f} MiB; with everything kept {result.kept_bytes / 2**20:.1f}")
    print(f"gradients of the two are the same bits: {result.same}")


if __name__ == "__main__":
    main()
