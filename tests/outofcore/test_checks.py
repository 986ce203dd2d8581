"""What would give other numbers than the whole network is refused before anything is changed."""

import copy
import pickle
import threading
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.testing import assert_close
from torch_geometric.nn import GATConv, InstanceNorm
from whole_graph_zoo import N, a_graph, plain_step, sum_of_losses, whole_step

from recollect.autoscale import normalize, to_adj_t
from recollect.models import RevGNN
from recollect.outofcore import WholeGraph

PTR = torch.tensor([0, 20, 20, 50, 61, N])


def a_model(kind=RevGNN, **options) -> RevGNN:
    return kind(7, 8, 4, 3, exact=True, **options).double()


class Doubled(RevGNN):
    def forward(self, x, edge_index, *args):
        return 2 * super().forward(x, edge_index, *args)


class Centred(RevGNN):
    def classify(self, x, mask=None):
        return super().classify(x - x.mean(0), mask)


class CentredFeatures(RevGNN):
    def embed(self, x):
        return super().embed(x - x.mean(0))


class Scaled(RevGNN):
    """Row by row."""

    def embed(self, x):
        return super().embed(x / x.norm(dim=1, keepdim=True))

    def classify(self, x, mask=None):
        return super().classify(x.tanh(), mask)


def hooked():
    model = a_model()
    model.layers[1].register_forward_hook(lambda module, args, out: 2 * out)
    return model


def normed_over_nodes():
    model = a_model()
    model.norm = InstanceNorm(8).double()
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: a_model(Doubled), TypeError, "Doubled has its own forward"),
        (lambda: a_model(Centred), ValueError, "Centred.classify returns"),
        (lambda: a_model(CentredFeatures), ValueError, "CentredFeatures.embed returns"),
        (hooked, ValueError, r"layers.1 \(GroupAddRev\) has forward_hooks"),
        (normed_over_nodes, ValueError, "other nodes' rows"),
    ],
)
def test_networks_that_do_something_else_as_a_whole(make, error, message):
    data = a_graph()
    with pytest.raises(error, match=message):
        WholeGraph(make(), data, PTR).step(sum_of_losses(data))


def test_what_goes_row_by_row_is_as_it_was_overridden():
    data = a_graph()
    model = a_model(Scaled, dropout=0.3)
    found, expected = whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data)
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


class Counted(RevGNN):
    """Counts the evaluations of all copies, row by row as it is; and may do something else later."""

    calls: ClassVar[list[int]] = [0, 0]
    centred = False
    again: Any = None

    def embed(self, x):
        self.calls[0] += 1
        return super().embed(x)

    def classify(self, x, mask=None):
        self.calls[1] += 1
        centred = self.centred or (self.again is not None and self.again.centred)
        return super().classify(x - x.mean(0) if centred else x, mask)


@pytest.mark.parametrize("kind", [RevGNN, Counted])
def test_what_goes_row_by_row_is_looked_at_once_for_each_form(kind, monkeypatch):
    data = a_graph()
    whole = WholeGraph(a_model(kind), data, PTR)
    monkeypatch.setattr(Counted, "calls", [0, 0])
    looks, look = [], RevGNN.check_rows
    monkeypatch.setattr(RevGNN, "check_rows", lambda model, x: looks.append(x) or look(model, x))
    for times in range(1, 4):
        whole.step(sum_of_losses(data))
        whole.evaluate()
        if kind is RevGNN:
            assert looks == []
        else:  # in training mode, which is new; evaluation mode was looked at when the WholeGraph was made
            assert len(looks) == 1
            # Four parts, forward and backward, and in evaluation; a look takes two runs of two parts.
            assert Counted.calls == [4 + 3 * 4 * times, 4 + 2 * 4 * times]


def centred_object():
    return SimpleNamespace(centred=True)


LATER = {
    "an attribute": lambda model: setattr(model, "centred", True),
    "an attribute of an object": lambda model: setattr(model, "again", centred_object()),
    "a norm": lambda model: setattr(model, "norm", InstanceNorm(8).double()),
    "a hook": lambda model: model.norm.register_forward_hook(lambda module, args, out: out - out.mean(0)),
    "a forward": lambda model: setattr(model.norm, "forward", lambda x: x - x.mean(0)),
    "a class": lambda model: setattr(model, "__class__", Centred),
    "a method": lambda model: setattr(model, "classify", lambda x, mask=None: model.head(x - x.mean(0))),
}


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (kind, what)
        for kind in (RevGNN, Counted)
        for what in LATER
        if hasattr(kind, "centred") or "attribute" not in what
    ],
)
def test_what_looks_at_other_rows_later_is_refused(kind, what):
    data, model = a_graph(), a_model(kind)
    whole = WholeGraph(model, data, PTR)
    for _ in range(2):
        whole.step(sum_of_losses(data))
    LATER[what](model)
    for call in (lambda: whole.step(sum_of_losses(data)), whole.evaluate):
        with pytest.raises(ValueError, match=r"classify returns rows that depend on other nodes' rows"):
            call()


