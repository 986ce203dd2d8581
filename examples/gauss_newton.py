"""Regression by Gauss-Newton steps: down to rounding in some thirty steps, beside Adam in the same run.

    python examples/gauss_newton.py
    python examples/gauss_newton.py --width 256

The objectives are residuals, one for each of 256 points, and their Gramian G = J Jᵀ is 256 x 256, however many
parameters there are. `GaussNewton` turns it into weights (G + λ I)⁻¹ r, so that the gradient that `backward` leaves is
the step of Levenberg (1944) and Marquardt (1963). Memory is what such steps are said to cost; in reversible layers it
does not grow with the depth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from recollect import invertible
from recollect.aggregation import GaussNewton
from recollect.autogram import Engine
from recollect.memory import peak_memory

POINTS, INPUTS = 256, 4


@dataclass(frozen=True)
class Result:
    """What a run ends with; losses are means of squared residuals.

    Attributes:
        losses: after each Gauss-Newton step.
        rejected: how many of these steps were taken back.
        adam_losses: after each step of Adam.
        seconds: a Gauss-Newton step takes; the median.
        adam_seconds: the same of Adam.
    """

    losses: list[float]
    rejected: int
    adam_losses: list[float]
    seconds: float
    adam_seconds: float


class LevenbergMarquardt:
    """Gauss-Newton steps, which are taken back where the loss rises, and a damping that follows how well they do.

    After a step Jᵀw the linear model leaves the residuals r - G w = λ w. How much the loss falls, relative to how much
    it would fall by that, decides about λ (Madsen, Nielsen and Tingleff 2004, "Methods for non-linear least squares
    problems", algorithm 3.16).

    Args:
        model: its parameters are trained.
        residuals_of: computes the residuals, of any shape [m], with the model.
        damping: λ at the first step.
    """

    def __init__(self, model: nn.Module, residuals_of: Callable[[], Tensor], damping: float = 1.0) -> None:
        self.engine = Engine(model)
        self.weighting = GaussNewton(damping)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        self.parameters = list(model.parameters())
        self.residuals_of = residuals_of
        self.residuals = residuals_of()
        self.growth = 2.0

    @property
    def loss(self) -> float:
        """The mean of the squared residuals."""
        return self.residuals.detach().square().mean().item()

    def step(self) -> bool:
        """Take a step, and return whether it stays."""
        before, damping = [p.detach().clone() for p in self.parameters], self.weighting.damping
        self.optimizer.zero_grad()
        weights = self.engine.backward(self.residuals, self.weighting)
        self.optimizer.step()
        predicted = (damping * weights).square().mean().item()
        trial, loss = self.residuals_of(), self.loss
        gain = (loss - trial.detach().square().mean().item()) / max(loss - predicted, 1e-300)
        if gain > 0:
            self.residuals = trial
            self.weighting.damping = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3)
            self.growth = 2.0
            return True
        with torch.no_grad():
            for p, old in zip(self.parameters, before, strict=True):
                p.copy_(old)
        self.residuals = self.residuals_of()
        self.weighting.damping = damping * self.growth
        self.growth *= 2
        return False


def make_net(width: int) -> nn.Module:
    """Return a perceptron from points [n, INPUTS] to [n, 1]."""
    layers = [nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
    return nn.Sequential(*layers).double()


def timed(step: Callable[[], object], seconds: list[float]) -> None:
    """Run a step and note how long it takes."""
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)


def train(width: int = 512, steps: int = 150, until: float = 1e-12, more: int = 10, seed: int = 0) -> Result:
    """Fit a sum of sines, by a step of each method in turn; Adam goes on until it has had ``more`` times as many."""
    torch.manual_seed(seed)
    x = 2 * torch.rand(POINTS, INPUTS, dtype=torch.float64) - 1
    y = torch.sin(3 * x).sum(1)
    net, twin = make_net(width), make_net(width)
    twin.load_state_dict(net.state_dict())
    method = LevenbergMarquardt(net, lambda: net(x).squeeze(1) - y)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-3)
    accepted: list[bool] = []
    losses: list[float] = []
    adam_losses: list[float] = []
    seconds: list[float] = []
    adam_seconds: list[float] = []

    def adam_step() -> None:
        adam.zero_grad()
        loss = (twin(x).squeeze(1) - y).square().mean()
        loss.backward()
        adam.step()
        adam_losses.append(loss.item())

    while len(losses) < steps and (not losses or losses[-1] >= until):
        timed(lambda: accepted.append(method.step()), seconds)
        losses.append(method.loss)
        timed(adam_step, adam_seconds)
    warm = min(3, len(seconds) - 1)  # the first steps are about finding out
    for _ in range((more - 1) * len(losses)):
        adam_step()
    middle, adam_middle = (statistics.median(each[warm:]) for each in (seconds, adam_seconds))
    return Result(losses, accepted.count(False), adam_losses, middle, adam_middle)


def deep_net(depth: int, width: int) -> nn.Sequential:
    """Return a network with additive couplings, of which only what leaves the last is kept."""

    def block() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width // 2), nn.Linear(width // 2, width // 2), nn.Tanh())

    body = invertible.Sequential(*(invertible.AdditiveCoupling(block(), block()) for _ in range(depth)))
    return nn.Sequential(nn.Linear(INPUTS, width), body, nn.Linear(width, 1)).double()


def peak(depth: int, width: int = 16, points: int = POINTS, keep: bool = False) -> int:
    """Return the bytes of tensors that a Gauss-Newton step takes at its peak, its gradients counted.

    With ``keep`` every activation is kept, as in ordinary layers.
    """
    torch.manual_seed(0)
    net = deep_net(depth, width)
    engine, x = Engine(net), torch.rand(points, INPUTS, dtype=torch.float64)
    body = cast(invertible.Sequential, net[1])
    with body.temp_mode(checkpoint=not keep), peak_memory("cpu") as memory:
        engine.backward(net(x).squeeze(1) - x.sum(1), GaussNewton(damping=1.0))
    return memory.peak_bytes


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Regression by Gauss-Newton steps, beside Adam.")
    parser.add_argument("--width", type=int, default=512, help="of the two hidden layers")
    parser.add_argument("--steps", type=int, default=150, help="at most")
    options = parser.parse_args()
    result = train(options.width, options.steps)
    count = len(result.losses)
    print(f"Gauss-Newton  loss {result.losses[-1]:.1e} after {count} steps, {result.rejected} of them taken back")
    print(f"Adam          loss {result.adam_losses[count - 1]:.1e} after {count} steps", end=", ")
    print(f"{result.adam_losses[-1]:.1e} after {len(result.adam_losses)}")
    print(f"a step takes  {1e3 * result.seconds:.1f} ms and {1e3 * result.adam_seconds:.1f} ms", end=": ")
    print(f"{result.seconds / result.adam_seconds:.2f} times Adam's")
    for depth in (4, 16, 64):
        mine, kept = (peak(depth, keep=keep) / 2**20 for keep in (False, True))
        print(f"{depth:3} couplings  {mine:.2f} MiB at the peak of a step; all kept: {kept:.2f} MiB")


if __name__ == "__main__":
    main()
