"""FairGrad: its equation holds, for every fairness, and Newton's method gets there from anywhere."""

import pytest
import torch
from weight_asserts import counting
from weight_inputs import DEGENERATE, camps, common, gram, lengths_apart, nearly_singular, normal, square, wide

from recollect.aggregation import FairGradWeighting, MGDAWeighting, NashMTLWeighting, _fairgrad

ALPHAS = [0.1, 0.5, 1.0, 2.0, 10.0]


@pytest.mark.parametrize("kind", [wide, common, camps])
@pytest.mark.parametrize("m", [1, 2, 7, 20])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_equation_holds(kind, m, alpha):
    gramian = gram(kind(m))
    weights = FairGradWeighting(alpha)(gramian)
    assert (weights > 0).all()
    residual = weights ** (1 / alpha) * (gramian @ weights) - 1
    assert float(residual.abs().amax()) < 1e-12 * max(1, 1 / alpha)


@pytest.mark.parametrize("kind", [square, lengths_apart])
def test_the_equation_holds_where_it_is_hard(kind):
    gramian = gram(kind(7))
    weights = FairGradWeighting(2.0)(gramian)
    assert float((weights**0.5 * (gramian @ weights) - 1).abs().amax()) < 1e-10


@pytest.mark.parametrize("alpha", ALPHAS)
def test_orthogonal_gradients_by_hand(alpha):
    squares = torch.tensor([1e-12, 1.0, 9.0, 1e16]).double()
    expected = squares ** (-alpha / (1 + alpha))
    torch.testing.assert_close(FairGradWeighting(alpha)(torch.diag(squares)), expected, rtol=1e-13, atol=0)


def test_alpha_one_is_the_bargain():
    gramian = gram(square(6))
    torch.testing.assert_close(FairGradWeighting(1.0)(gramian), NashMTLWeighting(max_norm=0)(gramian))


def test_the_larger_alpha_the_more_the_least_progress_counts():
    gramian = gram(common(6) * torch.logspace(-1, 1, 6).double()[:, None])
    weights = [FairGradWeighting(alpha)(gramian) for alpha in (0.0, 1.0, 5.0, 50.0)]
    least = [float((gramian @ w).amin() / (w @ gramian @ w).sqrt()) for w in weights]
    assert least[0] < 0 < least[1] < least[2] < least[3]
    shortest = MGDAWeighting()(gramian)  # whose direction has the largest least progress of all
    assert least[3] == pytest.approx(float((shortest @ gramian @ shortest).sqrt()), rel=0.05)


def test_without_fairness_it_is_the_mean():
    assert FairGradWeighting(0.0)(gram(square(4))).tolist() == [0.25] * 4


@pytest.mark.parametrize("case", ["all zero", "one objective, zero", "a zero row"])
def test_zero_gradients_get_nothing(case):
    jacobian = DEGENERATE[case]
    weights = FairGradWeighting(2.0)(gram(jacobian))
    assert ((weights > 0) == (jacobian.norm(dim=1) > 0)).all()


@pytest.mark.parametrize("alpha", [*ALPHAS, 50.0])
@pytest.mark.parametrize("factor", [1e-8, 1e-2, 1e2, 1e8])
@pytest.mark.parametrize("kind", [camps, nearly_singular])
def test_it_converges_from_anywhere(alpha, factor, kind):
    cosines = gram(torch.nn.functional.normalize(kind(9))) + 1e-8 * torch.eye(9).double()
    sizes = torch.logspace(-2, 0, 9).double()
    start = sizes * factor ** normal(9).sign()
    found, expected = (
        _fairgrad._descended(cosines, torch.zeros(9).double(), sizes, alpha, q, 1000) for q in (start, sizes)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_norm_of_the_combination_is_of_the_nearest_gramian(dtype):
    cosines = gram(torch.nn.functional.normalize(normal(8, 2))).to(dtype).double()
    q, length = _fairgrad.fair_shares(cosines, torch.ones(8).double(), 1.0)
    values, vectors = torch.linalg.eigh(cosines)
    assert (values < -1e-5).any() == (dtype == torch.float16)  # rounding has made it indefinite
    expected = (values.clamp(min=0).sqrt() * (vectors.T @ q)).norm()
    assert float(length) == pytest.approx(float(expected), rel=1e-6, abs=2e-3)  # of shares of about 1e4


def test_steps_are_few():
    gramian = gram(wide(40))
    with counting() as count:
        FairGradWeighting(2.0)(gramian)
    assert count.calls["linalg_cholesky_ex"] <= 16


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_a_fairness_that_is_none(alpha):
    with pytest.raises(ValueError, match="alpha must not be negative or infinite"):
        FairGradWeighting(alpha)
