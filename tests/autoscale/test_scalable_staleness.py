"""How old histories are, and how wrong."""

from __future__ import annotations

import pytest
import torch
from scalable_zoo import NODES, PTR, Mean, assert_same, batches, make_graph, run, tables

from recollect.autoscale import EvalSubgraphLoader, history_errors

forms = pytest.mark.parametrize(
    "form", [lambda data: data, lambda data: EvalSubgraphLoader(data, PTR)], ids=["graph", "loader"]
)


def test_mean_ages():
    model = Mean()
    ages = torch.zeros(NODES)
    for batch in 2 * batches(make_graph()):
        run(model, batch)
        ages += 1
        ages[batch.n_id[: batch.batch_size]] = 0
        assert model.staleness() == pytest.approx([float(ages.mean())] * 3)
    model.eval()(make_graph().x, make_graph().adj_t)
    assert model.staleness() == [0, 0, 0]


def test_what_was_never_pushed_is_not_fresh():
    model, data = Mean(), make_graph()
    for _ in range(2):
        assert model.staleness() == 3 * [float("inf")]
        assert model.never_pushed() == 3 * [NODES]
        first, *_, last = batches(data)
        run(model, first)
        assert model.never_pushed() == 3 * [NODES - first.batch_size]
        run(model, last)
        assert model.never_pushed() == 3 * [NODES - first.batch_size - last.batch_size]
        expected = (first.batch_size + 2 * (NODES - first.batch_size - last.batch_size)) / NODES
        assert model.staleness() == pytest.approx(3 * [expected])
        model(loader=EvalSubgraphLoader(data, PTR))
        assert model.never_pushed() == [0, 0, 0]
        model.reset_parameters()


@forms
def test_errors(form):
    model, data = Mean(), make_graph()
    for batch in batches(data):
        run(model, batch)
    with torch.no_grad():
        for weight in model.weights:
            weight += 0.05
    held, ages = tables(model), model.staleness()
    x, expected = data.x, []
    state: dict = {}
    for layer in range(3):
        x = model.forward_layer(layer, x, data.adj_t, state)
        expected.append(float(((held[layer] - x).norm() / x.norm()).detach()))
    assert history_errors(model, form(data)) == pytest.approx(expected, rel=1e-10)
    assert min(expected) > 0.01
    assert_same(tables(model), held)
    assert model.staleness() == ages
    assert model.training


@forms
def test_exact_and_empty_histories(form):
    model, data = Mean(), make_graph()
    assert history_errors(model, form(data)) == [1, 1, 1]
    model(loader=EvalSubgraphLoader(data, PTR))
    assert max(history_errors(model, form(data))) < 1e-12


def test_errors_where_all_is_zero():
    model, data = Mean(), make_graph()
    with torch.no_grad():
        for weight in model.weights:
            weight.zero_()
    assert history_errors(model, data) == [0, 0, 0]
    model.histories[1].push(torch.ones(1, 2), torch.tensor([3]))
    assert history_errors(model, data) == [0, float("inf"), 0]


def test_another_graph_is_refused():
    data = make_graph()
    data.x = data.x[:7]
    with pytest.raises(ValueError, match="data has 7 nodes, but the histories have 20"):
        history_errors(Mean(), data)
