"""MGDA: the shortest convex combination."""

import pytest
import torch
from weight_asserts import assert_no_conflict
from weight_inputs import DEGENERATE, KINDS, gram, tall
from weight_oracles import shortest

from recollect.aggregation import MGDAWeighting


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_as_short_as_any_face_allows(kind, m):
    gramian = gram(kind(m))
    weights, expected = MGDAWeighting()(gramian), shortest(gramian)
    value, best = weights @ gramian @ weights, expected @ gramian @ expected
    assert float(value - best) < 1e-9 * float(gramian.diagonal().amin())
    if best > 1e-6 * gramian.diagonal().amin():  # else there may be several
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [2, 40])
def test_a_convex_combination_that_no_objective_minds(kind, m):
    weights = MGDAWeighting()(gram(kind(m)))
    assert (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(1)
    assert_no_conflict(MGDAWeighting(), kind(m), tolerance=1e-8)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("one objective", [1.0]),
        ("all zero", [0.25] * 4),
        ("a zero row", [0.0, 1.0, 0.0]),
        ("opposite", [0.5, 0.5]),
        ("opposite and unequal", [2 / 3, 1 / 3, 0.0]),
        ("very far apart", [1.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_degenerate_gramians(case, expected):
    weights = MGDAWeighting()(gram(DEGENERATE[case]))
    torch.testing.assert_close(weights, torch.tensor(expected).double(), rtol=1e-7, atol=1e-8)


def test_low_precision_is_mended():
    gramian = gram(tall(30))
    weights = MGDAWeighting()(gramian.float()).double()
    assert weights @ gramian @ weights < 1e-6 * gramian.diagonal().amin()
