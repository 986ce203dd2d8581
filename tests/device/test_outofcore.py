"""Steps over a whole graph, part by part on the device, with tables on the host: one wait for a part."""

import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from device.compare import assert_same
from device.emulation import NAME, watch
from recollect._devices import FORMS, OTHERS
from recollect.aggregation import UPGradWeighting
from recollect.autoscale import normalize, to_adj_t
from recollect.frames import LatticeError, RebuildError
from recollect.models import GCN2, PNA_JK, RevGNN
from recollect.outofcore import WholeGraph
from recollect.outofcore._tables import Tables

pytest.importorskip("torch_geometric")
from torch_geometric.data import Data
from torch_geometric.nn import SAGEConv

NODES, PTR = 24, torch.tensor([0, 5, 12, 24])

NETWORKS = {
    "revgnn": partial(RevGNN, 5, 8, 3, 3, 2, dropout=0.3),
    "revgnn, gcn": partial(RevGNN, 5, 8, 3, 2, 2, conv="gcn"),
    "revgnn, gat": partial(RevGNN, 5, 8, 3, 2, 2, conv="gat"),
    "revgnn, four groups": partial(RevGNN, 5, 8, 3, 2, 4, conv="graphconv"),
    "gcn2": partial(GCN2, NODES, 5, 8, 3, num_layers=3, keep_histories=False),
    "pna_jk": partial(PNA_JK, NODES, 5, 6, 3, 3, ["sum", "min"], ["identity", "attenuation"], torch.full((NODES,), 3)),
}
each = pytest.mark.parametrize("name", NETWORKS)
several = pytest.mark.parametrize("name", ["revgnn", "revgnn, four groups", "gcn2"])


@pytest.fixture(autouse=True)
def forms(other, monkeypatch):
    """The device gets the forms that CUDA gets, of convolutions too."""
    monkeypatch.setitem(FORMS, other, FORMS["cuda"])


def graph(name="revgnn"):
    generator = torch.Generator().manual_seed(1)
    ring = torch.arange(NODES)
    edge_index = torch.cat([torch.stack([ring, ring.roll(1)]), torch.randint(NODES, (2, 50), generator=generator)], 1)
    x = torch.randn(NODES, 5, dtype=torch.float64, generator=generator)
    data = Data(x=x, edge_index=edge_index, y=ring % 3, train_mask=ring % 4 > 0)
    if "revgnn" not in name:
        data = to_adj_t(data)
        data.adj_t = normalize(data.adj_t).double()
    return data


def whole_of(name, device, store=None, **options):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    return WholeGraph(model.to(device), graph(name), PTR, store, **options)


def criterion(logits, y):
    return F.cross_entropy(logits, y, reduction="sum") / 18


def of_each_class(logits, y):
    losses = F.cross_entropy(logits, y, reduction="none")
    return torch.stack([(losses * (y == c)).sum() for c in range(3)]) / 6


def step(whole, *weighting, resumed=False):
    torch.manual_seed(3)
    whole.model.zero_grad()
    call = whole.resume if resumed else whole.step
    loss = call(of_each_class if weighting else criterion, *weighting)
    return [loss, *(parameter.grad for parameter in whole.model.parameters())]


@each
@pytest.mark.parametrize(("memory", "products"), [(0, True), (1 << 20, True), (1 << 20, False)])
def test_a_step_is_that_of_the_cpu(other, name, memory, products, monkeypatch):
    """With parts that stay on the device, and others; with convolutions by products, and called as they are."""
    if not products:
        monkeypatch.setitem(FORMS, other, OTHERS)
    whole = whole_of(name, other, memory=memory)
    expected = whole_of(name, "cpu")
    for _ in range(2):
        assert_same(step(whole), step(expected), 1e-10)
    if "revgnn" in name:
        assert whole.last_drift == expected.last_drift == 0.0
    logits = whole.evaluate()
    assert logits.device.type == "cpu"
    torch.testing.assert_close(logits, expected.evaluate(), rtol=1e-10, atol=1e-10)


@each
def test_an_operation_waits_once_for_what_it_changes(other, name, monkeypatch):
    """And for nothing beside."""
    whole = whole_of(name, other, memory=1 << 20)
    step(whole)
    passes, begun = [0], type(whole._space.crossing).back

    def back(*args):
        passes[0] += 1
        return begun(*args)

    monkeypatch.setattr(type(whole._space.crossing), "back", back)
    with watch() as log:
        step(whole)
    assert all("_crossing.py" in one or "_verdicts.py" in one for one in log.where), log.where
    assert 0 < len(log.where) <= passes[0]


