"""The examples run and reach what they are for."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_a_flow_on_two_moons():
    flow = load("flow")
    result = flow.train(steps=6, iterations=400)
    assert result.negative_log_likelihood < 0.6  # nats; a Gaussian has 1.88, and 0.3 is what longer training reaches
    assert result.gaussian > 1.8
    # The likelihood is exact: the density sums to one over the plane.
    side = torch.linspace(-2.5, 3.5, 400)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        z, log_det = result.flow.forward_and_log_det(grid)
    density = (log_det - 0.5 * z.square().sum(1) - math.log(2 * math.pi)).exp()
    assert density.sum().item() * (6 / 399) ** 2 == pytest.approx(1.0, abs=0.03)
    points = flow.sample(result.flow, 500)
    assert torch.isfinite(points).all()
    assert torch.allclose(result.flow.inverse(result.flow(points)), points, atol=1e-3)


def test_an_invertible_network_on_digits():
    cnn = load("invertible_cnn")
    result = cnn.train(couplings=4)
    assert result.accuracy > 0.97
    assert result.drift < 1e-3
    assert result.peak < result.peak_plain / 3
    deeper = cnn.train(couplings=12, epochs=0)
    assert deeper.peak <= 1.05 * result.peak
    assert deeper.peak_plain > 2.5 * result.peak_plain
