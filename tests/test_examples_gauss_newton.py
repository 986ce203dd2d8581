"""The examples of Gauss-Newton steps: their steps are the explicit solve's, and they reach what they are for."""

import importlib
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from recollect.aggregation import GaussNewton
from recollect.autogram import Engine
from recollect.memory import tensor_bytes

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # one imports the other, as it does where it is run
gauss_newton = importlib.import_module("gauss_newton")
poisson = importlib.import_module("poisson")

NORMS = 8 * 8  # bytes: the squared norm of the gradient of each of a coupling's parameters, for the certificate


def explicit_step(residuals, parameters, damping):
    """Solve (JᵀJ + λI) h = Jᵀr in the parameters, with a row of J by each backward pass."""
    rows = [torch.autograd.grad(r, parameters, retain_graph=True, materialize_grads=True) for r in residuals]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    matrix = jacobian.T @ jacobian + damping * torch.eye(jacobian.shape[1]).double()
    return torch.linalg.solve(matrix, jacobian.T @ residuals.detach())


def perceptron():
    net, x = gauss_newton.make_net(6), torch.rand(30, 4).double()
    return net, lambda: net(x).squeeze(1) - torch.sin(3 * x).sum(1)


def reversible():
    net, x = gauss_newton.deep_net(3, 8), torch.rand(30, 4).double()
    return net, lambda: net(x).squeeze(1) - torch.sin(3 * x).sum(1)


def equation():
    net, x = poisson.Net(5, 2, 3.0), torch.linspace(0, 1, 20).double()
    return net, lambda: poisson.residuals_of(net, x)


@pytest.mark.parametrize("problem", [perceptron, reversible, equation])
@pytest.mark.parametrize("damping", [0.1, 10.0])
def test_a_step_is_that_of_the_explicit_solve(problem, damping):
    torch.manual_seed(0)
    net, residuals_of = problem()
    expected = explicit_step(residuals_of(), list(net.parameters()), damping)
    Engine(net).backward(residuals_of(), GaussNewton(damping))
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert (found - expected).norm() < 1e-10 * expected.norm()


class Scalar(torch.nn.Module):
    def __init__(self, start):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor([start]).double())

    def forward(self):
        return self.p


def test_a_step_that_makes_it_worse_is_taken_back():
    net = Scalar(2.0)
    method = gauss_newton.LevenbergMarquardt(net, lambda: net().atan(), damping=1e-3)
    start, loss = net.p.detach().clone(), method.loss
    dampings = []
    while not method.step():
        dampings.append(method.weighting.damping)
        assert torch.equal(net.p, start)
        assert method.loss == loss
    assert dampings[:3] == pytest.approx([2e-3, 8e-3, 64e-3])  # each time by twice as much as before
    for _ in range(40):
        method.step()
    assert method.loss < 1e-12


def test_a_step_to_what_is_no_number_is_taken_back():
    net = Scalar(0.5)
    method = gauss_newton.LevenbergMarquardt(net, lambda: net().log() + 5, damping=1e-3)
    assert not method.step()  # to -1.7, which has no logarithm
    assert net.p.item() == 0.5
    for _ in range(40):
        method.step()
    assert method.loss < 1e-12


def test_where_the_model_is_linear_the_step_does_what_it_promises():
    torch.manual_seed(0)
    net, x, y = torch.nn.Linear(5, 1).double(), torch.randn(9, 5).double(), torch.randn(9).double()
    method = gauss_newton.LevenbergMarquardt(net, lambda: net(x).squeeze(1) - y, damping=2.0)
    expected = 2.0 * method.weighting(method.engine.compute_gramian(method.residuals), method.residuals)  # λ w
    assert method.step()
    torch.testing.assert_close(method.residuals.detach(), expected, rtol=1e-10, atol=1e-12)
    assert method.weighting.damping == pytest.approx(2 / 3)  # a gain of 1


def test_a_step_runs_the_model_once():
    torch.manual_seed(0)
    calls = []
    net, residuals_of = perceptron()
    net.register_forward_hook(lambda *_: calls.append(1))
    method = gauss_newton.LevenbergMarquardt(net, residuals_of)
    accepted = [method.step() for _ in range(10)]
    assert len(calls) == 1 + len(accepted) + accepted.count(False)


def test_regression_down_to_rounding():
    result = gauss_newton.train(width=128, more=2)
    assert result.losses[-1] < 1e-12
    assert len(result.losses) <= 150
    assert all(after <= before for before, after in pairwise(result.losses))
    assert len(result.adam_losses) == 2 * len(result.losses)
    assert result.adam_losses[-1] > 1e-4  # there was something to do


def test_a_poisson_equation():
    result = poisson.train()
    assert result.passes.startswith("1 backward pass of 64 losses")
    assert "row" not in result.passes
    assert result.losses[-1] < 1e-12
    assert result.error < 1e-7


def test_jets_are_derivatives():
    torch.manual_seed(0)
    net, x = poisson.Net(7, 3, 4.0), torch.rand(11).double().requires_grad_()
    u, slope, bend = net(x).unbind(1)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(slope, first, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bend, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("points", [32, 256])
def test_in_reversible_layers_a_step_is_flat_in_depth(points):
    """What grows is the gradients, which are as many bytes as the parameters, and their norms."""
    sizes = {depth: tensor_bytes(gauss_newton.deep_net(depth, 16)) for depth in (4, 16, 64)}
    peaks = {depth: gauss_newton.peak(depth, points=points) for depth in sizes}
    for shallow, deep in ((4, 16), (16, 64)):
        assert peaks[deep] - peaks[shallow] <= sizes[deep] - sizes[shallow] + NORMS * (deep - shallow)
    kept = {depth: gauss_newton.peak(depth, points=points, keep=True) for depth in (4, 64)}
    assert kept[64] - kept[4] > 5 * (sizes[64] - sizes[4])
    assert kept[64] > 3 * peaks[64]
