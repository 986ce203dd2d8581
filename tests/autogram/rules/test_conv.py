"""Convolutions over their grid of options, formed in rows by either way, and unfolded."""

import pytest
import torch
from factor_oracle import dense
from forms import set_form
from rule_layers import CONVS, drawn_conv
from rule_oracle import apply, batch_form, check, rows_form
from torch import nn

from recollect.autogram._factors import Blocks, Outer
from recollect.autogram.rules import _conv

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(params=["rows", "groups", "unfolded"])
def way(request, monkeypatch):
    monkeypatch.setattr(_conv._Call, "few_positions", lambda call: request.param == "unfolded")
    monkeypatch.setattr(_conv._Call, "_is_fast_by_groups", lambda call, sizes: request.param == "groups")
    set_form(monkeypatch, grouped_bytes=1000)  # some rows at once, or one
    return request.param


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("name", CONVS)
def test_against_autograd(name, axes, way):
    layer, x = drawn_conv(name)
    check(layer, x, axes=axes)


@pytest.mark.parametrize("name", CONVS)
def test_without_an_axis_for_the_batch(name, way):
    layer, x = drawn_conv(name)
    check(layer, x[0])


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("name", ["2d uneven", "2d groups", "transposed 2d"])
def test_strides_of_memory_do_not_matter(name, axes, way):
    layer, x = drawn_conv(name)
    layer.to(memory_format=torch.channels_last)
    check(layer, x.to(memory_format=torch.channels_last), axes=axes)
    check(layer, x.repeat_interleave(2, -1)[..., ::2], axes=axes)


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("name", ["1d", "2d", "transposed 2d"])
def test_one_element(name, axes, way):
    layer, x = drawn_conv(name)
    check(layer, x[:1], axes=axes)


def test_no_elements(way):
    layer, x = drawn_conv("2d")
    check(layer, x[:0])


def test_output_size_of_a_transposed_convolution(way):
    layer, x = drawn_conv("transposed 2d")
    check(layer, x, (10, 4), axes=(0,))


@pytest.mark.parametrize("name", CONVS)
def test_single_precision(name, way):
    layer, x = drawn_conv(name)
    check(layer.float(), x.float(), axes=(0,), tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["1d same", "2d groups", "transposed 2d"])
def test_half_precision_is_summed_in_single(name, dtype, way):
    layer, x = drawn_conv(name)
    _, views, grads = batch_form(layer, (x,), (0,))
    layer.to(dtype)
    views, grads = (views[0].to(dtype),), [grads[0].to(dtype)]
    found = apply(layer, views, grads)
    wider = apply(layer.double(), (views[0].double(),), [grads[0].double()])
    for key, factor in found.items():
        rows = dense(factor)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.double(), dense(wider[key]), rtol=1e-5, atol=1e-5)


def test_input_and_gradient_of_different_precision(way):
    layer, x = drawn_conv("2d")
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        _, views, grads = batch_form(layer, (x,), (0,))
    assert grads[0].dtype == torch.bfloat16
    rows = dense(apply(layer, views, grads)["weight"])
    exact = dense(apply(layer, views, [grads[0].float()])["weight"])
    torch.testing.assert_close(rows, exact, rtol=1e-5, atol=1e-5)


def weight_factor(layer, x, axes=None):
    _, views, grads = rows_form(layer, (x,)) if axes is None else batch_form(layer, (x,), axes)
    return apply(layer, views, grads)["weight"]


def test_few_positions_of_a_large_kernel_are_unfolded():
    assert isinstance(weight_factor(nn.Conv2d(64, 64, 3, padding=1), torch.randn(8, 64, 2, 2), (0,)), Outer)


@pytest.mark.parametrize("axes", [None, (0,)])
def test_many_positions_of_a_small_kernel_are_not(axes):
    factor = weight_factor(nn.Conv2d(3, 8, 3, padding=1), torch.randn(4, 3, 16, 16), axes)
    assert isinstance(factor, Blocks)
    assert factor.row_elements >= 8 * 3 * 9