class CentredInTraining(RevGNN):
    def classify(self, x, mask=None):
        return super().classify(x - x.mean(0) if self.training else x, mask)


class CentredBehindAGate(RevGNN):
    """Nothing is seen of it until the gate has moved."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate = nn.Parameter(torch.zeros(()))

    def classify(self, x, mask=None):
        return super().classify(x - self.gate * x.mean(0), mask)


class CentredBehindTwoSteps(RevGNN):
    """Says in a buffer how often it was called, whose value is no part of its form."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("count", torch.zeros(()))

    def classify(self, x, mask=None):
        return super().classify(x - x.mean(0) if self.count > 1 else x, mask)


def test_a_mode_a_gate_and_a_count_are_no_way_around():
    data = a_graph()
    whole = WholeGraph(a_model(CentredInTraining), data, PTR)
    whole.evaluate()
    with pytest.raises(ValueError, match=r"CentredInTraining\.classify returns"):
        whole.step(sum_of_losses(data))
    with pytest.raises(ValueError, match=r"CentredBehindAGate\.classify returns"):
        WholeGraph(a_model(CentredBehindAGate), data, PTR)
    whole = WholeGraph(a_model(CentredBehindTwoSteps), data, PTR)
    for _ in range(2):
        whole.step(sum_of_losses(data))
        whole.model.count += 1
    with pytest.raises(ValueError, match=r"CentredBehindTwoSteps\.classify returns"):
        whole.step(sum_of_losses(data))


