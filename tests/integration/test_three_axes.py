"""Depth, graph and objectives in one network: reversible layers on mini-batches with histories, many losses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recollect.aggregation import UPGradWeighting
from recollect.autogram import Engine
from recollect.autoscale import EvalSubgraphLoader, ScalableGNN, SubgraphLoader, normalize, partition, permute, to_adj_t
from recollect.data import load
from recollect.memory import peak_memory
from recollect.reversible import GroupAddRev

FEATURES, LABELS, LAYERS = 6, 4, 3


class Block(nn.Module):
    """What is computed at each node, whatever the edges."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, _: None) -> torch.Tensor:
        return self.linear(F.dropout(self.norm(x).relu(), 0.3, self.training))


class Network(ScalableGNN):
    """Message passing through histories; after each such layer a stack of reversible ones at the nodes."""

    def __init__(self, num_nodes: int, channels: int, depth: int) -> None:
        super().__init__(num_nodes, channels, LAYERS, history_dtype=torch.float64)
        widths = [FEATURES, *[channels] * (LAYERS - 1)]
        self.linears = nn.ModuleList(nn.Linear(width, channels) for width in widths)
        self.stacks = nn.ModuleList(
            nn.ModuleList(GroupAddRev(Block(channels // 2), num_groups=2) for _ in range(depth)) for _ in widths
        )
        self.head = nn.Linear(channels, LABELS)

    def forward_layer(self, layer, x, adj_t, state):
        x = adj_t @ self.linears[layer](x)
        for reversible in self.stacks[layer]:
            x = reversible(x, None)
        return self.head(x) if layer == self.num_layers - 1 else x


@pytest.fixture(scope="module")
def graph():
    data = load("sbm", num_nodes=200, num_classes=4, num_features=FEATURES, num_labels=LABELS).data
    data = to_adj_t(data)
    data.x = data.x.double()
    data.adj_t = normalize(data.adj_t).to(torch.float64)
    perm, ptr = partition(data.adj_t, 8, "contiguous")
    return permute(data, perm), ptr


def losses_of(network, batch):
    out = network(batch.data.x, batch.data.adj_t, *batch[1:])
    target = batch.data.y[: batch.batch_size].to(out)
    return F.binary_cross_entropy_with_logits(out, target, reduction="none").mean(0)


def test_a_step_is_that_of_the_explicit_jacobian(graph):
    data, ptr = graph
    torch.manual_seed(0)
    network = Network(data.num_nodes, 8, depth=3).double()
    network(loader=EvalSubgraphLoader(data, ptr))
    plain = copy.deepcopy(network)
    for module in plain.modules():
        if isinstance(module, GroupAddRev):
            module.disable = True
    engine = Engine(network)
    for seed, batch in enumerate(SubgraphLoader(data, ptr, batch_size=3)):
        torch.manual_seed(seed)
        expected = losses_of(plain, batch)
        parameters = list(plain.parameters())
        rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in expected]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        torch.manual_seed(seed)
        losses = losses_of(network, batch)
        gramian = engine.compute_gramian(losses)
        torch.testing.assert_close(gramian, jacobian @ jacobian.T, rtol=1e-9, atol=0)
        network.zero_grad()
        weights = engine.backward(losses, UPGradWeighting())
        gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        torch.testing.assert_close(gradient, jacobian.T @ weights, rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(network.histories, plain.histories, strict=True):
            assert torch.equal(ours.pull(), theirs.pull())
            assert torch.equal(ours.age(), theirs.age())


def test_memory_grows_by_no_more_than_the_rows_of_the_jacobian(graph):
    # One loss after the other goes backward, so rows are held for each parameter; of activations nothing is.
    data, ptr = graph
    batch = next(iter(SubgraphLoader(data, ptr, batch_size=6)))

    def peak(depth: int, disable: bool) -> int:
        network = Network(data.num_nodes, 16, depth).double()
        for module in network.modules():
            if isinstance(module, GroupAddRev):
                module.disable = disable
        engine = Engine(network)
        engine.backward(losses_of(network, batch), UPGradWeighting())
        with peak_memory() as memory:
            engine.backward(losses_of(network, batch), UPGradWeighting())
        return memory.peak_bytes

    grown = peak(16, disable=False) - peak(4, disable=False)
    parameters = 12 * LAYERS * 2 * sum(parameter.numel() for parameter in Block(8).parameters())
    assert grown < (LABELS + 3) * parameters * 8  # and their gradients
    assert peak(16, disable=True) - peak(4, disable=True) > 3 * grown
