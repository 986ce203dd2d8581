"""Gradients of mini-batches whose histories are corrected, against those of the whole graph."""

import gc

import pytest
import torch
from compensation_zoo import (
    DOUBLE,
    NODES,
    OTHERS,
    PTR,
    SUMS,
    Layers,
    epoch,
    error,
    fill,
    gradients_of,
    loss_of,
    make,
    make_data,
    run,
    whole,
)  # fmt: skip
from torch import nn

from recollect.autoscale import Combination, EvalSubgraphLoader, SubgraphLoader, get_data, propagate, with_weights
from recollect.autoscale._block_compensation import BlockCompensation
from recollect.autoscale._compensation import Compensation
from recollect.autoscale._separable import Edges, Form, Way
from recollect.models import GCN, GIN, RevGNN

EXACT = 1e-12
depths = pytest.mark.parametrize("layers", [2, 3, 4])


@depths
@pytest.mark.parametrize("outward", [True, "complete"], ids=["cut", "complete"])
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "frames"])
@pytest.mark.parametrize("name", SUMS)
def test_exact_histories_give_the_whole_graphs_gradient(name, recompute, outward, layers):
    data, model = make_data(), make(name, layers, compensate=True, recompute=recompute)
    expected, *tables = whole(model, data)
    fill(model, *tables)
    assert error(epoch(model, data, outward), expected) < EXACT
    without = make(name, layers)
    fill(without, *whole(without, data)[1:])
    assert error(epoch(without, data, False), expected) > 0.01


@pytest.mark.parametrize("name", SUMS)
def test_mini_batches_few_of_whose_nodes_have_edges_to_the_outside(name):
    data, model = make_data(edges=30), make(name, 3, compensate=True)
    expected, *tables = whole(model, data)
    fill(model, *tables)
    near = [Edges(batch.data.outward).near for batch in SubgraphLoader(data, PTR, 2, log=False, outward=True)]
    assert any(rows is not None and rows.numel() for rows in near)
    assert error(epoch(model, data, True), expected) < EXACT


@depths
@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_are_no_sums_need_all_edges_of_the_nodes_outside(name, layers):
    data, model = make_data(), make(name, layers, compensate=True)
    expected, *tables = whole(model, data)
    fill(model, *tables)
    assert error(epoch(model, data, "complete"), expected) < EXACT
    with pytest.raises(NotImplementedError, match="depends on the target's other sources"):
        epoch(make(name, layers, compensate=True), data, True)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gcn", Way(Form.SUM, products=False, written=True)),
        ("appnp", Way(Form.SUM, products=False)),
        ("gcn2", Way(Form.SUM, products=False)),
        ("gcn-linear", Way(Form.SUM_AND_OWN, products=False)),
        ("graphconv", Way(Form.SUM_AND_OWN, products=False)),
        ("own", Way(Form.SUM_AND_OWN, products=False)),
        ("sage-sum", Way(Form.EDGES, products=False)),
        ("gated", Way(Form.SUM)),
        ("edges", Way(Form.EDGES, products=False)),
    ],
)
def test_how_gradients_are_sent_back_is_observed(name, way):
    data, model = make_data(), make(name, 3, compensate=True)
    epoch(model, data, True)
    assert model._ways == {1: way, 2: way}


@depths
@pytest.mark.parametrize("name", [*SUMS, *OTHERS])
def test_after_a_refresh_the_first_step_is_exact(name, layers):
    data, model = make_data(), make(name, layers, compensate=True)
    expected, _, gradients = whole(model, data)

    def loss(out, batch):
        return loss_of(out, batch.data.node_share[: batch.batch_size])

    model.refresh(EvalSubgraphLoader(data, PTR, 2, log=False), loss)
    for layer in range(1, layers):
        torch.testing.assert_close(model.gradients.table(layer).pull(), gradients[layer], rtol=1e-11, atol=1e-12)
    outward = True if name in SUMS else "complete"
    for batch in SubgraphLoader(data, PTR, 2, log=False, outward=outward):
        loss(run(model, batch), batch).backward()
    assert error(gradients_of(model), expected) < EXACT


def test_histories_converge_to_the_exact_ones():
    data, model = make_data(), make("gcn", 4, compensate=True)
    expected, _, gradients = whole(model, data)
    errors = [error(epoch(model, data, True), expected) for _ in range(30)]
    assert errors[0] > 0.1, errors
    assert errors[-1] < EXACT
    for layer in range(1, 4):
        torch.testing.assert_close(model.gradients.table(layer).pull(), gradients[layer], rtol=1e-11, atol=1e-12)


