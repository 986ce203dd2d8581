"""Krum: the gradients in the closest company."""

import pytest
import torch
from weight_inputs import gram, normal

from recollect.aggregation import KrumWeighting


def chosen(jacobian, n_byzantine, n_selected):
    """Sum squared distances to the closest neighbours, one gradient after the other."""
    scores = []
    for i, row in enumerate(jacobian):
        others = torch.cat([jacobian[:i], jacobian[i + 1 :]])
        squares = (others - row).square().sum(1).sort().values
        scores.append(float(squares[: len(jacobian) - n_byzantine - 2].sum()))
    return sorted(sorted(range(len(jacobian)), key=scores.__getitem__)[:n_selected])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n_byzantine", "n_selected"), [(0, 1), (2, 1), (3, 4), (5, 8)])
def test_equals_one_gradient_after_the_other(seed, n_byzantine, n_selected):
    jacobian = normal(8, 5, seed=seed)
    weights = KrumWeighting(n_byzantine, n_selected)(gram(jacobian))
    assert weights.nonzero()[:, 0].tolist() == chosen(jacobian, n_byzantine, n_selected)
    assert set(weights.tolist()) <= {0.0, 1 / n_selected}


def test_the_adversary_is_not_chosen():
    jacobian = normal(1, 5) + 0.1 * normal(7, 5, seed=1)
    jacobian[4] *= -100
    weights = KrumWeighting(1, 5)(gram(jacobian))
    assert weights[4] == 0


def test_duplicates_are_each_others_closest_company():
    jacobian = normal(6, 5)
    jacobian[5] = jacobian[2]
    weights = KrumWeighting(3)(gram(jacobian))
    assert weights.argmax() in (2, 5)


@pytest.mark.parametrize(("settings", "message"), [((-1, 1), "n_byzantine must be at least 0"), ((1, 0), "n_selected")])
def test_settings_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        KrumWeighting(*settings)
    with pytest.raises(TypeError, match=r"n_byzantine must be a whole number \(got 1.5\)"):
        KrumWeighting(1.5)


@pytest.mark.parametrize(("settings", "least"), [((2, 1), 5), ((0, 5), 5)])
def test_too_few_objectives(settings, least):
    with pytest.raises(ValueError, match=f"at least {least} objectives; the Gramian has 4"):
        KrumWeighting(*settings)(torch.eye(4))