@pytest.mark.parametrize("way", ["rows", "groups"], indirect=True)
@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize(
    "name", ["2d", "2d groups", "2d whole vectors", "2d depthwise", "transposed 1d", "transposed 2d"]
)
def test_parts_make_the_whole(name, axes, way):
    factor = weight_factor(*drawn_conv(name), axes=axes)
    m, channels = factor.num_rows, factor.shape[factor.axis]
    whole = factor.form(slice(0, m), slice(0, channels))
    for rows in (slice(0, 2), slice(2, m)):
        for part in (slice(0, channels // 2), slice(channels // 2, channels)):
            torch.testing.assert_close(factor.form(rows, part), whole[rows, :, part], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["2d", "2d groups", "2d whole vectors, groups", "2d depthwise", "transposed 2d"])
def test_gramians_by_parts(name, monkeypatch):
    monkeypatch.setattr(_conv._Call, "few_positions", lambda call: False)
    set_form(monkeypatch, unfolded_bytes=1)
    set_form(monkeypatch, dense_bytes=(2**22, 1))  # the smallest parts that there are
    layer, x = drawn_conv(name)
    check(layer, x, axes=(0,))


def whole_vectors(**options):
    return nn.Conv2d(16, 8, 3, padding=1, **options)


@pytest.mark.parametrize(
    ("layer", "size", "unfolded"),
    [
        (whole_vectors(), 8, False),
        (nn.Conv2d(16, 16, 3, groups=16), 10, False),  # depthwise
        (nn.Conv3d(8, 8, 2, padding_mode="circular", padding=1), 4, False),
        (nn.ConvTranspose2d(16, 8, 3, stride=2), 8, False),
        (whole_vectors().double(), 8, True),
        (whole_vectors(), 7, True),  # few positions
        (nn.Conv2d(12, 8, 3, padding=1), 8, True),
        (nn.Conv2d(16, 10, 3, padding=1), 8, True),
        (nn.Conv2d(16, 8, 1), 8, True),
        (nn.ConvTranspose2d(16, 8, 3, output_padding=1, dilation=2), 8, True),  # outputs that no kernel reaches
    ],
)
def test_who_is_unfolded(layer, size, unfolded, monkeypatch):
    who_is_unfolded(monkeypatch, layer, size, unfolded, at_full_speed=False)


@pytest.mark.parametrize(
    ("layer", "size", "unfolded"),
    [
        (whole_vectors(), 8, True),
        (whole_vectors(), 12, False),
        (nn.Conv2d(16, 16, 3, groups=16), 10, False),  # depthwise
    ],
)
def test_who_is_unfolded_where_products_are_at_full_speed(layer, size, unfolded, monkeypatch):
    who_is_unfolded(monkeypatch, layer, size, unfolded, at_full_speed=True)


def who_is_unfolded(monkeypatch, layer, size, unfolded, at_full_speed):
    seen = []
    monkeypatch.setattr(_conv, "is_at_full_speed", lambda: at_full_speed)
    by_rows = _conv._Call._form_unfolded
    x = torch.randn(3, layer.in_channels, *[size] * len(layer.kernel_size), dtype=layer.weight.dtype)
    monkeypatch.setattr(_conv._Call, "few_positions", lambda call: False)
    monkeypatch.setattr(_conv._Call, "_form_unfolded", lambda *call: seen.append(call) or by_rows(*call))
    check(layer, x, axes=(0,), tolerance=1e-4)
    assert bool(seen) == unfolded


def test_frozen_weight_and_no_gradient():
    layer, x = drawn_conv("2d")
    layer.weight.requires_grad_(False)
    check(layer, x, axes=(0,))
    assert apply(layer, (x.unsqueeze(0),), [None]) == {}
