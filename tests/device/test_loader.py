"""Mini-batches on another device, and what the graph side computes there."""

import pytest
import torch

from device.compare import there
from device.emulation import watch
from recollect.autoscale import (
    EvalSubgraphLoader,
    SubData,
    SubgraphLoader,
    add_self_loops,
    compute_micro_f1,
    dropout,
    edge_index_of,
    gen_masks,
    metis,
    normalize,
    part_weights,
    partition,
    partition_quality,
    permute,
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
        assert isinstance(batch, SubData)
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


@pytest.mark.parametrize("outward", [True, "induced", "complete"])
def test_outward_edges_move(other, data, outward):
    """But for the numbers of nodes, by which histories are addressed from the host."""
    for batch in SubgraphLoader(data, PTR, log=False, outward=outward):
        before = batch.data.outward
        moved = batch.to(other).data.outward
        assert moved.n_id.device.type == "cpu"
        assert torch.equal(moved.n_id, before.n_id)
        assert {tensor.device.type for tensor in (moved.rowptr, moved.col, moved.value, *moved.nodes.values())} == {
            other
        }
        assert torch.equal(moved.col.cpu(), before.col)


@pytest.mark.parametrize("loader", [SubgraphLoader, EvalSubgraphLoader])
def test_batches_of_a_graph_that_lies_there(other, data, loader):
    expected = list(loader(data, PTR, log=False))
    for batch, same in zip(loader(data.clone().to(other), PTR, log=False), expected, strict=True):
        assert torch.equal(batch.data.adj_t.to("cpu").to_dense(), same.data.adj_t.to_dense())
        assert torch.equal(batch.data.x.cpu(), same.data.x)
        assert torch.equal(batch.n_id.cpu(), same.n_id)


def test_a_graph_is_divided_and_permuted_there(other, data):
    moved = data.clone().to(other)
    for method in ("contiguous", "metis"):
        if method == "metis":
            pytest.importorskip("pymetis")
        perm, ptr = partition(data.adj_t, 3, method, log=False)
        found = partition(moved.adj_t, 3, method, log=False)
        assert torch.equal(found.perm.cpu(), perm)
        assert torch.equal(found.ptr.cpu(), ptr)
        assert partition_quality(moved.adj_t, *found) == partition_quality(data.adj_t, perm, ptr)
        assert partition_quality(moved.adj_t, perm, ptr) == partition_quality(data.adj_t, perm, ptr)
        assert torch.equal(part_weights(moved.adj_t, found.ptr).cpu(), part_weights(data.adj_t, ptr))
        assert torch.equal(permute(moved.clone(), found.perm, log=False).x.cpu(), data.x[perm])
    assert torch.equal(metis(moved.adj_t, 3, log=False).perm.cpu(), perm)


def test_helpers(other, data):
    logits, y = torch.randn(NODES, 3), data.y
    assert compute_micro_f1(logits.to(other), y.to(other)) == compute_micro_f1(logits, y)
    for mask, expected in zip(gen_masks(y.to(other), 2, 2), gen_masks(y, 2, 2), strict=True):
        assert mask.device.type == other
        assert mask.shape == expected.shape
    dropped = dropout(there(data.adj_t), 0.5)
    assert dropped.device.type == other
    assert set(dropped.values().cpu().tolist()) <= {0.0, *(2 * data.adj_t.values()).tolist()}
