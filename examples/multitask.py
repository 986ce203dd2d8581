"""Several tasks for each image: losses [batch, tasks], each of them an objective.

    python examples/multitask.py

One network tells of a handwritten digit which it is, whether it is even, and how it is written: how much ink there is
in the upper half. Each image has a loss for each of the three tasks, and the Gramian of all of them has four
dimensions, [batch, tasks, tasks, batch] (instance-wise multi-task learning). `Flattening` lets any weighting work on
it. The weights come back in the shape of the losses.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.aggregation import Flattening, UPGradWeighting
from recollect.autogram import Engine
from recollect.data import load


@dataclass(frozen=True)
class Result:
    """What a run ends with, on the test images.

    Attributes:
        digits: accuracy of which digit it is.
        even: accuracy of whether it is even.
        ink: share of the ink's variance that is explained.
        weights: those of the last step, [batch, tasks].
    """

    digits: float
    even: float
    ink: float
    weights: Tensor


class Net(nn.Module):
    """A trunk that all tasks share, and a head for each."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.digit, self.even, self.ink = nn.Linear(width, 10), nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [batch, 10] and [batch], and ink [batch], for pixels [batch, 64]."""
        features = self.trunk(pixels)
        return self.digit(features), self.even(features).squeeze(1), self.ink(features).squeeze(1)


def losses_of(outputs: tuple[Tensor, Tensor, Tensor], y: Tensor, ink: Tensor) -> Tensor:
    """Return a loss for each image and task, [batch, 3]."""
    digit, even, amount = outputs
    is_even = (y % 2 == 0).to(even.dtype)
    return torch.stack(
        [
            F.cross_entropy(digit, y, reduction="none"),
            F.binary_cross_entropy_with_logits(even, is_even, reduction="none"),
            (amount - ink).square(),
        ],
        dim=1,
    )


def train(epochs: int = 6, batch: int = 32, seed: int = 0) -> Result:
    """Train with a weight for each image and task."""
    torch.manual_seed(seed)
    data = load("digits").data
    ink = data.x[:, :32].sum(1)
    ink = (ink - ink.mean()) / ink.std()
    net = Net()
    engine = Engine(net)
    weighting = Flattening(UPGradWeighting())
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    training = data.train_mask.nonzero().flatten()
    for _ in range(epochs):
        for part in training[torch.randperm(len(training))].split(batch):
            optimizer.zero_grad()
            weights = engine.backward(losses_of(net(data.x[part]), data.y[part], ink[part]), weighting)
            optimizer.step()
    test = data.test_mask
    with torch.no_grad():
        digit, even, amount = net(data.x[test])
    return Result(
        digits=(digit.argmax(1) == data.y[test]).double().mean().item(),
        even=((even > 0) == (data.y[test] % 2 == 0)).double().mean().item(),
        ink=1 - ((amount - ink[test]).square().mean() / ink[test].var()).item(),
        weights=weights,
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Instance-wise multi-task learning on digits.")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="images in a step, with three objectives each")
    options = parser.parse_args()
    result = train(options.epochs, options.batch)
    print(f"which digit   {result.digits:.1%}")
    print(f"even or odd   {result.even:.1%}")
    print(f"ink           {result.ink:.1%} of the variance")


if __name__ == "__main__":
    main()
