"""Graphs with a sparse adjacency are copied, saved, shared and sent like any others."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from graph_zoo import directed, ptr_of, ring
from torch_geometric.data import Batch, Data
from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
from torch_geometric.data.storage import GlobalStorage

from recollect.autoscale import SubgraphLoader, get_data, normalize, permute, to_adj_t


class Mesh(Data):
    """A class of the user."""


def mini_batch():
    data = permute(directed(), torch.randperm(9, generator=torch.Generator().manual_seed(0)), log=False)
    return next(iter(SubgraphLoader(data, ptr_of(4, 5), log=False))).data


def in_containers():
    data = to_adj_t(ring())
    data.more = {"other_adj": [data.adj_t], "scale": torch.ones(3)}
    return data


def batch_of_graphs():
    graphs = [Data(x=torch.randn(n, 2), edge_index=torch.randint(n, (2, 3 * n))) for n in (3, 5)]
    return to_adj_t(Batch.from_data_list(graphs))


def normalised():
    data = to_adj_t(ring())
    data.adj_t = normalize(data.adj_t)
    return data


MAKERS = [
    lambda: to_adj_t(directed()),
    lambda: to_adj_t(to_adj_t(directed())),
    lambda: permute(to_adj_t(ring()), torch.arange(8), log=False),
    lambda: to_adj_t(Mesh(**ring().to_dict())),
    mini_batch,
    in_containers,
    batch_of_graphs,
    normalised,
]
every = pytest.mark.parametrize(
    "make", MAKERS, ids=["to_adj_t", "again", "permuted", "subclass", "mini-batch", "in", "Batch", "norm"]
)


def saved(data):
    stream = io.BytesIO()
    torch.save(data, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def assert_same(one, other):
    assert type(one) is type(other)
    assert sorted(map(str, one.keys())) == sorted(map(str, other.keys()))
    for key in one.keys():  # noqa: SIM118 - Data is no mapping
        if isinstance(one[key], torch.Tensor):
            pair = one[key], other[key]
            assert pair[0].layout == pair[1].layout
            dense = [
                value.to_dense() if value.layout == torch.sparse_csr else value for value in (one[key], other[key])
            ]
            assert torch.equal(*dense)
    assert one.num_nodes == other.num_nodes


@every
@pytest.mark.parametrize(
    "how", [copy.deepcopy, copy.copy, lambda data: data.clone(), lambda data: pickle.loads(pickle.dumps(data)), saved]
)
def test_copies_are_equal(make, how):
    data = make()
    assert_same(how(data), data)


@every
def test_a_deep_copy_shares_nothing(make):
    data = make()
    twin = copy.deepcopy(data)
    before = data.adj_t.values().clone()
    twin.adj_t.values().add_(1)
    assert torch.equal(data.adj_t.values(), before)
    again = copy.deepcopy([data, data])
    assert again[0] is again[1]
    assert_same(copy.deepcopy(twin.clone()), twin)


def test_one_adjacency_under_two_names_stays_one():
    data = in_containers()
    twin = copy.deepcopy(data)
    assert twin.more["other_adj"][0] is twin.adj_t
    assert twin.adj_t is not data.adj_t


def test_what_holds_graphs_is_copied():
    found = get_data(None, "karate")
    assert_same(copy.deepcopy(found).data, found.data)
    loader = SubgraphLoader(permute(found.data, torch.arange(34), log=False), ptr_of(20, 14), log=False)
    for one, other in zip(copy.deepcopy(loader), loader, strict=True):
        assert_same(one.data, other.data)
        assert_same(copy.deepcopy(one).data, one.data)


def test_a_leaf_keeps_its_gradient_and_a_result_is_refused():
    data = to_adj_t(ring())
    data.adj_t.requires_grad_()
    assert copy.deepcopy(data).adj_t.requires_grad
    data.adj_t = data.adj_t * 2
    with pytest.raises(RuntimeError, match="computed with a gradient cannot be copied deeply"):
        copy.deepcopy(data)


@every
def test_all_parts_are_shared(make):
    data = make()
    before = data.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*untyped_storage")
        assert data.share_memory_() is data
    assert all(part.is_shared() for part in (data.adj_t.crow_indices(), data.adj_t.col_indices(), data.adj_t.values()))
    assert data.x.is_shared()
    assert_same(data, before)


def test_a_file_depends_on_torch_geometric_alone():
    data = permute(to_adj_t(ring()), torch.arange(8), log=False)
    stream = io.BytesIO()
    torch.save(data, stream)
    assert b"recollect" not in stream.getvalue()
    stream.seek(0)
    # Not those that torch_geometric has allowed for good: at its end all that it is given is forbidden.
    allowed = torch.serialization.get_safe_globals()
    wanted = [one for one in (Data, DataEdgeAttr, DataTensorAttr, GlobalStorage) if one not in allowed]
    with torch.serialization.safe_globals(wanted):
        found = torch.load(stream, weights_only=True)
    assert_same(found, data)
    assert_same(copy.deepcopy(to_adj_t(found)), data)  # a graph of ours again


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("make", [batch_of_graphs, lambda: to_adj_t(Mesh(**ring().to_dict()))], ids=["Batch", "Mesh"])
def test_workers_yield_the_same(make, context):
    data = permute(make(), torch.arange(8).flip(0), log=False)
    ptr = ptr_of(3, 5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"This process .* is multi-threaded, use of fork")
        loader = SubgraphLoader(
            data, ptr, num_workers=1, persistent_workers=True, timeout=60, multiprocessing_context=context
        )
        for _ in range(2):
            for one, other in zip(loader, SubgraphLoader(data, ptr), strict=True):
                assert torch.equal(one.n_id, other.n_id)
                assert_same(one.data, other.data)
                assert_same(copy.deepcopy(one.data), one.data)
