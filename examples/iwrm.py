"""Instance-wise risk minimisation on digits: one objective for each image, none of which a step may hurt.

    python examples/iwrm.py
    python examples/iwrm.py --batch 32

Ordinary training minimises the mean of a batch's losses, and may raise some of them to lower others. Here each
image's loss is an objective of its own ("Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232,
section 3). The engine turns the losses into the Gramian of their gradients, and UPGrad that into weights whose update
conflicts with no image. The same network is trained on the mean loss for comparison.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.aggregation import MeanWeighting, UPGradWeighting
from recollect.autogram import Engine
from recollect.data import load


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        accuracy: on the test images.
        conflicts: share of pairs of images in a batch whose gradients point against each other, mean over all steps.
        hurt: share of images whose loss a step raises: the cosine of its gradient and the update is below -0.01; mean
            over all steps.
    """

    accuracy: float
    conflicts: float
    hurt: float


def make_net() -> nn.Module:
    """Return a small convolutional network for images of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def upgrad() -> UPGradWeighting:
    """Return the weighting, hardly regularised: images learnt already have gradients that are small beside others'."""
    return UPGradWeighting(reg_eps=1e-9)


def train(weighting: Callable[[Tensor], Tensor], epochs: int = 4, batch: int = 64, seed: int = 0) -> Result:
    """Train with weights for the losses of each batch."""
    torch.manual_seed(seed)
    data = load("digits").data
    images = data.x.view(-1, 1, 8, 8)
    net = make_net()
    engine = Engine(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    training = data.train_mask.nonzero().flatten()
    conflicts, hurt = [], []

    def noting(gramian: Tensor) -> Tensor:
        weights = weighting(gramian)
        conflicts.append((gramian < 0).double().mean().item())
        slopes = gramian @ weights  # of each loss along the update; over both lengths they are cosines
        lengths = (gramian.diagonal() * (weights @ slopes)).sqrt()
        hurt.append((slopes < -0.01 * lengths).double().mean().item())
        return weights

    for _ in range(epochs):
        for part in training[torch.randperm(len(training))].split(batch):
            optimizer.zero_grad()
            losses = F.cross_entropy(net(images[part]), data.y[part], reduction="none")
            engine.backward(losses, noting)
            optimizer.step()
    with torch.no_grad():
        right = net(images[data.test_mask]).argmax(1) == data.y[data.test_mask]
    return Result(right.double().mean().item(), sum(conflicts) / len(conflicts), sum(hurt) / len(hurt))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Instance-wise risk minimisation on digits.")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="images in a step, each an objective")
    options = parser.parse_args()
    for name, weighting in (("UPGrad", upgrad()), ("mean loss", MeanWeighting())):
        result = train(weighting, options.epochs, options.batch)
        print(f"{name:<10} test accuracy {result.accuracy:.1%}", end="; ")
        print(f"pairs in conflict {result.conflicts:.1%}, images that a step hurts {result.hurt:.1%}")


if __name__ == "__main__":
    main()
