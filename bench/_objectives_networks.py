"""Networks as users write them, for `bench.objectives`: a ResNet, a vision transformer, a GPT, and an LSTM."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench._objectives_works import CLASSES, Work, classified

GROUPS = 8  # of channels, in GroupNorm


class Residual(nn.Module):
    """Two convolutions, each with GroupNorm, and a way past them, which is a convolution where sizes change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, after)
        changes = stride != 1 or before != after
        self.past = nn.Conv2d(before, after, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.past(x))


def resnet(batch: int, channels: int, device: torch.device) -> Work:
    """A ResNet on images of 3 x 32 x 32: a convolution, three residual blocks that halve the image, a linear layer."""
    widths = [channels, channels, 2 * channels, 4 * channels]
    first = [nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.GroupNorm(GROUPS, channels), nn.ReLU()]
    blocks = [Residual(a, b, 1 if a == b else 2) for a, b in pairwise(widths)]
    model = nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))
    size = f"{'-'.join(map(str, widths))} channels, B = {batch}"
    return classified("resnet", size, model, torch.randn(batch, 3, 32, 32, device=device), by_rows=False)


class _Block(nn.Module):
    """A transformer's block, normalised first."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, positions, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.project(mixed.transpose(1, 2).reshape(x.shape))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _ViT(nn.Module):
    """Patches by a convolution, a class token, a position embedding."""

    def __init__(self, width: int, layers: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(_Block(width, 4, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return logits


def vit(batch: int, width: int, layers: int, device: torch.device, patch: int = 4) -> Work:
    """A vision transformer on images of 3 x 32 x 32."""
    size = f"{layers} x {width}, patch {patch}, B = {batch}"
    x = torch.randn(batch, 3, 32, 32, device=device)
    return classified("vit", size, _ViT(width, layers, patch), x, by_rows=False)


class _GPT(nn.Module):
    """Causal blocks between an embedding and a head that share their weight."""

    def __init__(self, width: int, layers: int, positions: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(_Block(width, 4, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def gpt(batch: int, width: int, layers: int, positions: int, device: torch.device, vocabulary: int = 256) -> Work:
    """A language model; one loss for each sequence, the mean over its positions."""
    tokens = torch.randint(vocabulary, (batch, positions + 1), device=device)
    given, following = tokens[:, :-1], tokens[:, 1:]

    def losses(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(given).transpose(1, 2), following, reduction="none").mean(1)

    size = f"{layers} x {width}, T = {positions}, B = {batch}"
    model = _GPT(width, layers, positions, vocabulary).to(device)
    return Work("gpt", size, model, losses, batch, by_rows=False)


class _LSTM(nn.Module):
    """A recurrent layer, and a linear one on its last hidden state."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return logits


def lstm(batch: int, hidden: int, steps: int, device: torch.device) -> Work:
    """A classifier of sequences, whose elements are a fourth of the hidden state's."""
    inputs = max(1, hidden // 4)
    size = f"{inputs}-{hidden}, T = {steps}, B = {batch}"
    x = torch.randn(batch, steps, inputs, device=device)
    return classified("lstm", size, _LSTM(inputs, hidden), x, by_rows=False)
