"""Mini-batches on another device, and what the graph side computes there."""

import pytest
import torch

from device.compare import there
from device.emulation import watch
from recollect.autoscale import (
    EvalSubgraphLoader,
    SubgraphLoader,
    add_self_loops,
    edge_index_of,
    normalize,
    propagate,
    to_adj_t,
)

Data = pytest.importorskip("torch_geometric.data").Data
NODES = 20
PTR = torch.tensor([0, 6, 11, NODES])


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(NODES, (2, 60), generator=generator).unique(dim=1)
    x = torch.randn(NODES, 4, dtype=torch.float64, generator=generator)
    data = Data(x=x, y=torch.arange(NODES) % 3, edge_index=edge_index, node_order=torch.arange(NODES))
    return to_adj_t(data)


@pytest.mark.parametrize("loader", [SubgraphLoader, EvalSubgraphLoader])
def test_batches_move(other, data, loader):
    for batch in loader(data, PTR):
        x, adj_t = batch.data.x, batch.data.adj_t  # torch_geometric moves a graph in its place
        with watch() as log:
            moved = batch.to(other)
        assert log.where == []
        assert moved.data.x.device.type == moved.data.adj_t.device.type == other
        assert torch.equal(moved.data.adj_t.to("cpu").to_dense(), adj_t.to_dense())
        assert torch.equal(moved.data.x.cpu(), x)
        assert moved.n_id is batch.n_id


@pytest.mark.parametrize("prepare", [normalize, add_self_loops])
def test_adjacencies_are_prepared_there(other, data, prepare):
    found = prepare(there(data.adj_t))
    assert found.device.type == other
    torch.testing.assert_close(found.cpu().to_dense(), prepare(data.adj_t).to_dense())
    assert torch.equal(edge_index_of(found).cpu(), edge_index_of(found.cpu()))


def test_products(other, data):
    x = data.x.clone().requires_grad_()
    expected = torch.autograd.grad(propagate(data.adj_t, x).sin().sum(), x)[0]
    moved = there(data.x).requires_grad_()
    found = torch.autograd.grad(propagate(there(data.adj_t), moved).sin().sum(), moved)[0]
    torch.testing.assert_close(found.cpu(), expected)