@several
def test_several_losses(other, name):
    whole, expected = whole_of(name, other, row_bytes=200), whole_of(name, "cpu")
    assert_same(step(whole, UPGradWeighting()), step(expected, UPGradWeighting()), 1e-8)
    assert_same([whole.last_gramian, whole.last_weights], [expected.last_gramian, expected.last_weights], 1e-8)
    assert whole.certificate.checks == 1


@pytest.mark.parametrize("name", ["revgnn", "gcn2"])
@pytest.mark.parametrize("weighting", [(), (UPGradWeighting(),)], ids=["one loss", "several"])
def test_a_step_that_was_broken_off_goes_on(other, name, weighting, tmp_path, monkeypatch):
    expected = step(whole_of(name, other), *weighting)
    broken, done, apply = whole_of(name, other, tmp_path, memory=0), [0], Tables.apply

    class Killed(BaseException):
        pass

    def killed(self, changes, journaled):
        if journaled:
            done[0] += 1
            if done[0] == 17:
                raise Killed
        apply(self, changes, journaled)

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "apply", killed)
        with pytest.raises(Killed) as caught:
            step(broken, *weighting)
    caught.value.__traceback__ = None  # which holds the files open
    del caught, broken
    gc.collect()
    again = whole_of(name, other, tmp_path, memory=0)
    assert again.unfinished
    found = step(again, *weighting, resumed=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@several
def test_a_network_may_move_between_steps(other, name):
    whole, expected = whole_of(name, other), whole_of(name, "cpu")
    assert_same(step(whole), step(expected), 1e-10)
    whole.model.cpu()
    torch.testing.assert_close(step(whole), step(expected))
    whole.model.to(other)
    assert_same(step(whole), step(expected), 1e-10)


def test_up_to_rounding_too(other):
    whole, expected = whole_of("revgnn", other, exact=False), whole_of("revgnn", "cpu", exact=False)
    assert_same(step(whole), step(expected), 1e-10)
    assert 0 < whole.last_drift < 1e-12


def test_what_layers_draw_there_is_drawn_again(other):
    torch.manual_seed(0)
    model = GCN2(NODES, 5, 8, 3, num_layers=3, dropout=0.5, keep_histories=False).double().to(other)
    whole = WholeGraph(model, graph("gcn2"), PTR)
    first, second = step(whole), step(whole)
    assert_same(first, second, 0.0)
    before = torch.get_device_module(other).get_rng_state()
    whole.step(criterion)
    assert torch.equal(torch.get_device_module(other).get_rng_state(), before)


class Changed(nn.Module):
    """Computes something else behind so many calls on the device."""

    def __init__(self, channels, number, by):
        super().__init__()
        self.conv, self.number, self.by = SAGEConv(channels, channels), number, by

    def forward(self, x, edge_index):
        self.number -= x.device.type == NAME
        return self.conv(x, edge_index) + (self.by if self.number < 0 else 0)


@pytest.mark.parametrize(("number", "by", "error"), [(5, 0.1, RebuildError), (2, 1e5, LatticeError)])
def test_what_is_wrong_is_an_error_and_gradients_stay(other, number, by, error):
    """Each block is called for three parts forward, and again backward."""
    torch.manual_seed(0)
    model = RevGNN(5, 8, 3, 2, 2, conv=lambda channels: Changed(channels, number, by)).double()
    whole = WholeGraph(model.to(other), graph(), PTR)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(error, match=r"layer \d, block \d"):
        whole.step(criterion)
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


def test_a_network_in_two_places_is_refused(other):
    whole = whole_of("revgnn", "cpu")
    whole.model.head.to(other)
    for refused in (lambda: step(whole), whole.evaluate, lambda: WholeGraph(whole.model, graph(), PTR)):
        with pytest.raises(ValueError, match=r"parameters on cpu, other:0, but the parts .* model.to\(device\)"):
            refused()


@several
def test_the_graph_may_come_from_there(other, name):
    model = NETWORKS[name]().double().to(other)
    whole = WholeGraph(model, graph(name), PTR)
    expected = step(whole)
    assert_same(step(WholeGraph(model, graph(name).to(other), PTR.to(other))), expected, 0.0)
