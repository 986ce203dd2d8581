"""Losses of any shape are weighed as one list."""

import math

import pytest
import torch
from weight_inputs import gram, normal, weightings

from recollect.aggregation import Flattening, UPGradWeighting


def generalised(jacobian):
    k = jacobian.ndim - 1
    rows = jacobian.reshape(-1, jacobian.shape[-1])
    return gram(rows).reshape(2 * jacobian.shape[:-1]).permute([*range(k), *range(2 * k - 1, k - 1, -1)])


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("name", ["UPGrad", "PCGrad", "mean"])
def test_weights_have_the_shape_of_the_losses(shape, name):
    jacobian = normal(*shape, 4)
    m = math.prod(shape)
    weights = Flattening(weightings(m)[name])(generalised(jacobian))
    expected = weightings(m)[name](gram(jacobian.reshape(m, 4)))
    torch.testing.assert_close(weights, expected.reshape(shape))


def test_any_callable_can_be_wrapped():
    assert Flattening(lambda gramian: gramian.sum(0))(torch.ones(2, 3, 3, 2)).tolist() == [[6.0] * 3] * 2


def test_what_is_wrapped_gives_one_weight_for_each_loss():
    with pytest.raises(ValueError, match=r"returned weights of shape \[3\]; there are 6 objectives"):
        Flattening(lambda gramian: gramian[0, :3])(torch.ones(2, 3, 3, 2))


def test_errors_name_places():
    jacobian = normal(2, 3, 4)
    jacobian[1, 0] = math.nan
    with pytest.raises(ValueError, match=r"of objective \(1, 0\) \("):
        Flattening(UPGradWeighting())(generalised(jacobian))


def test_axes_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"mirroring the first; found \[2, 3, 2, 3\]"):
        Flattening(UPGradWeighting())(torch.ones(2, 3, 2, 3))


def test_it_is_seen_by_modules():
    flattening = Flattening(UPGradWeighting(torch.ones(2)))
    assert flattening.weighting in list(flattening.modules())
