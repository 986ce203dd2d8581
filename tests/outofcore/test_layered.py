"""Networks with a table for each layer: a step over parts is the step over the whole graph."""

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from whole_graph_zoo import N, a_graph, losses_by_label, sum_of_losses

from recollect import models
from recollect.aggregation import UPGradWeighting
from recollect.autoscale import ScalableGNN, add_self_loops, normalize, propagate, to_adj_t
from recollect.frames import RebuildError
from recollect.messages import sparse_csr
from recollect.outofcore import WholeGraph
from recollect.outofcore._tables import Tables

PTR = torch.tensor([0, 20, 20, 50, 61, N])


def a_data(labels=0, dtype=torch.float64):
    data = to_adj_t(a_graph(labels=labels, dtype=dtype))
    data.adj_t = normalize(add_self_loops(data.adj_t)).to(dtype)
    return data


class Own(ScalableGNN):
    """Leaves rows of neighbours in its state, tied weights, several entries for each node, and a flag."""

    def __init__(self, num_nodes, in_channels, hidden, out, num_layers):
        super().__init__(num_nodes, hidden, num_layers)
        self.first, self.shared, self.last = nn.Linear(7, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)
        self.unused = nn.Linear(2, 2)

    def forward_layer(self, layer, x, adj_t, state):
        if layer == 0:
            x = self.first(x)
            state["start"] = {"x": x, "known": True}
            state["pairs"] = x[: adj_t.size(0)].view(-1, 2, x.size(1) // 2)
        h = propagate(adj_t, self.shared(x + state["start"]["x"]))
        if layer % 2:
            state["pairs"] = state["pairs"] * h.view_as(state["pairs"]).tanh()
        return h.relu() + state["pairs"].flatten(1)

    def readout(self, x, state):
        return self.last(x + state["pairs"].sum(1).repeat(1, 1)[:, :1])


def gcn(data, out, **options):
    return models.GCN(N, 7, 6, out, 4, residual=True, **options)


MODELS = {
    "gcn": gcn,
    "gcn with a head": lambda data, out: gcn(data, out, linear=True),
    "gcn of several widths": lambda data, out: models.GCN(N, 7, [5, 8, 3], out, 4),
    "compensated gcn": lambda data, out: gcn(data, out, compensate=True),
    "gat": lambda data, out: models.GAT(N, 7, 4, 2, out, 2, 3),
    "gin": lambda data, out: models.GIN(N, 7, 6, out, 3),
    "appnp": lambda data, out: models.APPNP(N, 7, 6, out, 5),
    "gcn2": lambda data, out: models.GCN2(N, 7, 6, out, 5, shared_weights=False),
    "pna": lambda data, out: models.PNA(
        N, 7, 6, out, 3, ["mean", "max", "std"], ["identity", "amplification"], data.adj_t.crow_indices().diff()
    ),
    "pna with jumping knowledge": lambda data, out: models.PNA_JK(
        N, 7, 6, out, 3, ["sum", "min"], ["identity", "attenuation"], data.adj_t.crow_indices().diff()
    ),
    "own": lambda data, out: Own(N, 7, 6, out, 5),
}


def made(name, data):
    torch.manual_seed(3)
    return MODELS[name](data, data.y.size(1) if data.y.dim() == 2 else 4).to(data.x.dtype)


def plain(model, data, criterion):
    return criterion(model(data.x, data.adj_t)[data.train_mask], data.y[data.train_mask])


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def expected_step(model, data):
    model.zero_grad()
    loss = plain(model, data, sum_of_losses(data))
    loss.backward()
    found = {name: gradient.clone() for name, gradient in gradients_of(model).items()}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("keep_every", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_network(name, keep_every):
    data = a_data()
    model = made(name, data)
    loss, expected = expected_step(model, data)
    whole = WholeGraph(model, data, PTR, keep_every=keep_every)
    assert_close(whole.step(sum_of_losses(data)), loss, rtol=1e-10, atol=1e-10)
    assert_close(gradients_of(model), expected, rtol=1e-10, atol=1e-10)
    model.eval()
    assert_close(whole.evaluate(), model(data.x, data.adj_t).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keep_every", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_gramians_of_every_network(name, keep_every):
    data = a_data(labels=3)
    model = made(name, data)
    losses = plain(model, data, losses_by_label(data))
    rows = [torch.autograd.grad(one, model.parameters(), retain_graph=True, allow_unused=True) for one in losses]
    flat = [
        torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(row, model.parameters(), strict=True)
            ]
        )
        for row in rows
    ]
    jacobian = torch.stack(flat)
    whole = WholeGraph(model, data, PTR, keep_every=keep_every)
    found = whole.step(losses_by_label(data), UPGradWeighting())
    assert_close(found, losses.detach(), rtol=1e-10, atol=1e-10)
    assert_close(whole.last_gramian, jacobian @ jacobian.T, rtol=1e-10, atol=1e-10)
    gradient = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )
    assert_close(gradient, whole.last_weights @ jacobian, rtol=1e-10, atol=1e-10)
    assert whole.certificate.checks == 1


