"""A class-conditional flow on two moons: one network with a likelihood for each moon, which also tells them apart.

    python examples/conditional_flow.py

The label goes through the whole flow, ``flow(x, label=label)``: the couplings' blocks take it by their signature, the
other layers do not see it. By Bayes' rule the likelihoods of both classes give the probability of each.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

from recollect import invertible

CLASSES = 2


@dataclass(frozen=True)
class Result:
    """What a run ends with; the likelihood is in nats for each point."""

    flow: invertible.Sequential
    negative_log_likelihood: float
    accuracy: float


class Block(nn.Module):
    """Turns one coordinate and the class into scale and shift of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 32)
        self.first = nn.Linear(1, 32)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, z: Tensor, *, label: Tensor) -> Tensor:
        """Return scale and shift [batch, 2] for z [batch, 1] and labels [batch]."""
        out: Tensor = self.rest(self.first(z) + self.embed(label))
        return out


def make_flow(steps: int) -> invertible.Sequential:
    """Return a flow over points of the plane, given their class."""
    return invertible.Sequential(
        *(
            layer
            for _ in range(steps)
            for layer in (
                invertible.ActNorm(2),
                invertible.Linear(2, 2, parametrization="lu"),
                invertible.AffineCoupling(Block(), Block()),
            )
        )
    )


def log_likelihood(flow: invertible.Sequential, x: Tensor, label: Tensor) -> Tensor:
    """Return log p(x | label) of points [batch, 2], [batch], in nats."""
    z, log_det = flow.forward_and_log_det(x, label=label)
    log_normal: Tensor = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    return log_normal + log_det


def points(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points of two moons [number, 2], and which moon each is of [number]."""
    x, label = make_moons(number, noise=0.08, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(label, dtype=torch.int64)


def classify(flow: invertible.Sequential, x: Tensor) -> Tensor:
    """Return the likelier class of each point [batch]; both are as frequent."""
    with torch.no_grad():
        given = [torch.full((len(x),), label) for label in range(CLASSES)]
        return torch.stack([log_likelihood(flow, x, label) for label in given]).argmax(0)


def sample(flow: invertible.Sequential, label: Tensor) -> Tensor:
    """Draw a point of each class in ``label`` [batch] from a trained flow, [batch, 2]."""
    with torch.no_grad():
        x: Tensor = flow.inverse(torch.randn(len(label), 2), label=label)
        return x


def train(steps: int = 4, iterations: int = 300, seed: int = 0) -> Result:
    """Fit a flow; likelihood and accuracy are those of points that it has not seen."""
    torch.manual_seed(seed)
    flow = make_flow(steps)
    (x, label), (unseen, moon) = points(2000, seed=1), points(2000, seed=2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        batch = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        (-log_likelihood(flow, x[batch], label[batch]).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    flow.eval()
    with torch.no_grad():
        found = -log_likelihood(flow, unseen, moon).mean().item()
    return Result(flow, found, (classify(flow, unseen) == moon).float().mean().item())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="A class-conditional flow on two moons.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=300)
    options = parser.parse_args()
    result = train(options.steps, options.iterations)
    print(f"negative log-likelihood, given the class   {result.negative_log_likelihood:.3f} nats")
    print(f"accuracy by Bayes' rule                    {result.accuracy:.3f}")
    print(f"three samples of each class\n{sample(result.flow, torch.tensor([0, 0, 0, 1, 1, 1]))}")


if __name__ == "__main__":
    main()
