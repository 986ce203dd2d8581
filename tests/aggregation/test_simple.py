"""Weights that do not look at the gradients."""

import math

import pytest
import torch

from recollect.aggregation import ConstantWeighting, MeanWeighting, RandomWeighting, SumWeighting


def test_mean_and_sum():
    assert MeanWeighting()(torch.eye(4)).tolist() == [0.25] * 4
    assert SumWeighting()(torch.eye(4)).tolist() == [1.0] * 4


def test_constant_weights_take_the_gramians_type():
    weights = ConstantWeighting(torch.tensor([1, 2]))(torch.eye(2).double())
    assert weights.tolist() == [1.0, 2.0]
    assert weights.dtype == torch.float64


@pytest.mark.parametrize(
    ("weights", "message"),
    [(torch.ones(2, 2), r"one number for each objective, \[m\]"), (torch.tensor([1.0, math.nan]), "must be finite")],
)
def test_constant_weights_that_are_none(weights, message):
    with pytest.raises(ValueError, match=message):
        ConstantWeighting(weights)


def test_constant_weights_for_other_objectives():
    with pytest.raises(ValueError, match="for 2 objectives; the Gramian has 3"):
        ConstantWeighting(torch.ones(2))(torch.eye(3))


def test_random_weights_are_a_softmax_of_normal_numbers():
    weights = RandomWeighting(torch.Generator().manual_seed(2))(torch.eye(1000))
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights.log().std()) == pytest.approx(1, abs=0.1)
