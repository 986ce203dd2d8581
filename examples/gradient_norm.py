"""The squared norm of a gradient before there is one: Polyak's step size, which needs no learning rate.

    python examples/gradient_norm.py

The Gramian of a single loss is a single number, its squared gradient norm, and the engine computes it without writing
any gradient. Polyak's step goes as far as a line with that slope needs to reach zero loss: loss / norm² (for stochastic
steps Loizou et al. 2021, arXiv 2002.10542, with a least loss of zero and c = 1).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from recollect.autogram import Engine
from recollect.data import load


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        losses: of each step, before it.
        steps: the step sizes.
        difference: the largest relative one between a squared norm and that of the gradient itself.
        accuracy: on the test images.
    """

    losses: list[float]
    steps: list[float]
    difference: float
    accuracy: float


def train(epochs: int = 5, batch: int = 64, seed: int = 0) -> Result:
    """Train a perceptron on digits; loss and slope alone decide how far each step goes."""
    torch.manual_seed(seed)
    data = load("digits").data
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    engine = Engine(net)
    parameters = list(net.parameters())
    training = data.train_mask.nonzero().flatten()
    losses, steps, differences = [], [], []
    for _ in range(epochs):
        for part in training[torch.randperm(len(training))].split(batch):
            loss = F.cross_entropy(net(data.x[part]), data.y[part])
            squared_norm = engine.compute_gramian(loss)  # []
            step = (loss.detach() / squared_norm).item()
            gradients = torch.autograd.grad(loss, parameters)
            by_hand = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=step)
            losses.append(loss.item())
            steps.append(step)
            differences.append(abs(squared_norm / by_hand - 1).item())
    with torch.no_grad():
        right = net(data.x[data.test_mask]).argmax(1) == data.y[data.test_mask]
    return Result(losses, steps, max(differences), right.double().mean().item())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Polyak's step size on digits, from squared gradient norms.")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    result = train(options.epochs)
    print(f"loss               {result.losses[0]:.3f} before the first step, {result.losses[-1]:.3f} before the last")
    print(f"step sizes         {min(result.steps):.3f} to {max(result.steps):.3f}")
    print(f"test accuracy      {result.accuracy:.1%}")
    print(f"norm's difference  {result.difference:.1e}")


if __name__ == "__main__":
    main()
