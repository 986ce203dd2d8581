"""UPGrad and DualProj: against all sets of constraints, and by what their papers promise."""

import pytest
import torch
from weight_asserts import assert_no_conflict, cosines
from weight_inputs import DEGENERATE, KINDS, gram, normal, square, tall, wide
from weight_oracles import projection

from recollect.aggregation import DualProjWeighting, UPGradWeighting, _complementarity

BOTH = [UPGradWeighting, DualProjWeighting]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_upgrad_averages_the_projections_of_all_gradients(kind, m):
    gramian = gram(kind(m))
    weighting = UPGradWeighting()
    expected = torch.stack([projection(gramian, e) for e in torch.eye(m).double()]).mean(0)
    torch.testing.assert_close(weighting(gramian), expected, rtol=1e-7, atol=1e-9)
    assert weighting.last_residual < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_dualproj_projects_the_average(kind, m):
    gramian = gram(kind(m))
    weighting = DualProjWeighting()
    expected = projection(gramian, torch.full((m,), 1 / m).double())
    torch.testing.assert_close(weighting(gramian), expected, rtol=1e-7, atol=1e-9)
    assert weighting.last_residual < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_preferences(kind):
    gramian, preference = gram(kind(4)), torch.tensor([0.0, 1.0, 5.0, 1e-3]).double()
    expected = sum(projection(gramian, row) for row in torch.diag(preference))
    torch.testing.assert_close(UPGradWeighting(preference)(gramian), expected, rtol=1e-7, atol=1e-9)
    expected = projection(gramian, preference)
    torch.testing.assert_close(DualProjWeighting(preference)(gramian), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("make", BOTH)
def test_no_preference_at_all_is_no_update(make):
    assert not make(torch.zeros(3))(gram(square(3))).any()


@pytest.mark.parametrize("reg_eps", [1e-1, 1e-8])
def test_the_regularisation_is_what_was_asked_for(reg_eps):
    gramian = gram(square(4, seed=3))
    expected = projection(gramian, torch.full((4,), 0.25).double(), reg_eps)
    torch.testing.assert_close(DualProjWeighting(reg_eps=reg_eps)(gramian), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [2, 9, 40])
def test_no_objective_minds_the_update(make, kind, m):
    assert_no_conflict(make(), kind(m), tolerance=1.1e-4)
    assert_no_conflict(make(reg_eps=1e-8), kind(m), tolerance=1.1e-8)


@pytest.mark.parametrize("make", BOTH)
def test_the_mean_of_conflicting_gradients_is_minded(make):
    # So that the test above could fail.
    gramian = gram(torch.tensor([[1.0, 0.0], [-2.0, 0.5]]).double())
    assert cosines(gramian, torch.full((2,), 0.5).double()).amin() < -0.5
    assert cosines(gramian, make(reg_eps=1e-10)(gramian)).amin() > -1e-8


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("decades", [5, 20])
def test_without_regularisation_the_shortest_gradient_is_protected_too(make, decades):
    jacobian = square(6) * torch.logspace(-decades, decades, 6, dtype=torch.float64)[:, None]
    gramian = gram(jacobian)
    assert cosines(gramian, torch.full((6,), 1 / 6).double()).amin() < -0.1
    assert cosines(gramian, make(reg_eps=0.0)(gramian)).amin() > -1e-9


@pytest.mark.parametrize("make", BOTH)
def test_without_conflict_preferences_are_the_weights(make):
    gramian, preference = gram(normal(5, 4).abs()), torch.arange(1.0, 6.0).double()
    torch.testing.assert_close(make(preference)(gramian), preference, rtol=1e-12, atol=0)


def test_upgrad_is_linear_under_scaling():
    # A(diag(c) J) is linear in c > 0: for the Gramian of the unscaled J, weights of diag(c) J are c times those of J
    # with preference c.
    jacobian = square(6)
    exact = {"reg_eps": 0.0}
    first, second = normal(6, 1, seed=4).exp(), normal(6, 1, seed=5).exp()

    def update(scale):
        scaled = scale * jacobian
        return UPGradWeighting(**exact)(gram(scaled)) @ scaled

    torch.testing.assert_close(
        update(2 * first + 3 * second), 2 * update(first) + 3 * update(second), rtol=1e-6, atol=1e-8
    )


def test_upgrad_is_linear_in_the_preference():
    gramian, first, second = gram(tall(6)), normal(6).abs(), normal(6, seed=1).abs()

    def weights(preference):
        return UPGradWeighting(preference)(gramian)

    torch.testing.assert_close(weights(first + 2 * second), weights(first) + 2 * weights(second), rtol=1e-9, atol=1e-11)


def test_dualproj_is_not():
    gramian, first, second = gram(tall(6)), normal(6).abs(), normal(6, seed=1).abs()
    both = DualProjWeighting(first)(gramian) + DualProjWeighting(second)(gramian)
    assert (DualProjWeighting(first + second)(gramian) - both).norm() > 0.01 * both.norm()


def test_the_published_example():
    jacobian = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    weights = UPGradWeighting()(gram(jacobian))
    torch.testing.assert_close(weights, torch.tensor([1.1109, 0.7894]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("one objective", [1.0]),
        ("one objective, zero", [1.0]),
        ("all zero", [0.25] * 4),
        ("a zero row", [2 / 3, 1 / 3, 1 / 2]),  # -1 / 2 of g₁'s part along g₃, and the other way round
        ("opposite", [1.0, 1.0]),
        ("no conflict", [0.2] * 5),
    ],
)
def test_degenerate_gramians(case, expected):
    weights = UPGradWeighting(reg_eps=1e-10)(gram(DEGENERATE[case]))
    torch.testing.assert_close(weights, torch.tensor(expected).double(), rtol=1e-6, atol=1e-8)


def test_residuals_are_kept_and_told(monkeypatch):
    weighting = UPGradWeighting()
    assert weighting.last_residual is None
    weighting(gram(wide(20)))
    assert 0 < weighting.last_residual < 1e-11
    monkeypatch.setattr(_complementarity, "descend", lambda h, q, z, **_: z)
    monkeypatch.setattr(_complementarity, "_pivot", lambda h, q, guess: (0 * q, torch.arange(len(q))))
    with pytest.warns(RuntimeWarning, match="optimal only up to"):
        weighting(gram(tall(20)))
    assert weighting.last_residual > 1e-6


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("reg_eps", [-1e-4, float("nan")])
def test_a_negative_regularisation(make, reg_eps):
    with pytest.raises(ValueError, match="reg_eps must not be negative"):
        make(reg_eps=reg_eps)
