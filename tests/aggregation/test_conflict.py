"""Measures of conflict, from the Gramian, equal those of the gradients themselves."""

import dataclasses
import math

import pytest
import torch
from weight_inputs import DEGENERATE, KINDS, gram, normal, square

from recollect.aggregation import UPGradWeighting, conflict


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True])
def test_equals_what_the_gradients_say(kind, given):
    jacobian = kind(7)
    weights = normal(7, seed=8) if given else torch.full((7,), 1 / 7).double()
    found = conflict(gram(jacobian), weights if given else None)
    update = weights @ jacobian
    expected = torch.nn.functional.cosine_similarity(jacobian, update.expand_as(jacobian))
    torch.testing.assert_close(found.cosines, expected, rtol=1e-6, atol=1e-8)
    assert found.min_cosine == pytest.approx(float(expected.amin()), rel=1e-6)
    pairs = [(jacobian[i] @ jacobian[j] < 0).item() for i in range(7) for j in range(i)]
    assert found.negative_share == pytest.approx(sum(pairs) / len(pairs))


def test_losses_of_another_shape():
    jacobian = normal(2, 3, 4)
    gramian = torch.einsum("abp,cdp->abdc", jacobian, jacobian)
    weights = normal(2, 3, seed=1)
    found = conflict(gramian, weights)
    flat = conflict(gram(jacobian.reshape(6, 4)), weights.flatten())
    torch.testing.assert_close(found.cosines, flat.cosines.reshape(2, 3))
    assert (found.negative_share, found.min_cosine) == (flat.negative_share, flat.min_cosine)


@pytest.mark.parametrize(
    ("case", "share", "least"),
    [
        ("one objective", 0, 1),
        ("one objective, zero", 0, 0),
        ("all zero", 0, 0),
        ("opposite", 1, 0),
        ("opposite and unequal", 1 / 3, -(0.5**0.5)),
        ("rank one", 0.5, -1),
    ],
)
def test_degenerate_gramians(case, share, least):
    found = conflict(gram(DEGENERATE[case]))
    assert found.negative_share == pytest.approx(share)
    assert found.min_cosine == pytest.approx(least, abs=1e-7)
    assert found.cosines.isfinite().all()


@pytest.mark.parametrize("case", DEGENERATE)
def test_units_do_not_matter(case):
    jacobian = DEGENERATE[case]
    found, other = conflict(gram(jacobian)), conflict(gram(jacobian * 1e-3))
    torch.testing.assert_close(found.cosines, other.cosines, rtol=1e-5, atol=1e-6)
    assert found.negative_share == other.negative_share


def test_a_dead_objective_does_not_hide_in_the_smallest():
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]).double()
    found = conflict(gram(jacobian))
    assert found.cosines[1] == 0
    assert found.min_cosine == pytest.approx(2 / 5**0.5)


def test_rounding_is_no_conflict():
    rotation = torch.linalg.qr(normal(30, 30)).Q.float()
    assert conflict(gram(rotation)).negative_share == 0


def test_upgrad_removes_conflict():
    gramian = gram(torch.tensor([[1.0, 0.0], [-2.0, 0.5]]).double())
    assert conflict(gramian).min_cosine < -0.1
    assert conflict(gramian, UPGradWeighting(reg_eps=1e-8)(gramian)).min_cosine > -1e-5


def test_no_update_has_no_direction():
    found = conflict(gram(square(3)), torch.zeros(3))
    assert found.cosines.tolist() == [0.0] * 3


def test_measures_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        conflict(torch.eye(2)).min_cosine = 1.0


@pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(2, 1), torch.tensor([1.0, math.inf])])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match=r"weights must be finite and of the shape \[2\]"):
        conflict(torch.eye(2), weights)


def test_what_is_no_gramian():
    with pytest.raises(ValueError, match="symmetric"):
        conflict(torch.ones(2, 2).triu())
