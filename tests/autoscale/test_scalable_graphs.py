"""A network is not tied to a graph; its histories are."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from graph_zoo import ptr_of
from scalable_zoo import (
    IN,
    NODES,
    POOL,
    PTR,
    Handwritten,
    Mean,
    assert_same,
    batches,
    both,
    make_graph,
    pools,
    run,
    tables,
)
from torch_geometric.data import Data

from recollect._devices import FORMS
from recollect.autoscale import (
    EvalSubgraphLoader,
    HistoryOptions,
    SubData,
    SubgraphLoader,
    history_errors,
    partition,
    permute,
    to_adj_t,
    with_weights,
)
from recollect.autoscale._stamp import BatchSize, GraphStamp
from recollect.messages import rows_of, sparse_csr
from recollect.models import GCN


def other_graph(nodes=31, seed=5, edges=90):
    """In parts, in another order than it was made in."""
    generator = torch.Generator().manual_seed(seed)
    data = to_adj_t(
        Data(
            x=torch.randn(nodes, IN, dtype=torch.float64, generator=generator),
            edge_index=torch.randint(nodes, (2, edges), generator=generator),
            edge_weight=torch.rand(edges, dtype=torch.float64, generator=generator),
        )
    )
    perm, ptr = partition(data.adj_t, 4, "random", seed=seed, log=False)
    return permute(data, perm, log=False), ptr


def filled(model):
    model(loader=EvalSubgraphLoader(make_graph(), PTR))
    return model


def whole(model, data):
    """The whole graph by a network without histories."""
    bare = Mean(keep_histories=False).eval()
    bare.load_state_dict(model.state_dict())
    return bare(data.x, data.adj_t)


def state(model):
    return [*tables(model), *(history.age() for history in model.histories)]


places = pytest.mark.parametrize(
    "options", [{}, POOL, {"keep_histories": False}, {"history_path": "folder"}], ids=["plain", "pool", "none", "file"]
)


@places
@pytest.mark.parametrize("nodes", [7, NODES, 31], ids=["smaller", "as large", "larger"])
@pytest.mark.parametrize("form", ["loader", "workers", "list", "generator"])
def test_inference_on_another_graph_leaves_the_histories_alone(options, nodes, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Mean(**options)
    if model.keep_histories:
        filled(model)
        before = state(model)
    data, ptr = other_graph(nodes)
    loader = EvalSubgraphLoader(data, ptr, log=False, num_workers=2 * (form == "workers"))
    if form == "list":
        loader = list(loader)
    elif form == "generator":
        loader = Passes(loader)
    torch.testing.assert_close(model(loader=loader), whole(model, data), rtol=1e-12, atol=1e-12)
    if model.keep_histories:
        assert_same(state(model), before)


class Passes:
    """Yields what a loader does, and is none."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        yield from self.loader


def test_one_layer_goes_with_any_graph():
    model = GCN(50, IN, 8, 3, 1).double()
    data, ptr = other_graph()
    out = model.eval()(data.x, data.adj_t)
    torch.testing.assert_close(model(loader=EvalSubgraphLoader(data, ptr)), out)
    for batch in SubgraphLoader(data, ptr):
        found = model(batch.data.x, batch.data.adj_t, *batch[1:])
        torch.testing.assert_close(found, out[batch.n_id[: batch.batch_size]])


def test_rows_that_are_pushed_outside_of_a_call_are_of_one_graph_too():
    model, (data, ptr) = filled(Mean()), other_graph(NODES)
    batch = next(iter(SubgraphLoader(data, ptr)))
    before = state(model)
    with pytest.raises(ValueError, match="graph"):
        model.push_and_pull(model.histories[0], torch.ones(len(batch.n_id), 5), *batch[1:])
    assert_same(state(model), before)


def test_more_graphs_than_one_in_a_pass_are_refused():
    model, (data, ptr) = filled(Mean()), other_graph(NODES)
    before = state(model)
    mixed = [*batches(make_graph())[:2], *SubgraphLoader(data, ptr)]
    with pytest.raises(ValueError, match="more than one graph"):
        model(loader=mixed)
    assert model.histories[0].graph is not None
    assert_same(state(model)[1:3], before[1:3])