class Gated(RevGNN):
    """Has parameters of its own before and behind the layers."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate = nn.Linear(8, 8)

    def embed(self, x):
        h = super().embed(x)
        return h * self.gate(h).sigmoid()

    def classify(self, x, mask=None):
        return super().classify(x + self.gate(x), mask)


def test_parameters_of_ones_own_before_and_behind_the_layers():
    data = a_graph()
    model = a_model(Gated, dropout=0.3)
    found, expected = whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data)
    assert "gate.weight" in found[1]
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


def test_gradients_of_the_graph_are_not_left_out_in_silence():
    data = a_graph()
    data.x.requires_grad_()
    with pytest.raises(ValueError, match=r"data\.x requires grad"):
        WholeGraph(a_model(), data, PTR)
    data = a_graph()
    data.edge_weight = torch.rand(data.edge_index.size(1), dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"data\.edge_weight requires grad"):
        WholeGraph(a_model(conv="gcn"), data, PTR, inputs=("edge_weight",))


def test_one_mask_for_each_node():
    data = a_graph()
    data.train_mask = torch.stack([data.train_mask] * 3, 1)
    with pytest.raises(ValueError, match="take one column"):
        WholeGraph(a_model(), data, PTR)


def set_dropout(model, p):
    model.dropout = p
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = p


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_dropout_that_changes(p):
    data = a_graph()
    model = a_model(dropout=0.5)
    whole = WholeGraph(model, data, PTR)
    set_dropout(model, p)
    found, expected = whole_step(whole, data), plain_step(model, data)
    assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_dropout_for_which_there_is_no_room():
    data = a_graph()
    model = a_model()
    whole = WholeGraph(model, data, PTR)
    set_dropout(model, 0.5)
    with pytest.raises(ValueError, match=r"dropout=0\.5"):
        whole.step(sum_of_losses(data))


def test_another_dtype():
    data = a_graph()
    model = a_model()
    whole = WholeGraph(model, data, PTR)
    model.float()
    with pytest.raises(ValueError, match="float32 now"):
        whole.step(sum_of_losses(data))


def test_inference_mode():
    data = a_graph()
    whole = WholeGraph(a_model(), data, PTR)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        whole.step(sum_of_losses(data))


@pytest.mark.parametrize("what", ["evaluate", "step"])
def test_one_at_a_time_has_the_tables(what):
    data = a_graph()
    whole = WholeGraph(a_model(dropout=0.4), data, PTR)

    def criterion(logits, y):
        whole.evaluate() if what == "evaluate" else whole.step(sum_of_losses(data))
        return F.cross_entropy(logits, y)

    with pytest.raises(RuntimeError, match="under way"):
        whole.step(criterion)
    found, expected = whole_step(whole, data), plain_step(whole.model, data)
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


def test_an_evaluation_does_not_overwrite_an_unfinished_step(tmp_path):
    data = a_graph()
    model = a_model(dropout=0.4)
    whole = WholeGraph(model, data, PTR, tmp_path)
    torch.manual_seed(5)
    with pytest.raises(KeyError):
        whole.step(lambda logits, y: {}["loss"])
    with pytest.raises(RuntimeError, match="unfinished step"):
        whole.evaluate()
    loss = whole.resume(sum_of_losses(data))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    expected = plain_step(model, data)
    assert_close((loss, gradients), expected[:2], rtol=1e-10, atol=1e-10)
    assert whole.evaluate().shape == (N, 4)


@pytest.mark.parametrize("change", ["graph", "mode", "settings"])
def test_a_step_goes_on_with_the_same_graph_and_network_alone(change, tmp_path):
    data = a_graph()
    model = a_model(dropout=0.4)
    whole = WholeGraph(model, data, PTR, tmp_path)
    with pytest.raises(KeyError):
        whole.step(lambda logits, y: {}["loss"])
    if change == "graph":
        del whole
        data.edge_index = data.edge_index.flip(1)[:, 1:]
        whole = WholeGraph(model, data, PTR, tmp_path)
    elif change == "mode":
        model.eval()
    else:
        model.layers[0].convs[0].norm.eps = 0.1
    with pytest.raises(RuntimeError, match="the network or the graph"):
        whole.resume(sum_of_losses(data))


def test_threads_of_which_each_has_its_own():
    data = a_graph()
    failed = []

    def train():
        model = a_model(conv=lambda c: GATConv(c, c, dropout=0.5), dropout=0.3, shared_dropout=False)
        try:
            WholeGraph(model, data, PTR).step(sum_of_losses(data))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=train) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_new_head_between_steps():
    data = a_graph()
    model = a_model()
    whole = WholeGraph(model, data, PTR)
    whole.step(sum_of_losses(data))
    model.head = nn.Linear(8, 4).double()
    found, expected = whole_step(whole, data), plain_step(model, data)
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


def test_weights_of_an_adjacency_that_nobody_is_given(tmp_path):
    data = to_adj_t(a_graph())
    whole = WholeGraph(a_model(conv="graphconv"), data, PTR)  # all are 1
    data.adj_t = normalize(data.adj_t)
    with pytest.raises(ValueError, match=r"weights other than 1.*inputs=\('edge_weight',\)"):
        WholeGraph(a_model(conv="graphconv"), data, PTR, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    model = whole.model
    found = whole_step(WholeGraph(model, data, PTR, inputs=("edge_weight",)), data)
    adj_t = data.adj_t.to_sparse_coo()
    target, source = adj_t.indices()
    data.edge_index = torch.stack([source, target])
    expected = plain_step(model, data, adj_t.values())
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


def test_a_layer_that_stands_at_two_places():
    data = a_graph()
    model = a_model(dropout=0.3)
    model.layers[2] = model.layers[0]
    found, expected = whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data)
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


def test_weights_that_hooks_compute():
    data = a_graph()
    model = a_model()
    for module in (model.head, model.project, model.layers[0].convs[0].conv.lin_l):
        prune.random_unstructured(module, "weight", 0.4)
    model.double()
    found, expected = whole_step(WholeGraph(model, data, PTR), data), plain_step(model, data)
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


def test_what_a_step_would_refuse_is_told_before_it():
    data, model = a_graph(), a_model(norm="batch")
    model.eval()
    whole = WholeGraph(model, data, PTR)
    whole.check()
    model.train()
    with pytest.raises(ValueError, match="BatchNorm1d, which in training normalises over all nodes"):
        whole.check()


def test_tables_have_the_sizes_of_groups_and_masks(tmp_path):
    data = a_graph()
    sizes = WholeGraph(a_model(dropout=0.3), data, PTR).tables
    group = (data.num_nodes, 4, torch.float64)
    assert sizes == {
        **dict.fromkeys(("x0", "x1", "g0", "g1"), group),
        **dict.fromkeys(("mask", "last_mask"), (data.num_nodes, 1, torch.uint8)),
    }
    in_files = WholeGraph(a_model(), data, PTR, tmp_path)
    assert in_files.tables["x0"] == (data.num_nodes + int(PTR.diff().max()), 4, torch.float64)


def test_what_is_no_graph_is_refused():
    for other, what in ((None, "a NoneType"), ({"x": torch.zeros(3, 7)}, "a dict")):
        with pytest.raises(TypeError, match=f"data is {what}, but must be a graph with x, y and train_mask"):
            WholeGraph(a_model(), other, PTR)


def test_inputs_are_names_of_what_the_graph_has():
    for other in ("edge_weight", (3,)):
        with pytest.raises(TypeError, match=r"must be a tuple of names, such as \('edge_weight',\)"):
            WholeGraph(a_model(), a_graph(), PTR, inputs=other)
    with pytest.raises(ValueError, match="data has no edge_kind, which inputs names"):
        WholeGraph(a_model(), a_graph(), PTR, inputs=("edge_kind",))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused(copied):
    whole = WholeGraph(a_model(), a_graph(), PTR)
    with pytest.raises(TypeError, match="make another WholeGraph with the copy"):
        copied(whole)
