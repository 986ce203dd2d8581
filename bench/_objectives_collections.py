"""Small networks in the forms of public model collections, for `bench.objectives`: what is not a plain chain of layers.

Class tokens and position embeddings (parameters that are expanded and concatenated), layer scale and affine parameters
of a parent, linear layers over transposed tokens, squeeze-and-excitation, unfolding, cross-covariance attention,
attention through `nn.MultiheadAttention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench._harness import alternating, median, peak_bytes
from bench._objectives_measure import Row
from bench._objectives_networks import GROUPS, Residual, vit
from bench._objectives_systems import make_step
from bench._objectives_works import CLASSES, Work, classified
from bench._report import MIB, Target, ratio, show, table

COUNT, SIZE = 10, "4 x 192, B = 8"  # of the networks that the numbers to reach are set for
SLOWEST, MIDDLE = 3.0, 1.4  # forward and Gramian, over plain forward and backward
PATCH = 4  # of 32 x 32 pixels: 64 tokens
TOKENS = (32 // PATCH) ** 2


def _mlp(before: int, inside: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, inside), nn.GELU(), nn.Linear(inside, before))


class _Tokens(nn.Module):
    """Patches, blocks on tokens [B, 64, width], a norm, the mean over tokens, a head."""

    def __init__(self, width: int, blocks: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks, self.norm = nn.Sequential(*blocks), norm
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class _Scaled(nn.Module):
    """Attention of `nn.MultiheadAttention` and a perceptron, each scaled by a parameter of the block, as in CaiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = _mlp(width, 4 * width)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(x)
        x = x + self.scale1 * self.attention(inner, inner, inner, need_weights=False)[0]
        out: Tensor = x + self.scale2 * self.mlp(self.norm2(x))
        return out


class _Mixer(nn.Module):
    """MLP-Mixer: a perceptron over tokens, and one over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = _mlp(TOKENS, 2 * TOKENS), _mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.channels(self.norm2(x))
        return out


class _Affine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class _ResMLP(nn.Module):
    """ResMLP: a linear layer over tokens, a perceptron over channels, affine maps and layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Affine(width), _Affine(width)
        self.tokens, self.channels = nn.Linear(TOKENS, TOKENS), _mlp(width, 4 * width)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.scale2 * self.channels(self.norm2(x))
        return out


class _XCiT(nn.Module):
    """XCiT: attention between channels, by normalised queries and keys and a temperature; depthwise convolutions."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.scales = nn.ParameterList(torch.full((width,), 0.1) for _ in range(3))
        depthwise = [nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2)]
        self.local = nn.Sequential(depthwise[0], nn.GELU(), depthwise[1])
        self.mlp = _mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads, side = len(self.temperature), int(tokens**0.5)
        query, key, value = self.qkv(self.norm1(x)).view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 4, 1)
        products = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        mixed = (products * self.temperature).softmax(-1) @ value
        x = x + self.scales[0] * self.project(mixed.permute(0, 3, 1, 2).reshape(x.shape))
        image = self.norm3(x).transpose(1, 2).reshape(batch, width, side, side)
        x = x + self.scales[1] * self.local(image).flatten(2).transpose(1, 2)
        out: Tensor = x + self.scales[2] * self.mlp(self.norm2(x))
        return out


class _Excited(nn.Module):
    """Squeeze-and-excitation: channels are scaled by what a perceptron makes of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(scale)


def _conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.GroupNorm(GROUPS, after)]


class _Inverted(nn.Module):
    """MobileNetV3's block: more channels, a depthwise convolution, squeeze-and-excitation, fewer channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = 4 * channels
        first, middle = _conv(channels, inside, 1), _conv(inside, inside, 3, groups=inside)
        last = [_Excited(inside), *_conv(inside, channels, 1)]
        self.inner = nn.Sequential(*first, nn.Hardswish(inplace=True), *middle, nn.Hardswish(inplace=True), *last)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


class _ConvNeXt(nn.Module):
    """ConvNeXt's block: a depthwise convolution, a perceptron over channels, layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.mlp = nn.LayerNorm(channels), _mlp(channels, 4 * channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.scale * self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        out: Tensor = x + inner.permute(0, 3, 1, 2)
        return out