# Mini-batches of another graph.


def stale(model, batch):
    with pytest.raises(ValueError, match="graph"):
        run(model, batch)


@both
@pools
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("nodes", [7, 15, NODES, 31])
@pytest.mark.parametrize("workers", [0, 2])
def test_mini_batches_of_another_graph_are_refused_before_anything_is_written(kind, pool, training, nodes, workers):
    if workers and (pool or training):
        pytest.skip("once is enough")
    model = filled(kind(**pool)).train(training)
    before = state(model)
    data, ptr = other_graph(nodes, edges=60)
    for batch in SubgraphLoader(data, ptr, log=False, num_workers=workers):
        stale(model, batch)
    assert_same(state(model), before)
    for batch in batches(make_graph()):
        run(model, batch)


def test_the_first_mini_batch_says_whose_the_histories_are():
    model, (data, ptr) = Mean(), other_graph(NODES)
    first, *_ = batches(make_graph())
    run(model, first)
    batch = next(iter(SubgraphLoader(data, ptr)))
    stale(model, batch)
    model.reset_parameters()
    with torch.no_grad():
        run(model, batch)
    stale(model, first)


@pytest.mark.parametrize("change", ["order", "edges"])
def test_the_same_nodes_in_another_order_or_with_other_edges_are_another_graph(change):
    model, data = filled(Mean()), make_graph()
    if change == "order":
        data = permute(data, torch.randperm(NODES, generator=torch.Generator().manual_seed(9)), log=False)
    else:
        dense = data.adj_t.to_dense()
        dense[3] = dense[3].roll(1)
        data.adj_t = dense.to_sparse_csr()
    for batch in batches(data):
        stale(model, batch)
    with pytest.raises(ValueError, match="graph"):
        history_errors(model, data)
    with pytest.raises(ValueError, match="graph"):
        history_errors(model, EvalSubgraphLoader(data, PTR))


@pytest.mark.parametrize("options", [{"bipartite": False}, {"adjacency": "edge_index"}], ids=str)
def test_other_forms_weights_and_parts_are_the_same_graph(options):
    model, data = filled(Mean()), make_graph()
    data.adj_t = with_weights(data.adj_t, data.adj_t.values() * 2)
    for loader in (
        SubgraphLoader(data, PTR, 2, **options),
        SubgraphLoader(data, ptr_of(10, 10)),
        EvalSubgraphLoader(data, PTR, 3),
    ):
        for batch in loader:
            if "adjacency" in options and loader.batch_size == 2:
                model(batch.data.x, batch.data.edge_index, *batch[1:], edge_weight=batch.data.edge_weight)
            else:
                run(model, batch)
    for moved in (batch._replace(data=batch.data), batch.to("cpu"), copy.deepcopy(batch)):
        run(model, moved)


def test_numbers_typed_by_hand_say_nothing_of_their_graph():
    model = filled(Mean())
    data, ptr = other_graph(15, edges=40)
    batch = next(iter(SubgraphLoader(data, ptr)))
    typed = SubData(batch.data, int(batch.batch_size), batch.n_id, batch.offset, batch.count)
    run(model, typed)
    assert model.histories[0].graph.num_nodes == NODES
    data, ptr = other_graph(31)
    batch = list(SubgraphLoader(data, ptr))[-1]
    with pytest.raises(IndexError, match="graph"):
        run(model, batch._replace(batch_size=int(batch.batch_size)))


def test_a_file_knows_its_graph(tmp_path):
    model = filled(Mean(history_path=tmp_path))
    batch = batches(make_graph())[0]
    other = next(iter(SubgraphLoader(*other_graph(NODES))))
    for _ in range(2):
        graph = model.histories[1].graph
        del model
        model = Mean(history_path=tmp_path)
        assert model.histories[1].graph == graph == batch.batch_size.graph
        stale(model, other)
        run(model, batch)


@both
def test_a_pass_over_another_whole_graph_of_this_size_leaves_the_histories_alone(kind):
    model, (data, _) = filled(kind()).eval(), other_graph(NODES)
    before = state(model)
    torch.testing.assert_close(model(data.x, data.adj_t), whole(model, data), rtol=1e-12, atol=1e-12)
    assert_same(state(model), before)
    model(make_graph().x, make_graph().adj_t)
    assert not any(bool(history.age().any()) for history in model.histories)


