"""An invertible convolutional network on scikit-learn's digits, in memory that does not grow with its depth.

    python examples/invertible_cnn.py
    python examples/invertible_cnn.py --couplings 32

Additive couplings at 8 x 8 pixels, a space-to-depth, and couplings with invertible 1 x 1 convolutions between them at
4 x 4 pixels (as in i-RevNet, Jacobsen et al. 2018, arXiv 1802.07088). Backward recovers each layer's input from its
output.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from recollect import invertible
from recollect.memory import peak_memory


@dataclass(frozen=True)
class Result:
    """What a run ends with; peaks are of a step on all images, beyond parameters and gradients, in bytes."""

    accuracy: float
    peak: int
    peak_plain: int
    drift: float


def block(channels: int) -> nn.Module:
    """Return what a coupling adds to a group of channels: anything may stand here."""
    return nn.Sequential(nn.GroupNorm(1, channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))


def coupling(channels: int) -> invertible.Module:
    """Return a coupling of two groups."""
    return invertible.AdditiveCoupling(block(channels // 2), block(channels // 2))


class Net(nn.Module):
    """Classify images of 8 x 8 pixels.

    Args:
        couplings: at each of the two resolutions.
        channels: at 8 x 8 pixels; four times as many at 4 x 4.
    """

    def __init__(self, couplings: int, channels: int = 8) -> None:
        super().__init__()
        deep = 4 * channels
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.body = invertible.Sequential(
            *(coupling(channels) for _ in range(couplings)),
            invertible.PixelUnshuffle(2),
            *(layer for _ in range(couplings) for layer in (invertible.Conv2d(deep, deep, 1), coupling(deep))),
        )
        self.head = nn.Sequential(nn.GroupNorm(1, deep), nn.ReLU(), nn.Flatten(), nn.Linear(16 * deep, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [batch, 10] for images [batch, 1, 8, 8]."""
        logits: Tensor = self.head(self.body(self.stem(images)))
        return logits


def train(couplings: int = 4, epochs: int = 10, seed: int = 0) -> Result:
    """Train on three quarters of the images and test on the rest."""
    torch.manual_seed(seed)
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(digits)
    parts = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    training, testing = (torch.tensor(part) for part in parts)
    net = Net(couplings)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in training[torch.randperm(len(training))].split(128):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (net(images[testing]).argmax(1) == labels[testing]).double().mean().item()

    def step() -> None:
        F.cross_entropy(net(images), labels).backward()

    optimizer.zero_grad(set_to_none=False)
    with peak_memory() as memory:
        step()
    with net.body.temp_mode(checkpoint=False), peak_memory() as plain:
        step()
    return Result(accuracy, memory.peak_bytes, plain.peak_bytes, net.body.last_drift or 0.0)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="An invertible convolutional network on digits.")
    parser.add_argument("--couplings", type=int, default=4, help="at each of two resolutions")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    result = train(options.couplings, options.epochs)
    print(f"test accuracy              {result.accuracy:.1%}")
    print(f"peak memory of a step      {result.peak / 2**20:.1f} MiB")
    print(f"with everything kept       {result.peak_plain / 2**20:.1f} MiB")
    print(f"drift of recovered inputs  {result.drift:.1e}")


if __name__ == "__main__":
    main()
