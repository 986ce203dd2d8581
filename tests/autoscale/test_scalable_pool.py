"""Pulls and pushes beside the computation give what they give when they are done at once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from scalable_zoo import (
    NODES,
    POOL,
    PTR,
    Mean,
    assert_same,
    backward,
    batches,
    both,
    make_graph,
    pools,
    run,
    tables,
)  # fmt: skip

from recollect.autoscale import AsyncIOPool, EvalSubgraphLoader

HALO = 13  # the largest one of batches of two parts


def train(model, rounds=3):
    """A few steps of gradient descent; returns all that can differ."""
    found = []
    for batch in rounds * batches(make_graph(), 2):
        out = run(model, batch)
        gradients = backward(model, out)
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient
        found += [out.detach(), *gradients]
    return found + tables(model)


@both
@pytest.mark.parametrize("pool_size", [1, 2, 5])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_training_is_the_same_bit_for_bit(kind, pool_size, on_disk, tmp_path):
    path = tmp_path if on_disk else None
    found = train(kind(pool_size=pool_size, buffer_size=NODES, history_path=path))
    assert_same(found, train(kind()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_so_it_is_with_lossy_histories(dtype):
    assert_same(train(Mean(**POOL, history_dtype=dtype)), train(Mean(history_dtype=dtype)))


@pytest.mark.parametrize("buffer_size", [HALO, NODES], ids=["too small for inference", "large enough"])
def test_inference_is_the_same_bit_for_bit(buffer_size):
    loader = EvalSubgraphLoader(make_graph(), PTR, 2)
    plain, pooled = Mean(), Mean(pool_size=2, buffer_size=buffer_size)
    assert_same([pooled(loader=loader), *tables(pooled)], [plain(loader=loader), *tables(plain)])


def test_inference_reads_one_mini_batch_ahead(monkeypatch):
    order = []

    class Watched(Mean):
        def forward_layer(self, layer, x, adj_t, state):
            order.append("computed")
            return super().forward_layer(layer, x, adj_t, state)

    model, pull = Watched(**POOL), AsyncIOPool.async_pull
    monkeypatch.setattr(AsyncIOPool, "async_pull", lambda *args: (order.append("asked for"), pull(*args))[1])
    loader = EvalSubgraphLoader(make_graph(), PTR, 2)
    model(loader=loader)  # layers are looked at
    order.clear()
    model(loader=loader)
    first, ask, compute = 3 * ["computed"], "asked for", "computed"
    assert order == first + 3 * [ask, ask, compute, ask, compute, compute]


def test_all_pulls_start_before_the_first_layer(monkeypatch):
    order = []
    pull = AsyncIOPool.async_pull
    monkeypatch.setattr(AsyncIOPool, "async_pull", lambda *args, **kw: order.append("pull") or pull(*args, **kw))

    class Watched(Mean):
        def forward_layer(self, layer, *args):
            order.append(layer)
            return super().forward_layer(layer, *args)

    model, batch = Watched(pool_size=3, buffer_size=NODES), batches(make_graph())[0]
    run(model, batch)  # layers are looked at
    order.clear()
    run(model, batch)
    assert order == ["pull", "pull", "pull", 0, 1, 2, 3]


def test_a_halo_that_is_larger_than_the_buffers():
    model = Mean(pool_size=2, buffer_size=3)
    batch = batches(make_graph(), 2)[0]
    with pytest.raises(ValueError, match=f"buffer_size={len(batch.n_id) - batch.batch_size}"):
        run(model, batch)
    assert model.never_pushed() == 3 * [NODES]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_pass_that_fails_leaves_nothing_behind(failing):
    class Failing(Mean):
        broken = True

        def forward_layer(self, layer, *args):
            if self.broken and layer == failing:
                raise RuntimeError("broken")
            return super().forward_layer(layer, *args)

    model = Failing(**POOL)
    first, second, *_ = batches(make_graph())
    loader = EvalSubgraphLoader(make_graph(), PTR, 2)
    for use in (lambda: run(model, first), lambda: model(loader=loader)):
        with pytest.raises(RuntimeError, match="broken"):
            use()
    model.broken = False
    for history in model.histories:
        history.reset_parameters()
    plain = Mean()
    assert_same([run(model, second), *tables(model)], [run(plain, second), *tables(plain)])


def test_a_forward_that_uses_fewer_histories_or_another_order():
    class Odd(Mean):
        def forward(self, x, adj_t, *args):
            x = self.push_and_pull(self.histories[2], x[:, :1].expand(-1, 6), *args)
            return self.push_and_pull(self.histories[0], x[:, :5], *args)

    plain, pooled = Odd(), Odd(**POOL)
    for batch in 2 * batches(make_graph()):
        assert torch.equal(run(plain, batch), run(pooled, batch))
    assert_same(tables(pooled), tables(plain))


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pools
def test_copies_go_on_alone(again, pool):
    model = Mean(**pool)
    first, second, *_ = batches(make_graph())
    run(model, first)
    other = again(model)
    assert_same(tables(other), tables(model))
    run(other, second)
    assert not model.histories[0].pull(second.n_id[: second.batch_size]).any()
    assert_same([run(model, second)], [run(other, second)])
