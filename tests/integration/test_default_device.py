"""A default device, as torch.set_default_device sets it, that is not the data's."""

import copy

import pytest
import torch
from torch import nn

from recollect import autoscale
from recollect import invertible as inn
from recollect.aggregation import UPGradWeighting
from recollect.autogram import Engine
from recollect.data import load
from recollect.frames import checkpoint
from recollect.messages import convolve
from recollect.models import GCN
from recollect.reversible import GroupAddRev
from recollect.testing import check_invertible

Data = pytest.importorskip("torch_geometric.data").Data
SAGEConv = pytest.importorskip("torch_geometric.nn").SAGEConv

NODES = 12


@pytest.fixture
def elsewhere():
    """What is made without saying where has no numbers."""
    return torch.device("meta")


@pytest.fixture
def graph():
    ring = torch.arange(NODES)
    edge_index = torch.cat([torch.stack([ring, ring.roll(1)]), torch.stack([ring, ring.roll(3)])], 1)
    y = torch.arange(NODES) % 3
    return Data(x=torch.randn(NODES, 4), y=y, edge_index=edge_index, edge_attr=torch.rand(2 * NODES, 1))


def gradients(network, *inputs):
    network.zero_grad()
    out = network(*inputs)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in network.parameters())]


def assert_the_same(elsewhere, compute):
    torch.manual_seed(0)
    expected = compute()
    torch.manual_seed(0)
    with elsewhere:
        found = compute()
    assert all(t.device.type == "cpu" for t in found)
    torch.testing.assert_close(found, expected)


def test_checkpoint(elsewhere):
    net = _Framed(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4)))
    x = torch.randn(3, 4)
    assert_the_same(elsewhere, lambda: gradients(net, x))


class _Framed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return checkpoint(self.net, x)


def test_reversible_layers_measure_their_drift(elsewhere, graph):
    layers = nn.Sequential(*(_Layer(GroupAddRev(SAGEConv(4, 4), num_groups=2), graph.edge_index) for _ in range(3)))
    x = torch.randn(NODES, 8)
    assert_the_same(elsewhere, lambda: gradients(layers, x))


class _Layer(nn.Module):
    def __init__(self, layer, edge_index):
        super().__init__()
        self.layer, self.edge_index = layer, edge_index

    def forward(self, x):
        return self.layer(x, self.edge_index)


def test_convolve(elsewhere, graph):
    conv = SAGEConv(4, 4)
    with elsewhere:
        out = convolve(conv, graph.x, graph.edge_index)
    torch.testing.assert_close(out, conv(graph.x, graph.edge_index))


def test_invertible_layers_and_their_check(elsewhere):
    net = inn.Sequential(
        inn.Linear(4, 4), inn.ActNorm(4), inn.LeakyReLU(), inn.AffineCoupling(nn.Linear(2, 4), nn.Linear(2, 4))
    )
    x = torch.randn(5, 4)
    net(x)  # sets what depends on data
    assert_the_same(elsewhere, lambda: gradients(net, x))
    with elsewhere:
        net.check(x)
        check_invertible(net, x)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_gramian_and_weights(elsewhere, batch_dim):
    net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(5, 4)

    def compute():
        gramian = Engine(net, batch_dim=batch_dim).compute_gramian(net(x).square().squeeze(1))
        return [gramian, UPGradWeighting()(gramian)]

    assert_the_same(elsewhere, compute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("place", ["memory", "file"])
def test_histories(elsewhere, place, dtype, tmp_path):
    with elsewhere:
        history = autoscale.History(6, 2, dtype=dtype, path=tmp_path / "h" if place == "file" else None)
        rows = torch.tensor([[0.5, 1.0], [2.0, 1.0]], device="cpu")
        history.push(rows, n_id=torch.tensor([4, 1], device="cpu"))
        history.push(rows[:1], offset=torch.tensor([0], device="cpu"), count=torch.tensor([1], device="cpu"))
        found, age = history.pull(torch.tensor([1, 4, 0], device="cpu")), history.age()
        assert history.state_dict() is not None
        history.reset_parameters()
        assert not history.pull().any()
    torch.testing.assert_close(found, rows[[1, 0, 0]], rtol=1e-2, atol=1e-2)
    assert age.tolist()[:2] == [0, 1]


@pytest.mark.parametrize("method", ["metis", "kaminpar", "random", "contiguous"])
@pytest.mark.parametrize("num_parts", [3, 1, 40])
def test_partitions(elsewhere, graph, method, num_parts):
    pytest.importorskip({"metis": "pymetis"}.get(method, method if method == "kaminpar" else "torch"))

    def compute():
        data = autoscale.to_adj_t(graph.clone())
        perm, ptr, *_ = autoscale.partition(data.adj_t, num_parts=num_parts, method=method, log=False)
        return [perm, ptr, autoscale.permute(data, perm, log=False).x]

    assert_the_same(elsewhere, compute)


@pytest.mark.parametrize("pool", [None, 2])
def test_mini_batches(elsewhere, graph, pool):
    data = autoscale.to_adj_t(graph)
    perm, ptr, *_ = autoscale.partition(data.adj_t, num_parts=3, method="contiguous", log=False)
    data = autoscale.permute(data, perm, log=False)
    model = GCN(NODES, 4, 8, 3, 3, pool_size=pool, buffer_size=NODES if pool else None)

    def compute():
        net, outputs = copy.deepcopy(model), []
        cut = autoscale.SubgraphLoader(data, ptr, log=False).collate_fn  # DataLoader itself asks the default device
        for batch in (cut([0, 2]), cut([1])):
            out = net(batch.data.x, batch.data.adj_t, *batch[1:])
            out.sum().backward()
            outputs.append(out.detach())
        every = [cut([0, 1]), cut([2])]
        outputs.append(net(loader=every))
        errors = autoscale.history_errors(net, every)
        return [*outputs, *(p.grad for p in net.parameters()), torch.tensor(errors, device="cpu")]

    assert_the_same(elsewhere, compute)


def test_masks(elsewhere, graph):
    generator = torch.Generator()

    def compute():
        return list(autoscale.gen_masks(graph.y, 2, 1, num_splits=2, generator=generator.manual_seed(0)))

    assert_the_same(elsewhere, compute)


@pytest.mark.parametrize("name", ["sbm", "karate"])
def test_data(elsewhere, name):
    options = {"num_nodes": 100} if name == "sbm" else {}
    keys = ("x", "y", "edge_index", "train_mask")
    assert_the_same(elsewhere, lambda: [load(name, **options).data[key] for key in keys])