class ByParts(nn.Module):
    """The same network with everything kept, whose layers draw for each part as those of a step do."""

    def __init__(self, whole, data):
        super().__init__()
        self.whole, self.data = whole, data

    def forward(self, seed):
        model, parts = self.whole.model, [self.whole.parts[k] for k in range(len(self.whole.parts))]
        x = self.data.x
        states: list[dict] = [{} for _ in parts]
        for layer in [*range(model.num_layers), None]:
            out = []
            for part, state in zip(parts, states, strict=True):
                place = model.num_layers if layer is None else layer
                torch.manual_seed(hash((seed, place, part.number)) & (2**62 - 1))
                rowptr = self.data.adj_t.crow_indices()[part.start : part.stop + 1]
                values = self.data.adj_t.values()[rowptr[0] : rowptr[-1]]
                size = part.size, part.n_id.numel()
                rows = sparse_csr(rowptr - rowptr[0], part.edge_index[0], values, size)
                if layer is None:
                    out.append(model.readout(x[part.start : part.stop], state))
                else:
                    out.append(model.run_layer(layer, x[part.n_id], rows, state))
            x = torch.cat(out)
        return x


@pytest.mark.parametrize("name", ["gcn", "gcn2", "pna with jumping knowledge"])
def test_what_layers_draw_is_drawn_again(name):
    data = a_data()
    model = made(name, data)
    model.dropout = 0.4
    whole = WholeGraph(model, data, PTR, keep_every=2)
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, (1,)))
    logits = ByParts(whole, data)(seed)
    sum_of_losses(data)(logits[data.train_mask], data.y[data.train_mask]).backward()
    expected = {key: gradient.clone() for key, gradient in gradients_of(model).items()}
    model.zero_grad()
    torch.manual_seed(5)
    whole.step(sum_of_losses(data))
    assert_close(gradients_of(model), expected, rtol=1e-10, atol=1e-10)


def test_edges_with_features():
    data = a_data()
    data.edge_attr = torch.randn(data.adj_t.values().numel(), 2, dtype=torch.float64)
    degrees = data.adj_t.crow_indices().diff()
    model = models.PNA(N, 7, 6, 4, 3, ["mean", "max"], ["identity"], degrees, edge_dim=2).double()
    logits = model(data.x, data.adj_t, edge_attr=data.edge_attr)
    sum_of_losses(data)(logits[data.train_mask], data.y[data.train_mask]).backward()
    expected = {key: gradient.clone() for key, gradient in gradients_of(model).items()}
    model.zero_grad()
    WholeGraph(model, data, PTR).step(sum_of_losses(data))
    assert_close(gradients_of(model), expected, rtol=1e-10, atol=1e-10)


class Centred(models.GCN):
    def forward_layer(self, layer, x, adj_t, state):
        return super().forward_layer(layer, x - x.mean(0), adj_t, state)


class CentredInTraining(models.GCN):
    def forward_layer(self, layer, x, adj_t, state):
        return super().forward_layer(layer, x - x.mean(0) if self.training else x, adj_t, state)


class CentredReadout(models.GCN):
    def readout(self, x, state):
        return x - x.mean(0)


class LeavesAScalar(models.GCN):
    def forward_layer(self, layer, x, adj_t, state):
        state["sum"] = x.sum()
        return super().forward_layer(layer, x, adj_t, state)


