"""Engines over layers whose saved tensors are dropped and rebuilt: the memory is theirs, and not the depth's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recollect
from recollect.autogram import Engine
from recollect.memory import peak_memory
from recollect.reversible import GroupAddRev

WIDTH, POSITIONS = 8, 64


class Block(nn.Module):
    """A norm, a layer, an activation, a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor, graph: Any = None) -> Tensor:
        return self.layers(x)


class Stack(nn.Module):
    """Blocks one after the other, in a chain of frames or with everything kept."""

    def __init__(self, source: str, depth: int) -> None:
        super().__init__()
        self.source = source
        self.layers = nn.ModuleList(
            Block(WIDTH) if source == "checkpoint" else GroupAddRev(Block(WIDTH // 2), num_groups=2)
            for _ in range(depth)
        )

    def forward(self, x: Tensor, enabled: bool = True) -> Tensor:
        graph = torch.zeros(2, 0, dtype=torch.long)
        for layer in self.layers:
            if self.source == "checkpoint":
                x = x + recollect.checkpoint(layer, x, enabled=enabled)
            else:
                layer.disable = not enabled
                x = layer(x, graph)
        return x.square().flatten(1).sum(1)


def peak(source: str, depth: int, enabled: bool, batch_dim: int | None) -> int:
    """Peak bytes of forward and Gramian, beyond parameters and input."""
    torch.manual_seed(0)
    stack, x = Stack(source, depth), torch.randn(4, POSITIONS, WIDTH)
    engine = Engine(stack, batch_dim=batch_dim)
    engine.compute_gramian(stack(x, enabled))  # the first call looks for the batch
    with peak_memory("cpu") as memory:
        engine.compute_gramian(stack(x, enabled))
    return memory.peak_bytes


def rows(source: str, batch_dim: int | None) -> float:
    """Twice the bytes of all losses' gradients in 28 layers: without a batch, those are held up to a bound."""
    return 0 if batch_dim == 0 else 2 * 4 * 4 * sum(p.numel() for p in Stack(source, 28).parameters())


@pytest.mark.parametrize("batch_dim", [0, None])
def test_reversible_layers_are_flat_in_depth(batch_dim):
    shallow, deep = (peak("reversible", depth, True, batch_dim) for depth in (4, 32))
    assert deep <= 1.05 * shallow + rows("reversible", batch_dim)
    kept = [peak("reversible", depth, False, batch_dim) for depth in (4, 32)]
    assert kept[1] > 4 * kept[0]  # which shows that growth would be seen
    assert deep < kept[1] / 4


@pytest.mark.parametrize("batch_dim", [0, None])
def test_checkpoints_keep_their_inputs_alone(batch_dim):
    shallow, deep = (peak("checkpoint", depth, True, batch_dim) for depth in (4, 32))
    activation = 4 * POSITIONS * WIDTH * 4
    assert deep - shallow <= 28 * 1.1 * activation + rows("checkpoint", batch_dim)
    kept = [peak("checkpoint", depth, False, batch_dim) for depth in (4, 32)]
    assert kept[1] - kept[0] > 28 * 3 * activation
