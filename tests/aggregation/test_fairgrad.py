"""FairGrad: its equation holds, for every fairness, and Newton's method gets there from anywhere."""

import pytest
import torch
from weight_asserts import counting
from weight_inputs import DEGENERATE, camps, common, gram, lengths_apart, normal, square, wide

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


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("factor", [1e-4, 1e-2, 1e2, 1e4])
def test_it_converges_from_anywhere(alpha, factor):
    cosines = torch.nn.functional.normalize(camps(9))
    cosines, sizes = gram(cosines), torch.logspace(-2, 0, 9).double()
    start = sizes * factor ** normal(9).sign()
    found, expected = (
        _fairgrad._descended(cosines, torch.zeros(9).double(), sizes, alpha, q, 1000) for q in (start, sizes)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_steps_are_few_and_wait_seldom():
    gramian = gram(wide(40))
    with counting() as count:
        FairGradWeighting(2.0)(gramian)
    assert count.calls["linalg_cholesky_ex"] <= 16
    assert count.reads <= 4


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_a_fairness_that_is_none(alpha):
    with pytest.raises(ValueError, match="alpha must not be negative or infinite"):
        FairGradWeighting(alpha)
