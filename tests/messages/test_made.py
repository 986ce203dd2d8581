"""What was made of edges is found again for the same edges, and for no others."""

import pytest
import torch
from torch.testing import assert_close
from torch_geometric.nn import GCNConv, SAGEConv

from recollect.messages import Made, adjacency_of_edges, convolve, made_of, propagate, sparse_csr, take_made
from recollect.messages import _adjacency as adjacency

N = 12


def some_edges() -> torch.Tensor:
    """Sorted by target; some edges are there twice."""
    edge_index = torch.randint(N, (2, 40), generator=torch.Generator().manual_seed(0))
    edge_index = torch.cat([edge_index, edge_index[:, :3]], 1)
    return edge_index[:, torch.argsort(edge_index[1], stable=True)].contiguous()


def used(edge_index, conv):
    """Outputs and gradients of a convolution."""
    x = torch.linspace(-1, 1, N * 3).view(N, 3).requires_grad_()
    out = convolve(conv, x, edge_index)
    return out, torch.autograd.grad(out.sin().sum(), x)[0]


@pytest.mark.parametrize("kind", [SAGEConv, GCNConv])
def test_what_a_convolution_made_is_not_made_again(kind, monkeypatch, tmp_path):
    conv, edge_index = kind(3, 3), some_edges()
    expected = used(edge_index, conv)
    made = made_of(edge_index)
    assert (made.num_nodes, made.num_targets) == (N, N)
    assert any(each is not None for each in made.transposes)  # that backward took
    torch.save(vars(made), tmp_path / "made")
    again = edge_index.clone()
    take_made(again, Made(**torch.load(tmp_path / "made")))
    monkeypatch.setattr(adjacency, "narrow_adj_t", None)  # whoever sorts edges fails
    monkeypatch.setattr(adjacency, "_sorted", None)
    found = used(again, conv)
    assert_close(found, expected, rtol=0, atol=0)
    assert made_of(again).number == made.number > 1


def test_a_change_in_place_makes_other_edges_of_them():
    conv, edge_index = SAGEConv(3, 3), some_edges()
    used(edge_index, conv)
    again = edge_index.clone()
    take_made(again, made_of(edge_index))
    again[0, 0] = (again[0, 0] + 1) % N
    assert_close(used(again, conv), used(again.clone(), conv), rtol=0, atol=0)


def test_nothing_was_made():
    edge_index = some_edges()
    assert made_of(edge_index) is None
    adjacency.edges_of(edge_index, N)
    assert made_of(edge_index) is None
    empty = sparse_csr(torch.zeros(N - 3, dtype=torch.int64), edge_index[0, :0], torch.zeros(0), (N - 4, N - 4))
    adjacency.edges_of(edge_index, N - 4).adj_t("some", lambda: empty)
    assert made_of(edge_index) is None  # with nodes that are not among those


def test_the_adjacency_of_sorted_edges_is_kept():
    edge_index, values = some_edges(), torch.rand(43)
    edge_index = edge_index[:, edge_index[1] < 7].contiguous()
    values = values[: edge_index.size(1)]
    adj_t = adjacency_of_edges(edge_index, values, N, 7)
    assert adjacency_of_edges(edge_index, values, N, 7) is adj_t
    x = torch.rand(N, 3)
    expected = torch.zeros(7, 3).index_add_(0, edge_index[1], values.unsqueeze(1) * x[edge_index[0]])
    assert_close(propagate(adj_t, x), expected)
    again = edge_index.clone()
    take_made(again, made_of(edge_index))
    assert_close(propagate(adjacency_of_edges(again, values, N, 7), x), expected)
    nothing = adjacency_of_edges(edge_index[:, :0], values[:0], N, 7)
    assert nothing.shape == (7, N)
    assert not propagate(nothing, x).any()
