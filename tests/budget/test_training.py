"""Training with a plan: scaled losses that add up, mini-batches with histories, and frames that are there already."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch_geometric.data import Data

import recollect
from recollect.autoscale import ScalableGNN, SubgraphLoader, propagate, to_adj_t
from recollect.budget import Row
from recollect.memory import peak_memory


class Unit(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.first, self.last = nn.BatchNorm1d(width), nn.Linear(width, 32), nn.Linear(32, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.last(self.dropout(self.first(self.norm(x)).tanh()))


def forced(plan, *strategies):
    each = [strategies[i % len(strategies)] for i in range(len(plan.rows))]
    plan.rows = tuple(Row(r.unit, r.keeps, s, r.bytes, r.seconds) for r, s in zip(plan.rows, each, strict=True))
    return plan


def test_scaled_losses_add_up():
    """As with GradScaler: several backward passes of scaled losses, then one step that divides by the scale."""

    def trained(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(3):
                out = model(torch.randn(16, 8, dtype=torch.float64, generator=generator))
                scaler.scale(out.square().mean() / 3).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return model.state_dict()

    torch.manual_seed(0)
    plain = nn.Sequential(*[Unit() for _ in range(5)]).double()
    model = copy.deepcopy(plain)
    x = torch.randn(16, 8, dtype=torch.float64)
    with forced(recollect.plan(model, x, budget="1 GB"), "checkpoint", "link", "link", "selective", "store"):
        found = trained(model)
    expected = trained(plain)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


class Histories(ScalableGNN):
    """A layer is a unit and a sum over edges."""

    def __init__(self, nodes, layers=4):
        super().__init__(nodes, 8, layers, history_dtype=torch.float64)
        self.layers = nn.ModuleList(Unit() for _ in range(layers))

    def forward_layer(self, layer, x, adj_t, state):
        return self.layers[layer](x[: adj_t.size(0)] + 0.1 * propagate(adj_t, x))


def test_mini_batches_with_histories():
    generator = torch.Generator().manual_seed(0)
    nodes = 120
    data = to_adj_t(
        Data(
            x=torch.randn(nodes, 8, dtype=torch.float64, generator=generator),
            edge_index=torch.randint(nodes, (2, 500), generator=generator),
        )
    )
    data.node_order = torch.arange(nodes)
    loader = SubgraphLoader(data, torch.arange(0, nodes + 1, 40), log=False)
    torch.manual_seed(0)
    model = Histories(nodes).double()
    for history, value in zip(model.histories, range(3), strict=True):
        history.push(torch.full((nodes, 8), float(value), dtype=torch.float64), n_id=torch.arange(nodes))
    plain = copy.deepcopy(model)

    def call(net, batch):
        return net(batch.data.x, batch.data.adj_t, *batch[1:])

    def rows_of(net):
        return [history.pull(torch.arange(nodes)).clone() for history in net.histories]

    def trained(net):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        torch.manual_seed(1)
        for _ in range(2):
            for batch in loader:
                optimizer.zero_grad()
                call(net, batch).sin().square().mean().backward()
                optimizer.step()
        return [*net.state_dict().values(), *rows_of(net)]

    batch = next(iter(loader))
    known = copy.deepcopy(model)
    call(known, batch)  # the first call looks at the layers
    with peak_memory("cpu") as memory:
        call(known, batch).sum().backward()
    example = (batch.data.x, batch.data.adj_t, *batch[1:])
    plan = recollect.plan(model, example, budget=int(0.8 * memory.peak_bytes), units="layers.*")
    assert {row.strategy for row in plan.rows} > {"store"}
    for found, before in zip(rows_of(model), rows_of(plain), strict=True):
        assert torch.equal(found, before)
    with plan:
        found = trained(model)
    for one, other in zip(found, trained(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_frames_that_are_there_already():
    """A checkpoint around each unit: it is set aside by a plan of pairs, and none of units is to be had."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = nn.ModuleList(Unit() for _ in range(2))

        def forward(self, x):
            for unit in self.units:
                x = recollect.checkpoint(unit, x)
            return x

    def gradients(model):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 128, dtype=torch.float64).view(16, 8)
        return torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))

    torch.manual_seed(0)
    model = nn.Sequential(*[Pair() for _ in range(3)]).double()
    state = copy.deepcopy(model.state_dict())
    expected = gradients(copy.deepcopy(model))
    plan = recollect.plan(model, torch.randn(16, 8, dtype=torch.float64), budget="1 GB", units=Pair)
    for strategy in ("store", "checkpoint", "link", "selective"):
        with forced(plan, strategy):
            found = gradients(model)
        assert all(map(torch.equal, found, expected))
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="outside of checkpoints"):
        recollect.plan(model, torch.randn(16, 8, dtype=torch.float64), budget="1 GB", units=Unit)
