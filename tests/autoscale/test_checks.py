"""What is given by mistake is refused, before anything is made of it."""

import numpy as np
import pytest
import torch
from graph_zoo import ptr_of, ring
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData

from recollect.autoscale import SubgraphLoader, permute, to_adj_t

PERM = torch.tensor([4, 7, 0, 2, 6, 1, 3, 5])
PTR = ptr_of(4, 4)


def with_attributes(**attributes):
    """A ring of 8 nodes and 16 edges."""
    return Data(**ring().to_dict() | attributes)


@pytest.mark.parametrize("call", [to_adj_t, lambda data: permute(data, PERM)], ids=["to_adj_t", "permute"])
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: with_attributes(edge_index=ring().edge_index.numpy()), TypeError, r"ndarray.*torch.as_tensor\(data.e"),
        (lambda: with_attributes(edge_index=ring().edge_index.tolist()), TypeError, "edge_index is a list"),
        (lambda: with_attributes(edge_index=tuple(ring().edge_index)), TypeError, r"torch.stack\(data.edge_index\)"),
        (lambda: with_attributes(edge_index=ring().edge_index.t()), ValueError, r"\(16, 2\).*edge_index.t\(\).contig"),
        (lambda: with_attributes(edge_index=torch.arange(8)), ValueError, r"shape \(8,\), but must be \[2, E\]"),
        (lambda: with_attributes(edge_index=ring().edge_index.float()), TypeError, r"write data.edge_index.long\(\)"),
        (lambda: with_attributes(x=np.ones((8, 2))), TypeError, r"data.x is a ndarray.*torch.as_tensor\(data.x\)"),
        (lambda: with_attributes(y=[0] * 8), TypeError, "data.y is a list, but must be a tensor with a row for each"),
        (HeteroData, TypeError, r"data is a HeteroData, .* data.to_homogeneous\(\)"),
        (lambda: (ring().x, ring().edge_index), TypeError, r"data is a tuple, .* Data\(x=x, edge_index=edge_index\)"),
        (
            lambda: with_attributes(edge_index=None, adj_t=torch.eye(8).to_sparse()),
            TypeError,
            r"data.adj_t = data.adj_t.to_sparse_csr\(\)",
        ),
        (lambda: with_attributes(refractive_index=torch.ones(8)), TypeError, "kinds={'refractive_index': 'graph'}"),
        (lambda: with_attributes(pair_index=torch.tensor([8])), ValueError, "entries from 8 to 8, .* 8 nodes"),
        (lambda: with_attributes(edge_label_index=ring().edge_index, edge_label=torch.ones(3)), ValueError, "entries;"),
        (lambda: with_attributes(train_nodes=torch.arange(3)), ValueError, "kinds={'train_nodes': 'index'}, or"),
    ],
)
def test_what_is_given_by_mistake_is_refused(call, make, error, message):
    with pytest.raises(error, match=message):
        call(make())


def test_another_sparse_matrix_of_nodes_is_refused_until_it_is_said():
    data = with_attributes(table=torch.eye(8).to_sparse())
    with pytest.raises(ValueError, match=r"data.table has shape \(8, 8\) .* kinds={'table': 'node'}, .* or 'graph'"):
        permute(data, PERM)
    assert permute(data, PERM, kinds={"table": "graph"}).table is data.table


@pytest.mark.parametrize("call", [to_adj_t, lambda data: permute(data, PERM)], ids=["to_adj_t", "permute"])
def test_an_edge_index_of_another_size_is_refused(call):
    data = with_attributes(edge_index=EdgeIndex(ring().edge_index, sparse_size=(9, 9)))
    with pytest.raises(ValueError, match=r"of a graph of \[9, 9\] nodes, but data has 8 nodes"):
        call(data)


class SparseTensor:
    """What torch_sparse calls so."""


def test_a_sparse_tensor_of_another_library_is_refused():
    data = with_attributes(edge_index=None)
    data.adj_t = SparseTensor()
    with pytest.raises(TypeError, match=r"data.adj_t.to_torch_sparse_csr_tensor\(\)"):
        permute(data, PERM)


@pytest.mark.parametrize("call", [to_adj_t, lambda data: permute(data, PERM), lambda data: SubgraphLoader(data, PTR)])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(9, 1)}, r"data.x has shape \(9, 1\), .* each of the 8 nodes"),
        ({"num_nodes": 9}, r"data.adj_t is \[8, 8\], but data.num_nodes is 9"),
        ({"y": torch.ones(3)}, r"data.y has shape \(3,\), .* 8 nodes"),
        ({"edge_attr": torch.ones(3)}, r"data.edge_attr has shape \(3,\), .* 16 edges"),
    ],
)
def test_sizes_of_another_graph_are_refused(call, changes, message):
    data = to_adj_t(ring())
    data.node_order = torch.arange(8)
    for name, value in changes.items():
        data[name] = value
    with pytest.raises(ValueError, match=message):
        call(data)
