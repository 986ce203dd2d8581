"""MoDo and SDMGrad: steps on the simplex, against an explicit projection; cross-Gramians that need not be symmetric."""

import math

import pytest
import torch
from weight_inputs import gram, normal, square, wide
from weight_oracles import shortest

from recollect.aggregation import Flattening, MoDoWeighting, SDMGradWeighting
from recollect.aggregation._double_sampling import _stepped


def nearest(point):
    """Find the nearest weights that are not negative and sum to one: bisect for what is taken from all entries."""
    low, high = point.amax() - 1, point.amax()
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if (point - level).clamp(min=0).sum() > 1 else (low, level)
    return (point - high).clamp(min=0)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("rate", [1e-3, 0.3, 30.0])
def test_a_step_is_projected(seed, m, rate):
    weights, slope = normal(m, seed=seed).softmax(0), normal(m, seed=seed + 20)
    found = _stepped(weights, slope, rate)
    torch.testing.assert_close(found, nearest(weights - rate * slope), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1e30, 1e300])
def test_a_vast_step_puts_all_on_the_steepest(size):
    slope = torch.tensor([2.0, -1.0, 0.5]).double() * size
    assert _stepped(torch.tensor([0.25, 0.25, 0.5]).double(), slope, 1e10).tolist() == [0, 1, 0]
    assert _stepped(torch.tensor([0.25, 0.25, 0.5]).double(), 0 * slope + size, 1e10).tolist() == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_modo_by_its_equation(rho):
    weighting, expected = MoDoWeighting(gamma=0.05, rho=rho), torch.ones(4).double() / 4
    for seed in range(5):
        cross = normal(4, 9, seed=seed) @ normal(4, 9, seed=seed + 50).T
        expected = nearest(expected - 0.05 * (cross + rho * torch.eye(4).double()) @ expected)
        torch.testing.assert_close(weighting(cross), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sdmgrad_by_its_steps(momentum):
    preference = torch.tensor([0.5, 0.3, 0.2]).double()
    weighting = SDMGradWeighting(0.3, momentum, 7, 0.4, preference)
    w = torch.ones(3).double() / 3
    for seed in range(3):
        cross = wide(3, seed=seed) @ (wide(3, seed=seed) + 0.1 * wide(3, seed=seed + 9)).T
        matrix, velocity = cross / cross.diagonal().sqrt().mean() ** 2, torch.zeros(3).double()
        for _ in range(7):
            velocity = momentum * velocity + matrix @ (w + 0.4 * preference)
            w = nearest(w - 0.3 * velocity)
        torch.testing.assert_close(weighting(cross), (w + 0.4 * preference) / 1.4, rtol=1e-10, atol=1e-12)


def test_many_steps_lead_to_the_shortest_combination():
    gramian = gram(square(4))
    expected = shortest(gramian)
    for weighting in (MoDoWeighting(0.02, 0.0), SDMGradWeighting(0.1, 0.0, 20, 0.0)):
        for _ in range(20_000 // (1 if isinstance(weighting, MoDoWeighting) else 20)):
            weights = weighting(gramian)
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighting", [MoDoWeighting(), SDMGradWeighting()])
@pytest.mark.parametrize("matrix", [-torch.eye(3), torch.ones(3, 3).triu(1), torch.zeros(3, 3), -torch.ones(3, 3)])
def test_cross_gramians_may_be_of_any_sign(weighting, matrix):
    weighting.reset()
    weights = weighting(matrix)
    assert (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(1)


def test_a_diagonal_beside_which_all_is_vast():
    matrix = 1e300 * torch.tensor([[0, 1, -1], [-1, 0, 1], [1, -1, 0]]).double() + 1e-300 * torch.eye(3).double()
    weights = SDMGradWeighting()(matrix)
    assert (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("weighting", [MoDoWeighting(), SDMGradWeighting(), Flattening(MoDoWeighting())])
@pytest.mark.parametrize("batch", [0, 1])
def test_what_is_not_finite_is_named(weighting, batch):
    jacobians = [normal(4, 3), normal(4, 3, seed=1)]
    jacobians[batch][2, 0] = math.nan
    with pytest.raises(ValueError, match="losses and gradients of objective 2 "):
        weighting(jacobians[0] @ jacobians[1].T)


@pytest.mark.parametrize("matrix", [torch.ones(2, 3), torch.ones(0, 0), torch.ones(2, 2, dtype=torch.int64)])
def test_what_is_no_cross_gramian(matrix):
    with pytest.raises(ValueError, match=r"square matrix|is empty|floating-point"):
        MoDoWeighting()(matrix)
    with pytest.raises(TypeError, match="the cross-Gramian must be a tensor"):
        MoDoWeighting()(matrix.tolist())


def test_flattening_takes_cross_gramians():
    cross = square(6)
    generalised = cross.reshape(2, 3, 2, 3).transpose(2, 3)
    torch.testing.assert_close(Flattening(MoDoWeighting())(generalised).flatten(), MoDoWeighting()(cross))
