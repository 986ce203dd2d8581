"""Gramians in half precision: weights are finite in their type, and those of the same numbers in float64."""

import pytest
import torch
from weight_inputs import DEGENERATE, camps, common, gram, normal, square, weightings, wide

from recollect.aggregation import ConstantWeighting, FairGradWeighting, Flattening, MeanWeighting, NashMTLWeighting
from recollect.aggregation._weighting import fitted

HALF = [torch.float16, torch.bfloat16]
NAMES = list(weightings(1))
# What counts as dependent hangs on the type, and so may what is drawn.
OTHERWISE = {"IMTL-G", "Aligned-MTL", "ConFIG", "random"}


def within(gramian, dtype):
    return bool(gramian.to(dtype).isfinite().all())


def both(name, gramian) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of a half-precision Gramian, and those of its numbers in float64."""
    return weightings(len(gramian))[name](gramian), weightings(len(gramian))[name](gramian.double())


def assert_same_direction(found, expected, dtype):
    assert found.dtype == dtype
    assert found.isfinite().all()
    shrunk = float(expected.abs().amax() / found.double().abs().amax()) if expected.any() else 1.0
    eps = torch.finfo(dtype).eps
    assert shrunk == pytest.approx(max(1.0, float(expected.abs().amax()) / torch.finfo(dtype).max), rel=2 * eps)
    error = (found.double() * shrunk - expected).abs().amax()
    assert float(error) <= 4 * eps * float(expected.abs().amax())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
@pytest.mark.parametrize("kind", [wide, common, camps])
@pytest.mark.parametrize("length", [1e-3, 1e-1, 1.0])
def test_weights_are_those_of_the_same_numbers(name, dtype, kind, length):
    gramian = gram(torch.nn.functional.normalize(kind(5)) * length * 200).to(dtype)
    assert_same_direction(*both(name, gramian), dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [3e-4, 1.0, 60.0])
def test_rank_one(name, dtype, size):
    for seed in range(20):
        row = normal(8, 1, seed=seed) * size
        gramian = gram(row).to(dtype)
        if not within(gramian, dtype):
            continue
        found, expected = both(name, gramian)
        if name in OTHERWISE:
            assert found.isfinite().all()
        else:
            assert_same_direction(found, expected, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["IMTL-G", "ConFIG", "Aligned-MTL"])
def test_rank_one_without_conflict_is_told_from_rounding(name, dtype):
    for seed in range(20):
        row = normal(8, 1, seed=seed).abs() + 0.2
        update = weightings(8)[name](gram(row).to(dtype)).double() @ row
        expected = weightings(8)[name](gram(row)) @ row
        torch.testing.assert_close(update, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


WITHIN = [
    (case, factor, dtype)
    for case in DEGENERATE
    for factor in (1.0, 2.0**-12, 2.0**6)
    for dtype in HALF
    if within(gram(DEGENERATE[case] * factor), dtype)
]


@pytest.mark.parametrize(("case", "factor", "dtype"), WITHIN)
def test_degenerate_gramians(case, factor, dtype):
    gramian = gram(DEGENERATE[case] * factor).to(dtype)
    for name in NAMES:
        if name == "Krum" and len(gramian) < 3:
            continue
        found, expected = both(name, gramian)
        if name in OTHERWISE:
            assert found.isfinite().all(), name
        else:
            assert_same_direction(found, expected, dtype)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_the_largest_numbers_of_the_type(name):
    gramian = torch.full((4, 4), 60000.0).half()
    gramian.diagonal().fill_(65504.0)
    assert_same_direction(*both(name, gramian), torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_squares_that_are_zero_in_the_type(name):
    """The square of a short gradient's norm is lost, not its products with long ones."""
    jacobian = square(4) * torch.tensor([3e-5, 1.0, 1.0, 1e-5]).double()[:, None]
    gramian = gram(jacobian).half()
    assert gramian[0, 0] == gramian[3, 3] == 0
    assert gramian[0].any()
    found, expected = both(name, gramian)
    assert found.isfinite().all()
    if name not in OTHERWISE:
        assert_same_direction(found, expected, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_of_use(name, dtype):
    losses = torch.ones(8, dtype=dtype, requires_grad=True)
    weights = weightings(8)[name](gram(normal(8, 1, seed=1)).to(dtype))
    losses.backward(weights)
    assert losses.grad.isfinite().all()


def test_a_weight_out_of_range_shrinks_all_alike():
    exact = torch.tensor([1e6, -5e5, 10.0]).double()
    found = fitted(exact, torch.empty(0, dtype=torch.float16)).double()
    torch.testing.assert_close(found, exact * (65504 / 1e6), rtol=1e-3, atol=0)
    assert ConstantWeighting(exact)(torch.eye(3).half())[0] == 65504
    assert ConstantWeighting(exact.long())(torch.eye(3).half())[0] == 65504
    assert ConstantWeighting(exact)(torch.eye(3))[0] == 1e6
    # A weight of 1e45 for the square of the norm 1e-45.
    weights = FairGradWeighting(1e6)(torch.diag(torch.tensor([1e-45, 4e-45, 1.0])))
    assert weights.isfinite().all()
    assert float(weights[1] / weights[0]) == pytest.approx(1 / 3, rel=1e-3)  # 4e-45 is three of float32's least number


def test_what_is_not_finite_is_not_hidden():
    weights = torch.tensor([1.0, torch.inf, torch.nan]).double()
    assert fitted(weights, torch.empty(0)).isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("wrap", [lambda weighting: weighting, Flattening])
def test_nothing_overflows_in_a_long_run_of_rank_one_gramians(wrap):
    for seed in range(60):
        torch.manual_seed(seed)
        row = torch.randn(8, 1)
        assert wrap(NashMTLWeighting())((row @ row.T).half()).isfinite().all()


def test_rounding_of_the_least_numbers_is_no_asymmetry():
    gramian = torch.tensor([[2e-7, 6e-8], [0.0, 2e-7]]).half()
    assert gramian[0, 1] > 0
    assert MeanWeighting()(gramian).tolist() == [0.5, 0.5]
