"""What belongs to what is declared: nothing is found by a size alone."""

import numpy as np
import pytest
import torch
from graph_zoo import graph, ptr_of, ring
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data

from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader, permute, to_adj_t

PERM = torch.tensor([4, 7, 0, 2, 6, 1, 3, 5])
INVERSE = PERM.argsort()
both_forms = pytest.mark.parametrize("form", [lambda data: data, to_adj_t], ids=["edge_index", "adj_t"])


def with_attributes(kind=Data, **attributes):
    """A ring of 8 nodes and 16 edges."""
    found = ring()
    return kind(**found.to_dict() | attributes)


class Declared(Data):
    """Says of its own attributes what they are."""

    def __inc__(self, key, value, *args, **kwargs):
        sizes = {"root": self.num_nodes, "by_x": self.x.size(0), "not_index": 0, "chance": 8, "tokens": 30}
        return sizes[key] if key in sizes else super().__inc__(key, value, *args, **kwargs)

    def __cat_dim__(self, key, value, *args, **kwargs):
        if key in ("turned", "edges_turned"):
            return 1
        return None if key == "whole" else super().__cat_dim__(key, value, *args, **kwargs)


class Levels(Data):
    """Says which attributes are of nodes, and which of edges."""

    def is_node_attr(self, key):
        return key == "charge" or super().is_node_attr(key)

    def is_edge_attr(self, key):
        return key == "current" or super().is_edge_attr(key)


@both_forms
@pytest.mark.parametrize("name", ["root", "by_x"])
def test_an_increment_by_the_number_of_nodes_makes_numbers_of_nodes(form, name):
    data = form(with_attributes(Declared, **{name: torch.tensor([3, 4, 4])}))
    assert torch.equal(permute(data, PERM)[name], INVERSE[data[name]])


@pytest.mark.parametrize("name", ["not_index", "tokens"])
def test_another_increment_does_not(name):
    data = with_attributes(Declared, **{name: torch.tensor([3, 4, 4])})
    assert permute(data, PERM)[name] is data[name]


def test_an_increment_that_is_as_large_by_chance_is_refused():
    data = with_attributes(Declared, chance=torch.tensor([3, 4, 4]))
    with pytest.raises(ValueError, match=r"__inc__ of data.chance is 8, .* kinds={'chance': 'index'}, or .*'graph'}"):
        permute(data, PERM)
    assert torch.equal(permute(data, PERM, kinds={"chance": "index"}).chance, INVERSE[data.chance])
    assert permute(data, PERM, kinds={"chance": "graph"}).chance is data.chance


@both_forms
def test_rows_lie_along_the_dimension_that_is_declared(form):
    data = with_attributes(Declared, turned=torch.arange(24.0).view(3, 8), edges_turned=torch.arange(32).view(2, 16))
    data = form(data)
    found = permute(data, PERM)
    assert torch.equal(found.turned, data.turned[:, PERM])
    assert torch.equal(found.x[:, 0], data.x[PERM, 0])
    by_edge = dict(zip(zip(*edges(data), strict=True), data.edges_turned.t().tolist(), strict=True))
    for source, target, row in zip(*edges(found), found.edges_turned.t().tolist(), strict=True):
        assert row == by_edge[int(PERM[source]), int(PERM[target])]
    for batch in SubgraphLoader(found, ptr_of(3, 5)):
        assert torch.equal(batch.data.turned, found.turned[:, batch.n_id])
        for source, target, row in zip(*edges(batch.data), batch.data.edges_turned.t().tolist(), strict=True):
            assert row == by_edge[int(PERM[batch.n_id[source]]), int(PERM[batch.n_id[target]])]


def edges(data):
    """Sources and targets."""
    if "edge_index" in data:
        return data.edge_index.tolist()
    rows = torch.repeat_interleave(torch.arange(data.adj_t.size(0)), data.adj_t.crow_indices().diff())
    return data.adj_t.col_indices().tolist(), rows.tolist()


def test_what_is_declared_to_have_no_dimension_belongs_to_the_graph():
    data = with_attributes(Declared, whole=torch.randn(8, 2))
    assert permute(data, PERM).whole is data.whole


def test_a_class_says_what_is_of_nodes_and_edges():
    data = with_attributes(Levels, charge=torch.arange(8), current=torch.arange(16))
    found = permute(to_adj_t(data), PERM)
    assert torch.equal(found.charge, PERM)
    by_edge = dict(zip(zip(*edges(data), strict=True), range(16), strict=True))
    for source, target, row in zip(*edges(found), found.current.tolist(), strict=True):
        assert by_edge[int(PERM[source]), int(PERM[target])] == row
    assert type(found) is Levels
    with pytest.raises(ValueError, match=r"data.other has shape \(8,\)"):  # as large as nodes, of which it says nothing
        permute(with_attributes(Levels, other=torch.arange(8.0)), PERM)


