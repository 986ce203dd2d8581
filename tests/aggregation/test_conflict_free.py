"""ConFIG: against its form with unit gradients, and by what it promises."""

import pytest
import torch
from weight_inputs import DEGENERATE, KINDS, camps, common, gram, lengths_apart, nearly_singular, normal, tall, wide

from recollect.aggregation import ConFIGWeighting

CLEAR = [kind for kind in KINDS if kind not in (tall, nearly_singular)]


def update(jacobian, preference):
    """Equation 2 of the paper, with the Jacobian."""
    units = torch.nan_to_num(jacobian / jacobian.norm(dim=1, keepdim=True))
    direction = torch.nn.functional.normalize(torch.linalg.pinv(units) @ preference, dim=0)
    return (jacobian @ direction).sum() * direction


def assert_same(found, expected, tolerance):
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("kind", [wide, common, camps, lengths_apart])
@pytest.mark.parametrize("m", [1, 2, 7, 20])
def test_equals_the_form_with_the_jacobian(kind, m):
    jacobian = kind(m)
    assert_same(ConFIGWeighting()(gram(jacobian)) @ jacobian, update(jacobian, torch.ones(m).double()), 1e-12)
    preference = torch.linspace(0.5, 2, m).double()
    assert_same(ConFIGWeighting(preference)(gram(jacobian)) @ jacobian, update(jacobian, preference), 1e-12)


@pytest.mark.parametrize("kind", CLEAR)
@pytest.mark.parametrize("m", [2, 7])
def test_cosines_are_as_preferred(kind, m):
    jacobian, preference = kind(m), torch.linspace(0.5, 2, m).double()
    direction = ConFIGWeighting(preference)(gram(jacobian)) @ jacobian
    cosines = torch.cosine_similarity(jacobian, direction[None])
    torch.testing.assert_close(cosines / cosines.sum(), preference / preference.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("m", [3, 8])
def test_dependent_gradients(m):
    jacobian = tall(m)
    assert_same(ConFIGWeighting()(gram(jacobian)) @ jacobian, update(jacobian, torch.ones(m).double()), 1e-10)


@pytest.mark.parametrize("case", ["duplicates", "a zero row", "no conflict", "tiny", "huge"])
def test_degenerate_gramians(case):
    jacobian = DEGENERATE[case]
    expected = update(jacobian, torch.ones(len(jacobian)).double())
    weights = ConFIGWeighting()(gram(jacobian))
    assert_same(weights @ jacobian, expected, 1e-10)
    assert not weights[jacobian.norm(dim=1) == 0].any()


def test_preferences_have_no_size():
    gramian = gram(normal(4, 9))
    torch.testing.assert_close(ConFIGWeighting(torch.full((4,), 7.0))(gramian), ConFIGWeighting()(gramian))


@pytest.mark.parametrize("case", ["all zero", "opposite", "one objective, zero"])
def test_without_a_direction_there_is_no_update(case):
    assert not ConFIGWeighting()(gram(DEGENERATE[case])).any()


@pytest.mark.parametrize("m", [3, 5, 8])
def test_gradients_that_cancel_leave_no_direction(m):
    angles = 2 * torch.pi * torch.arange(m).double() / m
    jacobian = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.linspace(1, 9, m).double()[:, None]
    assert not ConFIGWeighting()(gram(jacobian)).any()


def test_no_preference_is_no_update():
    assert not ConFIGWeighting(torch.zeros(3))(gram(normal(3, 3))).any()
