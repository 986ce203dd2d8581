"""Corrected histories beside everything else: inference, state, modes, autocast, dropout and batch norm."""

import copy

import pytest
import torch
from compensation_zoo import PTR, epoch, error, fill, gradients_of, loss_of, make, make_data, run, whole

from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader, history_errors
from recollect.models import GCN


def batches(data, outward=True):
    return list(SubgraphLoader(data, PTR, 2, log=False, outward=outward))


@pytest.mark.parametrize("name", ["gcn", "gcn-linear", "gcn2", "appnp"])
def test_inference_is_the_same_and_histories_hold_what_layers_return(name):
    data = make_data()
    plain, corrected = make(name, 4), make(name, 4, compensate=True)
    plain.eval()
    everything = EvalSubgraphLoader(data, PTR, 2, log=False)
    out = corrected(loader=everything)
    torch.testing.assert_close(out, plain(data.x, data.adj_t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, corrected.eval()(data.x, data.adj_t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, corrected.refresh(everything, lambda out, batch: out.sum()))
    assert history_errors(corrected, data) == pytest.approx([0.0] * 3, abs=1e-14)
    for history, row in zip(corrected.tables, whole(corrected, data)[1], strict=False):
        torch.testing.assert_close(history.pull(), row, rtol=1e-12, atol=1e-12)


def test_without_gradients_and_in_evaluation_nothing_is_asked_for():
    data, model = make_data(), make("gcn", 3, compensate=True)
    (batch, *_) = batches(data, outward=False)
    with torch.no_grad():
        out = run(model, batch)
    assert torch.equal(run(model.eval(), batch), out)
    assert model.gradients.is_empty(1)


def test_a_graph_with_outward_edges_is_taken_by_networks_without_correction():
    data, model = make_data(), make("gcn", 3)
    (batch, *_) = batches(data)
    (bare, *_) = batches(data, outward=False)
    assert torch.equal(run(model, batch), run(model, bare))


def test_whole_graphs_train_as_ever():
    data, plain, corrected = make_data(), make("gcn", 3), make("gcn", 3, compensate=True)
    for model in (plain, corrected):
        loss_of(model(data.x, data.adj_t), data.node_share).backward()
    assert torch.equal(gradients_of(plain), gradients_of(corrected))


def test_copies_go_their_own_way_and_states_leave_gradients_out():
    data, model = make_data(), make("gcn", 3, compensate=True, save_histories=True)
    epoch(model, data, True)
    twin = copy.deepcopy(model)
    assert torch.equal(epoch(twin, data, True), epoch(model, data, True))
    assert not any("gradients" in name for name in model.state_dict())
    other = make("gcn", 3, compensate=True, save_histories=True)
    other.load_state_dict(model.state_dict())
    assert other.gradients.is_empty(1)
    model.reset_parameters()
    assert not model.gradients.table(2).pull().any()
    assert model.gradients.trust(2) == 1


@pytest.mark.parametrize("options", [{}, {"history_path": "folder"}], ids=["memory", "file"])
@pytest.mark.parametrize("trained", [False, True])
def test_new_nodes_are_appended(options, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data = make("gcn", 3, compensate=True, **options), make_data()
    if trained:
        epoch(model, data, True)
    grown, ptr = copy.copy(data), torch.cat([PTR, PTR[-1:] + 2])
    dense = torch.zeros(PTR[-1] + 2, PTR[-1] + 2, dtype=torch.float64)
    dense[:-2, :-2], dense[-2:, ::7], dense[::9, -2:] = data.adj_t.to_dense(), 0.5, 0.25
    grown.adj_t, grown.node_order = dense.to_sparse_csr(), torch.arange(len(dense))
    grown.x, grown.node_share = (torch.cat([value, value[:2].sin()]) for value in (data.x, data.node_share))
    del grown.edge_attr
    model.extend(len(dense))
    assert model.gradients.trust(1) == 1
    assert model.gradients.is_empty(1)
    loader = EvalSubgraphLoader(grown, ptr, log=False)
    model.refresh(loader, lambda out, batch: loss_of(out, batch.data.node_share[: batch.batch_size]))
    for batch in SubgraphLoader(grown, ptr, 2, log=False, outward=True):
        loss_of(run(model, batch), batch.data.node_share[: batch.batch_size]).backward()
    found = gradients_of(model)
    loss_of(model(grown.x, grown.adj_t), grown.node_share).backward()
    assert error(found, gradients_of(model)) < 1e-9


def test_autocast_reaches_the_nodes_outside():
    data = make_data()
    model = make("gcn", 3, compensate=True, history_dtype=torch.float32).float()
    data.x, data.adj_t, data.node_share = data.x.float(), data.adj_t.float(), data.node_share.float()
    expected, *tables = whole(model, data)
    fill(model, *tables)
    for batch in batches(data):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(model, batch)
        loss_of(out.float(), batch.data.node_share[: batch.batch_size]).backward()
    assert error(gradients_of(model), expected) < 0.02


def test_dropout_draws_nothing_for_the_nodes_outside_and_modes_come_back():
    data, model = make_data(), make("gcn", 3, compensate=True, dropout=0.5)
    plain = make("gcn", 3, dropout=0.5)
    fill(model, *whole(model.eval(), data)[1:])
    states = []
    for network, outward in ((model.train(), True), (plain, False)):
        (batch, *_) = batches(data, outward)
        torch.manual_seed(1)
        loss_of(run(network, batch), batch.data.node_share[: batch.batch_size]).backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert all(module.training for module in model.modules())


def test_batch_norm_counts_each_step_once_and_is_exact_by_its_running_figures():
    data = make_data()
    torch.manual_seed(0)
    options = {"batch_norm": True, "compensate": True, "history_dtype": torch.float64}
    model = GCN(data.num_nodes, 3, 6, 4, 3, **options).double()
    for batch in batches(data):
        loss_of(run(model, batch), batch.data.node_share[: batch.batch_size]).backward()
    assert [int(norm.num_batches_tracked) for norm in model.bns] == [len(batches(data))] * 2
    model.eval().zero_grad()
    expected, *tables = whole(model, data)
    fill(model, *tables)
    model.gradients.believe()
    assert error(epoch(model, data, True), expected) < 1e-12


def test_frozen_layers_below_are_left_out():
    data, model = make_data(), make("gcn", 4, compensate=True)
    for parameter in [*model.convs[0].parameters(), *model.convs[1].parameters()]:
        parameter.requires_grad_(False)
    expected, rows, gradients = _whole_of_frozen(model, data)
    fill(model, rows)
    model.gradients.table(3, 4).push(gradients[3])
    model.gradients.table(2).push(gradients[2])
    assert error(epoch(model, data, True), expected) < 1e-12
    assert model.gradients.is_empty(1)


def _whole_of_frozen(model, data):
    rows = []

    def follow(layer, out, before, state):
        if out.requires_grad:
            out.retain_grad()
        rows.append(out)
        return out, state

    out = model.run_layers(data.x, data.adj_t, {}, lambda layer, x: x, None, follow)
    loss_of(out, data.node_share).backward()
    return gradients_of(model), [row.detach() for row in rows], [row.grad for row in rows]
