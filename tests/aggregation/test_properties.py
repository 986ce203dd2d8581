"""What holds of all weightings for any gradients: hypothesis looks for those of which it does not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_inputs import gram, normal, weightings

from recollect.aggregation import GaussNewtonWeighting

NAMES = list(weightings(1))
RANDOM = {"PCGrad", "GradVac", "random"}
ORDERED = {"UPGrad, preference", "constant", *RANDOM}
# Gradients of k times the length have weights of k to this power; of the others, the same ones.
DEGREES = {"Nash-MTL": -1.0, "FairGrad": -2 / 3, "FairGrad, large alpha": -10 / 6}
STEPS = {"MoDo"}  # the step itself depends on the length
SIMPLEX = {"MGDA", "MoDo", "SDMGrad", "mean", "random", "Krum"}
TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@st.composite
def jacobians(draw, least=1, *, degenerate=True):
    """Gradients of any number, dimension and length; some are zero, some are there twice, some are opposed."""
    m, n, seed = draw(st.integers(least, 9)), draw(st.integers(1, 12)), draw(st.integers(0, 10_000))
    jacobian = normal(m, n, seed=seed)
    if draw(st.booleans()):
        jacobian = jacobian * 10 ** (draw(st.integers(0, 6)) * normal(m, 1, seed=seed + 1))
    for _ in range(draw(st.integers(0, 3)) if degenerate else 0):
        i, j = draw(st.integers(0, m - 1)), draw(st.integers(0, m - 1))
        jacobian[i] = draw(st.sampled_from([0.0, 1.0, -1.0, 3.0])) * jacobian[j]
    return jacobian


def fresh(name):
    """A weighting that is made anew for each Gramian: without memory, and with the same draws."""
    return lambda gramian: weightings(len(gramian))[name](gramian)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    jacobian=jacobians(least=3), dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
)
def test_weights_are_finite_numbers_of_the_gramians_type(name, jacobian, dtype):
    gramian = gram(jacobian / jacobian.norm().clamp(min=1e-300)).to(dtype)
    weights = fresh(name)(gramian)
    assert weights.shape == (len(gramian),)
    assert weights.dtype == dtype
    assert weights.isfinite().all()
    if name in SIMPLEX:
        assert (weights >= 0).all()
        assert float(weights.double().sum()) == pytest.approx(1, abs=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Krum"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(jacobian=jacobians())
def test_few_objectives(name, jacobian):
    weighting = fresh(name)
    assert weighting(gram(jacobian)).isfinite().all()
    alone = weighting(gram(jacobian[:1]))
    if name not in {"constant", "UPGrad, preference", "CAGrad", "CAGrad, large c", *DEGREES} and jacobian[0].any():
        torch.testing.assert_close(alone, torch.ones(1).double(), rtol=1e-9, atol=0)  # the gradient itself


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ORDERED | {"Krum"}])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(jacobian=jacobians(least=2, degenerate=False), seed=st.integers(0, 100))
def test_the_order_of_objectives_does_not_matter(name, jacobian, seed):
    unit = torch.nn.functional.normalize(jacobian)
    independent = torch.cat([unit, torch.eye(len(unit)).double()], dim=1)  # so that there is one solution
    order = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))
    expected = fresh(name)(gram(independent))[order]
    torch.testing.assert_close(fresh(name)(gram(independent[order])), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STEPS])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(jacobian=jacobians(least=3), exponent=st.integers(-30, 30))
def test_the_unit_of_gradients_is_a_power(name, jacobian, exponent):
    gramian, factor = gram(jacobian), 2.0**exponent  # a power of two: not even rounding differs
    expected = fresh(name)(gramian) * factor ** DEGREES.get(name, 0.0)
    torch.testing.assert_close(fresh(name)(factor**2 * gramian), expected, rtol=1e-4, atol=0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(jacobian=jacobians(), exponent=st.integers(-30, 30), damping=st.sampled_from([1e-6, 1.0, 1e6]))
def test_gauss_newton_goes_by_the_unit_of_damping(jacobian, exponent, damping):
    gramian, residuals, factor = gram(jacobian), normal(len(jacobian)), 2.0**exponent
    expected = GaussNewtonWeighting(damping)(gramian, residuals) / factor**2
    found = GaussNewtonWeighting(damping * factor**2)(factor**2 * gramian, residuals)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    matrix = factor**2 * (gramian + damping * torch.eye(len(gramian)).double())
    size = matrix.abs() @ found.abs() + residuals.abs()
    assert ((matrix @ found - residuals).abs() <= 1e-12 * size.amax()).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ORDERED | {"Krum"}])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), m=st.integers(2, 6))
def test_gradients_that_are_the_same_have_the_same_weight(name, seed, m):
    jacobian = normal(m, 20, seed=seed)
    jacobian = torch.cat([jacobian, jacobian[:1]])
    weights = fresh(name)(gram(jacobian))
    torch.testing.assert_close(weights[0], weights[-1], rtol=1e-4, atol=1e-4)  # which is up to a ridge


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ORDERED | {"mean", "sum", "Krum"}])
def test_without_gradients_there_are_weights_all_the_same(name):
    weights = fresh(name)(torch.zeros(4, 4))
    assert weights.equal(weights[:1].expand(4))
