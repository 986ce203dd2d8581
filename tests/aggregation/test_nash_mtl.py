"""Nash-MTL: its equation holds."""

import pytest
import torch
from weight_inputs import DEGENERATE, KINDS, centred, gram, lengths_apart, nearly_singular, square, tall

from recollect.aggregation import NashMTLWeighting


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (tall, nearly_singular, centred)])
@pytest.mark.parametrize("m", [1, 2, 7, 40])
def test_the_equation_holds(kind, m):
    gramian = gram(kind(m))
    weights = NashMTLWeighting(max_norm=0)(gramian)
    assert (weights > 0).all()
    torch.testing.assert_close(weights * (gramian @ weights), torch.ones(m).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_the_norm_of_the_update_is_limited(max_norm):
    gramian = gram(square(5))
    free, weights = NashMTLWeighting(max_norm=0)(gramian), NashMTLWeighting(max_norm)(gramian)
    assert float((weights @ gramian @ weights).sqrt()) == pytest.approx(min(max_norm, 5**0.5), rel=1e-5)
    torch.testing.assert_close(weights / weights.sum(), free / free.sum())


def test_long_gradients_do_not_drown_short_ones():
    jacobian = lengths_apart(6)
    shares = NashMTLWeighting()(gram(jacobian)) * jacobian.norm(dim=1)
    alike = NashMTLWeighting()(gram(torch.nn.functional.normalize(jacobian)))
    torch.testing.assert_close(shares, alike)


@pytest.mark.parametrize("case", ["all zero", "one objective, zero", "a zero row"])
def test_zero_gradients_get_nothing(case):
    jacobian = DEGENERATE[case]
    weights = NashMTLWeighting()(gram(jacobian))
    assert ((weights > 0) == (jacobian.norm(dim=1) > 0)).all()


@pytest.mark.parametrize("case", ["opposite", "rank one"])
def test_gradients_that_cancel_leave_bounded_weights(case):
    jacobian = DEGENERATE[case]
    weights = NashMTLWeighting()(gram(jacobian))
    assert (weights * jacobian.norm(dim=1) < 1e5).all()
    assert float((weights @ jacobian).norm()) <= 1


def test_a_negative_norm():
    with pytest.raises(ValueError, match="max_norm must not be negative"):
        NashMTLWeighting(-1.0)
