"""How many bytes it takes from a layer's inputs and gradients to its Gramian: bounded, whatever the Jacobian's are."""

import pytest
import torch
from forms import set_form
from rule_oracle import apply
from torch import nn

from recollect.autogram._contract import add_gramian
from recollect.autogram._square import SquareSum
from recollect.memory import peak_memory

M = 32
MB = 2**20


def peak(layer, x, name="weight", shared=False):
    """Of the rule and the contraction together, above the input, the gradient and the Gramian."""
    shape = layer(x).shape
    inputs = (x.unsqueeze(0) if shared else x.unsqueeze(1),)
    grad = torch.randn(M, *shape) if shared else torch.randn(shape).unsqueeze(1)
    total = SquareSum(M, torch.float32, torch.device("cpu"))
    with peak_memory("cpu") as memory:
        add_gramian(total, [apply(layer, inputs, [grad])[name]])
    assert total.total().abs().max() > 0
    return memory.peak_bytes


def small_bounds(monkeypatch):
    set_form(monkeypatch, row_bytes=MB // 4)
    set_form(monkeypatch, dense_bytes=(2**22, MB))
    set_form(monkeypatch, unfolded_bytes=MB // 4)
    set_form(monkeypatch, grouped_bytes=MB // 4)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_is_not_unfolded_whole(groups, monkeypatch):
    small_bounds(monkeypatch)
    layer, x = nn.Conv2d(16, 8, 3, padding=1, groups=groups), torch.randn(M, 16, 24, 24)
    unfolded = M * 16 * 9 * 24 * 24 * 4
    assert peak(layer, x) < unfolded / 4


@pytest.mark.parametrize(
    ("layer", "channels"), [(nn.Conv2d(64, 128, 3, padding=1), 64), (nn.ConvTranspose2d(128, 64, 3), 128)]
)
def test_convolution_s_jacobian_is_not_held_whole(layer, channels, monkeypatch):
    small_bounds(monkeypatch)
    jacobian = M * layer.weight.numel() * 4
    assert jacobian > 8 * MB
    assert peak(layer, torch.randn(M, channels, 12, 12)) < 3 * MB


def test_few_positions_form_no_jacobian():
    layer, x = nn.Conv2d(128, 128, 3, padding=1), torch.randn(M, 128, 2, 2)
    jacobian = M * layer.weight.numel() * 4
    assert peak(layer, x) < jacobian / 4


@pytest.mark.parametrize("rows", [1, M])
@pytest.mark.parametrize(("layer", "blocks"), [(nn.RNN(8, 64), 4.5), (nn.GRU(8, 64), 9.5), (nn.LSTM(8, 64), 8.5)])
def test_a_recurrent_layer_s_gates_are_held_once(layer, blocks, rows):
    x, grad = torch.randn(rows, 50, 1, 8), torch.randn(M, 50, 1, 64)
    ends = [None] * (2 if isinstance(layer, nn.LSTM) else 1)
    with peak_memory("cpu") as memory:
        factors = apply(layer, (x,), [grad, *ends])
    assert factors["weight_hh_l0"].left.shape == (M, 50, 1, len(layer.weight_hh_l0))
    one = M * 50 * 64 * 4  # bytes of a gate, or of a state, of all steps and rows
    assert memory.peak_bytes < blocks * one


def test_embedding_s_table_is_not_filled_with_zeros():
    layer, x = nn.Embedding(100_000, 16), torch.randint(100_000, (M, 50))
    assert peak(layer, x) < M * 100_000 * 16 * 4 / 10


def test_bags_hold_only_what_they_pick():
    layer, x = nn.EmbeddingBag(100_000, 16), torch.randint(100_000, (M, 50))
    assert peak(layer, x) < M * 100_000 * 16 * 4 / 10


def test_norms_take_a_few_copies_of_their_input():
    x = torch.randn(M, 64, 256)
    assert peak(nn.LayerNorm(256), x) < 4 * x.numel() * 4
