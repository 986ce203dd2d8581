"""Gauss-Newton steps: against the explicit solve with the Jacobian, alone, in training, and with momentum."""

import copy
import pickle

import pytest
import torch
from weight_inputs import DEGENERATE, common, gram, normal, square, tall, wide

from recollect.aggregation import Flattening, GaussNewtonWeighting, ResidualWeighting


def step(jacobian, residuals, damping):
    """Solve the normal equations in the parameters."""
    matrix = jacobian.T @ jacobian + damping * torch.eye(jacobian.shape[1]).double()
    return torch.linalg.solve(matrix, jacobian.T @ residuals)


@pytest.mark.parametrize("kind", [wide, square, tall, common])
@pytest.mark.parametrize("m", [1, 2, 7, 40])
@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e3])
def test_equals_the_explicit_solve(kind, m, damping):
    jacobian, residuals = kind(m), normal(m, seed=8)
    weights = GaussNewtonWeighting(damping)(gram(jacobian), residuals)
    torch.testing.assert_close(weights @ jacobian, step(jacobian, residuals, damping), rtol=1e-10, atol=1e-10)


def test_a_small_damping():
    jacobian, residuals = wide(7), normal(7, seed=8)
    found = GaussNewtonWeighting(1e-9)(gram(jacobian), residuals) @ jacobian
    expected = jacobian.T @ torch.linalg.solve(gram(jacobian) + 1e-9 * torch.eye(7).double(), residuals)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [wide, square, tall])
def test_without_damping_it_is_the_shortest_solution(kind):
    jacobian, residuals = kind(6), normal(6, seed=8)
    weights = GaussNewtonWeighting(0.0)(gram(jacobian), residuals)
    torch.testing.assert_close(weights @ jacobian, torch.linalg.pinv(jacobian) @ residuals, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("damping", [0.0, 1e-12, 1.0])
def test_degenerate_gramians(case, damping):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        gramian = gram(DEGENERATE[case]).to(dtype)
        if gramian.isfinite().all():  # within the range of the type
            weights = GaussNewtonWeighting(damping)(gramian, normal(len(gramian)))
            assert weights.dtype == dtype
            assert weights.isfinite().all()


def test_without_gradients_residuals_are_damped():
    weights = GaussNewtonWeighting(4.0)(torch.zeros(3, 3), torch.tensor([1.0, 2.0, -4.0]))
    assert weights.tolist() == [0.25, 0.5, -1.0]


def test_a_damping_beside_which_gradients_vanish():
    weights = GaussNewtonWeighting(1.0)(torch.eye(2).double() * 1e-310, torch.tensor([1.0, -2.0]))
    assert weights.tolist() == [1.0, -2.0]


def test_momentum_is_that_of_sgd():
    """SPRING: φ ← μ φ + Jᵀ (J Jᵀ + λ)⁻¹ (r - μ J φ), and SGD's momentum buffer is φ."""
    jacobians, offset, mu, damping = [normal(4, 6, seed=seed) for seed in range(5)], normal(4, seed=9), 0.8, 0.1
    weighting = GaussNewtonWeighting(damping, momentum=mu)
    parameters = torch.zeros(6).double().requires_grad_()
    optimizer = torch.optim.SGD([parameters], lr=0.5, momentum=mu)
    expected, phi = torch.zeros(6).double(), torch.zeros(6).double()
    for jacobian in jacobians:
        residuals = jacobian @ parameters - offset
        last = optimizer.state[parameters].get("momentum_buffer")
        projection = torch.zeros(4).double() if last is None else jacobian @ last
        optimizer.zero_grad()
        residuals.backward(weighting(gram(jacobian), residuals, projection))
        optimizer.step()
        phi = mu * phi + step(jacobian, jacobian @ expected - offset - mu * jacobian @ phi, damping)
        expected = expected - 0.5 * phi
        torch.testing.assert_close(parameters.detach(), expected, rtol=1e-10, atol=1e-12)


def test_momentum_asks_for_a_projection():
    with pytest.raises(ValueError, match=r"momentum is 0.9: give projection.*before the first one, zeros"):
        GaussNewtonWeighting(1.0, 0.9)(torch.eye(2), torch.ones(2))


def test_a_linear_problem_is_solved_in_one_step():
    from recollect.autogram import Engine

    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1).double()
    x, y = torch.randn(4, 5).double(), torch.randn(4).double()
    residuals = model(x).squeeze(1) - y
    engine = Engine(model)
    residuals = model(x).squeeze(1) - y
    residuals.backward(GaussNewtonWeighting(0.0)(engine.compute_gramian(residuals), residuals))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert float((model(x).squeeze(1) - y).detach().norm()) < 1e-12


