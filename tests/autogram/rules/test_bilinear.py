"""Layers that are linear in each of two inputs."""

import pytest
import torch
from rule_oracle import apply, check
from torch import nn


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("between", [(), (5,), (5, 2), (0,)])
@pytest.mark.parametrize("bias", [False, True])
def test_bilinear(bias, between, axes):
    layer = nn.Bilinear(3, 2, 4, bias=bias).double()
    check(layer, *(torch.randn(3, *between, size, dtype=torch.float64) for size in (3, 2)), axes=axes)


def test_without_an_axis_for_the_batch():
    check(nn.Bilinear(3, 2, 4).double(), torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype, tolerance):
    layer = nn.Bilinear(3, 2, 4).to(dtype)
    check(layer, torch.randn(3, 5, 3).to(dtype), torch.randn(3, 5, 2).to(dtype), axes=(0,), tolerance=tolerance)


def test_no_gradient_and_a_frozen_weight():
    layer = nn.Bilinear(3, 2, 4).double()
    inputs = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    assert apply(layer, tuple(x.unsqueeze(0) for x in inputs), [None]) == {}
    layer.weight.requires_grad_(False)
    check(layer, *inputs)
