"""Options of histories, attributes and optional arguments as PyGAS has them, and what is said of unfilled histories."""

from __future__ import annotations

import dataclasses
import doctest
import warnings

import pytest
import torch
from scalable_zoo import (
    NODES,
    POOL,
    PTR,
    WIDTHS,
    Handwritten,
    Mean,
    assert_same,
    backward,
    batches,
    both,
    make_graph,
    pools,
    run,
    tables,
)

from recollect.autoscale import EvalSubgraphLoader, HistoryOptions, ScalableGNN, SubData, SubgraphLoader
from recollect.autoscale import _batch as batch_file
from recollect.autoscale.histories._selection import select_batch


def test_the_example_of_its_documentation():
    examples = doctest.DocTestFinder().find(HistoryOptions, "HistoryOptions", globs={}, module=False)
    (example,) = [found for found in examples if found.examples]
    assert doctest.DocTestRunner().run(example).failed == 0


# Options.


def test_options_are_one_value_under_either_name(tmp_path):
    options = HistoryOptions(torch.int8, path=tmp_path / "a", pool_size=2, buffer_size=NODES)
    one = ScalableGNN(NODES, 4, 3, histories=options)
    named = {"history_dtype": torch.int8, "history_path": tmp_path / "b"}
    other = ScalableGNN(NODES, 4, 3, 2, NODES, **named)
    assert one.history_options == options
    assert other.history_options == dataclasses.replace(options, path=tmp_path / "b")
    for model in (one, other):
        assert [history.dtype for history in model.histories] == [torch.int8, torch.int8]
        assert (model.pool_size, model.buffer_size, model.pool.buffer_size) == (2, NODES, NODES)


def test_arguments_stand_above_the_options():
    options = HistoryOptions(torch.float16, pool_size=2, buffer_size=4)
    model = ScalableGNN(NODES, 4, 2, 1, histories=options, history_dtype=torch.float64, save_histories=True)
    assert model.history_options == HistoryOptions(torch.float64, save=True, pool_size=1, buffer_size=4)
    assert set(model.state_dict()) == {"histories.0.table", "histories.0.stamps", "histories.0.pushes"}


def test_options_that_there_are_not():
    with pytest.raises(TypeError, match="there is no option colour, size of histories: see HistoryOptions"):
        ScalableGNN(NODES, 4, 2, size=3, colour="red")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_size": 2}, "pool_size and buffer_size come together"),
        ({"keep": False, "save": True}, "keep_histories=False goes without"),
        ({"keep": False, "path": "x"}, "keep_histories=False goes without"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        HistoryOptions(**options)


# Attributes.


@pytest.mark.parametrize("layers", [1, 4])
def test_attributes(layers):
    model = ScalableGNN(NODES, 4, layers)
    model.lin = torch.nn.Linear(1, 1)
    assert model.device == model.emb_device == torch.device("cpu")
    assert (model.pool_size, model.buffer_size) == (None, None)
    assert all(history.emb.shape == (NODES, 4) for history in model.histories)


def test_the_device_follows_the_network_and_the_histories_stay():
    model = Mean()
    for history in model.histories:
        history._result = history._result.to("meta")
    assert (model.device, model.emb_device) == (torch.device("meta"), torch.device("cpu"))
    assert Mean(device="cpu").emb_device == torch.device("cpu")


def test_the_table_is_what_was_pushed():
    model = Mean()
    for batch in batches(make_graph()):
        run(model, batch)
    assert_same([history.emb for history in model.histories], tables(model))
    assert model.histories[0].emb.data_ptr() == model.histories[0].table.records.tensor.data_ptr()


# Optional arguments.


def step(model, batch, *arguments):
    out = model(batch.data.x, batch.data.adj_t, *arguments)
    return [out, *backward(model, out)]


@both
@pools
@pytest.mark.parametrize("per_batch", [1, 2])
def test_without_parts_rows_are_pushed_by_number(kind, pool, per_batch):
    plain, numbered = kind(**pool), kind(**pool)
    for batch in batches(make_graph(), per_batch):
        expected = step(plain, batch, *batch[1:])
        assert_same(step(numbered, batch, batch.batch_size, batch.n_id), expected)
        assert_same(tables(numbered), tables(plain))
        assert all(torch.equal(a.age(), b.age()) for a, b in zip(plain.histories, numbered.histories, strict=True))


@pools
def test_nodes_in_any_order_without_parts(pool):
    """A mini-batch cut by hand, whose nodes are not in the order of the graph."""
    model, data = Mean(**pool), make_graph()
    dense = data.adj_t.to_dense()
    own = torch.tensor([7, 2, 19, 4])
    halo = torch.tensor([n for n in range(NODES) if n not in own.tolist() and bool(dense[own, n].any())])
    n_id = torch.cat([own, halo])
    adj_t = dense[own][:, n_id].to_sparse_csr()
    x = data.x.clone()
    with torch.no_grad():
        for layer, history in enumerate(model.histories):
            history.push(torch.randn(NODES, WIDTHS[layer], dtype=torch.float64))
    kept = tables(model)
    found = model(x[n_id], adj_t, 4, n_id)
    first = None
    for layer, weight in enumerate(model.weights):
        out = torch.cat([dense[own] @ x, x[own]], -1) @ weight
        first = out.tanh() if layer == 0 else first
        out = (out + first @ model.skip if layer == 3 else out).tanh()
        if layer < 3:
            kept[layer][own] = out.detach()
            x = kept[layer].clone()
            x[own] = out
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tables(model), kept, rtol=1e-12, atol=1e-12)


