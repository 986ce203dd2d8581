"""`extreme` is torch's reduction of all messages, also in every kind of backward.

The oracle makes every message, and reduces them with the operation that torch_geometric uses.
"""

from __future__ import annotations

import pytest
import torch
from graph_zoo import every_graph

import recollect
from recollect.memory import peak_memory
from recollect.messages import _extreme, extreme, make_adj_t

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # of torch's own forward mode
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),  # the tests make some themselves
]


@pytest.fixture
def adj_t():
    """Rectangular, with an empty row and a column without edges."""
    dense = torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]]
    )
    return dense.to_sparse_csr()


@pytest.fixture
def x():
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def reduced(edge_index: torch.Tensor, x: torch.Tensor, which: str) -> torch.Tensor:
    messages = x.index_select(0, edge_index[0])
    index = edge_index[1].unsqueeze(-1).expand_as(messages)
    return torch.zeros_like(x).scatter_reduce_(0, index, messages, f"a{which}", include_self=False)


def adjacency(edge_index: torch.Tensor, num_nodes: int) -> torch.Tensor:
    return make_adj_t(edge_index[0], edge_index[1], None, num_nodes)[0]


def assert_alike(edge_index: torch.Tensor, x: torch.Tensor, which: str) -> None:
    """Compare outputs, gradients, and the gradients of a function of the gradients."""
    adj_t, weight = adjacency(edge_index, x.size(0)), torch.linspace(-1, 2, x.numel()).view_as(x).to(x)
    orders = []
    for out in (reduced(edge_index, x, which), extreme(adj_t, x, which)):
        factor = weight.clone().requires_grad_()
        (first,) = torch.autograd.grad((out * factor).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), factor)
        orders.append([out, first, second])
    torch.testing.assert_close(orders[1], orders[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("piece", [(1, 4), (1 << 14, 1 << 18)], ids=["pieces", "one piece"])
@pytest.mark.parametrize("which", ["max", "min"])
@every_graph
def test_on_hazardous_graphs(make, which, piece, monkeypatch):
    """As they are, and with values of which many are equal, many 0."""
    monkeypatch.setattr(_extreme, "_PIECE", piece)
    data = make()
    for x in (data.x, data.x.relu(), data.x.round()):
        assert_alike(data.edge_index, x.double().clone().requires_grad_(), which)


@pytest.mark.parametrize("which", ["max", "min"])
def test_infinite_values_and_such_that_are_none(which):
    x = torch.tensor([[torch.inf, -torch.inf, 0.0], [-torch.inf, -torch.inf, torch.nan], [1.0, 2.0, 3.0]])
    edge_index = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 1]])
    expected = reduced(edge_index, x, which)
    torch.testing.assert_close(extreme(adjacency(edge_index, 3), x, which), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_is_exact_in_every_type(dtype):
    edge_index = torch.randint(20, (2, 90), generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    out = extreme(adjacency(edge_index, 20).to(dtype), x, "max")
    assert torch.equal(out, reduced(edge_index, x, "max"))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.dtype == dtype


def test_batched_gradients_and_features_and_forward_mode(adj_t, x):
    target = torch.repeat_interleave(adj_t.crow_indices().diff())
    edge_index = torch.stack([adj_t.col_indices(), target])
    square = adjacency(edge_index, 6)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return extreme(square, x, "max"), reduced(edge_index, x, "max")

    found, expected = both(x)
    grads = torch.randn(4, *found.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found, x, grads, is_grads_batched=True),
        torch.autograd.grad(expected, x, grads, is_grads_batched=True),
    )
    rows = torch.stack([x.detach(), -x.detach()], 1)
    torch.testing.assert_close(*torch.func.vmap(both, in_dims=1)(rows))
    torch.testing.assert_close(*torch.func.jvp(both, (x.detach(),), (x.detach().cos(),))[1])
    torch.testing.assert_close(*torch.func.jacrev(both)(x.detach()))


def test_in_a_frame(x):
    edge_index = torch.randint(6, (2, 20), generator=torch.Generator().manual_seed(2))
    adj_t = adjacency(edge_index, 6)
    out = recollect.checkpoint(lambda x: extreme(adj_t, x.sin(), "min").cos(), x)
    expected = reduced(edge_index, x.sin(), "min").cos()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("graph", ["any", "one target"])
def test_nothing_of_the_size_of_the_edges_and_channels_is_made(graph):
    """Not even where all edges end at one node."""
    edge_index = torch.randint(500, (2, 40_000), generator=torch.Generator().manual_seed(0))
    if graph == "one target":
        edge_index[1] = 7
    adj_t, x = adjacency(edge_index, 500), torch.randn(500, 64).relu().requires_grad_()
    with peak_memory("cpu") as peak:
        extreme(adj_t, x, "max").sum().backward()
    assert peak.peak_bytes < 40_000 * 64 * 4 / 6


def test_what_it_is_not_for_is_refused(adj_t, x):
    with pytest.raises(TypeError, match=r"must be a torch\.sparse_csr"):
        extreme(adj_t.to_dense(), x, "max")
    with pytest.raises(ValueError, match="which='mean' is unknown; choose 'max' or 'min'"):
        extreme(adj_t, x, "mean")
    with pytest.raises(ValueError, match="x is on meta, but torch has this reduction on the CPU only"):
        extreme(adj_t, x.to("meta"), "max")


def test_what_is_no_row_for_each_source_is_refused(adj_t, x):
    for other in (x[:5], x.new_zeros(7, 3), x[:, 0]):
        with pytest.raises(ValueError, match=r"adj_t \[4, 6\] has 6 sources: give a row for each, \[6, channels\]"):
            extreme(adj_t, other, "max")
    with pytest.raises(TypeError, match=r"x is of torch\.int64, but must be floating point"):
        extreme(adj_t, torch.ones(6, 3, dtype=torch.int64), "max")
    with pytest.raises(TypeError, match=r"complex numbers have no order"):
        extreme(adj_t, x.to(torch.complex128), "max")