def test_a_mini_batch_goes_backward_once():
    data, model = make_data(), make("gcn", 3, compensate=True)
    batch = next(iter(SubgraphLoader(data, PTR, 2, log=False, outward=True)))
    out = run(model, batch)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="go backward once for each forward pass, from the sum of all losses"):
        out.sum().backward()


@pytest.mark.parametrize("recompute", [False, True])
def test_each_step_pushes_once(recompute):
    data, model = make_data(), make("gcn", 4, compensate=True, recompute=recompute)
    for step, batch in enumerate(SubgraphLoader(data, PTR, 1, log=False, outward=True), 1):
        run(model, batch).sum().backward()
        assert [model.gradients.table(layer).table.clock.pushes for layer in (1, 2, 3)] == [step] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"history_dtype": torch.float32}, {"history_dtype": torch.float16}, {"history_dtype": torch.int8},
        {"pool_size": 2, "buffer_size": NODES}, {"history_path": True},
    ],
    ids=["float32", "float16", "int8", "pool", "file"],
)  # fmt: skip
def test_every_kind_of_history(options, tmp_path):
    if "history_path" in options:
        options = {"history_path": tmp_path}
    data, model = make_data(), make("gcn", 3, compensate=True, **options)
    expected = whole(model, data)[0]
    for _ in range(30):
        found = epoch(model, data, True)
    exact = model.tables[0].dtype == torch.float64
    assert error(found, expected) < (EXACT if exact else 0.03)
    assert {t.dtype for t in model.gradients.tables} != {torch.float16}
    assert (tmp_path / "2.gradients").exists() == ("history_path" in options)


