"""Histories in every place and form, with a network on another device: values, corrections, waits."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch.nn import functional as F

from device.compare import assert_same, waits
from device.emulation import watch
from recollect._devices import FORMS
from recollect.autoscale import (
    Around,
    AsyncIOPool,
    BlockwiseGNN,
    Combination,
    EvalSubgraphLoader,
    History,
    HistoryOptions,
    ScalableGNN,
    SubgraphLoader,
    history_errors,
    history_parts,
    load_history_parts,
    normalize,
    own_graph,
    permute,
    to_adj_t,
)
from recollect.distributed import Shares
from recollect.frames import settle
from recollect.messages import propagate
from recollect.models import GCN, RevGNN

Data = pytest.importorskip("torch_geometric.data").Data

NODES, IN, OUT, LAYERS = 24, 5, 3, 3
PTR = torch.tensor([0, 7, 15, NODES])
DOUBLE = {"history_dtype": torch.float64}

# For each name: options of a GCN's histories. With a folder they lie in files.
KINDS = {
    "float64": DOUBLE,
    "int8": {"history_dtype": torch.int8},
    "bfloat16": {"history_dtype": torch.bfloat16},
    "rebuilt": {"recompute": True} | DOUBLE,  # the source Rows, which pulls again
    "pool": {"pool_size": 2, "buffer_size": NODES} | DOUBLE,
    "corrected": {"compensate": True} | DOUBLE,
    "combined": {"compensate": True, "combine": Combination(0.8, "x")} | DOUBLE,
}
OUTWARD = {"corrected": True, "combined": "induced"}
PLACES = ["host", "device", "file"]
CASES = [(form, place) for form in KINDS for place in PLACES if (form, place) != ("pool", "device")]
each = pytest.mark.parametrize(("form", "place"), CASES, ids=lambda value: value)


def make_graph(prepare=normalize):
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(NODES - 1, (2, 3 * NODES), generator=generator).unique(dim=1)
    x = torch.randn(NODES, IN, dtype=torch.float64, generator=generator)
    data = Data(x=x, y=torch.arange(NODES) % OUT, edge_index=edge_index)
    data = to_adj_t(permute(data, torch.randperm(NODES, generator=generator), log=False))
    data.adj_t = data.adj_t if prepare is None else prepare(data.adj_t)
    return data


def gcn(form, place="host", folder=None, **options):
    where = {"host": {}, "device": {"device": "other"}, "file": {"history_path": folder}}[place]
    torch.manual_seed(0)
    return GCN(NODES, IN, 6, OUT, num_layers=LAYERS, **KINDS[form], **where, **options).double()


def batches(form, data=None, parts=1):
    return SubgraphLoader(data or make_graph(), PTR, parts, log=False, outward=OUTWARD.get(form, False))


def loss_of(model, batch):
    inputs = {"outward": batch.data.outward} if "outward" in batch.data else {}
    out = model(batch.data.x, batch.data.adj_t, *batch[1:], **inputs)
    return F.cross_entropy(out, batch.data.y[: batch.batch_size])


def sum_of_losses(out, batch):
    y = batch.data.y[: batch.batch_size].to(out.device, non_blocking=True)
    return F.cross_entropy(out, y, reduction="sum")


def trained(model, optimizer, data=None, form="float64"):
    """Take the steps of an epoch, and return their losses."""
    losses = []
    for batch in batches(form, data):
        optimizer.zero_grad()
        loss = loss_of(model, batch.to(next(model.parameters()).device))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@each
def test_steps_are_those_of_the_cpu(other, form, place, tmp_path):
    model, on_device = gcn(form), gcn(form, place, tmp_path).to(other)
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (model, on_device)]
    for _ in range(3):
        expected = trained(model, optimizers[0], form=form)
        assert_same(trained(on_device, optimizers[1], form=form), expected)
    assert_same(list(on_device.parameters()), list(model.parameters()))
    for one, two in zip(on_device.histories, model.histories, strict=True):
        torch.testing.assert_close(one.pull().cpu(), two.pull(), rtol=1e-9, atol=1e-9)
    expected = history_errors(model, make_graph())
    assert history_errors(on_device, make_graph().to(other)) == pytest.approx(expected)
    assert history_errors(on_device, EvalSubgraphLoader(make_graph(), PTR, log=False)) == pytest.approx(expected)


@each
def test_waits(other, form, place, tmp_path):
    """Rows on the host wait for the copies that push them, of gradients too, and nothing else does."""
    model, moved = gcn(form, place, tmp_path).to(other), [batch.to(other) for batch in batches(form)]
    found = waits(lambda: [loss_of(model, batch).backward() for batch in moved], times=2)
    pushed = (LAYERS - 1) * (2 if form in OUTWARD else 1)
    copies = 0 if place == "device" else 2 * len(moved) * pushed
    assert [where for where in found if not where.startswith("copy_ at")] == []
    assert len(found) == copies, found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", ["float64", "corrected", "combined"])
def test_a_refresh(other, form, place, tmp_path):
    model, on_device = gcn(form), gcn(form, place, tmp_path).to(other)
    loader = EvalSubgraphLoader(make_graph(), PTR, 2, log=False)
    loss = sum_of_losses if form in OUTWARD else None
    expected = model.refresh(loader, loss)
    torch.testing.assert_close(on_device.refresh(loader, loss).cpu(), expected)
    tables = [*zip(on_device.histories, model.histories, strict=True)]
    for layer in range(1, LAYERS) if form in OUTWARD else ():
        tables.append((on_device.gradients.table(layer), model.gradients.table(layer)))
    for one, two in tables:
        torch.testing.assert_close(one.pull().cpu(), two.pull(), rtol=1e-9, atol=1e-9)
    found = waits(lambda: on_device.refresh(loader, loss), times=1)
    assert [where for where in found if not where.startswith("copy_ at")] == []


@pytest.mark.parametrize("place", ["host", "device"])
def test_states_come_back(other, place, tmp_path):
    model = gcn("int8", place, tmp_path / "one", save_histories=True).to(other)
    trained(model, torch.optim.SGD(model.parameters(), 0.1))
    again = gcn("int8", place, tmp_path / "two", save_histories=True).to(other)
    again.load_state_dict(model.state_dict())
    on_cpu = gcn("int8", save_histories=True)
    on_cpu.load_state_dict(model.state_dict())
    for one, two, three in zip(model.histories, again.histories, on_cpu.histories, strict=True):
        assert torch.equal(one.pull(), two.pull())
        assert torch.equal(one.pull().cpu(), three.pull())
    expected = trained(model, torch.optim.SGD(model.parameters(), 0.1))
    assert_same(trained(again, torch.optim.SGD(again.parameters(), 0.1)), expected)
    assert copy.deepcopy(again).histories[0].pull().device.type == other


def test_the_graph_may_lie_on_the_device(other):
    """To cut a mini-batch waits there, as its halo is as large as values say; the step itself does not."""
    model, on_device, data = gcn("corrected"), gcn("corrected", "device").to(other), make_graph()
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (model, on_device)]
    for _ in range(2):
        expected = trained(model, optimizers[0], form="corrected")
        assert_same(trained(on_device, optimizers[1], data.clone().to(other), "corrected"), expected)


class Blocks(RevGNN):
    """A network of blocks, whose convolutions are sums."""

    def __init__(self, **options):
        torch.manual_seed(0)
        super().__init__(IN, 8, OUT, 2, conv="graphconv", num_nodes=NODES, **DOUBLE, **options)
        self.double()


@pytest.mark.parametrize(("place", "forms"), [("file", "others"), ("device", "cuda")])
@pytest.mark.parametrize("corrected", [False, True], ids=["plain", "corrected"])
def test_a_network_of_blocks(other, place, forms, corrected, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, other, FORMS[other if forms == "others" else forms])
    assert issubclass(Blocks, BlockwiseGNN)
    where = {"host": {}, "device": {"device": other}, "file": {"history_path": tmp_path}}[place]
    form = "corrected" if corrected else "float64"
    model, on_device = Blocks(compensate=corrected), Blocks(compensate=corrected, **where).to(other)
    data = make_graph(None)
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (model, on_device)]
    for _ in range(2):
        expected = trained(model, optimizers[0], data, form)
        assert_same(trained(on_device, optimizers[1], data, form), expected)
    assert_same(list(on_device.parameters()), list(model.parameters()))
    settle()
    moved = [batch.to(other) for batch in batches(form, data)]
    found = waits(lambda: [loss_of(on_device, batch).backward() for batch in moved], times=1)
    assert [where for where in found if not where.startswith("copy_ at")] == []
    pushed = 2 + (on_device.num_groups * 2 - 1 if corrected else 0)
    assert len(found) == (0 if place == "device" else len(moved) * pushed), found
    settle()
    loss = sum_of_losses if corrected else None
    loader = EvalSubgraphLoader(data, PTR, 2, log=False)
    torch.testing.assert_close(on_device.refresh(loader, loss).cpu(), model.refresh(loader, loss))


def test_the_rows_around_a_mini_batch_are_on_the_device(other):
    class Watched(Blocks):
        def run_stage(self, index, x, edge_index, shared, args, around):
            found.append(around)
            return super().run_stage(index, x, edge_index, shared, args, around)

    found, model, data = list[Around](), Watched().to(other), make_graph(None)
    loss_of(model, next(iter(batches("float64", data))).to(other)).backward()
    assert all(isinstance(around, Around) for around in found)
    assert {rows.device.type for around in found for rows in (around.inputs, around.outputs)} == {other}
    settle()


def test_a_history_by_itself(other):
    for place, out in (("cpu", other), (other, other), (other, "cpu")):
        history, rows = History(NODES, 4, device=place).to(out), torch.randn(5, 4)
        n_id = torch.tensor([3, 1, 9, 20, 2])
        history.push(rows.to(out), n_id)
        pulled = history.pull(n_id)
        assert pulled.device.type == torch.device(out).type
        assert torch.equal(pulled.cpu(), rows)
    with watch() as log:
        History(NODES, 4, device=other).to(other).pull(n_id)
    assert log.where == []


def test_options_and_pools_are_the_same_by_other_names(other):
    options = HistoryOptions(dtype=torch.float64, pool_size=2, buffer_size=NODES)
    model, expected = gcn_of(options).to(other), gcn("pool").to(other)
    assert isinstance(model.pool, AsyncIOPool)
    assert isinstance(model, ScalableGNN)
    assert_same(trained(model, torch.optim.SGD(model.parameters(), 0.1)), trained(
        expected, torch.optim.SGD(expected.parameters(), 0.1)))  # fmt: skip


def gcn_of(options):
    torch.manual_seed(0)
    return GCN(NODES, IN, 6, OUT, num_layers=LAYERS, histories=options).double()


def test_histories_over_ranks(other):
    """Rows of a process group of the CPU; the network is on the device."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shares, data = Shares(PTR), make_graph()
        model, on_device = gcn("float64"), gcn("float64", process_group=shares).to(other)
        own = own_graph(data, shares)
        optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in (model, on_device)]
        for _ in range(2):
            expected = trained(model, optimizers[0])
            assert_same(trained(on_device, optimizers[1], own), expected)
        moved = [batch.to(other) for batch in batches("float64")]
        found = waits(lambda: [loss_of(on_device, batch).backward() for batch in moved], times=1)
        assert [where for where in found if not where.startswith("copy_ at")] == []
        state = history_parts(on_device)
        assert {rows.device.type for rows in state.values()} == {"cpu"}
        load_history_parts(on_device, {name: torch.zeros_like(rows) for name, rows in state.items()})
        assert not on_device.histories[0].pull(torch.arange(NODES)).any()
    finally:
        dist.destroy_process_group()


