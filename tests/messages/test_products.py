"""`propagate` is the product with the dense adjacency, `extreme` torch's reduction; also in every kind of backward."""

from __future__ import annotations

import weakref

import pytest
import torch
from graph_zoo import every_graph

import recollect
from recollect.autoscale import edge_index_of, to_adj_t
from recollect.memory import peak_memory
from recollect.messages import _products, extreme, make_adj_t, propagate, sparse_csr
from recollect.messages._products import _TRANSPOSES

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


@every_graph
def test_on_hazardous_graphs(make):
    data = to_adj_t(make())
    x = data.x.clone().requires_grad_()
    dense = torch.zeros(data.num_nodes, data.num_nodes, dtype=torch.float64)
    for (source, target), weight in zip(make().edge_index.t().tolist(), make().edge_weight.tolist(), strict=True):
        dense[target, source] += weight
    out = propagate(data.adj_t, x)
    torch.testing.assert_close(out, dense @ x, rtol=1e-13, atol=1e-13)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(found, dense.t() @ grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("channels", [1, 31, 64, 200])
def test_rows_of_any_length_and_both_kinds_of_indices(channels, index, dtype, adj_t):
    """The product is computed in two ways, by the length of the rows."""
    dense, x = adj_t.to_dense().to(dtype), torch.randn(6, channels, dtype=dtype, requires_grad=True)
    parts = adj_t.crow_indices().to(index), adj_t.col_indices().to(index), adj_t.values().to(dtype)
    out = propagate(sparse_csr(*parts, (4, 6)), x)
    torch.testing.assert_close(out, dense @ x)
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), x) for y in (out, dense @ x)))


def test_gradients_of_first_and_second_order(adj_t, x):
    assert torch.autograd.gradcheck(lambda x: propagate(adj_t, x), (x,))
    assert torch.autograd.gradgradcheck(lambda x: propagate(adj_t, x).sin(), (x,))


def test_forward_mode(adj_t, x):
    def both_ways(x: torch.Tensor) -> torch.Tensor:
        return propagate(adj_t, x).sin()

    assert torch.autograd.gradcheck(
        both_ways, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(both_ways, (x,), check_fwd_over_rev=True, check_rev_over_rev=True)
    dense = adj_t.to_dense()
    expected = torch.func.jacfwd(lambda x: dense @ x)(x.detach())
    torch.testing.assert_close(torch.func.jacfwd(lambda x: propagate(adj_t, x))(x.detach()), expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian], ids=["grad", "hessian"])
def test_a_transpose_that_is_first_asked_for_in_a_transform(transform, adj_t, x):
    """It serves there and later."""
    dense = adj_t.to_dense()
    for _ in range(2):
        found = transform(lambda x: propagate(adj_t, x).sin().sum())(x.detach())
        torch.testing.assert_close(found, transform(lambda x: (dense @ x).sin().sum())(x.detach()))
    (grad,) = torch.autograd.grad(propagate(adj_t, x).sum(), x)
    torch.testing.assert_close(grad, dense.t() @ torch.ones(4, 3, dtype=torch.float64))


def test_an_adjacency_that_nobody_keeps(adj_t, x):
    """Frames drop it, and backward makes it again."""
    dense, made = adj_t.to_dense(), []

    def region(x: torch.Tensor) -> torch.Tensor:
        lone = adj_t.clone()
        made.append(weakref.ref(lone))
        return propagate(lone, x).sin()

    def orders(out: torch.Tensor) -> list[torch.Tensor]:
        (batched,) = torch.autograd.grad(out, x, torch.stack([out, -out]), is_grads_batched=True, retain_graph=True)
        (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), x)
        return [batched, first, second]

    out = recollect.checkpoint(region, x)
    assert made[0]() is None
    torch.testing.assert_close(orders(out), orders((dense @ x).sin()))


def test_a_batch_without_channels(adj_t):
    assert torch.func.vmap(lambda x: propagate(adj_t, x))(torch.ones(2, 6, 0).double()).shape == (2, 4, 0)