def test_inference_over_mini_batches_without_parts():
    model, data = Mean(), make_graph()
    expected = model(loader=EvalSubgraphLoader(data, PTR))
    pools: list[dict] = [{}, POOL]
    for pool in pools:
        bare = [SubData(batch.data, batch.batch_size, batch.n_id, None, None) for batch in batches(data)]
        assert_same([Mean(**pool)(loader=bare)], [expected])


def test_numbers_alone_are_all_of_the_mini_batch():
    model, x = Mean(), torch.randn(3, WIDTHS[0], dtype=torch.float64)
    history = model.histories[0]
    assert torch.equal(model.push_and_pull(history, x, None, torch.tensor([5, 1, 9])), x)
    assert torch.equal(history.pull(torch.tensor([5, 1, 9])), x)
    assert history.never_pushed() == NODES - 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2, torch.tensor([3, 3, 5])), ValueError, "each row can be pushed once"),
        ((4, torch.tensor([3, 2, 5])), ValueError, "batch_size=4, but n_id has 3"),
        ((-1, torch.tensor([3, 2, 5])), ValueError, "batch_size=-1"),
        ((2, torch.tensor([3, NODES, 5])), IndexError, "another graph"),
        ((2, None), TypeError, "without n_id, offset, count"),
        ((2, torch.tensor([3, 2]), torch.tensor([3])), TypeError, "without count"),
        ((2, [3, 2]), TypeError, "must be tensors of one dimension"),
    ],
)
def test_what_is_no_mini_batch_is_refused_before_anything_is_written(arguments, error, message):
    model = Mean()
    with pytest.raises(error, match=message):
        model.push_and_pull(model.histories[0], torch.ones(3, WIDTHS[0]), *arguments)
    with pytest.raises(error, match=message):
        model(make_graph().x[:3], torch.eye(3).to_sparse_csr(), *arguments)
    assert model.never_pushed() == 3 * [NODES]


@both
@pools
def test_a_mini_batch_is_made_once(kind, pool, monkeypatch):
    made = []

    def counted(*arguments, **options):
        made.append(1)
        return select_batch(*arguments, **options)

    monkeypatch.setattr(batch_file, "select_batch", counted)
    model = kind(**pool)
    for number, batch in enumerate(batches(make_graph()), start=1):
        run(model, batch)
        assert len(made) == number


def test_a_mini_batch_with_other_rows_within_a_call_is_made_anew():
    class Half(Handwritten):
        """Pushes only its first rows; the others count as halo."""

        def forward(self, x, adj_t, batch_size, n_id, offset, count):
            x = self.forward_layer(0, x, adj_t, {})
            return self.push_and_pull(self.histories[0], x, 2, n_id)

    model = Half()
    batch = batches(make_graph())[0]
    assert run(model, batch).shape == (len(batch.n_id), WIDTHS[0])
    assert model.never_pushed() == [NODES - 2, NODES, NODES]


# Unfilled histories.


def warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(one.message) for one in caught]


@both
@pools
def test_training_on_unfilled_histories_is_said_once(kind, pool):
    model, (first, second, *_) = kind(**pool), batches(make_graph())
    with pytest.warns(UserWarning, match=r"of 20 rows, 20, 20, 20 were never pushed .*EvalSubgraphLoader") as caught:
        run(model, first)
    assert caught[0].filename.endswith("scalable_zoo.py")
    assert warned(lambda: (run(model, second), run(model, first))) == []


def test_a_part_of_the_rows():
    model, (first, second, *_) = Mean(), batches(make_graph())
    with torch.no_grad():
        run(model, first)
    with pytest.warns(UserWarning, match="of 20 rows, 14, 14, 14 were never pushed"):
        run(model, second)


@pytest.mark.parametrize("case", ["filled", "eval", "no grad", "inference", "no halo", "whole", "loader", "few layers"])
def test_nothing_is_said_where_nothing_is_missing(case):
    model, data = Mean(), make_graph()
    if case == "few layers":
        model = ScalableGNN(NODES, 3, 1)
        model.forward_layer = lambda layer, x, adj_t, state: x[: adj_t.size(0)]  # type: ignore[method-assign]
    if case == "filled":
        model(loader=EvalSubgraphLoader(data, PTR))
    if case == "eval":
        model.eval()
    per_batch = 5 if case == "no halo" else 1

    def use():
        if case == "whole":
            return model(data.x, data.adj_t)
        if case == "loader":
            return model(loader=EvalSubgraphLoader(data, PTR))
        with torch.inference_mode(case == "inference"), torch.set_grad_enabled(case not in ("no grad", "inference")):
            return [run(model, batch) for batch in SubgraphLoader(data, PTR, per_batch)]

    assert warned(use) == []