def test_the_whole_graph_says_whose_the_histories_are():
    model, data = Mean().eval(), make_graph()
    model(data.x, data.adj_t)
    assert model.histories[0].graph == GraphStamp.of(data.adj_t)
    stale(model, next(iter(SubgraphLoader(*other_graph(NODES)))))
    run(model, batches(data)[0])
    assert model.histories[0].graph == GraphStamp.of(data.adj_t, data.node_order)


# Networks for other graphs.


@places
def test_a_network_for_another_graph_shares_the_parameters(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = filled(Mean(**options)) if options.get("keep_histories", True) else Mean(**options)
    data, ptr = other_graph()
    histories = HistoryOptions(torch.float64, path="other") if "history_path" in options else None
    other = model.for_graph(31, histories)
    assert (other.num_nodes, model.num_nodes) == (31, NODES)
    assert all(a is b for a, b in zip(other.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        model.skip += 1
    torch.testing.assert_close(other(loader=EvalSubgraphLoader(data, ptr)), whole(model, data), rtol=1e-12, atol=1e-12)
    if not model.keep_histories:
        return
    assert other.never_pushed() == model.never_pushed() == [0, 0, 0]
    assert other.pool is None or other.pool is not model.pool
    assert [table.dtype for table in tables(other)] == [table.dtype for table in tables(model)]
    before = state(model)
    for batch in SubgraphLoader(data, ptr):
        run(other, batch).sum().backward()
    assert model.skip.grad.any()
    assert_same(state(model), before)


def test_two_networks_do_not_share_files(tmp_path):
    model = Mean(history_path=tmp_path)
    with pytest.raises(
        ValueError, match=r"cannot be those of another graph too: give HistoryOptions with another path"
    ):
        model.for_graph(31)
    assert not list(model.for_graph(5, HistoryOptions(path=tmp_path / "b")).histories[0].pull()[5:])


def grown(data, ptr, new=6):
    """The graph with new nodes behind the others, as a last part, and edges from and to them."""
    generator = torch.Generator().manual_seed(7)
    nodes = data.num_nodes + new
    dense = torch.zeros(nodes, nodes, dtype=torch.float64)
    dense[:-new, :-new] = data.adj_t.to_dense()
    dense[-new:, ::3] = 0.5
    dense[::4, -new:] = 0.25
    x = torch.cat([data.x, torch.randn(new, IN, dtype=torch.float64, generator=generator)])
    order = torch.cat([data.node_order, torch.arange(nodes - new, nodes)])
    return Data(x=x, adj_t=dense.to_sparse_csr(), node_order=order), torch.cat([ptr, ptr[-1:] + new])


@pytest.mark.parametrize("options", [{}, POOL, {"history_path": "folder"}], ids=["plain", "pool", "file"])
def test_new_nodes_are_appended_and_their_rows_filled(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = filled(Mean(**options))
    old = tables(model)
    data, ptr = grown(make_graph(), PTR)
    assert model.extend(NODES) is None
    assert model.extend(NODES + 6) is None
    assert model.never_pushed() == [6, 6, 6]
    assert_same([table[:NODES] for table in tables(model)], old)
    with pytest.raises(ValueError, match=r"the loader's graph has 20 nodes \(expected 26"):
        model.extend(26, EvalSubgraphLoader(make_graph(), PTR))
    loader = EvalSubgraphLoader(data, ptr)
    torch.testing.assert_close(model.extend(26, loader), whole(model, data), rtol=1e-12, atol=1e-12)
    assert model.never_pushed() == [0, 0, 0]
    assert max(history_errors(model, data)) < 1e-12
    for batch in SubgraphLoader(data, ptr):
        run(model, batch)
    stale(model, batches(make_graph())[0])
    with pytest.raises(ValueError, match="num_nodes must be at least 26"):
        model.extend(25)


@pytest.mark.parametrize("options", [{}, {"history_path": "folder"}], ids=["memory", "file"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda state: torch.load(_saved(state))], ids=["copied", "saved"])
def test_a_state_says_whose_its_histories_are(options, again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, data = Mean(save_histories=True), make_graph()
    model(loader=EvalSubgraphLoader(data, PTR))
    state = again(model.state_dict())
    other = Mean(**options or {"save_histories": True})
    other.load_state_dict(state)
    assert all(history.graph == GraphStamp.of(data.adj_t, data.node_order) for history in other.histories)
    run(other, batches(data)[0])
    before = tables(other)
    with pytest.raises(ValueError, match="another graph"):
        run(other, batches(other_graph(NODES)[0])[0])
    assert_same(tables(other), before)
    earlier = Mean(save_histories=True)  # a state that does not say it
    earlier.load_state_dict({name: value for name, value in state.items() if not name.endswith(".graph")})
    assert [history.graph for history in earlier.histories] == [None] * 3


def _saved(state):
    torch.save(state, "state.pt")
    return "state.pt"


# Stamps.


@pytest.mark.parametrize("edges", [0, 5, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("order", [None, 0, 3, 2**64 - 1])
def test_stamps_as_numbers(edges, order):
    stamp = GraphStamp(7, edges, order)
    assert GraphStamp.from_numbers(stamp.numbers()) == stamp
    assert GraphStamp.from_numbers(torch.zeros(3, dtype=torch.int64)) is None


def test_stamps_tell_graphs_apart_and_do_not_see_how_they_are_kept():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        dense = (torch.rand(9, 9, generator=generator) < 0.3).float()
        adj_t = dense.to_sparse_csr()
        stamp = GraphStamp.of(adj_t)
        seen.add(stamp)
        crow, col = adj_t.crow_indices(), adj_t.col_indices().clone()
        for start, end in zip(crow[:-1].tolist(), crow[1:].tolist(), strict=True):
            col[start:end] = col[start:end].flip(0)
        flipped = sparse_csr(crow.int(), col.int(), torch.rand(col.numel()), (9, 9))
        assert GraphStamp.of(flipped) == stamp
    assert len(seen) == 50
    orders = {GraphStamp.of(adj_t, torch.randperm(9, generator=generator)) for _ in range(50)}
    assert len(orders) == 50
    assert all(stamp.is_of(other) for other in orders)
    assert sum(other.is_of(next(iter(orders))) for other in orders) == 1


def test_stamps_of_pieces(monkeypatch):
    adj_t = make_graph().adj_t
    expected = GraphStamp.of(adj_t)
    monkeypatch.setitem(FORMS, "cpu", replace(FORMS["cpu"], piece=7))
    assert GraphStamp.of(adj_t) == expected
    row, order = rows_of(adj_t), torch.randperm(adj_t.size(0))

    def mixed(number):
        number = number * 0x9E3779B97F4A7C15 % 2**64
        number ^= (number - (number >> 63 << 64) >> 31) % 2**64
        number = number * 0xBF58476D1CE4E5B9 % 2**64
        return (number ^ (number - (number >> 63 << 64) >> 29)) % 2**64

    pairs = zip(row.tolist(), adj_t.col_indices().tolist(), strict=True)
    assert expected.edges == sum(mixed(target * adj_t.size(1) + source) for target, source in pairs) % 2**64
    places = sum(mixed(k * order.numel() + node) for k, node in enumerate(order.tolist()))
    assert GraphStamp.of(adj_t, order) == GraphStamp(adj_t.size(0), expected.edges, places % 2**64)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda size: pickle.loads(pickle.dumps(size))])
def test_a_stamped_size_is_a_number(again):
    size = BatchSize(5, GraphStamp(7, 1, 2))
    assert again(size) == 5
    assert again(size).graph == size.graph
    assert isinstance(size, int)
    assert repr(size) == "5"
    assert torch.arange(9)[:size].numel() == torch.zeros(size).numel() == 5


def test_handwritten_networks_fill_histories_of_the_whole_graph_in_training_too():
    model, data = Handwritten(), make_graph()
    model(data.x, data.adj_t)
    assert model.never_pushed() == [0, 0, 0]
    other, _ = other_graph(NODES)
    before = tables(model)
    model(other.x, other.adj_t)
    assert_same(tables(model), before)