def test_batched_gradients_and_transforms(adj_t, x):
    out = propagate(adj_t, x)
    grads = torch.randn(5, *out.shape, dtype=torch.float64)
    expected = torch.einsum("ij,bic->bjc", adj_t.to_dense(), grads)
    (found,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, expected)
    rows = torch.stack([x.detach(), 2 * x.detach()], 1)
    torch.testing.assert_close(
        torch.func.vmap(lambda x: propagate(adj_t, x), in_dims=1)(rows), torch.stack([out, 2 * out]).detach()
    )
    jacobian = torch.func.jacrev(lambda x: propagate(adj_t, x))(x.detach())
    torch.testing.assert_close(jacobian, torch.einsum("ij,cd->icjd", adj_t.to_dense(), torch.eye(3).double()))


def test_in_a_frame(adj_t, x):
    out = recollect.checkpoint(lambda x: propagate(adj_t, x.sin()).cos(), x)
    expected = (adj_t.to_dense() @ x.sin()).cos()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_type_of_x_and_at_least_the_precision_of_float32(dtype, adj_t, x):
    x = x.detach().to(dtype).requires_grad_()
    out = propagate(adj_t.to(torch.float32), x)
    assert out.dtype == dtype
    exact = adj_t.to(torch.float32).to_dense().double() @ x.double()
    torch.testing.assert_close(out, exact.to(dtype))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.dtype == dtype
    both = propagate(adj_t.to(dtype), x)
    torch.testing.assert_close(both, (adj_t.to(dtype).to_dense().double() @ x.double()).to(dtype))


def test_under_autocast(adj_t, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = propagate(adj_t, x)
        assert out.dtype == torch.float64
        torch.autograd.grad(out.sum(), x)


def test_weights_that_require_grad(adj_t, x):
    weights = adj_t.detach().requires_grad_()
    (grad,) = torch.autograd.grad(propagate(weights, x).sum(), weights)
    dense = adj_t.to_dense().requires_grad_()
    (expected,) = torch.autograd.grad((dense @ x).sum(), dense)
    torch.testing.assert_close(grad.to_dense(), expected)  # torch gives one for edges that are not there too


def test_the_transpose_is_made_once(adj_t, x, monkeypatch):
    made = []
    argsort = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda *args, **kw: made.append(1) or argsort(*args, **kw))
    for _ in range(3):
        propagate(adj_t, x).sum().backward()
    propagate(adj_t.clone(), x).sum().backward()
    assert len(made) == 2
    (grad,) = torch.autograd.grad(propagate(adj_t, x).sin().sum(), x, create_graph=True)
    grad.sin().sum().backward()
    assert len(made) == 2  # the transpose of the transpose is the adjacency


def test_nothing_of_the_size_of_the_edges_and_channels_is_made():
    nodes, edges, channels = 100, 5_000, 64
    generator = torch.Generator().manual_seed(0)
    dense = torch.zeros(nodes, nodes)
    dense.view(-1)[torch.randperm(nodes * nodes, generator=generator)[:edges]] = 1.0
    adj_t, x = dense.to_sparse_csr(), torch.randn(nodes, channels, requires_grad=True)
    with peak_memory("cpu") as peak:
        propagate(adj_t, x).sum().backward()
    assert peak.peak_bytes < edges * channels * 4 / 2


def test_the_transpose_goes_with_the_adjacency(adj_t, x):
    before = len(_TRANSPOSES)
    other = adj_t.clone()
    propagate(other, x).sum().backward()
    assert len(_TRANSPOSES) == before + 2  # both ways
    del other
    assert len(_TRANSPOSES) == before


def test_what_is_no_adjacency_is_refused(adj_t, x):
    for other in (adj_t.to_dense(), edge_index_of(adj_t)):
        with pytest.raises(
            TypeError, match=r"adj_t is a tensor of layout torch\.strided, but must be a torch\.sparse_csr"
        ):
            propagate(other, x)


