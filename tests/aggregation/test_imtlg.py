"""IMTL-G: equal projections."""

import pytest
import torch
from weight_inputs import DEGENERATE, KINDS, gram, nearly_singular, normal, tall

from recollect.aggregation import IMTLGWeighting


def projections(jacobian, weights):
    norms = jacobian.norm(dim=1)
    return (jacobian @ (weights @ jacobian))[norms > 0] / norms[norms > 0]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (tall, nearly_singular)])
@pytest.mark.parametrize("m", [1, 2, 7, 20])
def test_the_update_projects_equally_onto_all(kind, m):
    jacobian = kind(m)
    weights = IMTLGWeighting()(gram(jacobian))
    assert float(weights.sum()) == pytest.approx(1)
    found = projections(jacobian, weights)
    torch.testing.assert_close(found, found[:1].expand(m), rtol=1e-3, atol=1e-6 * float(found.abs().amax()))


def test_the_formula():
    jacobian = normal(5, 9)
    expected = torch.linalg.solve(gram(jacobian), jacobian.norm(dim=1))
    torch.testing.assert_close(IMTLGWeighting()(gram(jacobian)), expected / expected.sum())


@pytest.mark.parametrize("kind", [tall, nearly_singular])
@pytest.mark.parametrize("m", [2, 5, 12])
def test_the_formula_where_gradients_are_dependent(kind, m):
    jacobian = kind(m)
    if kind is nearly_singular:
        jacobian = torch.cat([jacobian[: m // 2], 3 * jacobian[: m // 2]])
    expected = torch.linalg.pinv(gram(jacobian), rtol=1e-12, hermitian=True) @ jacobian.norm(dim=1)
    torch.testing.assert_close(IMTLGWeighting()(gram(jacobian)), expected / expected.sum(), rtol=1e-6, atol=1e-9)


def test_dependent_gradients_of_very_different_length():
    jacobian = DEGENERATE["very far apart"]  # 5 gradients of 4 parameters: the shortest one is not needed
    weights = IMTLGWeighting()(gram(jacobian))
    expected = IMTLGWeighting()(gram(jacobian[1:]))
    torch.testing.assert_close(weights[1:], expected, rtol=1e-6, atol=0)
    assert abs(float(weights[0])) < 1e-6


@pytest.mark.parametrize("case", ["a zero row", "duplicates", "very far apart", "tiny", "huge"])
def test_dependent_gradients_are_no_harm(case):
    jacobian = DEGENERATE[case]
    weights = IMTLGWeighting()(gram(jacobian))
    if case in ("a zero row", "duplicates"):
        found = projections(jacobian, weights)
        torch.testing.assert_close(found, found[:1].expand(len(found)), rtol=1e-6, atol=1e-9)
    assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("case", ["all zero", "opposite"])
def test_without_a_solution_there_is_no_update(case):
    assert not IMTLGWeighting()(gram(DEGENERATE[case])).any()


def test_zero_gradients_get_nothing():
    assert IMTLGWeighting()(gram(DEGENERATE["a zero row"]))[1] == 0