@both_forms
@pytest.mark.parametrize("rows", [8, 16], ids=["nodes", "edges"])
def test_a_size_alone_is_no_reason(form, rows):
    data = form(ring())
    data.table = torch.randn(rows, 2)
    with pytest.raises(
        ValueError, match=r"data.table has shape \(\d+, 2\) in a graph of 8 nodes and 16 edges, .*chance"
    ):
        permute(data, PERM)
    kinds = {"table": "graph"}
    data = permute(data, PERM, kinds=kinds)
    with pytest.raises(ValueError, match=r"kinds={'table': 'node'}, 'edge', 'index' .* or 'graph'"):
        SubgraphLoader(data, ptr_of(8))
    (batch,) = SubgraphLoader(data, ptr_of(3, 5), sampler=[1], kinds=kinds)
    assert torch.equal(batch.data.table, data.table)


@both_forms
@pytest.mark.parametrize(
    "name",
    ["node_year", "old_mask", "random_walk_pe", "x_2", "x1", "y_true", "feat_t", "pos_enc", "z", "normal", "n_id"],
)
def test_names_of_nodes(form, name):
    data = form(with_attributes(**{name: torch.arange(16.0).view(8, 2)}))
    assert torch.equal(permute(data, PERM)[name], data[name][PERM])


def test_the_form_of_edges_alone_does_not_ask_what_is_of_nodes():
    data = to_adj_t(with_attributes(charge=torch.arange(8)))
    assert torch.equal(permute(data, PERM, kinds={"charge": "node"}).charge, PERM)
    with pytest.raises(ValueError, match=r"data\.current has shape"):
        to_adj_t(with_attributes(current=torch.arange(16)))


@both_forms
@pytest.mark.parametrize("name", ["train_mask", "val_mask", "test_mask"])
def test_masks_of_several_splits(form, name):
    data = form(with_attributes(**{name: torch.rand(8, 5) < 0.5}))
    assert torch.equal(permute(data, PERM)[name], data[name][PERM])


@pytest.mark.parametrize("name", ["edge_time", "edge_type", "edge_label", "is_edge_new"])
def test_names_of_edges(name):
    data = with_attributes(**{name: torch.arange(16)})
    by_edge = dict(zip(zip(*edges(data), strict=True), range(16), strict=True))
    found = permute(to_adj_t(data), PERM)
    for source, target, row in zip(*edges(found), found[name].tolist(), strict=True):
        assert by_edge[int(PERM[source]), int(PERM[target])] == row


@both_forms
def test_labels_go_with_their_pairs_even_if_they_are_as_many_as_edges(form):
    pairs = torch.randint(8, (2, 16), generator=torch.Generator().manual_seed(0))
    data = with_attributes(edge_label_index=pairs, edge_label=torch.arange(16), edge_label_time=torch.arange(16))
    found = permute(form(data), PERM)
    assert torch.equal(found.edge_label_index, INVERSE[pairs])
    assert torch.equal(found.edge_label, data.edge_label)
    assert torch.equal(found.edge_label_time, data.edge_label_time)


@both_forms
def test_other_edges_have_their_own_attributes(form):
    other = torch.tensor([[0, 1, 5], [2, 7, 4]])
    data = form(with_attributes(edge_index_2=other, edge_attr_2=torch.arange(3), edge_weight_2=torch.arange(3.0)))
    found = permute(data, PERM)
    assert torch.equal(found.edge_index_2, INVERSE[other])
    assert torch.equal(found.edge_attr_2, data.edge_attr_2)
    for batch in SubgraphLoader(found, ptr_of(3, 5)):
        assert_cut(batch, found.edge_index_2, batch.data.edge_index_2, found.edge_attr_2, batch.data.edge_attr_2)


