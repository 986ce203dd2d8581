"""A normalising flow on two moons: exact likelihoods from couplings, trained in the memory of one layer.

    python examples/flow.py

Each step of the flow is an ActNorm, an invertible linear layer and an affine coupling (Glow, Kingma and Dhariwal 2018,
arXiv 1807.03039). The log-likelihood of x is that of z = flow(x) under a standard normal distribution, plus the
log-determinant of the flow's Jacobian.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn

from recollect import invertible


@dataclass(frozen=True)
class Result:
    """What a run ends with; likelihoods are in nats for each point."""

    flow: invertible.Sequential
    negative_log_likelihood: float
    gaussian: float


def block() -> nn.Module:
    """Return the network that turns one coordinate into scale and shift of the other."""
    return nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))


def make_flow(steps: int) -> invertible.Sequential:
    """Return a flow over points of the plane."""
    return invertible.Sequential(
        *(
            layer
            for _ in range(steps)
            for layer in (
                invertible.ActNorm(2),
                invertible.Linear(2, 2, parametrization="lu"),
                invertible.AffineCoupling(block(), block()),
            )
        )
    )


def negative_log_likelihood(flow: invertible.Sequential, x: Tensor) -> Tensor:
    """Return the mean of -log p(x) over points [batch, 2], in nats."""
    z, log_det = flow.forward_and_log_det(x)
    log_normal = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    mean: Tensor = -(log_normal + log_det).mean()
    return mean


def points(number: int, seed: int) -> Tensor:
    """Return points of two moons, [number, 2]."""
    x, _ = make_moons(number, noise=0.05, random_state=seed)
    return torch.tensor(x, dtype=torch.float32)


def train(steps: int = 6, iterations: int = 600, seed: int = 0) -> Result:
    """Fit a flow, and compare it with a Gaussian on points that neither has seen."""
    torch.manual_seed(seed)
    flow = make_flow(steps)
    training, testing = points(4000, seed=1), points(4000, seed=2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        negative_log_likelihood(flow, training[torch.randint(len(training), (256,))]).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    flow.eval()
    gaussian = torch.distributions.MultivariateNormal(training.mean(0), training.T.cov())
    with torch.no_grad():
        found = negative_log_likelihood(flow, testing).item()
        return Result(flow, found, -gaussian.log_prob(testing).mean().item())


def sample(flow: invertible.Sequential, number: int) -> Tensor:
    """Draw points [number, 2] from a trained flow."""
    with torch.no_grad():
        x: Tensor = flow.inverse(torch.randn(number, 2))
        return x


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="A normalising flow on two moons.")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=600)
    options = parser.parse_args()
    result = train(options.steps, options.iterations)
    print(f"negative log-likelihood of the flow      {result.negative_log_likelihood:.3f} nats")
    print(f"negative log-likelihood of a Gaussian    {result.gaussian:.3f} nats")
    print(f"five samples\n{sample(result.flow, 5)}")


if __name__ == "__main__":
    main()
