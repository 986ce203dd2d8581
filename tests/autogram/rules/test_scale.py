"""Parameters that scale what passes."""

import pytest
import torch
from rule_oracle import check
from torch import nn


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize(
    ("count", "shape"), [(1, (3, 4, 2)), (4, (3, 4)), (4, (3, 4, 5, 2)), (1, (3,)), (1, (1, 2)), (4, (3, 4, 0))]
)
def test_prelu(count, shape, axes):
    layer, x = nn.PReLU(count).double(), torch.randn(shape, dtype=torch.float64)
    x.view(-1)[:1] = 0  # where its slope has a corner
    check(layer, x, axes=axes)


def test_prelu_of_a_number():
    check(nn.PReLU().double(), torch.tensor(-2.0, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_prelu_in_lower_precision(dtype, tolerance):
    check(nn.PReLU(4).to(dtype), torch.randn(3, 4, 50).to(dtype), axes=(0,), tolerance=tolerance)