class TestExtreme:
    """The oracle makes every message, and reduces them with the operation that torch_geometric uses."""

    @staticmethod
    def reduced(edge_index: torch.Tensor, x: torch.Tensor, which: str) -> torch.Tensor:
        messages = x.index_select(0, edge_index[0])
        index = edge_index[1].unsqueeze(-1).expand_as(messages)
        return torch.zeros_like(x).scatter_reduce_(0, index, messages, f"a{which}", include_self=False)

    @staticmethod
    def adjacency(edge_index: torch.Tensor, num_nodes: int) -> torch.Tensor:
        return make_adj_t(*edge_index, None, num_nodes)[0]

    def assert_alike(self, edge_index: torch.Tensor, x: torch.Tensor, which: str) -> None:
        """Compare outputs, gradients, and the gradients of a function of the gradients."""
        adj_t, weight = self.adjacency(edge_index, x.size(0)), torch.linspace(-1, 2, x.numel()).view_as(x).to(x)
        orders = []
        for out in (self.reduced(edge_index, x, which), extreme(adj_t, x, which)):
            factor = weight.clone().requires_grad_()
            (first,) = torch.autograd.grad((out * factor).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sin().sum(), factor)
            orders.append([out, first, second])
        torch.testing.assert_close(orders[1], orders[0], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("piece", [(1, 4), (1 << 14, 1 << 18)], ids=["pieces", "one piece"])
    @pytest.mark.parametrize("which", ["max", "min"])
    @every_graph
    def test_on_hazardous_graphs(self, make, which, piece, monkeypatch):
        """As they are, and with values of which many are equal, many 0."""
        monkeypatch.setattr(_products, "_PIECE", piece)
        data = make()
        for x in (data.x, data.x.relu(), data.x.round()):
            self.assert_alike(data.edge_index, x.double().clone().requires_grad_(), which)

    @pytest.mark.parametrize("which", ["max", "min"])
    def test_infinite_values_and_such_that_are_none(self, which):
        x = torch.tensor([[torch.inf, -torch.inf, 0.0], [-torch.inf, -torch.inf, torch.nan], [1.0, 2.0, 3.0]])
        edge_index = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 1]])
        expected = self.reduced(edge_index, x, which)
        torch.testing.assert_close(extreme(self.adjacency(edge_index, 3), x, which), expected, equal_nan=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_is_exact_in_every_type(self, dtype):
        edge_index = torch.randint(20, (2, 90), generator=torch.Generator().manual_seed(0))
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = extreme(self.adjacency(edge_index, 20).to(dtype), x, "max")
        assert torch.equal(out, self.reduced(edge_index, x, "max"))
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.dtype == dtype

    def test_batched_gradients_and_features_and_forward_mode(self, adj_t, x):
        target = torch.repeat_interleave(adj_t.crow_indices().diff())
        edge_index = torch.stack([adj_t.col_indices(), target])
        square = self.adjacency(edge_index, 6)

        def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return extreme(square, x, "max"), self.reduced(edge_index, x, "max")

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

    def test_in_a_frame(self, x):
        edge_index = torch.randint(6, (2, 20), generator=torch.Generator().manual_seed(2))
        adj_t = self.adjacency(edge_index, 6)
        out = recollect.checkpoint(lambda x: extreme(adj_t, x.sin(), "min").cos(), x)
        expected = self.reduced(edge_index, x.sin(), "min").cos()
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x), torch.autograd.grad(expected.sum(), x))

    @pytest.mark.parametrize("graph", ["any", "one target"])
    def test_nothing_of_the_size_of_the_edges_and_channels_is_made(self, graph):
        """Not even where all edges end at one node."""
        edge_index = torch.randint(500, (2, 40_000), generator=torch.Generator().manual_seed(0))
        if graph == "one target":
            edge_index[1] = 7
        adj_t, x = self.adjacency(edge_index, 500), torch.randn(500, 64).relu().requires_grad_()
        with peak_memory("cpu") as peak:
            extreme(adj_t, x, "max").sum().backward()
        assert peak.peak_bytes < 40_000 * 64 * 4 / 6

    def test_what_it_is_not_for_is_refused(self, adj_t, x):
        with pytest.raises(TypeError, match=r"must be a torch\.sparse_csr"):
            extreme(adj_t.to_dense(), x, "max")
        with pytest.raises(ValueError, match="which='mean' is unknown; choose 'max' or 'min'"):
            extreme(adj_t, x, "mean")
        with pytest.raises(ValueError, match="x is on meta, but torch has this reduction on the CPU only"):
            extreme(adj_t, x.to("meta"), "max")
