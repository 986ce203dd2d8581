"""Tables that are looked up: repeated, padded, scaled and bagged look-ups."""

import pytest
import torch
from rule_oracle import apply, batch_form, check, rows_form
from torch import nn

from recollect.autogram._factors import NotCovered

INDEX = torch.tensor([[1, 1, 2], [0, 4, 2], [2, 2, 2], [3, 0, 1]])
FLAT = torch.tensor([1, 1, 2, 0, 4, 2, 2, 3])
SCALE = torch.randn(4, 3, dtype=torch.float64)


def table(**options):
    return nn.Embedding(6, 3, **options).double()


def bags(**options):
    return nn.EmbeddingBag(6, 3, **options).double()


@pytest.mark.parametrize("axes", [None, (0,), (1,)])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}, {"sparse": True}, {"max_norm": 0.5}])
def test_embedding(options, axes):
    check(table(**options), INDEX, axes=axes)


@pytest.mark.parametrize(
    "index", [torch.tensor(3), FLAT, FLAT[:0], INDEX.T, INDEX[:1], INDEX.reshape(2, 2, 3), INDEX.int()]
)
def test_shapes_of_indices(index):
    check(table(), index)
    if index.ndim:
        check(table(), index, axes=(0,)) if len(index) else None


def test_frequencies_scale_where_all_objectives_share_the_indices():
    layer = table(scale_grad_by_freq=True, padding_idx=1)
    check(layer, INDEX)
    _, views, grads = batch_form(layer, (INDEX,), (0,))
    with pytest.raises(NotCovered, match="frequencies"):
        apply(layer, views, grads)


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_length(mode, padding_idx, axes):
    check(bags(mode=mode, padding_idx=padding_idx), INDEX, axes=axes)


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("offsets", [[0, 3, 4], [0, 0, 8], [0, 8, 8], [0], [0] * 11 + [5]])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_at_offsets(mode, padding_idx, offsets, axes):
    check(bags(mode=mode, padding_idx=padding_idx), FLAT, torch.tensor(offsets), axes=axes)


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_short_integers(mode, axes):
    check(bags(mode=mode), FLAT.int(), torch.tensor([0, 3, 4]).int(), axes=axes)


@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_last_offset_included(axes, mode):
    check(bags(mode=mode, include_last_offset=True), FLAT, torch.tensor([0, 3, 3, 8]), axes=axes)


@pytest.mark.parametrize("axes", [None, (0,)])
def test_weights_of_samples(axes):
    check(bags(mode="sum"), INDEX, None, SCALE, axes=axes)
    check(bags(mode="sum", padding_idx=2), FLAT, torch.tensor([0, 3, 4]), SCALE.view(-1)[:8], axes=axes)


@pytest.mark.parametrize("make", [rows_form, lambda *call: batch_form(*call, axes=(0,))])
def test_frequencies_do_not_scale_bags(make):
    # on the CPU, autograd divides by other counts than the frequencies: only the fallback can follow it
    layer = bags(scale_grad_by_freq=True)
    _, views, grads = make(layer, (INDEX,))
    with pytest.raises(NotCovered, match="frequencies"):
        apply(layer, views, grads)


def test_the_first_of_equal_largest():
    layer = bags(mode="max")
    nn.init.ones_(layer.weight)
    check(layer, torch.tensor([[3, 1, 1], [2, 1, 3]]), axes=(0,))


def test_nothing_looked_up():
    check(bags(), FLAT[:0], torch.tensor([0, 0, 0]), axes=(0,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_lower_precision(dtype, tolerance):
    check(table().to(dtype), INDEX, axes=(0,), tolerance=tolerance)
    check(bags(mode="mean").to(dtype), INDEX, axes=(0,), tolerance=tolerance)
    check(bags(mode="max").to(dtype), FLAT, torch.tensor([0, 3]), axes=(0,), tolerance=tolerance)