def test_residuals_of_another_shape():
    jacobian, residuals = normal(2, 3, 9), normal(2, 3, seed=1)
    gramian = torch.einsum("abp,cdp->abdc", jacobian, jacobian)
    flattening = Flattening(GaussNewtonWeighting(0.1))
    expected = GaussNewtonWeighting(0.1)(gram(jacobian.reshape(6, 9)), residuals.flatten())
    torch.testing.assert_close(flattening(gramian, residuals).flatten(), expected)
    assert flattening.takes_residuals
    with pytest.raises(ValueError, match=r"shape \[2, 3\]; what comes beside their Gramian has \[3, 2\]"):
        flattening(gramian, residuals.T)


@pytest.mark.parametrize(
    ("residuals", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "residuals must be a tensor"),
        (torch.ones(3), ValueError, r"residuals has the shape \[3\]; the Gramian is of 2 objectives"),
        (torch.tensor([1.0, torch.nan]), ValueError, "residuals must be finite"),
        (torch.ones(2, dtype=torch.int64), ValueError, "floating point"),
    ],
)
def test_residuals_that_are_none(residuals, error, message):
    with pytest.raises(error, match=message):
        GaussNewtonWeighting(1.0)(torch.eye(2), residuals)
    with pytest.raises(error, match=message.replace("residuals", "projection")):
        GaussNewtonWeighting(1.0)(torch.eye(2), torch.ones(2), residuals)


def test_what_is_no_gramian():
    with pytest.raises(ValueError, match="symmetric"):
        GaussNewtonWeighting(1.0)(torch.ones(2, 2).triu(), torch.ones(2))
    with pytest.raises(TypeError, match="the Gramian must be a tensor"):
        GaussNewtonWeighting(1.0)([[1.0]], torch.ones(1))


def test_a_method_of_ones_own():
    class Size(ResidualWeighting):
        def weigh(self, gramian, residuals, projection=None):
            return residuals.abs()

    weights = Size()(torch.eye(2), torch.tensor([1.0, -2.0], requires_grad=True))
    assert weights.tolist() == [1, 2]
    assert not weights.requires_grad
    assert Size().takes_residuals


def test_settings_copy_and_are_shown():
    weighting = GaussNewtonWeighting(0.5, 0.25)
    assert repr(weighting) == "GaussNewtonWeighting(damping=0.5, momentum=0.25)"
    for twin in (copy.deepcopy(weighting), pickle.loads(pickle.dumps(weighting))):
        assert (twin.damping, twin.momentum) == (0.5, 0.25)


@pytest.mark.parametrize("m", [2, 120, 128])
def test_pivots_of_rounding_are_not_solved_with(m):
    """The matrix is singular, which the algorithm need not see: weights of 1e16 come of that."""
    residuals = normal(m)
    weights = GaussNewtonWeighting(1e-30)(torch.ones(m, m).double(), residuals)
    torch.testing.assert_close(weights, torch.full_like(weights, residuals.sum() / m**2), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("unit", [1e-200, 1e-101, 1e-99, 1e99, 1e101, 1e200])
def test_gramians_at_the_ends_of_the_range(unit):
    jacobian, residuals = wide(5), normal(5, seed=8)
    weights = GaussNewtonWeighting(0.1 * unit)(gram(jacobian) * unit, residuals * unit)
    torch.testing.assert_close(weights, GaussNewtonWeighting(0.1)(gram(jacobian), residuals), rtol=1e-10, atol=0)
