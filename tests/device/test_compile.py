"""Blocks of reversible layers are compiled whole, and steps with compiled blocks do not wait."""

import copy

import pytest
import torch
from torch import nn

from device.compare import assert_same, gradients, there, waits
from recollect import invertible as inn
from recollect.autogram import Engine
from recollect.frames import settle
from recollect.models import RevGNN
from recollect.reversible import GroupAddRev

# What torch.compile looks at of every tensor, and hides where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

CONVS = ["gat", "gcn", "gen", "gin", "graphconv", "sage"]
NODES = 24


def compiled(function):
    return torch.compile(function, backend="eager", fullgraph=True)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def edges():
    return torch.randint(NODES - 1, (2, 80), generator=torch.Generator().manual_seed(1))


def net(conv, **options):
    torch.manual_seed(0)
    return RevGNN(5, 16, 3, 3, conv=conv, **options).double()


@pytest.mark.parametrize("conv", CONVS)
def test_the_block_of_revgnn(other, conv):
    pytest.importorskip("torch_geometric")
    block = next(module for module in net(conv).to(other).modules() if type(module).__name__ == "_Block")
    x = torch.randn(NODES, 8, dtype=torch.float64).to(other)
    edge_index = there(edges())
    assert_same(gradients(compiled(block), x, edge_index), gradients(block, x, edge_index))


@pytest.mark.parametrize("kind", [inn.AdditiveCoupling, inn.AffineCoupling])
def test_blocks_of_couplings(other, kind):
    torch.manual_seed(0)
    width = 2 if kind is inn.AdditiveCoupling else 4
    plain = kind(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, width)), nn.Linear(2, width)).double().to(other)
    blocks = copy.deepcopy(plain.blocks)
    coupling = kind(*(compiled(block) for block in blocks))
    x = torch.randn(6, 4, dtype=torch.float64).to(other)
    assert_same(gradients(coupling, x), gradients(plain, x))

    def step():
        coupling(x.requires_grad_() * 1).square().sum().backward()

    assert waits(step) == []


@pytest.mark.parametrize("kind", [inn.AdditiveCoupling, inn.AffineCoupling])
def test_a_whole_coupling_runs_plain(other, kind):
    torch.manual_seed(0)
    width = 2 if kind is inn.AdditiveCoupling else 4
    coupling = kind(nn.Linear(2, width), nn.Linear(2, width)).double().to(other)
    x = torch.randn(6, 4, dtype=torch.float64).to(other)
    assert_same(gradients(coupling, x, call=compiled(coupling)), gradients(coupling, x))


def test_a_step_with_compiled_blocks_does_not_wait(other):
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear, self.dropout = nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout(0.3)

        def forward(self, x, _):
            return self.dropout(self.linear(self.norm(x).relu()))

    layers = nn.ModuleList(GroupAddRev(Block(), num_groups=2) for _ in range(3)).to(other)
    x, found = torch.randn(6, 8, device=other), []

    def call(h):
        for layer in layers:
            h = layer(h, None)
        return h

    for wrap in (False, True):
        if wrap:
            for block in layers.modules():
                if isinstance(block, Block):
                    block.compile(backend="eager", fullgraph=True)
        torch.manual_seed(5)
        found.append(gradients(layers, x, call=call))
    assert_same(found[1], found[0], 1e-5)
    assert waits(lambda: call(x.requires_grad_() * 1).square().sum().backward(), times=3) == []


def test_an_engine_over_a_compiled_network(other):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double().to(other)
    x, whole = torch.randn(6, 4, dtype=torch.float64).to(other), compiled(network)
    engine = Engine(network)

    def gramian(function):
        return engine.compute_gramian(function(x).square().sum(1))

    assert_same([gramian(whole)], [gramian(network)])
    assert waits(lambda: gramian(whole)) == []


@pytest.mark.parametrize("conv", ["sage", "gin"])
def test_a_step_of_revgnn_with_compiled_blocks(other, conv):
    pytest.importorskip("torch_geometric")
    x, edge_index = torch.randn(NODES, 5, dtype=torch.float64).to(other), there(edges())
    y, found = torch.arange(NODES, device=other) % 3, []
    for wrap in (False, True):
        model = net(conv, dropout=0.3).to(other)
        for module in model.modules():
            if wrap and type(module).__name__ == "_Block":
                module.compile(backend="eager", fullgraph=True)
        torch.manual_seed(5)
        found.append(gradients(model, x, edge_index))
    assert_same(found[1], found[0])
    optimizer = torch.optim.Adam(model.parameters())

    def step():
        optimizer.zero_grad()
        model.loss(model(x, edge_index), y).backward()
        optimizer.step()

    assert waits(step, times=3) == []
    settle()


def test_a_step_of_couplings_with_compiled_blocks(other):
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        kept = inn.AffineCoupling(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)), nn.Linear(2, 4))
        layers.append(inn.AffineCoupling(*(compiled(block) for block in kept.blocks)))
    model = inn.Sequential(*layers).to(other)
    optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(6, 4, device=other)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    assert waits(step, times=3) == []
    settle()
