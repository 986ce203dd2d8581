"""Of two ways to a Gramian, the one that takes fewer operations is gone."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from recollect.autogram import Engine, Outer
from recollect.autogram._contract import gramian


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("m", "positions", "left", "right", "pairs"),
    [
        (8, 1, 512, 512, True),
        (64, 1, 256, 128, True),
        (4, 4, 512, 512, True),
        (64, 64, 8, 8, False),
        (256, 4, 4, 4, False),
        (32, 16, 32, 32, False),
    ],
)
def test_products_of_positions_or_of_rows(m, positions, left, right, pairs):
    factor = Outer(torch.rand(m, positions, 1, left), torch.rand(m, positions, 1, right), torch.Size((left, right)))
    by_pairs = 2 * m * m * positions**2 * (left + right)
    by_rows = 2 * m * positions * left * right + 2 * m * m * left * right
    assert (by_pairs < by_rows) is pairs
    least = min(by_pairs, by_rows)
    assert operations(lambda: gramian([factor])) <= 1.05 * least


def test_a_linear_layer_forms_no_row():
    """(g gᵀ) ∘ (a aᵀ): 2 m² (in + out) operations, and not the 2 m² in · out of rows."""
    layer = nn.Linear(256, 256, bias=False)
    engine = Engine(layer, batch_dim=0)
    engine.compute_gramian(layer(torch.rand(16, 256)).sum(1))  # where the batch is
    losses = layer(torch.rand(16, 256)).sum(1)
    assert operations(lambda: engine.compute_gramian(losses)) <= 2 * 16**2 * (256 + 256)