class Reordered(models.GCN):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * 2


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Centred, ValueError, "layer 0 of the Centred returns.*depends on more"),
        (CentredInTraining, ValueError, "layer 0 of the CentredInTraining"),
        (CentredReadout, ValueError, "readout of the CentredReadout"),
        (LeavesAScalar, ValueError, r"layer 0 .*shape \[\]"),
        (Reordered, TypeError, "own forward"),
    ],
)
def test_networks_that_cannot_be_computed_part_by_part(kind, error, message):
    data = a_data()
    model = kind(N, 7, 6, 4, 3, dropout=0.3).double()
    with pytest.raises(error, match=message):
        WholeGraph(model, data, PTR).step(sum_of_losses(data))


def test_batch_normalisation_is_refused_in_training_alone():
    data = a_data()
    model = gcn(data, 4, batch_norm=True).double()
    whole = WholeGraph(model, data, PTR)
    with pytest.raises(ValueError, match=r"bns\.0 is a BatchNorm1d"):
        whole.step(sum_of_losses(data))
    model.eval()
    assert_close(whole.evaluate(), model(data.x, data.adj_t).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"inputs": ("edge_weight",)}, "gcn", "says in its attribute inputs"),
        ({"keep_every": 0}, "gcn", "keep_every"),
        ({"keep_every": 2}, "rev", "come back by inversion"),
    ],
)
def test_settings_of_the_other_kind(options, model, message):
    data = a_data()
    model = models.RevGNN(7, 8, 4, 3).double() if model == "rev" else made(model, data)
    with pytest.raises(ValueError, match=message):
        WholeGraph(model, data, PTR, **options)


def test_what_nodes_have_is_not_given_to_layers():
    data = a_data()
    data.pos = torch.randn(N, 2, dtype=torch.float64)
    model = made("gcn", data)
    model.inputs = ("pos",)
    with pytest.raises(ValueError, match="row for each of the"):
        WholeGraph(model, data, PTR)


class Writing(models.GCN):
    """Keeps a mean of its rows in a buffer, in training, or how often it was called."""

    of_rows = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mean", torch.zeros(()))

    def forward_layer(self, layer, x, adj_t, state):
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean() if self.of_rows else 0.1)
        return super().forward_layer(layer, x, adj_t, state)


class Telling(models.GCN):
    """Leaves a number in the state that is made of a parameter, or of rows."""

    of_rows = False

    def forward_layer(self, layer, x, adj_t, state):
        if layer == 0:
            state["scale"] = bool(x.abs().max() > 1e3) if self.of_rows else float(self.convs[0].weight.detach().sum())
        return super().forward_layer(layer, x, adj_t, state) * (1 + float(state["scale"]))


def test_buffers_into_which_layers_write_what_depends_on_rows_are_refused_in_training_alone():
    data = a_data()
    model = Writing(N, 7, 6, 4, 3).double()
    whole = WholeGraph(model, data, PTR)
    with pytest.raises(ValueError, match="layer 0 of the Writing writes to the buffer mean"):
        whole.step(sum_of_losses(data))
    assert model.mean == 0
    model.of_rows = False
    whole.step(sum_of_losses(data))
    assert_close(model.mean, torch.tensor(1 - 0.9**3, dtype=torch.float64))  # once for each layer
    model.eval()
    assert_close(whole.evaluate(), model(data.x, data.adj_t).detach(), rtol=1e-10, atol=1e-10)


def test_what_a_layer_tells_others_is_always_the_same():
    data = a_data()
    model = Telling(N, 7, 6, 4, 3).double()
    with pytest.raises(ValueError, match=r"layer 0 leaves .* beside tensors, and left .* on a small graph"):
        WholeGraph(model, data, PTR).step(sum_of_losses(data))
    assert not gradients_of(model)
    model.of_rows = True
    loss, expected = expected_step(model, data)
    whole = WholeGraph(model, data, PTR)
    assert_close(whole.step(sum_of_losses(data)), loss, rtol=1e-10, atol=1e-10)
    assert_close(gradients_of(model), expected, rtol=1e-10, atol=1e-10)
    model.zero_grad()
    data.x[3] = 1e4
    with pytest.raises(ValueError, match=r"layer 0 leaves .*True.* beside tensors"):
        WholeGraph(model, data, PTR).step(sum_of_losses(data))


