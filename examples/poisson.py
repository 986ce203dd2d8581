"""A differential equation by its residuals: -u'' = f on [0, 1] with u(0) = u(1) = 0, by Gauss-Newton steps.

    python examples/poisson.py
    python examples/poisson.py --layers 2 --first 6

The network carries jets (u, u', u'') forward, from layer to layer, in place of asking autograd for derivatives with
respect to x. They lie along an axis of positions, [points, 3, channels], through ordinary linear layers, so that each
point keeps to itself and one backward pass gives the Gramian of all residuals, as `engine.explain` tells.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from gauss_newton import LevenbergMarquardt
from torch import Tensor, nn


@dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
        net: the solution.
        passes: which backward passes the Gramian takes.
        losses: the mean of the squared residuals, after each step.
        error: the largest distance from the exact solution, on a fine grid.
    """

    net: Net
    passes: str
    losses: list[float]
    error: float


class Net(nn.Module):
    """A function of x as a perceptron of sines, and its first two derivatives.

    Args:
        width: of the hidden layers.
        layers: how many there are.
        first: the sines of the first layer turn by up to so many radians along the interval.
    """

    def __init__(self, width: int, layers: int, first: float) -> None:
        super().__init__()
        sizes = [1, *[width] * layers]
        # An input that is always 1, with derivatives 0, takes the place of the bias, which would be added to all three.
        hidden = [nn.Linear(a + 1, b, bias=False) for a, b in pairwise(sizes)]
        self.hidden = nn.ModuleList(hidden)
        self.last = nn.Linear(width + 1, 1, bias=False)
        self.double()
        with torch.no_grad():
            slopes = hidden[0].weight[:, 0].uniform_(-first, first)
            hidden[0].weight[:, 1] = -slopes * torch.rand(width, dtype=torch.float64)  # zero somewhere in [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        """Return u, u' and u'', [points, 3], for x [points]."""
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        constant = torch.stack([one, zero, zero], 1).unsqueeze(2)
        jets = torch.stack([x, one, zero], 1).unsqueeze(2)
        for layer in self.hidden:
            value, slope, bend = layer(torch.cat([jets, constant], 2)).unbind(1)
            sine, cosine = value.sin(), value.cos()
            jets = torch.stack([sine, cosine * slope, cosine * bend - sine * slope.square()], 1)
        found: Tensor = self.last(torch.cat([jets, constant], 2)).squeeze(2)
        return found


def residuals_of(net: Net, x: Tensor) -> Tensor:
    """Return u'' + f at each point [points] between the ends, and u, times 10, at the ends."""
    u, _, bend = net(x).unbind(1)
    f = math.pi**2 * torch.sin(math.pi * x)
    return torch.where((x > 0) & (x < 1), bend + f, 10 * u)


def train(
    points: int = 64,
    width: int = 256,
    layers: int = 1,
    first: float = 10.0,
    steps: int = 400,
    until: float = 1e-12,
    seed: int = 0,
) -> Result:
    """Solve the equation at equidistant points."""
    torch.manual_seed(seed)
    net = Net(width, layers, first)
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    method = LevenbergMarquardt(net, lambda: residuals_of(net, x))
    passes = method.engine.explain(method.residuals)
    losses: list[float] = []
    while len(losses) < steps and method.loss >= until:
        method.step()
        losses.append(method.loss)
    fine = torch.linspace(0, 1, 1001, dtype=torch.float64)
    with torch.no_grad():
        error = (net(fine)[:, 0] - torch.sin(math.pi * fine)).abs().max().item()
    return Result(net, passes, losses, error)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="A Poisson equation, by Gauss-Newton steps on its residuals.")
    parser.add_argument("--points", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1, help="hidden ones")
    parser.add_argument("--first", type=float, default=10.0, help="radians by which the first sines turn")
    parser.add_argument("--steps", type=int, default=400, help="at most")
    options = parser.parse_args()
    result = train(options.points, options.width, options.layers, options.first, options.steps)
    print(result.passes)
    print(f"loss   {result.losses[0]:.1e} after one step, {result.losses[-1]:.1e} after {len(result.losses)}")
    print(f"error  {result.error:.1e} at most, of a solution between 0 and 1")


if __name__ == "__main__":
    main()
