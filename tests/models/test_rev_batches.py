"""`RevGNN` on mini-batches with histories, against the whole graph and against its formula written out."""

from __future__ import annotations

import pytest
import torch
from rev_batches_zoo import NODES, call, make_graph, make_model, written_out

from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader, history_errors
from recollect.frames import InPlaceError

CONVS = ["gat", "gen", "gin", "graphconv", "sage"]
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def gradients(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


def close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_one_part_is_the_whole_graph(exact, shared, dropout):
    data, ptr = make_graph(1)
    model = make_model(dropout=dropout, shared_dropout=shared, exact=exact)
    plain = make_model(dropout=dropout, shared_dropout=shared, exact=exact, num_nodes=None)
    plain.load_state_dict(model.state_dict())
    (batch,) = SubgraphLoader(data, ptr)
    torch.manual_seed(3)
    out = call(model, batch)
    torch.manual_seed(3)
    expected = plain(data.x, edge_index_of(data))
    assert torch.equal(out, expected)
    close(gradients(out.square().sum(), model), gradients(expected.square().sum(), plain))


def edge_index_of(data):
    row = torch.repeat_interleave(torch.arange(NODES), data.adj_t.crow_indices().diff())
    return torch.stack([data.adj_t.col_indices(), row])


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("groups", [2, 3, 8])
def test_outputs_with_true_histories_are_those_of_the_whole_graph(groups, conv):
    data, ptr = make_graph()
    model = make_model(hidden=24, num_groups=groups, conv=conv)
    true = model.eval()(data.x, data.adj_t)
    for batch in SubgraphLoader(data, ptr, batch_size=2):
        close([call(model, batch)], [true[batch.n_id[: batch.batch_size]]])


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("groups", [2, 3, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_the_plain_model_with_halo_rows_as_constants(dropout, groups, conv):
    data, ptr = make_graph()
    model = make_model(hidden=24, num_groups=groups, conv=conv, dropout=dropout)
    model(loader=EvalSubgraphLoader(data, ptr))
    for seed, batch in enumerate(SubgraphLoader(data, ptr, batch_size=2)):
        tables = [history.pull() for history in model.histories]
        torch.manual_seed(seed)
        expected, outputs = written_out(model, batch, tables)
        torch.manual_seed(seed)
        out = call(model, batch)
        close([out], [expected])
        close(gradients(out.square().sum(), model), gradients(expected.square().sum(), model))
        own = batch.n_id[: batch.batch_size]
        for table, history, rows in zip(tables, model.histories, outputs, strict=True):
            table[own] = rows.detach()
            close([history.pull()], [table])


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("groups", [2, 3])
def test_inference_by_parts_is_the_whole_graph_and_fills_the_histories(groups, conv):
    data, ptr = make_graph()
    model = make_model(hidden=12, num_groups=groups, conv=conv, dropout=0.5)
    out = model(loader=EvalSubgraphLoader(data, ptr, batch_size=2))
    tables = [history.pull() for history in model.histories]
    close([out], [model.eval()(data.x, data.adj_t)])
    close(tables, [history.pull() for history in model.histories])
    assert model.never_pushed() == [0, 0, 0]
    assert max(history_errors(model, data)) < 1e-12
    assert max(history_errors(model, EvalSubgraphLoader(data, ptr))) < 1e-12


def test_a_row_that_somebody_pushed_before_backward_is_noticed():
    data, ptr = make_graph()
    model = make_model()
    model(loader=EvalSubgraphLoader(data, ptr))
    first, second = list(SubgraphLoader(data, ptr, batch_size=2))
    loss = call(model, first).sum()
    call(model, second)
    with pytest.raises(InPlaceError, match=r"pushed again .* backward before the next forward pass"):
        loss.backward()


def test_each_history_is_pulled_once_forward_and_once_backward(monkeypatch):
    data, ptr = make_graph()
    model = make_model(num_layers=4, num_groups=4)
    model(loader=EvalSubgraphLoader(data, ptr))
    counts = {id(history): 0 for history in model.histories}
    for history in model.histories:

        def pull(n_id=None, history=history, original=history.pull):
            counts[id(history)] += 1
            return original(n_id)

        monkeypatch.setattr(history, "pull", pull)
    batch = next(iter(SubgraphLoader(data, ptr)))
    loss = call(model, batch).sum()
    assert list(counts.values()) == [1] * 4
    loss.backward()
    assert list(counts.values()) == [2] * 4
