"""The same weights in `torch_geometric.nn.GroupAddRev` give the same outputs and gradients, where that one is right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recollect.reversible import GroupAddRev

pyg = pytest.importorskip("torch_geometric.nn")

CONVS = {
    "sage": lambda c: pyg.SAGEConv(c, c),
    "gcn": lambda c: pyg.GCNConv(c, c),
    "gin": lambda c: pyg.GINConv(nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c))),
    "gat": lambda c: pyg.GATConv(c, c // 2, heads=2),
    "gen": lambda c: pyg.GENConv(c, c),
    "graphconv": lambda c: pyg.GraphConv(c, c),
}
EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 3, 2], [1, 2, 3, 4, 5, 0, 3, 0, 2]])


class Masked(nn.Module):
    """A dropout mask given as an argument, which is how the peer trains with dropout."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = pyg.SAGEConv(channels, channels)

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        self.conv.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor, mask: Tensor) -> Tensor:
        return self.conv(self.norm(x).relu() * mask, edge_index)


def train(layers: list[nn.Module], x: Tensor, *args: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    h = x * 1
    for layer in layers:
        h = layer(h, EDGES, *args)
    parameters = [p for layer in layers for p in layer.parameters()]
    output = h.detach().clone()
    return [output, *torch.autograd.grad(h.sin().sum(), [x, *parameters])]


def pair(seed: nn.Module, groups: int, depth: int) -> tuple[list[Any], list[Any]]:
    theirs = [pyg.GroupAddRev(copy.deepcopy(seed), num_groups=groups).double() for _ in range(depth)]
    return theirs, [GroupAddRev(copy.deepcopy(layer.convs)) for layer in theirs]


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("name", CONVS)
def test_outputs_gradients_and_inverse(name, groups):
    torch.manual_seed(0)
    theirs, ours = pair(CONVS[name](4), groups, depth=3)
    x = torch.randn(7, 4 * groups, dtype=torch.float64)
    for found, expected in zip(train(ours, x), train(theirs, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own.inverse(x, EDGES), other.inverse(x.clone(), EDGES), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 4])
def test_chunked_arguments(groups):
    torch.manual_seed(0)
    theirs, ours = pair(Masked(4), groups, depth=3)
    x = torch.randn(7, 4 * groups, dtype=torch.float64)
    mask = torch.bernoulli(torch.full_like(x, 0.5)) * 2
    for found, expected in zip(train(ours, x, mask), train(theirs, x, mask), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 3])
def test_weights_are_exchanged_by_state_dict(groups):
    theirs = pyg.GroupAddRev(pyg.SAGEConv(4, 4), num_groups=groups)
    ours = GroupAddRev(pyg.SAGEConv(4, 4), num_groups=groups)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 4 * groups)
    assert torch.equal(ours(x, EDGES), theirs(x.clone(), EDGES))
    assert repr(ours) == repr(theirs)
    assert ours.num_groups == theirs.num_groups


def test_disabled_peer_agrees_with_dropout_in_the_blocks():
    """The peer is wrong for dropout only where it recomputes; keeping everything, it is an oracle for that too."""
    torch.manual_seed(0)
    conv = pyg.GATConv(4, 4, dropout=0.5)
    theirs = pyg.GroupAddRev(conv, num_groups=2, disable=True).double()
    ours = GroupAddRev(copy.deepcopy(theirs.convs))
    x = torch.randn(7, 8, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        results.append(train([layer, layer], x))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
