import logging
import pickle
import warnings

import numpy as np
import pytest
import torch
from graph_zoo import edges_of, edges_of_adj_t, every_graph, graph, ptr_of, ring, scattered
from torch.utils.data._utils.pin_memory import pin_memory
from torch_geometric import EdgeIndex
from torch_geometric.data import Data
from torch_geometric.utils import bipartite_subgraph, k_hop_subgraph

from recollect.autoscale import EvalSubgraphLoader, SubData, SubgraphLoader, permute, to_adj_t
from recollect.autoscale.loader._cut import Cut
from recollect.data import load
from recollect.memory import peak_memory

both_forms = pytest.mark.parametrize("adjacency", ["csr", "edge_index"])


def permuted(data, seed=0):
    return permute(data, torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(seed)))


def thirds(data):
    n = data.num_nodes
    return ptr_of(n // 3, n // 2 - n // 3, n - n // 2)


def assert_same(one, other):
    assert (one.batch_size, one.n_id.tolist()) == (other.batch_size, other.n_id.tolist())
    assert (one.offset.tolist(), one.count.tolist()) == (other.offset.tolist(), other.count.tolist())
    assert one.data.keys() == other.data.keys()
    for key in one.data.keys():  # noqa: SIM118 - Data is no mapping
        if key == "adj_t":
            assert one.data.adj_t.layout == other.data.adj_t.layout == torch.sparse_csr
            assert torch.equal(one.data.adj_t.to_dense(), other.data.adj_t.to_dense())
        elif isinstance(one.data[key], torch.Tensor):
            assert type(one.data[key]) is type(other.data[key])
            assert torch.equal(one.data[key], other.data[key])
        else:
            assert one.data[key] == other.data[key]


@every_graph
@pytest.mark.parametrize("parts", [(0,), (1,), (2, 0), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("bipartite", [True, False])
def test_a_mini_batch_is_what_sets_and_loops_make_of_it(make, parts, bipartite):
    data = permuted(make())
    ptr = thirds(data)
    loader = SubgraphLoader(data, ptr, batch_size=len(parts), bipartite=bipartite, sampler=parts)
    (batch,) = loader
    inside = [node for part in parts for node in range(ptr[part], ptr[part + 1])]
    edges = [edge for edge in edges_of(data) if edge[1] in inside]
    nodes = inside + sorted({source for source, *_ in edges} - set(inside))
    assert batch.n_id.tolist() == nodes
    assert batch.batch_size == len(inside)
    assert batch.offset.tolist() == [ptr[part] for part in parts]
    assert batch.count.tolist() == [ptr[part + 1] - ptr[part] for part in parts]
    assert batch.data.adj_t.shape == (len(inside) if bipartite else len(nodes), len(nodes))
    found = edges_of_adj_t(batch.data.adj_t, batch.data.edge_attr)
    assert sorted((nodes[source], nodes[target], *rest) for source, target, *rest in found) == edges
    for key in ("x", "y", "train_mask"):
        assert torch.equal(batch.data[key], data[key][batch.n_id])
    assert batch.data.name == "zoo"
    assert batch.data.num_nodes == len(nodes)
    assert "node_order" not in batch.data


@every_graph
def test_a_mini_batch_is_what_torch_geometric_makes_of_it(make):
    data = permuted(make())
    for batch in SubgraphLoader(data, thirds(data), adjacency="edge_index"):
        inside = batch.n_id[: batch.batch_size]
        nodes, *_ = k_hop_subgraph(inside, 1, data.edge_index, num_nodes=data.num_nodes)
        assert sorted(batch.n_id.tolist()) == nodes.tolist()
        size = (data.num_nodes, data.num_nodes)
        edges, attr = bipartite_subgraph((nodes, inside), data.edge_index, data.edge_attr, size=size)
        assert sorted(zip(*edges.tolist(), attr.tolist(), strict=True)) == sorted(
            zip(*batch.n_id[batch.data.edge_index].tolist(), batch.data.edge_attr.tolist(), strict=True)
        )


@every_graph
@pytest.mark.parametrize("bipartite", [True, False])
def test_products_and_gradients_are_those_of_the_whole_graph(make, bipartite):
    data = permuted(make())
    whole = to_adj_t(data).adj_t.to_dense()
    for batch in SubgraphLoader(data, thirds(data), batch_size=2, bipartite=bipartite):
        x = data.x.clone().requires_grad_()
        out = (batch.data.adj_t @ x[batch.n_id])[: batch.batch_size]
        rows = batch.n_id[: batch.batch_size]
        torch.testing.assert_close(out, (whole @ data.x)[rows])
        (gradient,) = torch.autograd.grad(out.sin().sum(), x)
        other = data.x.clone().requires_grad_()
        (wanted,) = torch.autograd.grad((whole @ other)[rows].sin().sum(), other)
        torch.testing.assert_close(gradient, wanted)


@every_graph
@pytest.mark.parametrize("bipartite", [True, False])
def test_edge_index_holds_the_edges_of_adj_t(make, bipartite):
    data = permuted(make())
    forms = [
        SubgraphLoader(data, thirds(data), batch_size=2, bipartite=bipartite, adjacency=form)
        for form in ("csr", "edge_index")
    ]
    for csr, coo in zip(*forms, strict=True):
        found = coo.data.edge_index
        assert isinstance(found, EdgeIndex)
        assert found.sort_order == "col"
        assert found.sparse_size() == tuple(reversed(csr.data.adj_t.shape))
        found.validate()
        assert "adj_t" not in coo.data
        assert torch.equal(found.as_tensor()[0], csr.data.adj_t.col_indices())
        assert torch.equal(coo.data.edge_weight, csr.data.adj_t.values())
        assert edges_of(coo.data) == edges_of_adj_t(csr.data.adj_t, csr.data.edge_attr)


@pytest.mark.parametrize("index", ["tensor", "EdgeIndex", "adj_t", "adj_t of int32"])
def test_the_form_of_the_whole_graph_does_not_matter(index):
    data = permuted(ring())
    other = to_adj_t(data) if "adj_t" in index else data.clone()
    if index == "EdgeIndex":
        other.edge_index = EdgeIndex(data.edge_index, sparse_size=(8, 8))
    elif index == "adj_t of int32":
        a = other.adj_t
        parts = a.crow_indices().int(), a.col_indices().int(), a.values()
        other.adj_t = torch.sparse_csr_tensor(*parts, a.shape, check_invariants=True)
    for one, two in zip(SubgraphLoader(data, thirds(data)), SubgraphLoader(other, thirds(data)), strict=True):
        assert_same(one, two)


def test_without_weights_they_are_ones():
    data = permuted(ring())
    del data.edge_weight
    (batch,) = SubgraphLoader(data, ptr_of(8))
    assert batch.data.adj_t.values().tolist() == [1.0] * 16
    assert batch.data.adj_t.dtype == torch.get_default_dtype()


def test_evaluation_covers_every_node_once_in_order():
    data = permuted(ring())
    loader = EvalSubgraphLoader(data, ptr_of(1, 0, 3, 2, 2), batch_size=2, shuffle=False)
    for _ in range(2):
        seen = [(b.n_id[: b.batch_size].tolist(), b.offset.tolist(), b.count.tolist()) for b in loader]
        assert seen == [([0], [0], [1]), ([1, 2, 3, 4, 5], [1], [5]), ([6, 7], [6], [2])]


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": 5}])
def test_parts_without_nodes_are_left_out(options):
    data = permuted(ring())
    ptr = ptr_of(0, 3, 0, 0, 5)
    seen = [part for batch in SubgraphLoader(data, ptr, **options) for part in batch.count.tolist()]
    assert seen == [3, 5]
    (batch,) = SubgraphLoader(data, ptr, batch_size=3, sampler=[4, 2, 1])  # a sampler's numbers are those of ptr
    assert batch.offset.tolist() == [3, 0]
    assert batch.count.tolist() == [5, 3]


def test_order_follows_the_generator():
    data = permuted(scattered())
    ptr = ptr_of(*[4] * 10)

    def epochs(seed):
        generator = torch.Generator().manual_seed(seed)
        loader = SubgraphLoader(data, ptr, batch_size=3, shuffle=True, generator=generator)
        return [[batch.n_id.tolist() for batch in loader] for _ in range(2)]

    assert epochs(0) == epochs(0) != epochs(1)
    assert epochs(0)[0] != epochs(0)[1]


@pytest.mark.parametrize(("adjacency", "context"), [("csr", "fork"), ("edge_index", "fork"), ("csr", "spawn")])
def test_persistent_workers_yield_the_same_and_warn_of_nothing(adjacency, context, capfd):
    data = permuted(scattered())
    ptr = ptr_of(10, 10, 20)
    options = {"adjacency": adjacency, "bipartite": False}
    workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": context}
    loader = SubgraphLoader(data, ptr, **workers, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"This process .* is multi-threaded, use of fork")
        for _ in range(2):
            for one, other in zip(loader, SubgraphLoader(data, ptr, **options), strict=True):
                assert_same(one, other)
    assert capfd.readouterr().err == ""


def test_a_mini_batch_survives_pickle():
    data = permuted(scattered())
    for batch in SubgraphLoader(data, thirds(data)):
        assert_same(pickle.loads(pickle.dumps(batch)), batch)
        assert "adj_t" in batch.data


@both_forms
def test_all_tensors_are_pinned(adjacency, monkeypatch):
    data = permuted(ring())
    (batch,) = SubgraphLoader(data, ptr_of(8), adjacency=adjacency)
    pinned = []

    def pin(tensor):
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    found = pin_memory(batch)
    assert isinstance(found, SubData)
    tensors = [value for _, value in batch.data if isinstance(value, torch.Tensor)]
    tensors += [batch.n_id, batch.offset, batch.count]
    assert {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in pinned}


def test_moving_moves_the_graph_and_leaves_the_numbers():
    data = permuted(ring())
    (batch,) = SubgraphLoader(data, ptr_of(8))
    moved = batch.to("meta")
    assert moved.data.x.device.type == moved.data.train_mask.device.type == "meta"
    assert moved.n_id.device.type == moved.offset.device.type == moved.count.device.type == "cpu"
    graph, batch_size, *rest = moved
    assert graph is moved.data
    assert batch_size == 8
    assert len(rest) == 3


@pytest.mark.parametrize("kind", [SubgraphLoader, EvalSubgraphLoader])
def test_mini_batches_are_cut_when_asked_for(kind, monkeypatch):
    calls = []
    cut = Cut.__call__
    monkeypatch.setattr(Cut, "__call__", lambda self, parts: calls.append(list(parts)) or cut(self, parts))
    loader = kind(permuted(ring()), ptr_of(2, 2, 2, 2))
    assert calls == []
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    assert calls == [[0], [1]]


def test_workers_get_no_more_than_the_graph():
    data = permuted(scattered())
    loader = SubgraphLoader(data, ptr_of(20, 20))
    before = len(pickle.dumps(loader.collate_fn))
    list(loader)
    assert len(pickle.dumps(loader.collate_fn)) == before


def test_the_number_of_nodes_is_that_of_the_mini_batch():
    data = permuted(graph(6, [(0, 1), (4, 5)]))
    for key in ("x", "y", "train_mask"):
        del data[key]
    data.num_nodes = 6
    for batch in SubgraphLoader(data, ptr_of(2, 4)):
        assert batch.data.num_nodes == batch.n_id.numel()


def test_memory_does_not_grow_with_mini_batches():
    data = permuted(scattered())
    loader = SubgraphLoader(data, ptr_of(*[4] * 10), batch_size=2, shuffle=True)
    with peak_memory("cpu") as memory:
        live = []
        for _ in range(5):
            for batch in loader:
                assert batch.batch_size == 8
            del batch
            live.append(memory.current_bytes)
    assert live[1:] == live[:1] * 4


def test_the_graph_is_not_changed():
    data = permuted(ring())
    before = data.clone()
    list(SubgraphLoader(data, thirds(data)))
    assert data.keys() == before.keys()
    assert all(torch.equal(data[key], before[key]) for key in ("x", "edge_index", "edge_weight", "edge_attr"))


def test_kinds_are_what_they_are_said_to_be():
    """As many nodes as edges: the sizes of tensors tell nothing."""
    data = graph(6, [(i, (i + 1) % 6) for i in range(6)])
    data.noise, data.charge, data.table = torch.arange(6), torch.arange(6), torch.arange(6)
    kinds = {"noise": "edge", "charge": "node", "table": "graph", "edge_weight": "edge"}
    data = permute(data, torch.tensor([3, 5, 0, 1, 4, 2]), kinds=kinds)
    (batch,) = SubgraphLoader(data, ptr_of(4, 2), sampler=[1], kinds=kinds)
    sources = data.edge_index[0, [(data.edge_index[1] == node).nonzero().item() for node in (4, 5)]]
    assert data.node_order[sources].tolist() == batch.data.noise.tolist()  # edge i starts at node i
    assert batch.data.charge.tolist() == data.node_order[batch.n_id].tolist()
    assert batch.data.table.tolist() == list(range(6))


def test_preparation_is_logged_if_wanted(caplog):
    data = permuted(ring())
    with caplog.at_level(logging.INFO, logger="recollect"):
        SubgraphLoader(data, thirds(data), log=False)
        assert caplog.messages == []
        SubgraphLoader(data, thirds(data))
    assert "mini-batches of 3 parts" in caplog.messages[0]


def broken(**changes):
    data = permuted(ring())
    for key, value in changes.items():
        data[key] = value
    return data


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        (ring, {}, ValueError, r"not in the order of the parts: call permute\(data, perm\) first"),
        (broken, {"ptr": ptr_of(4, 5)}, ValueError, "ptr runs from 0 to 9, but must run from 0 to 8"),
        (broken, {"ptr": ptr_of(4, 3)}, ValueError, "ptr runs from 0 to 7"),
        (broken, {"ptr": torch.tensor([1, 8])}, ValueError, "ptr runs from 1 to 8"),
        (broken, {"ptr": torch.tensor([0, 6, 4, 8])}, ValueError, "ptr descends after part 1"),
        (broken, {"ptr": [0, 8]}, ValueError, "ptr is a list, but must be an int64 tensor"),
        (broken, {"ptr": torch.tensor([0.0, 8.0])}, ValueError, "ptr is of torch.float32"),
        (broken, {"batch_size": 0}, ValueError, r"batch_size must be at least 1, the number of parts .* \(got 0\)"),
        (broken, {"batch_size": None}, ValueError, r"batch_size must be an integer .* \(got None\)"),
        (broken, {"adjacency": "coo"}, ValueError, "adjacency is 'coo', but must be one of csr, edge_index"),
        (lambda: broken(y=torch.ones(7)), {}, ValueError, r"data.y has shape \(7,\), but a row .* of the 8 nodes"),
        (lambda: broken(edge_attr=torch.ones(8)), {}, ValueError, r"data.edge_attr .* of the 16 edges"),
        (lambda: broken(adj_t=to_adj_t(ring()).adj_t), {}, ValueError, "both of edge_index and adj_t"),
        (lambda: Data(x=torch.ones(8, 1), node_order=torch.arange(8)), {}, ValueError, "neither of edge_index and"),
        (lambda: load("karate"), {}, TypeError, "data is a GraphDataset, but .* give its attribute data"),
        (lambda: torch.ones(2, 16), {}, TypeError, r"data is a tensor .*Data\(x=x, edge_index=edge_index\) makes one"),
    ],
)
@pytest.mark.parametrize("kind", [SubgraphLoader, EvalSubgraphLoader])
def test_refused(kind, data, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(data(), **{"ptr": ptr_of(4, 4), **arguments})


@pytest.mark.parametrize("name", ["shuffle", "sampler", "batch_sampler", "drop_last"])
def test_evaluation_takes_no_order(name):
    with pytest.raises(ValueError, match=f"it takes no {name}"):
        EvalSubgraphLoader(permuted(ring()), ptr_of(8), **{name: [0] if "sampler" in name else True})


def test_another_collate_fn_is_refused():
    data = permuted(ring())
    with pytest.raises(ValueError, match="a collate_fn of its own"):
        SubgraphLoader(data, thirds(data), collate_fn=list)


def test_a_part_twice_is_refused():
    with pytest.raises(ValueError, match=r"each part once, but its sampler chose \[1, 1\]"):
        list(SubgraphLoader(permuted(ring()), ptr_of(4, 4), batch_size=2, sampler=[1, 1]))


def test_weights_twice_are_refused():
    data = to_adj_t(permuted(ring()))
    data.edge_weight = torch.ones(16)
    with pytest.raises(ValueError, match="edge_weight beside adj_t, whose values are weights already"):
        SubgraphLoader(data, ptr_of(8), adjacency="edge_index")


@pytest.mark.parametrize("kind", [SubgraphLoader, EvalSubgraphLoader])
def test_parts_in_a_mini_batch_may_be_counted_by_numpy(kind):
    data = permuted(ring())
    one, other = (next(iter(kind(data, ptr_of(3, 4, 1), size))) for size in (2, np.int64(2)))
    assert one.batch_size == other.batch_size == 7


def test_an_attribute_of_the_graph_is_told_where_it_is():
    data = permuted(ring())
    batch = next(iter(SubgraphLoader(data, thirds(data))))
    with pytest.raises(AttributeError, match=r"no attribute 'x'; its graph has it: batch\.data\.x"):
        batch.x  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'weight'; it has data, batch_size, n_id, offset, count"):
        batch.weight  # noqa: B018
