"""Normalisations, with every option that changes what is normalised or how."""

import pytest
import torch
from rule_layers import NORMS, drawn_norm, tracked
from rule_oracle import apply, check, rows_form
from torch import nn

from recollect.autogram._factors import NotCovered


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("name", NORMS)
def test_against_autograd(name, axes):
    layer, x = drawn_norm(name)
    check(layer, x, axes=axes)


@pytest.mark.parametrize("name", NORMS)
def test_strides_do_not_matter(name):
    layer, x = drawn_norm(name)
    check(layer, x.mT.contiguous().mT, axes=(0,))
    check(layer, x.repeat_interleave(2, 0)[::2], axes=None)


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("name", ["layer", "group", "instance 2d", "batch 2d"])
def test_one_element(name, axes):
    layer, x = drawn_norm(name)
    check(layer, x[:1], axes=axes)


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
def test_instance_norm_with_and_without_a_batch(shape):
    layer, _ = drawn_norm("instance 1d")
    check(layer, torch.randn(shape, dtype=torch.float64))


def test_batch_axis_that_is_not_the_first():
    layer, x = drawn_norm("layer")
    check(layer, x, axes=(1,))


@pytest.mark.parametrize("name", ["layer", "rms", "batch 2d"])  # autograd's own is not a number for the others
def test_no_positions(name):
    layer, x = drawn_norm(name)
    check(layer, x[..., :0, :], axes=(0,))


@pytest.mark.parametrize("name", NORMS)
def test_single_precision(name):
    layer, x = drawn_norm(name)
    check(layer.float(), x.float(), axes=(0,), tolerance=1e-4)


@pytest.mark.parametrize("name", ["layer", "rms over two", "group", "instance 2d", "batch 2d"])
def test_half_precision_is_summed_in_single(name):
    layer, x = drawn_norm(name)
    layer, x = layer.bfloat16(), x.bfloat16()
    views, grads = (x.unsqueeze(1),), [torch.ones_like(x).unsqueeze(1)]
    found = apply(layer, views, grads)
    wider = apply(layer.float(), (views[0].float(),), [grads[0].float()])
    for key, factor in found.items():
        assert factor.values.dtype == torch.float32
        torch.testing.assert_close(factor.values, wider[key].values, rtol=1e-5, atol=1e-5)


def test_rms_norm_of_small_numbers_in_half_precision():
    layer, x = nn.RMSNorm(4).bfloat16(), torch.full((2, 1, 4), 0.01, dtype=torch.bfloat16)
    rows = apply(layer, (x,), [torch.ones_like(x)])["weight"].values
    torch.testing.assert_close(rows, layer(x).float().sum(1), rtol=1e-2, atol=0)


@pytest.mark.parametrize("eval_without_tracking", [False, True])
def test_batch_norm_by_the_batch_where_all_objectives_share_it(eval_without_tracking):
    layer = nn.BatchNorm2d(4, track_running_stats=not eval_without_tracking).double().train(not eval_without_tracking)
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    check(layer, x)
    views, grads = (x.unsqueeze(1),), [torch.ones_like(x).unsqueeze(1)]
    with pytest.raises(NotCovered, match="more than one row"):
        apply(layer, views, grads)


def test_batch_norm_over_devices_only_in_evaluation():
    layer = nn.SyncBatchNorm(4).double()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    check(tracked(layer), x, axes=(0,))
    _, views, grads = rows_form(layer, (x,))
    with pytest.raises(NotCovered):
        apply(layer.train(), views, grads)


def test_frozen_parameters_have_no_factor():
    layer, x = drawn_norm("layer")
    layer.weight.requires_grad_(False)
    check(layer, x)


def test_without_a_gradient_there_is_no_factor():
    layer, x = drawn_norm("layer")
    assert apply(layer, (x.unsqueeze(0),), [None]) == {}
