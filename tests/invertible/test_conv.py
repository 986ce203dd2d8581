"""Invertible convolutions: which there are, and what they refuse."""

import math

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recollect.invertible import Conv1d, Conv2d, Conv3d


@pytest.mark.parametrize(
    ("kind", "args", "keywords", "message"),
    [
        (Conv2d, (4, 4, 3), {"stride": 1}, r"kernel_size=\[3, 3\], stride=\[1, 1\]: stride must equal kernel_size"),
        (Conv2d, (4, 4, 1), {"stride": 2}, r"kernel_size=\[1, 1\], stride=\[2, 2\]: stride must equal"),
        (Conv2d, (4, 4, 0), {}, r"kernel_size=\[0, 0\].* at least 1"),
        (Conv1d, (4, 8, 2), {"padding": 1}, r"padding=1: padding must be 0; use ConstantPad"),
        (Conv1d, (4, 8, 1), {"padding": "same"}, r"padding='same'"),
        (Conv3d, (4, 4, 1), {"dilation": (1, 2, 1)}, r"dilation=\(1, 2, 1\): dilation must be 1"),
        (Conv2d, (4, 4, 1), {"padding_mode": "circular"}, r"padding_mode='circular'"),
        (Conv2d, (4, 4, 1), {"groups": 3}, r"in_channels=4, out_channels=4, groups=3: both must be .* divisible"),
        (Conv2d, (4, 4, 1), {"groups": 0}, r"groups=0"),
        (Conv2d, (2, 4, 2), {}, r"out_channels=4 for 2 channels x 4 positions of a patch: out_channels must be 8"),
        (Conv2d, (3, 2, 1), {}, r"out_channels=2 for 3 channels x 1 positions"),
        (Conv2d, (4, 4, (1, 1, 1)), {}, r"kernel_size must be one number or 2 \(got \(1, 1, 1\)\)"),
    ],
)
def test_settings_without_an_inverse(kind, args, keywords, message):
    with pytest.raises(ValueError, match=message):
        kind(*args, **keywords)


def test_settings_may_be_spelt_as_for_torch():
    a = Conv2d(3, 12, 2, 2, 0, 1, 1, False, "zeros")
    b = Conv2d(3, 12, kernel_size=(2, 2), stride=(2, 2), padding="valid", dilation=(1, 1), bias=False)
    plain = nn.Conv2d(3, 12, 2, 2, bias=False)
    for one in (a, b):
        assert (one.kernel_size, one.stride, one.padding, one.dilation) == ((2, 2), (2, 2), (0, 0), (1, 1))
        assert one.weight.shape == plain.weight.shape
        assert one.bias is None


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 4, 3), (3, 3), (1, 2, 3, 4, 4)])
def test_sizes_that_the_kernel_does_not_divide(shape):
    with pytest.raises(ValueError, match=r"2 size\(s\) divisible by the kernel's, \[2, 2\] \(got shape"):
        Conv2d(3, 12, 2)(torch.randn(shape))


@pytest.mark.parametrize(
    ("kind", "shape", "kernel"),
    [(Conv1d, (4, 6), 3), (Conv2d, (4, 6, 2), (3, 1)), (Conv3d, (4, 2, 3, 2), (2, 3, 1))],
)
def test_without_a_batch(kind, shape, kernel):
    torch.manual_seed(0)
    size = math.prod(kernel) if isinstance(kernel, tuple) else kernel
    layer = kind(4, 4 * size, kernel, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer(x[None])[0])
    torch.testing.assert_close(layer.inverse(layer(x)), x)
    with pytest.raises(ValueError, match="needs a batch dimension"):
        layer.forward_and_log_det(x)


def test_patches_are_a_space_to_depth_and_a_matrix():
    torch.manual_seed(0)
    layer = Conv2d(2, 8, 2, scaled=True, dtype=torch.float64)
    x = torch.randn(3, 2, 4, 6, dtype=torch.float64)
    expected = torch.einsum("oi,bihw->bohw", layer.weight.flatten(1), F.pixel_unshuffle(x, 2))
    torch.testing.assert_close(layer(x), expected + layer.bias.view(-1, 1, 1))


def test_groups_do_not_mix():
    torch.manual_seed(0)
    layer = Conv1d(4, 12, 3, groups=2, parametrization="lu", dtype=torch.float64)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    parts = []
    for weight, bias, part in zip(layer.weight.chunk(2), layer.bias.chunk(2), x.chunk(2, 1), strict=True):
        parts.append(F.conv1d(part, weight, bias, stride=3))
    torch.testing.assert_close(layer(x), torch.cat(parts, 1))
    other = layer(torch.cat([x[:, :2], -x[:, 2:]], 1))
    assert torch.equal(other[:, :6], layer(x)[:, :6])


def test_an_orthogonal_convolution_keeps_lengths():
    torch.manual_seed(0)
    layer = Conv3d(2, 16, 2, bias=False, dtype=torch.float64)
    x = torch.randn(3, 2, 4, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(layer(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


def test_the_log_determinant_counts_positions():
    torch.manual_seed(0)
    layer = Conv2d(4, 4, 1, groups=2, scaled=True, dtype=torch.float64)
    with torch.no_grad():
        layer.matrices.log_scale.copy_(torch.tensor([[0.1, 0.2], [0.3, -1.0]]))
    log_det = layer.forward_and_log_det(torch.randn(2, 4, 3, 5, dtype=torch.float64))[1]
    torch.testing.assert_close(log_det, torch.full((2,), 15 * -0.4, dtype=torch.float64))


def test_numbers_may_be_numpys():
    torch.manual_seed(0)
    layer = Conv2d(*map(numpy.int64, (4, 16, 2)), groups=numpy.int64(2))
    assert layer.kernel_size == layer.stride == (2, 2)
    assert layer.check(torch.randn(2, 4, 6, 4))
