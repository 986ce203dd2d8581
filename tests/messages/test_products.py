"""`propagate` is the product with the dense adjacency; also in every kind of backward."""

from __future__ import annotations

import weakref

import pytest
import torch
from graph_zoo import every_graph

import recollect
from recollect.autoscale import edge_index_of, to_adj_t
from recollect.memory import peak_memory
from recollect.messages import propagate, sparse_csr, with_weights
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
    torch.testing.assert_close(grad.to_dense(), expected * (adj_t.to_dense() != 0))  # of the edges that are there


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


@pytest.mark.parametrize("change", ["values", "columns"])
def test_an_adjacency_that_is_changed_between_passes_has_another_transpose(change, adj_t, x):
    for _ in range(3):
        out, expected = propagate(adj_t, x), adj_t.to_dense() @ x
        torch.testing.assert_close(out, expected)
        found, wanted = (torch.autograd.grad(y.sin().sum(), x, create_graph=True)[0] for y in (out, expected))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(y.cos().sum(), x)[0] for y in (found, wanted)))
        if change == "values":
            adj_t.values().mul_(-2.0)
        else:
            adj_t.col_indices().copy_(adj_t.col_indices().add(1).remainder(6))


def test_an_adjacency_that_is_changed_before_backward_is_an_error(adj_t, x):
    for other in (adj_t, with_weights(adj_t, torch.ones(8, dtype=torch.float64, requires_grad=True))):
        out = propagate(other, x)
        with torch.no_grad():
            other.values().mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_what_is_no_row_for_each_source_is_refused(adj_t, x):
    """A kernel would read beyond the end of fewer rows."""
    weights = adj_t.values().clone().requires_grad_()
    calls = (
        lambda x: propagate(adj_t, x),
        lambda x: propagate(adj_t, x, weights),
        lambda x: propagate(with_weights(adj_t, weights), x),
    )
    for call in calls:
        for other in (x[:5], x.new_zeros(7, 3), x.new_zeros(2, 64), x[:, 0], x.unsqueeze(0)):
            with pytest.raises(ValueError, match=r"adj_t \[4, 6\] has 6 sources: give a row for each, \[6, channels\]"):
                call(other)
        for other, what in (([1.0], "a list"), (x.to_sparse(), r"a tensor of layout torch\.sparse_coo")):
            with pytest.raises(TypeError, match=rf"x is {what}, but must be a dense tensor \[6, channels\]"):
                call(other)
        for dtype in (torch.int64, torch.bool):
            with pytest.raises(TypeError, match=rf"x is of {dtype}, but must be floating point: write x\.float\(\)"):
                call(torch.ones(6, 3, dtype=dtype))


def test_what_is_no_adjacency_is_refused(adj_t, x):
    for other in (adj_t.to_dense(), edge_index_of(adj_t)):
        with pytest.raises(
            TypeError, match=r"adj_t is a tensor of layout torch\.strided, but must be a torch\.sparse_csr"
        ):
            propagate(other, x)
