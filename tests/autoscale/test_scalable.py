"""`ScalableGNN`: one definition of each layer, evaluated on the whole graph and on mini-batches."""

from __future__ import annotations

import doctest
import logging

import numpy
import pytest
import torch
from scalable_zoo import (
    IN,
    NODES,
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
from torch_geometric import EdgeIndex

from recollect.autoscale import ScalableGNN, SubgraphLoader


def step(model, batch):
    out = run(model, batch)
    return [out, *backward(model, out)]


def test_the_example_of_its_documentation():
    examples = doctest.DocTestFinder().find(ScalableGNN, "ScalableGNN", globs={}, module=False)
    (example,) = [found for found in examples if found.examples]
    assert doctest.DocTestRunner().run(example).failed == 0


class TestMiniBatch:
    @both
    def test_the_histories_hold_what_was_pushed_last_and_the_halo_comes_from_them(self, kind):
        """Three rounds over the parts, followed by hand with plain tensors."""
        model, data = kind(), make_graph()
        dense = data.adj_t.to_dense()
        kept = [torch.zeros(NODES, width, dtype=torch.float64) for width in WIDTHS]
        for batch in 3 * batches(data):
            with torch.no_grad():
                for weight in model.weights:
                    weight += 0.01
            rows = batch.n_id[: batch.batch_size]
            x, first = data.x, None
            for layer, weight in enumerate(model.weights):
                out = torch.cat([dense[rows] @ x, x[rows]], -1) @ weight
                first = out.tanh() if layer == 0 else first
                out = (out + first @ model.skip if layer == 3 else out).tanh()
                if layer < 3:
                    kept[layer][rows] = out.detach()
                    x = kept[layer].clone()
                    x[rows] = out
            found = run(model, batch)
            torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
            expected = backward(model, out)
            torch.testing.assert_close(backward(model, found), expected, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(tables(model), kept, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("per_batch", [1, 2, 4])
    def test_overriding_forward_changes_nothing(self, per_batch):
        data = make_graph()
        plain, own = Mean(), Handwritten()
        for batch in batches(data, per_batch):
            assert_same(step(own, batch), step(plain, batch))
        assert_same(tables(own), tables(plain))

    def test_square_adjacencies_and_edge_indices_are_other_forms_of_the_same(self):
        data = make_graph()
        results = []
        for options in ({}, {"bipartite": False}, {"adjacency": "edge_index"}):
            model = Mean()
            for batch in batches(data, 2, **options):
                if "adjacency" in options:
                    sub = batch.data
                    assert isinstance(sub.edge_index, EdgeIndex)
                    out = model(sub.x, sub.edge_index, *batch[1:], edge_weight=sub.edge_weight)
                else:
                    out = run(model, batch)
            results.append([out, *backward(model, out), *tables(model)])
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])

    def test_no_gradient_goes_through_the_halo(self):
        model = Mean()
        (batch,) = batches(make_graph())[1:2]
        for history in model.histories:
            history.push(torch.randn(NODES, history.embedding_dim, dtype=torch.float64))
        x = torch.randn(len(batch.n_id), WIDTHS[0], dtype=torch.float64, requires_grad=True)
        out = model.push_and_pull(model.histories[0], x, *batch[1:])
        assert torch.equal(out[batch.batch_size :], model.histories[0].pull(batch.n_id[batch.batch_size :]))
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad[: batch.batch_size], torch.ones(batch.batch_size, WIDTHS[0], dtype=torch.float64))
        assert not grad[batch.batch_size :].any()

    def test_embeddings_in_another_type_than_the_histories(self):
        model = Mean(history_dtype=torch.float16).float()
        for batch in batches(make_graph()):
            out = model(batch.data.x.float(), batch.data.adj_t, *batch[1:])
            assert out.dtype == torch.float32
        assert all(table.any() for table in tables(model))

    def test_autocast(self):
        model = Mean(history_dtype=torch.float32).float()
        (batch, *_) = batches(make_graph(), 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(batch.data.x.float(), batch.data.adj_t, *batch[1:])
        assert out.dtype == torch.bfloat16
        assert all(g.isfinite().all() for g in backward(model, out))


class TestWholeGraph:
    @both
    def test_in_evaluation_it_fills_the_histories(self, kind):
        model, data = kind().eval(), make_graph()
        out = model(data.x, data.adj_t)
        exact = tables(model)
        for batch in batches(data):
            rows = batch.n_id[: batch.batch_size]
            torch.testing.assert_close(run(model, batch), out[rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tables(model), exact, rtol=1e-12, atol=1e-12)

    def test_in_training_it_leaves_them_alone(self):
        model, data = Mean(), make_graph()
        backward(model, model(data.x, data.adj_t))
        assert model.never_pushed() == 3 * [NODES]
        assert not any(table.any() for table in tables(model))

    def test_another_graph_leaves_them_alone(self):
        model, data = Mean().eval(), make_graph()
        sub = data.adj_t.to_dense()[:7, :7].to_sparse_csr()
        assert model(data.x[:7], sub).shape == (7, 4)
        assert model.never_pushed() == 3 * [NODES]


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"n_id": None}, TypeError, "without n_id"),
            ({"count": None}, TypeError, "without count"),
            ({"offset": [0], "count": [6]}, TypeError, r"tensors .* \(got shape \[\d+\], list, list\)"),
            ({"count": torch.tensor(6)}, TypeError, r"tensors of one dimension, .*shape \[\]\)"),
            ({"batch_size": 5}, ValueError, "batch_size=5, but count adds up to 6"),
            ({"count": torch.tensor([5])}, ValueError, "count adds up to 5"),
            ({"x": torch.zeros(5, IN, dtype=torch.float64)}, ValueError, "x has 5 rows, but n_id has"),
            ({"adj_t": make_graph().adj_t}, ValueError, r"adj_t is \[20, 20\]"),
            ({"adj_t": torch.ones(6, 5).to_sparse_csr()}, ValueError, r"adj_t is \[6, 5\], but for 6 nodes"),
            ({"adj_t": torch.eye(3)}, TypeError, "adj_t is a tensor of layout torch.strided"),
            ({"n_id": "far"}, IndexError, "20 rows"),
            ({"n_id": "negative"}, IndexError, "-1 to"),
            ({"n_id": "float"}, TypeError, "int64"),
            ({"n_id": "shuffled"}, ValueError, "permute"),
            ({"offset": torch.tensor([1])}, ValueError, "permute"),
            ({"offset": torch.tensor([18])}, IndexError, "20 rows"),
        ],
    )
    @pools
    @both
    def test_what_is_no_batch_is_refused_before_anything_is_written(self, kind, pool, change, error, message):
        if kind is Handwritten and ("x" in change or "adj_t" in change):
            pytest.skip("its own forward does what it likes with them")
        model = kind(**pool)
        batch = batches(make_graph())[0]
        given = {"x": batch.data.x, "adj_t": batch.data.adj_t} | batch._asdict() | change
        n_id = batch.n_id.clone()
        if change.get("n_id") == "far":
            n_id[-1] = NODES
        elif change.get("n_id") == "negative":
            n_id[-1] = -1
        elif change.get("n_id") == "float":
            n_id = n_id.double()
        elif change.get("n_id") == "shuffled":
            n_id[:6] = n_id[:6].flip(0)
        if "n_id" not in change or change["n_id"] is not None:
            given["n_id"] = n_id
        del given["data"]
        with pytest.raises(error, match=message):
            model(**given)
        assert model.never_pushed() == 3 * [NODES]
        assert not any(table.any() for table in tables(model))
        run(model, batch)  # and it goes on
        assert max(model.never_pushed()) < NODES

    def test_features_of_another_width(self):
        model = Mean()
        batch = batches(make_graph())[0]
        with pytest.raises(RuntimeError):
            model(batch.data.x[:, :2], batch.data.adj_t, *batch[1:])
        assert model.never_pushed() == 3 * [NODES]

    @pytest.mark.parametrize(("rows", "channels"), [(16, 5), (16, 1), (5, 2)])
    def test_a_history_of_another_size(self, rows, channels):
        model = Mean()
        batch = batches(make_graph())[0]
        with pytest.raises(ValueError, match=rf"x is \[{rows}, {channels}\], but"):
            model.push_and_pull(model.histories[1], torch.ones(rows, channels), *batch[1:])
        assert model.never_pushed() == 3 * [NODES]

    def test_layers_that_return_too_few_rows(self):
        class Short(Mean):
            def forward_layer(self, layer, x, adj_t, state):
                return super().forward_layer(layer, x, adj_t, state)[:2]

        batch = batches(make_graph())[0]
        with pytest.raises(ValueError, match=r"Short.forward_layer\(0, ...\) returned 2 rows"):
            run(Short(), batch)

    def test_layers_that_return_more_rows_than_they_were_asked_for(self):
        class Long(Mean):
            def forward_layer(self, layer, x, adj_t, state):
                out = super().forward_layer(layer, x, adj_t, state)
                return torch.cat([out, out])

        plain, other, data = Mean(), Long(), make_graph()
        assert_same([other(data.x, data.adj_t)], [plain(data.x, data.adj_t)])
        for batch in batches(data):
            assert_same(step(other, batch), step(plain, batch))

    def test_a_network_without_layers(self):
        batch = batches(make_graph())[0]
        with pytest.raises(NotImplementedError, match="ScalableGNN has no forward_layer"):
            run(ScalableGNN(NODES, 3, 2), batch)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 3, 2), "num_nodes must be at least 1, such as data.num_nodes"),
            ((3, 3, 0), "num_layers must be at least 1"),
            ((3, 0, 2), "hidden_channels must be at least 1"),
            ((3, [3, 3], 2), "hidden_channels has 2 numbers, but between 2 layers there are 1"),
            ((3, 3, 2, 4), "pool_size and buffer_size come together"),
            ((3, 3, 2, None, 4), "pool_size and buffer_size come together"),
            ((3, 3, 2, 0, 4), "pool_size must be at least 1"),
        ],
    )
    def test_of_the_network(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            ScalableGNN(*arguments)

    def test_one_layer_needs_no_histories(self):
        assert len(ScalableGNN(NODES, 3, 1).histories) == 0
        assert ScalableGNN(NODES, [], 1, 2, 3).staleness() == []

    def test_what_the_histories_take_is_logged_before_it_is_allocated(self, caplog, monkeypatch):
        monkeypatch.setattr("recollect.autoscale._making.History", None)
        with caplog.at_level(logging.INFO), pytest.raises(TypeError):
            ScalableGNN(2**20, 255, 3)
        assert caplog.messages == ["2 histories of 1048576 nodes take 2.000 GiB in host memory"]

    def test_histories_in_files(self, tmp_path):
        data = make_graph()
        model, other = Mean(history_path=tmp_path / "run"), Mean()
        for batch in SubgraphLoader(data, PTR):
            assert_same(step(model, batch), step(other, batch))
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [f"{k}.history" for k in range(3)]

    def test_a_file_in_the_place_of_their_folder_is_refused(self, tmp_path):
        (tmp_path / "run").write_bytes(b"")
        with pytest.raises(ValueError, match=r"history_path='.*run' is a file, but must be a folder"):
            Mean(history_path=tmp_path / "run")

    def test_reset_parameters_empties_the_histories(self):
        model, data = Mean().eval(), make_graph()
        model(data.x, data.adj_t)
        model.reset_parameters()
        assert not any(table.any() for table in tables(model))


@pytest.mark.parametrize("given", [(), ("batch",), (None, "adjacency")])
def test_what_is_no_tensor_is_told_how_to_call(given):
    with pytest.raises(TypeError, match=r"x must be a tensor .*model\(batch.data.x, batch.data.adj_t, \*batch\[1:\]\)"):
        Mean()(*given)


def test_a_mini_batch_without_its_numbers_is_refused():
    batch = batches(make_graph())[0]
    with pytest.raises(ValueError, match=r"the whole graph has as many rows, .*\*batch\[1:\]"):
        Mean()(batch.data.x, batch.data.adj_t)


@pytest.mark.parametrize("number", [None, "data", 2.5])
def test_a_number_of_nodes_is_an_integer(number):
    with pytest.raises(ValueError, match=r"num_nodes must be an integer of at least 1, such as data.num_nodes"):
        ScalableGNN(number, 4, 2)


@pytest.mark.parametrize("channels", [numpy.int64(4), [numpy.int64(4)], numpy.array([4]), (4,)], ids=repr)
def test_numbers_may_be_numpys(channels):
    model = ScalableGNN(numpy.int64(5), channels, numpy.int64(2), numpy.int64(1), numpy.int64(3))
    assert type(model.num_nodes) is type(model.num_layers) is int
    assert model.hidden_channels in (4, [4])
    assert (model.tables[0].num_embeddings, model.tables[0].embedding_dim) == (5, 4)


@pytest.mark.parametrize("channels", ["8", 8.0, None, [8.0]])
def test_numbers_of_channels_are_integers(channels):
    with pytest.raises(ValueError, match="hidden_channels must be an integer of at least 1"):
        ScalableGNN(5, channels, 2)


class Returning(ScalableGNN):
    """Returns what it is told to make of its input."""

    def __init__(self, result, **options):
        super().__init__(NODES, IN, 2, history_dtype=torch.float64, **options)
        self.result = result

    def forward_layer(self, layer, x, adj_t, state):
        return self.result(x)


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
@pytest.mark.parametrize(
    "call", [lambda model, data: model(data.x, data.adj_t), lambda model, data: run(model, batches(data)[0])]
)
@pytest.mark.parametrize("result", [lambda x: None, lambda x: (x, x)], ids=["NoneType", "tuple"])
def test_a_layer_that_returns_no_tensor_is_named(result, call, options):
    name = type(result(torch.ones(1))).__name__
    with pytest.raises(TypeError, match=rf"Returning.forward_layer\(0, ...\) returned a {name}, .*is there a return"):
        call(Returning(result, **options), make_graph())