def assert_cut(batch, nodes, local, rows=None, local_rows=None):
    """Columns within the parts, in rows of the mini-batch; with what goes with them."""
    inside = set(batch.n_id[: batch.batch_size].tolist())
    columns = nodes.t().tolist()
    kept = [k for k, column in enumerate(columns) if set(np.atleast_1d(column).tolist()) <= inside]
    assert sorted(batch.n_id[local].t().tolist()) == sorted(columns[k] for k in kept)
    assert local.dtype == nodes.dtype
    if rows is not None:
        wanted = sorted((columns[k], rows[k].tolist()) for k in kept)
        assert sorted(zip(batch.n_id[local].t().tolist(), local_rows.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("parts", [(0,), (2, 0), (3, 1), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_numbers_of_nodes_in_a_mini_batch_are_its_own(parts, dtype):
    generator = torch.Generator().manual_seed(2)

    def nodes(*shape):
        return torch.randint(30, shape, generator=generator).to(dtype)

    data = graph(30, torch.randint(30, (80, 2), generator=generator).tolist())
    data.face, data.train_index, data.edge_label_index = nodes(3, 50), nodes(40), nodes(2, 60)
    data.edge_label, data.root = torch.arange(60), nodes(20)
    kinds = {"root": "index"}
    data = permute(to_adj_t(data, kinds), torch.randperm(30, generator=generator), kinds=kinds)
    loader = SubgraphLoader(data, ptr_of(9, 0, 8, 13), batch_size=len(parts), sampler=parts, kinds=kinds)
    for batch in loader:
        for name in ("face", "train_index", "root"):
            assert_cut(batch, data[name], batch.data[name])
        pairs, labels = batch.data.edge_label_index, batch.data.edge_label
        assert_cut(batch, data.edge_label_index, pairs, data.edge_label, labels)


def test_evaluation_hands_out_what_lies_within_joined_parts():
    data = with_attributes(edge_label_index=torch.tensor([[0, 1, 5, 7], [2, 3, 4, 6]]), edge_label=torch.arange(4))
    data = permute(data, PERM)
    found = [
        label for batch in EvalSubgraphLoader(data, ptr_of(2, 2, 4), batch_size=3) for label in batch.data.edge_label
    ]
    assert sorted(map(int, found)) == [0, 1, 2, 3]


def test_pairs_as_an_edge_index_class():
    pairs = EdgeIndex(torch.tensor([[0, 1], [2, 3]]), sparse_size=(8, 8))
    data = permute(with_attributes(edge_label_index=pairs), PERM)
    assert torch.equal(data.edge_label_index, INVERSE[pairs.as_tensor()])
    assert type(data.edge_label_index) is torch.Tensor


@pytest.mark.parametrize("value", [torch.tensor(3), torch.tensor([[0, 1], [2, 3]])], ids=["one", "no dimension"])
def test_entries_along_no_dimension_cannot_be_cut(value):
    kinds = {"start": "index"}
    data = permute(with_attributes(start=value), PERM, kinds=kinds)
    assert torch.equal(data.start, INVERSE[value])
    with pytest.raises(ValueError, match=r"data.start has shape .* along which dimension its entries lie"):
        SubgraphLoader(data, ptr_of(8), kinds=kinds)


@both_forms
def test_tensors_in_containers(form):
    data = form(
        with_attributes(
            more={"x": torch.randn(8, 2), "pair_index": torch.tensor([[0, 3], [1, 2]]), "scale": torch.ones(3)},
            node_lists=[torch.arange(8), (torch.arange(8.0), "name")],
        )
    )
    found = permute(data, PERM)
    assert torch.equal(found.more["x"], data.more["x"][PERM])
    assert torch.equal(found.more["pair_index"], INVERSE[data.more["pair_index"]])
    assert found.more["scale"] is data.more["scale"]
    assert torch.equal(found.node_lists[0], PERM)
    assert torch.equal(found.node_lists[1][0], PERM.float())
    assert found.node_lists[1][1] == "name"
    for batch in SubgraphLoader(found, ptr_of(3, 5)):
        assert torch.equal(batch.data.more["x"], found.more["x"][batch.n_id])
        assert torch.equal(batch.data.node_lists[1][0], found.node_lists[1][0][batch.n_id])
        assert_cut(batch, found.more["pair_index"], batch.data.more["pair_index"])
    assert torch.equal(data.node_lists[0], torch.arange(8))  # the graph's containers are not changed


def test_kinds_of_what_lies_in_containers():
    data = with_attributes(more={"a": torch.arange(8), "b": [torch.arange(8)]})
    with pytest.raises(ValueError, match=r"data.more.a has shape \(8,\) .* kinds={'more.a': 'node'}"):
        permute(data, PERM)
    kinds = {"more": "node", "more.b.0": "graph"}
    found = permute(data, PERM, kinds=kinds)
    assert torch.equal(found.more["a"], PERM)
    assert found.more["b"][0] is data.more["b"][0]
    (batch,) = SubgraphLoader(found, ptr_of(3, 5), sampler=[0], kinds=kinds)
    assert torch.equal(batch.data.more["a"], found.more["a"][batch.n_id])


def test_kinds_may_name_the_numbers_that_rows_go_with():
    data = with_attributes(edge_label_index=torch.tensor([[0, 1], [2, 3]]), scores=torch.tensor([5.0, 6.0]))
    kinds = {"scores": "edge_label_index"}
    data = permute(data, PERM, kinds=kinds)
    for batch in SubgraphLoader(data, ptr_of(5, 3), kinds=kinds):
        assert_cut(batch, data.edge_label_index, batch.data.edge_label_index, data.scores, batch.data.scores)
    with_index = with_attributes(x_index=torch.arange(3), scores=torch.ones(2))
    with pytest.raises(ValueError, match=r"data.scores has shape \(2,\), .* for each of x_index's entries"):
        permute(with_index, PERM, kinds={"scores": "x_index"})


def test_a_batch_of_graphs():
    graphs = [Data(x=torch.randn(n, 2), edge_index=torch.randint(n, (2, 3 * n)), u=torch.ones(1, 4)) for n in (3, 5)]
    data = Batch.from_data_list(graphs, follow_batch=["x"])
    found = permute(data, PERM)
    assert torch.equal(found.batch, data.batch[PERM])
    assert torch.equal(found.x_batch, data.batch[PERM])
    assert torch.equal(found.u, data.u)
    assert "ptr" not in found
    assert "x_ptr" not in found
    assert "ptr" in data
    with pytest.raises(RuntimeError, match="Cannot reconstruct"):
        found.get_example(0)
    assert torch.equal(data.get_example(1).x, graphs[1].x)
    for batch in SubgraphLoader(to_adj_t(found), ptr_of(4, 4)):
        assert torch.equal(batch.data.batch, found.batch[batch.n_id])


class Rooted(Data):
    def __inc__(self, key, value, *args, **kwargs):
        return self.num_nodes if key == "root" else super().__inc__(key, value, *args, **kwargs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("root_index", 3),
        ("center_idx", np.int64(3)),
        ("seed_index", [3, 5]),
        ("seed_nodes", {3, 5}),
        ("train_idx", np.array([3, 5])),
        ("face", ((0,), (1,), (2,))),
        ("groups", {"few": {"first_index": [3]}}),
        ("split_idx", {"train": [3], "test": (4, 5)}),
        ("root", 3),
        ("root", [[3], [5]]),
    ],
)
@both_forms
def test_nodes_in_anything_but_tensors_are_refused(form, name, value):
    data = form(with_attributes(Rooted, **{name: value}))
    with pytest.raises(TypeError, match=rf"data.{name} is of type .* kinds={{'{name}': 'graph'}}"):
        permute(data, PERM, log=False)
    kept = permute(data, PERM, log=False, kinds={name: "graph"})
    assert np.array_equal(kept[name], value)
    with pytest.raises(TypeError, match="may hold nodes by number"):
        permute(data, PERM, log=False, kinds={name: "index"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_nodes_of_parts", 3),
        ("names", ["a", "b"]),
        ("idx_name", "third"),
        ("share_index", 0.5),
        ("depth", 3),
        ("is_index", True),
        ("layers", [[3, 4], [5]]),
        ("chance", {"a": 8, "b": None}),
    ],
)
def test_other_values_stay_what_they_are(name, value):
    assert permute(with_attributes(Rooted, **{name: value}), PERM, log=False)[name] == value


@pytest.mark.parametrize("shape", [(16, 2), (2, 5), (5, 2)])
@pytest.mark.parametrize("path", [("train_edges",), ("split", "edge"), ("split_idx", "train")])
def test_integers_that_may_be_nodes_are_asked_about(shape, path):
    nodes, name = torch.arange(2 * max(shape)).view(shape) % 8, ".".join(path)
    data = ring()
    data[path[0]] = nodes if len(path) == 1 else {path[1]: nodes}
    if path[0] == "split_idx":
        data[path[0]] = {path[1]: nodes.flatten()[:5]}
    with pytest.raises(ValueError, match=rf"data.{name} has shape .* 'index'"):
        permute(data, PERM, log=False)
    moved = permute(data, PERM, log=False, kinds={name: "index"})
    found = moved[path[0]] if len(path) == 1 else moved[path[0]][path[1]]
    before = data[path[0]] if len(path) == 1 else data[path[0]][path[1]]
    assert torch.equal(found, INVERSE[before])