def test_rows_that_were_never_pushed_compensate_nothing():
    data, found = make_data(), []
    for compensate in (False, True):
        model = make("gcn", 3, compensate=compensate)
        fill(model, whole(model, data)[1])
        batch = next(iter(SubgraphLoader(data, PTR, 2, log=False, outward=compensate)))
        loss_of(run(model, batch), batch.data.node_share[: batch.batch_size]).backward()
        found.append(gradients_of(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def test_old_rows_count_as_far_as_they_agree_with_what_replaces_them():
    model = make("gcn", 3, compensate=True)
    history = model.gradients
    n_id, where = torch.arange(NODES), ((0, NODES),)
    rows = torch.randn(NODES, 6, dtype=torch.float64)
    assert history.trust(1) == 1
    noise = torch.randn_like(rows)
    noise -= rows * (noise * rows).sum() / rows.square().sum()
    noise *= rows.norm() / noise.norm()
    for factor, share, trust in (
        (1.0, 0.0, 1.0),
        (0.25, 0.0, 0.25),
        (2.0, 0.0, 1.0),
        (-3.0, 0.0, 0.0),
        (1.0, 0.5, 2 / 1.25 - 1),  # of the new rows' squares 1 of 1 + 0.25 is explained
        (1.0, 1.1, 0.0),
    ):
        history.reset_parameters()
        history.push(1, rows, n_id, where)
        history.push(1, rows * factor + noise * share, n_id, where)
        assert float(history.trust(1)) == pytest.approx(trust, abs=1e-9)


def test_what_is_refused():
    data = make_data()
    with pytest.raises(ValueError, match="keep_histories=False, but compensate=True needs histories"):
        make("gcn", 3, compensate=True, keep_histories=False)
    with pytest.raises(
        ValueError, match="outward is 'all', but must be one of False, True, 'cut', 'induced', 'complete'"
    ):
        SubgraphLoader(data, PTR, log=False, outward="all")
    model = make("gcn", 3, compensate=True)
    batch = next(iter(SubgraphLoader(data, PTR, log=False)))
    with pytest.raises(ValueError, match=r"outward=batch\.data\.outward"):
        run(model, batch)
    with pytest.raises(ValueError, match="needs the loss of a mini-batch"):
        model.refresh(EvalSubgraphLoader(data, PTR, log=False))
    with pytest.raises(NotImplementedError, match="may leave there what they return, and nothing else"):
        epoch(make("leaving", 3, compensate=True), data, True)
    with pytest.raises(NotImplementedError, match="reads from its state what earlier layers left for a target"):
        epoch(make("late-state", 3, compensate=True), data, "complete")
    with pytest.raises(NotImplementedError, match=r"with a gradient in state\['lipschitz'\]"):
        epoch(GIN(NODES, 3, 6, 4, 3, noise=0.1, compensate=True).double(), data, "complete")
    edges = make("edges", 3, compensate=True)
    batch = next(iter(SubgraphLoader(data, PTR, log=False, outward=True)))
    batch.data.outward.edges.clear()
    with pytest.raises(ValueError, match="the graph of the mini-batch's loader has no edge_attr"):
        run(edges, batch)


class Opened(Layers):
    """A gate, which is closed at first, before what is no sum over edges, or no sum alone."""

    def __init__(self, kind, *args, **options):
        super().__init__(*args, **options)
        self.kind, self.gate = kind, nn.Parameter(torch.zeros(()))

    def convolve(self, layer, x, adj_t, state):
        out = propagate(adj_t, self.layers[layer](x))
        if self.kind == "square":
            return out + self.gate * out.square()
        if self.kind == "degree":
            return out * (1 + self.gate * adj_t.crow_indices().diff().unsqueeze(1))
        return out + self.gate * self.layers[layer](x[: adj_t.size(0)]).sin()


@pytest.mark.parametrize("kind", ["square", "degree", "own"])
def test_a_gate_that_is_zero_at_first_hides_nothing(kind):
    data = make_data()
    torch.manual_seed(0)
    model = Opened(kind, nn.Linear, 3, compensate=True, **DOUBLE).double()
    if kind != "own":
        with pytest.raises(NotImplementedError, match="depends on the target's other sources"):
            epoch(model, data, True)
        return
    batch = next(iter(SubgraphLoader(data, PTR, 2, log=False, outward=True)))
    run(model, batch)  # how gradients are sent back is known from here on
    with torch.no_grad():
        model.gate.fill_(1.0)
    expected, *tables = whole(model, data)
    fill(model, *tables)
    assert error(epoch(model, data, True), expected) < EXACT


class Squared(Layers):
    def convolve(self, layer, x, adj_t, state):
        return propagate(with_weights(adj_t, adj_t.values().square()), self.layers[layer](x))


def test_weights_of_the_first_mini_batch_do_not_tell_how_weights_are_used():
    data = make_data()
    adj_t = data.adj_t
    outside = torch.repeat_interleave(torch.arange(NODES), adj_t.crow_indices().diff()) >= PTR[3]
    first = outside & (adj_t.col_indices() < PTR[3])
    data.adj_t = with_weights(adj_t, torch.where(first, 1.0, adj_t.values()))
    batch = next(iter(SubgraphLoader(data, PTR, 2, log=False, outward=True)))
    assert batch.data.outward.value.unique().tolist() == [1.0]
    torch.manual_seed(0)
    model = Squared(nn.Linear, 3, compensate=True, **DOUBLE).double()
    expected, *tables = whole(model, data)
    fill(model, *tables)
    assert error(epoch(model, data, True), expected) < EXACT


def test_weights_that_the_outward_edges_do_not_have_are_refused():
    data, model = make_data(), make("gcn", 3, compensate=True)
    batch = next(iter(SubgraphLoader(data, PTR, 2, log=False, outward=True)))
    weights = batch.data.adj_t.values()
    for other in (2 * weights, weights.clone().requires_grad_()):
        batch.data.adj_t = with_weights(batch.data.adj_t, other)
        with pytest.raises(ValueError, match="weights of adj_t are others"):
            run(model, batch)
    batch.data.adj_t = with_weights(batch.data.adj_t, weights)
    run(model, batch)


PASSES = {
    "cut": lambda *sizes: GCN(34, *sizes, num_layers=3, compensate=True),
    "with dropout": lambda *sizes: GCN(34, *sizes, num_layers=3, dropout=0.5, compensate=True),
    "combined": lambda *sizes: GCN(34, *sizes, num_layers=3, compensate=True, combine=Combination(0.5)),
    "blocks": lambda *sizes: RevGNN(*sizes, 3, conv="graphconv", num_nodes=34, compensate=True),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_freed_with_its_graph(name):
    """Without the garbage collector, and whether the mini-batch went backward or not."""
    data, in_channels, out_channels = get_data(None, "karate")
    data.node_order = torch.arange(34)
    model = PASSES[name](in_channels, 8, out_channels)
    loader = SubgraphLoader(
        data, torch.tensor([0, 10, 20, 34]), batch_size=1, outward="induced" if name == "combined" else True
    )
    gc.collect()
    gc.disable()
    try:
        for backward in (True, False, True):
            for batch in loader:
                out = model(batch.data.x, batch.data.adj_t, *batch[1:], outward=batch.data.outward)
                if backward:
                    out.square().mean().backward()
            del out, batch
            assert [each for each in gc.get_objects() if isinstance(each, Compensation | BlockCompensation)] == []
    finally:
        gc.enable()