class _MobileViT(nn.Module):
    """MobileViT's block: a convolution, attention among pixels that lie alike in 2 x 2 patches, a convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.local, self.into = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, width, 1)
        self.blocks = nn.Sequential(_Scaled(width), _Scaled(width))
        self.out, self.fuse = nn.Conv2d(width, channels, 1), nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(self.local(x))
        batch, width, height, length = y.shape
        parts = y.view(batch, width, height // 2, 2, length // 2, 2).permute(0, 3, 5, 2, 4, 1)
        parts = self.blocks(parts.reshape(4 * batch, -1, width)).view(parts.shape)
        y = parts.permute(0, 5, 3, 1, 4, 2).reshape(y.shape)
        fused: Tensor = self.fuse(torch.cat([x, self.out(y)], 1))
        return fused


def _images(*layers: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def _stem(channels: int) -> list[nn.Module]:
    return [*_conv(3, channels, 3, 2), nn.ReLU()]


def _deep_stem(channels: int) -> nn.Sequential:
    """A ResNet that begins with three small convolutions."""
    few, many = channels // 2, 2 * channels
    stem = [*_conv(3, few, 3), nn.ReLU(), *_conv(few, channels, 3), nn.ReLU(), *_conv(channels, channels, 3, 2)]
    return _images(*stem, nn.ReLU(), Residual(channels, channels, 1), Residual(channels, many, 2), channels=many)


def collection(batch: int, width: int, layers: int, device: torch.device) -> dict[str, Callable[[], Work]]:
    """Return how to make each network: tokens of this width, and images of a fourth or half as many channels."""
    few, half = width // 4, width // 2
    models: dict[str, Callable[[], nn.Module]] = {
        "layer scale": lambda: _Tokens(width, [_Scaled(width) for _ in range(layers)], nn.LayerNorm(width)),
        "mixer": lambda: _Tokens(width, [_Mixer(width) for _ in range(layers)], nn.LayerNorm(width)),
        "resmlp": lambda: _Tokens(width, [_ResMLP(width) for _ in range(layers)], _Affine(width)),
        "xcit": lambda: _Tokens(width, [_XCiT(width) for _ in range(layers)], nn.LayerNorm(width)),
        "mobilevit": lambda: _images(*_stem(few), _MobileViT(few, half), channels=few),
        "convnext": lambda: _images(*_stem(half), *(_ConvNeXt(half) for _ in range(layers)), channels=half),
        "mobilenet": lambda: _images(*_stem(few), *(_Inverted(few) for _ in range(layers)), channels=few),
        "excitation": lambda: _images(*_stem(few), Residual(few, few, 1), _Excited(few), channels=few),
        "deep stem": lambda: _deep_stem(few),
    }

    size = f"{layers} x {width}, B = {batch}"

    def work(name: str) -> Work:
        model, x = models[name](), torch.randn(batch, 3, 32, 32, device=device)
        return classified(name, size, model, x, by_rows=False)

    def token() -> Work:
        return replace(vit(batch, width, layers, device, PATCH), kind="class token", size=size)

    return {"class token": token, **{name: partial(work, name) for name in models}}


def collection_row(work: Work, repeats: int, device: torch.device) -> Row:
    """Measure forward and Gramian, and forward and backward, in turns after two runs that do not count.

    Returns:
        By system, "plain" and "freed": `all_seconds`, `seconds` (median) and `peak_bytes`; `ratio` of the medians.
    """
    steps = {system: make_step(system, work, device) for system in ("plain", "freed")}
    for step in steps.values():
        step()
    peaks = {system: peak_bytes(step, device) for system, step in steps.items()}
    times = alternating(steps, repeats, device)
    seconds = {system: median(values) for system, values in times.items()}
    row = {"kind": work.kind, "size": work.size, "all_seconds": times, "seconds": seconds, "peak_bytes": peaks}
    return {**row, "ratio": ratio(seconds["freed"], seconds["plain"])}


def collection_table(rows: Sequence[Row]) -> str:
    """What is printed of the rows."""
    head = ["forward and Gramian", "plain, ms", "freed, ms", "freed / plain", "peak, plain, MiB", "peak, freed, MiB"]
    body = []
    for row in rows:
        times = [show(row["seconds"][system], ".1f", 1e-3) for system in ("plain", "freed")]
        peaks = [show(row["peak_bytes"][system], ".1f", MIB) for system in ("plain", "freed")]
        body.append([f"{row['kind']}, {row['size']}", *times, show(row["ratio"], ".2f"), *peaks])
    return table(head, body)


def collection_targets(rows: Sequence[Row]) -> list[Target]:
    """Hold the slowest of all these networks, and the one in the middle, against the numbers to reach."""
    found = [row["ratio"] for row in rows if row["size"] == SIZE]
    largest, middle = (max(found), median(found)) if len(found) == COUNT else (None, None)
    name = f"networks as in collections, {SIZE}: forward and Gramian, freed / plain"
    return [Target(f"{name}, the slowest", largest, SLOWEST), Target(f"{name}, the median", middle, MIDDLE)]
