"""Networks for the whole graph, which keep no histories."""

from __future__ import annotations

import weakref

import pytest
import torch
from scalable_zoo import POOL, PTR, Mean, assert_same, backward, batches, both, make_graph, run

from recollect.autoscale import EvalSubgraphLoader, History, history_errors
from recollect.autoscale._making import fresh_histories


@both
def test_the_whole_graph_is_as_with_histories(kind):
    model, other, data = kind(keep_histories=False), kind(), make_graph()
    for training in (True, False):
        out, expected = model.train(training)(data.x, data.adj_t), other.train(training)(data.x, data.adj_t)
        assert_same([out, *backward(model, out)], [expected, *backward(other, expected)])


def test_no_memory_is_taken(monkeypatch):
    monkeypatch.setattr("recollect.autoscale.histories._history.memory_table", None)
    model = Mean(keep_histories=False)
    assert [history.embedding_dim for history in model.histories] == [5, 2, 6]
    History(2**40, 2**20, keep=False).push(torch.ones(1, 2**20), torch.tensor([2**39]))  # nor for what is pushed


@both
def test_mini_batches_are_refused(kind):
    model = kind(keep_histories=False)
    with pytest.raises(RuntimeError, match=r"made with keep=False.*keep_histories=False.*keep=True for mini-batches"):
        run(model, batches(make_graph())[0])
    with pytest.raises(RuntimeError, match="keep=False"):
        model.staleness()
    with pytest.raises(RuntimeError, match="keep=False"):
        model.never_pushed()
    with pytest.raises(RuntimeError, match="keep=False"):
        history_errors(model, make_graph())


def test_layer_wise_inference_makes_histories_for_itself():
    model, data = Mean(keep_histories=False), make_graph()
    out = model(loader=EvalSubgraphLoader(data, PTR))
    torch.testing.assert_close(out, model.eval()(data.x, data.adj_t), rtol=1e-12, atol=1e-12)


def test_it_drops_each_of_them_when_no_layer_reads_it_any_more(monkeypatch):
    made: list = []
    alive: dict = {}

    def fresh(*arguments):
        histories = fresh_histories(*arguments)
        made.extend(map(weakref.ref, histories))
        return histories

    class Watched(Mean):
        def forward_layer(self, layer, x, adj_t, state):
            alive[layer] = [history() is not None for history in made]
            return super().forward_layer(layer, x, adj_t, state)

    monkeypatch.setattr("recollect.autoscale._scalable.fresh_histories", fresh)
    Watched(keep_histories=False)(loader=EvalSubgraphLoader(make_graph(), PTR))
    assert [alive[layer] for layer in (1, 2, 3)] == [[True, True, True], [False, True, True], [False, False, True]]


def test_state_moves_and_resets():
    model = Mean(keep_histories=False)
    model.load_state_dict(model.state_dict())
    kept = Mean(save_histories=True, history_dtype=torch.int8).state_dict()  # of which the parameters are wanted here
    model.load_state_dict(kept)
    assert model.float().histories[0].out_dtype == torch.float32
    for history in model.histories:
        history.reset_parameters()


@pytest.mark.parametrize("options", [POOL, {"history_path": "x"}, {"save_histories": True}])
def test_what_is_for_histories_is_refused(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="keep_histories=False goes without"):
        Mean(keep_histories=False, **options)
    if "pool_size" not in options:
        renamed = {"path": "x"} if "history_path" in options else options
        with pytest.raises(ValueError, match="has nothing to be kept"):
            History(3, 2, keep=False, **renamed)
    assert list(tmp_path.iterdir()) == []
