"""Aligned-MTL: the aligned gradients are orthogonal and equally long."""

import pytest
import torch
from weight_inputs import DEGENERATE, gram, normal

from recollect.aggregation import AlignedMTLWeighting


def update(jacobian, preference, size):
    """Align by the singular value decomposition of the gradients themselves."""
    u, s, v = torch.linalg.svd(jacobian, full_matrices=False)
    there = s > 1e-10 * s[0]
    u, s, v = u[:, there], s[there], v[there]
    return size(s) * preference @ u @ v


SIZES = {
    "min": lambda s: s.amin(),
    "median": lambda s: s.square().median().sqrt(),
    "rmse": lambda s: s.square().mean().sqrt(),
}


@pytest.mark.parametrize("mode", SIZES)
@pytest.mark.parametrize("shape", [(1, 3), (5, 9), (6, 6), (9, 4)])
def test_equals_the_alignment_of_the_gradients(mode, shape):
    jacobian, preference = normal(*shape), normal(shape[0], seed=1).abs()
    weights = AlignedMTLWeighting(preference, mode)(gram(jacobian))
    torch.testing.assert_close(weights @ jacobian, update(jacobian, preference, SIZES[mode]), rtol=1e-8, atol=1e-10)


def test_the_precision_of_the_gramian_decides_what_is_zero():
    jacobian = normal(6, 3)
    exact = AlignedMTLWeighting()(gram(jacobian))
    rounded = AlignedMTLWeighting()(gram(jacobian).float())
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-3, atol=1e-5)


def test_without_gradients_preferences_are_the_weights():
    assert AlignedMTLWeighting()(gram(DEGENERATE["all zero"])).tolist() == [0.25] * 4


def test_a_mode_that_is_none():
    with pytest.raises(ValueError, match=r"one of min, median, rmse \(got 'max'\)"):
        AlignedMTLWeighting(scale_mode="max")