class Mixed(ScalableGNN):
    """Layers of one width in single and in double precision."""

    def __init__(self):
        super().__init__(N, 6, 4)
        self.lins = nn.ModuleList(nn.Linear(a, 6) for a in (7, 6, 6, 6)).double()
        self.lins[1].float()
        self.lins[2].float()

    def forward_layer(self, layer, x, adj_t, state):
        dtype = self.lins[layer].weight.dtype
        return propagate(adj_t.to(dtype), self.lins[layer](x.to(dtype))).tanh()


def test_layers_of_one_width_and_two_types():
    data = a_data()
    torch.manual_seed(0)
    model = Mixed()
    data.y = data.y % 4
    loss, expected = expected_step(model, data)
    whole = WholeGraph(model, data, PTR)
    assert_close(whole.step(sum_of_losses(data)), loss, rtol=1e-6, atol=1e-6)
    names = set(gradients_of(model))
    assert names == set(expected)
    for name, gradient in gradients_of(model).items():
        assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)
    gradients = {name: dtype for name, (_, dtype) in whole._network.tables().items() if name.startswith("g")}
    assert set(gradients.values()) == {torch.float32, torch.float64}
    assert all(name.endswith(str(dtype).removeprefix("torch.")) for name, dtype in gradients.items())


class Forgetful(models.GCN):
    factor = 1.0

    def forward_layer(self, layer, x, adj_t, state):
        return super().forward_layer(layer, x, adj_t, state) * self.factor


def test_a_layer_that_does_not_repeat_itself_is_named():
    data = a_data()
    model = Forgetful(N, 7, 6, 4, 4).double()

    def criterion(logits, y):
        model.factor = 1.1
        return sum_of_losses(data)(logits, y)

    with pytest.raises(RebuildError, match="layer 3"):
        WholeGraph(model, data, PTR).step(criterion)
    assert not gradients_of(model)


def test_a_layer_that_changed_is_observed_anew():
    data = a_data()
    model = Forgetful(N, 7, 6, 4, 3).double()
    whole = WholeGraph(model, data, PTR)
    network: Any = whole._network
    whole.step(sum_of_losses(data))
    seen = network.look
    whole.step(sum_of_losses(data))
    assert network.look is seen
    model.activation = lambda x: x - x.mean(0)
    with pytest.raises(ValueError, match="depends on more"):
        whole.step(sum_of_losses(data))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("keep_every", [1, 2])
@pytest.mark.parametrize("at", [1, 9, 21, 22, 30, 40])
def test_a_step_whose_process_ended_goes_on(at, keep_every, tmp_path, monkeypatch):
    data = a_data(dtype=torch.float32)

    def a_whole(path):
        model = made("gcn2", data)
        model.dropout = 0.3
        return WholeGraph(model, data, PTR, path, memory=0, keep_every=keep_every)

    whole = a_whole(tmp_path / "whole")
    torch.manual_seed(5)
    loss, number = whole.step(sum_of_losses(data)), torch.rand(1)
    broken, finished, finish, write = a_whole(tmp_path / "broken"), [0], Tables._finish, Tables._write

    def stop(self, rows, cleared):
        finished[0] += 1
        if finished[0] == at and at % 2:
            raise Killed
        finish(self, rows, cleared)

    def tear(self, rows):
        if finished[0] == at - 1 and not at % 2:
            write(self, [(name, where, torch.full_like(values, torch.nan)) for name, where, values in rows])
            raise Killed
        write(self, rows)

    monkeypatch.setattr(Tables, "_finish", stop)
    monkeypatch.setattr(Tables, "_write", tear)
    torch.manual_seed(5)
    with pytest.raises(Killed) as caught:
        broken.step(sum_of_losses(data))
    monkeypatch.undo()
    caught.value.__traceback__ = None  # which holds the files open
    del caught, broken
    gc.collect()
    again = a_whole(tmp_path / "broken")
    torch.manual_seed(99)
    assert torch.equal(again.resume(sum_of_losses(data)), loss)
    assert torch.equal(torch.rand(1), number)
    expected = gradients_of(whole.model)
    assert all(torch.equal(gradient, expected[key]) for key, gradient in gradients_of(again.model).items())
    assert_close(again.evaluate(), whole.evaluate(), rtol=0, atol=0)
