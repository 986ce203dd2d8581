"""CAGrad: against the certificate that a convex program has."""

import pytest
import torch
from weight_inputs import DEGENERATE, KINDS, centred, gram, lengths_apart, nearly_singular, square, tall, wide

from recollect.aggregation import CAGradWeighting, _cagrad
from recollect.aggregation._complementarity import solve

CLEAR = [kind for kind in KINDS if kind is not lengths_apart]  # no gradient is so short that it counts as none


@pytest.mark.parametrize("kind", CLEAR)
@pytest.mark.parametrize("m", [1, 2, 7, 40])
@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
def test_the_worst_off_objective_cannot_do_better(kind, m, c):
    # d = g0 + sum x_i g_i with x >= 0 at the ball's edge is optimal if x_i > 0 only for objectives that gain least.
    jacobian = kind(m)
    jacobian = jacobian / jacobian.norm()
    average = jacobian.mean(0)
    weights = CAGradWeighting(c, norm_eps=0)(gram(jacobian))
    extra = weights - 1 / m
    direction = weights @ jacobian
    gains = jacobian @ direction
    assert (extra >= 0).all()
    radius = c * float(average.norm())
    assert float((direction - average).norm()) == pytest.approx(radius, rel=1e-4)
    active = extra > 1e-9 * extra.amax()
    torch.testing.assert_close(gains[active], gains.amin().expand(int(active.sum())), rtol=1e-5, atol=1e-7)


def test_two_objectives_by_trying_many_weights():
    jacobian = torch.tensor([[1.0, 0.3], [-2.0, 1.0]]).double()
    average, c = jacobian.mean(0), 0.4
    w = torch.linspace(0, 1, 100_001).double()
    between = w[:, None] * jacobian[0] + (1 - w[:, None]) * jacobian[1]
    best = between[(between @ average + c * average.norm() * between.norm(dim=1)).argmin()]
    expected = average + c * average.norm() * best / best.norm()
    weights = CAGradWeighting(c)(gram(jacobian))
    torch.testing.assert_close(weights @ jacobian, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [square, wide])
def test_without_a_ball_it_is_the_mean(kind):
    assert CAGradWeighting(0)(gram(kind(4))).tolist() == [0.25] * 4


@pytest.mark.parametrize("case", ["a zero row", "opposite", "all zero", "duplicates"])
def test_degenerate_gramians(case):
    jacobian = DEGENERATE[case]
    update = CAGradWeighting(0.5)(gram(jacobian)) @ jacobian
    assert update.any() == (case == "duplicates")


@pytest.mark.parametrize("kind", [tall, nearly_singular])
def test_a_ball_that_reaches_a_stationary_point_gives_no_update(kind):
    assert not CAGradWeighting(1.5)(gram(kind(7))).any()


@pytest.mark.parametrize("kind", CLEAR)
def test_few_programs_are_solved(kind, monkeypatch):
    programs = []
    monkeypatch.setattr(_cagrad, "solve", lambda h, f, q: programs.append(len(q)) or solve(h, f, q))
    CAGradWeighting(0.5)(gram(kind(20)))
    assert len(programs) <= (12 if kind is centred else 6)


@pytest.mark.parametrize("settings", [{"c": -0.1}, {"c": 0.5, "norm_eps": -1.0}, {"c": float("nan")}])
def test_negative_settings(settings):
    with pytest.raises(ValueError, match="must not be negative"):
        CAGradWeighting(**settings)