def test_corrected_steps_have_the_autocast_of_their_forward(other):
    data, found = make_graph(), []
    data.x, data.adj_t = data.x.float(), data.adj_t.float()
    for device in ("cpu", other):
        torch.manual_seed(0)
        model = GCN(NODES, IN, 6, OUT, LAYERS, compensate=True, history_dtype=torch.float32, device=device).to(device)
        grads = list[torch.Tensor]()
        for _ in range(3):  # backward runs layers again for the halo, outside of the context
            for batch in SubgraphLoader(data, PTR, log=False, outward=True):
                batch = batch.to(device)
                with torch.autocast(device, dtype=torch.bfloat16):
                    out = model(batch.data.x, batch.data.adj_t, *batch[1:], outward=batch.data.outward)
                loss = F.cross_entropy(out.float(), batch.data.y[: batch.batch_size])
                grads += torch.autograd.grad(loss, list(model.parameters()))
        found.append(grads)
    assert_same(found[1], found[0], 1e-6)
    settle()


def test_layers_that_look_further_are_refused_there_too(other):
    class Centred(ScalableGNN):
        def __init__(self):
            super().__init__(NODES, IN, 1)
            self.lin = torch.nn.Linear(IN, OUT)

        def forward_layer(self, layer, x, adj_t, state):
            h = propagate(adj_t, self.lin(x))
            return h - h.mean(0)

    data = make_graph()
    data.x = data.x.float()
    for device in ("cpu", other):
        batch = next(iter(SubgraphLoader(data, PTR, log=False))).to(device)
        with pytest.raises(ValueError, match="more than the node and the edges into it"):
            Centred().to(device)(batch.data.x, batch.data.adj_t, *batch[1:])
