"""The gradients of edges' weights are those of a dense matrix that the weights are summed up in."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from graph_zoo import every_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import recollect
from recollect.autoscale import (
    SubgraphLoader,
    add_self_loops,
    dropout,
    edge_index_of,
    normalize,
    partition,
    permute,
    propagate,
    to_adj_t,
    with_weights,
)
from recollect.memory import peak_memory
from recollect.messages import _kernels, sparse_csr, values_of
from recollect.messages._weights import _KNOWN

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # of torch's own forward mode
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),  # the tests make some themselves
]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def dense_of(adj_t: Tensor, weights: Tensor) -> Tensor:
    """The matrix of an adjacency with these weights; those of edges that two nodes share are summed up."""
    rowptr = adj_t.crow_indices()
    row = torch.repeat_interleave(torch.arange(adj_t.size(0)), rowptr.diff().long())
    zeros = torch.zeros(tuple(adj_t.shape), dtype=weights.dtype)
    return zeros.index_put((row, adj_t.col_indices().long()), weights, accumulate=True)


def make_csr(row: list[int], col: list[int], size: tuple[int, int], index: torch.dtype = torch.int64) -> Tensor:
    """Entries in the order given, within their rows."""
    counts = torch.tensor(row, dtype=torch.int64).bincount(minlength=size[0])
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return sparse_csr(rowptr.to(index), torch.tensor(col, dtype=index), torch.ones(len(col)).double(), size)


@pytest.fixture
def adj_t() -> Tensor:
    """Rectangular; unsorted columns, an edge three times, an empty row, a column without edges, self-loops."""
    return make_csr([0, 0, 0, 2, 2, 2, 2, 3], [5, 0, 5, 4, 2, 1, 1, 3], (5, 7))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def w() -> Tensor:
    return torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()


@st.composite
def patterns(draw: st.DrawFn) -> Tensor:
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    edges = draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, cols - 1)), max_size=14)) if cols else []
    edges.sort(key=lambda edge: edge[0])  # columns stay as they come
    index = draw(st.sampled_from([torch.int32, torch.int64]))
    return make_csr([row for row, _ in edges], [col for _, col in edges], (rows, cols), index)


@settings(max_examples=60, deadline=None)
@given(
    adj_t=patterns(), channels=st.integers(0, 5), block=st.sampled_from([None, 1, 40, 1 << 20]), seed=st.integers(0, 99)
)
def test_gradients_of_first_and_second_order_of_any_pattern(adj_t, channels, block, seed):
    """Both orders, of the weights and of the features, however few edges are taken at a time."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(adj_t.size(1), channels, dtype=torch.float64, generator=generator).requires_grad_()
    w = torch.randn(adj_t.col_indices().numel(), dtype=torch.float64, generator=generator).requires_grad_()
    orders = []
    with pytest.MonkeyPatch.context() as patch:
        if block is not None:  # where there is no kernel for it
            patch.setattr(torch.backends.mkl, "is_available", lambda: False)
            patch.setattr(_kernels, "_BLOCK", block)
        for out in (propagate(with_weights(adj_t, w), x), dense_of(adj_t, w) @ x):
            first = torch.autograd.grad(out.sin().sum(), (w, x), create_graph=True)
            second = torch.autograd.grad(sum(part.sin().sum() for part in first), (w, x))
            orders.append([out, *first, *second])
    torch.testing.assert_close(orders[0], orders[1], **EXACT)


@every_graph
def test_on_hazardous_graphs_and_their_mini_batches(make):
    data = make()
    data.number = torch.arange(data.edge_weight.numel())
    data = to_adj_t(data, kinds={"number": "edge"})
    perm, ptr = partition(data.adj_t, 3, "random", log=False)
    data = permute(data, perm, log=False, kinds={"number": "edge"})
    w = torch.rand(data.number.numel(), dtype=torch.float64).requires_grad_()
    for batch in SubgraphLoader(data, ptr, log=False, kinds={"number": "edge"}):
        own = w[batch.data.number]
        adj_t, x = batch.data.adj_t, batch.data.x
        found = propagate(with_weights(adj_t, own), x)
        expected = dense_of(adj_t, own) @ x
        torch.testing.assert_close(found, expected, **EXACT)
        torch.testing.assert_close(
            *(torch.autograd.grad(out.sin().sum(), w, retain_graph=True) for out in (found, expected)), **EXACT
        )


def test_every_kind_of_backward_of_torch(adj_t, x, w):
    """Numerical gradients of both orders, forward mode, batches of gradients and of tangents."""

    def function(w: Tensor, x: Tensor) -> Tensor:
        return propagate(adj_t, x, w).sin()

    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(function, (w, x), **checks)
    checks = {"check_fwd_over_rev": True, "check_rev_over_rev": True, "check_batched_grad": True}
    assert torch.autograd.gradgradcheck(function, (w, x), **checks)


TRANSFORMS = {
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "jacrev twice": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "vmap": lambda f: torch.func.vmap(torch.func.jacrev(f)),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms_of_the_weights(name, adj_t, x, w):
    given = (torch.stack([w, 2 * w]) if name == "vmap" else w).detach()
    entries = torch.stack([dense_of(adj_t, one) for one in torch.eye(8, dtype=torch.float64)])
    found = TRANSFORMS[name](lambda w: propagate(adj_t, x.detach(), w).sin())(given)
    expected = TRANSFORMS[name](lambda w: (torch.einsum("e,eij->ij", w, entries) @ x.detach()).sin())(given)
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_batch_of_features_and_of_both(adj_t, x, w):
    xs, ws = torch.stack([x, x.cos()], 1).detach(), torch.stack([w, -w]).detach()
    dense = [dense_of(adj_t, each) for each in ws]
    found = torch.func.vmap(lambda x: propagate(adj_t, x, ws[0]), in_dims=1)(xs)
    torch.testing.assert_close(found, torch.stack([dense[0] @ xs[:, i] for i in range(2)]), **EXACT)
    found = torch.func.vmap(lambda x, w: propagate(adj_t, x, w), in_dims=(1, 0))(xs, ws)
    torch.testing.assert_close(found, torch.stack([dense[i] @ xs[:, i] for i in range(2)]), **EXACT)


def test_weights_of_a_transform_cannot_be_put_into_an_adjacency(adj_t, x, w):
    with pytest.raises(TypeError, match=r"transform of torch\.func or have a tangent, .* call propagate\(adj_t"):
        torch.func.grad(lambda w: propagate(with_weights(adj_t, w), x).sum())(w.detach())
    with pytest.raises(TypeError, match=r"transform of torch\.func"):
        torch.func.vmap(lambda w: propagate(with_weights(adj_t, w), x))(w.detach()[None])
    with forward_ad.dual_level(), pytest.raises(TypeError, match="or have a tangent"):
        with_weights(adj_t, forward_ad.make_dual(w.detach(), w.detach()))


def test_the_values_of_an_adjacency_that_nodes_share_edges_in(adj_t, w):
    """Once they have a gradient; of several it cannot be told what belongs to which edge."""
    other, factor = with_weights(adj_t, w), torch.arange(8.0).double()
    out = (other.values() * factor).sum()
    (found,) = torch.autograd.grad(out, w, retain_graph=True)
    assert torch.equal(found, factor)
    with pytest.raises(RuntimeError, match=r"share several edges, .* adj_t\.values\(\) no more than once"):
        torch.autograd.grad(out + other.values().sum(), w)


@pytest.mark.parametrize("uses", [1, 3])
@pytest.mark.parametrize("leaf", [True, False])
def test_an_adjacency_that_requires_grad_itself(leaf, uses, x):
    """Such as torch makes: right with ascending columns, and refused with others."""
    col = torch.tensor([1, 5, 0, 3, 2])
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    rowptr = torch.tensor([0, 2, 2, 4, 4, 5])
    adj_t = torch.sparse_csr_tensor(rowptr, col, weights.detach() if leaf else weights, (5, 7), check_invariants=True)
    adj_t = adj_t.requires_grad_() if leaf else adj_t
    out = sum(propagate(adj_t, x).sin().sum() for _ in range(uses))
    (found,) = torch.autograd.grad(out, adj_t if leaf else weights)
    expected = uses * (dense_of(adj_t, weights) @ x).sin().sum()
    torch.testing.assert_close(found.values() if leaf else found, torch.autograd.grad(expected, weights)[0], **EXACT)


@pytest.mark.parametrize("col", [[5, 1, 0, 3, 2], [1, 1, 0, 3, 2]], ids=["unsorted", "shared"])
def test_one_whose_gradients_torch_would_mix_up_is_refused(col, x):
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    rowptr = torch.tensor([0, 2, 2, 4, 4, 5])
    adj_t = torch.sparse_csr_tensor(rowptr, torch.tensor(col), weights, (5, 7), check_invariants=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"columns are unsorted, .* with_weights\(adj_t\.detach\(\), weights\)"):
            propagate(adj_t, x)
    out = propagate(with_weights(adj_t.detach(), weights), x).sum()
    expected = (dense_of(adj_t, weights) @ x).sum()
    torch.testing.assert_close(*(torch.autograd.grad(o, weights) for o in (out, expected)), **EXACT)


@pytest.mark.parametrize("uses", [1, 3])
def test_the_operator_on_unsorted_columns(uses, x, w):
    """Also together with the values, and with `propagate`."""
    adj_t = make_csr([0, 0, 0, 2, 2, 2, 2, 3], [5, 0, 4, 4, 2, 1, 0, 3], (5, 7))
    other, dense = with_weights(adj_t, w), dense_of(adj_t, w)
    found = sum((other @ x).sum() for _ in range(uses))
    expected = uses * (dense @ x).sum()
    torch.testing.assert_close(*(torch.autograd.grad(o, w, retain_graph=True) for o in (found, expected)), **EXACT)
    found = found + sum(other.values().square().sum() + propagate(other, x).sum() for _ in range(uses))
    expected = 2 * expected + uses * w.square().sum()
    torch.testing.assert_close(*(torch.autograd.grad(o, w) for o in (found, expected)), **EXACT)


def test_the_operator_on_edges_that_nodes_share_is_refused_in_backward(adj_t, x, w):
    other = with_weights(adj_t, w)
    out = other @ x
    torch.testing.assert_close(out, dense_of(adj_t, w) @ x, **EXACT)
    for total in (out.sum(), out.sum() + other.values().sum()):
        with pytest.raises(
            RuntimeError, match=r"nodes share several edges, .* propagate\(adj_t, x\) instead of adj_t @"
        ):
            torch.autograd.grad(total, w, retain_graph=True)


def test_a_detached_adjacency_learns_nothing(adj_t, x, w):
    for bare in (with_weights(adj_t, w).detach(), with_weights(adj_t, w).detach_()):
        out = propagate(bare, x.detach())
        assert not out.requires_grad
        torch.testing.assert_close(out, dense_of(adj_t, w.detach()) @ x.detach(), **EXACT)
    with torch.no_grad():
        constant = with_weights(adj_t, w)
    assert not propagate(constant, x.detach()).requires_grad


@pytest.mark.parametrize("function", [normalize, add_self_loops, lambda adj_t: dropout(adj_t, 0.5)])
def test_what_is_made_of_an_adjacency_with_weights(function):
    """Of both orders, with nodes of degree 0 and edges that two nodes share."""
    adj_t = make_csr([0, 0, 0, 2, 2, 2, 3], [2, 0, 2, 4, 2, 4, 1], (5, 5))
    w = (torch.rand(7, dtype=torch.float64) + 0.1).requires_grad_()
    x = torch.randn(5, 3, dtype=torch.float64)

    def by_hand(kept: Tensor) -> Tensor:
        dense = dense_of(adj_t, w)
        if function not in (normalize, add_self_loops):
            return dense_of(adj_t, w * kept)
        dense = dense + torch.diag((dense.diagonal() == 0).double())
        if function is add_self_loops:
            return dense
        scale = dense.sum(1).rsqrt()
        return scale[:, None] * dense * scale

    torch.manual_seed(0)
    made = function(with_weights(adj_t, w))
    kept = (values_of(made) / w).detach() if made.values().numel() == 7 else w
    orders = []
    for out in (propagate(made, x), by_hand(kept) @ x):
        (first,) = torch.autograd.grad(out.sin().sum(), w, create_graph=True)
        (second,) = torch.autograd.grad(first.sin().sum(), w)
        orders.append([out, first, second])
    torch.testing.assert_close(*orders, **EXACT)


def test_normalising_without_self_loops_where_nodes_have_no_edges():
    adj_t = make_csr([0, 0, 2], [1, 0, 0], (3, 3))
    w = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64, requires_grad=True)
    made = normalize(with_weights(adj_t, w), self_loops=False)
    dense = dense_of(adj_t, w)
    scale = torch.stack([dense[0].sum().rsqrt(), dense.new_zeros(()), dense[2].sum().rsqrt()])
    found, expected = values_of(made).sin().sum(), (scale[:, None] * dense * scale).sin().sum()
    torch.testing.assert_close(torch.autograd.grad(found, w), torch.autograd.grad(expected, w), **EXACT)


@pytest.mark.parametrize("kept", [True, False])
def test_in_frames(kept, adj_t, x, w):
    """Weights from outside of the frame, within the adjacency, and such that are made in it."""
    given, lone = with_weights(adj_t, w.sin()), []

    def region(x: Tensor, adj_t: Tensor) -> Tensor:
        if not kept:
            adj_t = with_weights(adj_t.detach(), w.sin())
            lone.append(weakref.ref(adj_t))
        return propagate(adj_t, x.sin()).cos()

    out = recollect.checkpoint(region, x, given)
    expected = (dense_of(adj_t, w.sin()) @ x.sin()).cos()
    assert all(ref() is None for ref in lone)
    for wanted in (out, expected):
        (first,) = torch.autograd.grad(wanted.sum(), w, create_graph=True)
        lone.append(torch.autograd.grad(first.sin().sum() + wanted.sum(), (w, x)))
    torch.testing.assert_close(*lone[-2:], **EXACT)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_weights", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_in_float32_at_least(dtype, of_weights, kernel, monkeypatch):
    """5,000 ones that follow one another end at 2,048 in float16, at 256 in bfloat16."""
    if not kernel:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    adj_t = make_csr([0] * 3, [2, 0, 2], (1, 3))
    x = torch.ones(3, 5000, dtype=dtype, requires_grad=True)
    w = torch.ones(3, dtype=of_weights, requires_grad=True)
    of_weight, of_x = torch.autograd.grad(propagate(with_weights(adj_t, w), x).sum(), (w, x))
    assert (of_weight.dtype, of_x.dtype) == (of_weights, dtype)
    assert of_weight.tolist() == [torch.tensor(5000.0).to(of_weights).item()] * 3
    assert torch.equal(of_x, torch.tensor([1.0, 0.0, 2.0], dtype=dtype)[:, None].expand(3, 5000))


def test_under_autocast(adj_t, x, w):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = propagate(with_weights(adj_t, w), x)
        found = torch.autograd.grad(out.sum(), (w, x))
    torch.testing.assert_close(found, torch.autograd.grad((dense_of(adj_t, w) @ x).sum(), (w, x)), **EXACT)


@pytest.mark.parametrize("kernel", [True, False])
def test_nothing_of_the_size_of_the_edges_and_channels_is_made(kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    nodes, edges, channels = 300, 40_000, 64
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(nodes, (edges,), generator=generator).sort().values
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), row.bincount(minlength=nodes).cumsum(0)])
    adj_t = sparse_csr(rowptr, torch.randint(nodes, (edges,), generator=generator), torch.ones(edges), (nodes, nodes))
    x, w = torch.randn(nodes, channels, requires_grad=True), torch.rand(edges, requires_grad=True)
    propagate(with_weights(adj_t, w), x).sum().backward()  # the other order of the edges is made
    with peak_memory("cpu") as peak:
        propagate(with_weights(adj_t, w), x).sum().backward()
    of_edges = 8 * edges * 8  # a few numbers for each edge
    assert peak.peak_bytes < of_edges + 8 * nodes * channels * 4 + 2 * _kernels._BLOCK < edges * channels * 4


def test_edges_are_ordered_once_for_all_weights(adj_t, x, w, monkeypatch):
    made = []
    argsort = torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda *args, **kw: made.append(1) or argsort(*args, **kw))
    for step in range(3):
        propagate(with_weights(adj_t, w * step), x).sum().backward()
    assert len(made) == 1


def test_the_order_goes_with_the_adjacency(x, w):
    before = len(_KNOWN)
    adj_t = make_csr([0] * 8, [0, 1, 2, 3, 4, 5, 6, 0], (1, 7))
    other = with_weights(adj_t, w)
    propagate(other, x).sum().backward()
    assert len(_KNOWN) == before + 2
    kept = weakref.ref(_KNOWN[adj_t][1])
    del adj_t
    assert kept() is not None
    del other
    assert kept() is None
    assert len(_KNOWN) == before


def test_weights_of_another_number_are_refused(adj_t, x, w):
    for call in (lambda: propagate(adj_t, x, w[:3]), lambda: with_weights(adj_t, w[:3])):
        with pytest.raises(ValueError, match=r"weights have shape \[3\], but must be \[8\]: one for each edge"):
            call()
    for call in (lambda: propagate(adj_t, x, w.tolist()), lambda: with_weights(adj_t, w.tolist())):
        with pytest.raises(TypeError, match=r"weights are a list, but must be a tensor \[8\]"):
            call()
    with pytest.raises(TypeError, match=r"must be a torch\.sparse_csr"):
        with_weights(edge_index_of(adj_t), w)


def test_edges_that_are_changed_in_place_are_ordered_anew(adj_t, x, w):
    for _ in range(3):
        found, wanted = propagate(adj_t, x, w), dense_of(adj_t, w) @ x
        pairs = zip(*(torch.autograd.grad(y.sin().sum(), (x, w)) for y in (found, wanted)), strict=True)
        assert all(torch.allclose(one, other, **EXACT) for one, other in pairs)
        adj_t.col_indices().copy_(adj_t.col_indices().add(1).remainder(7))


def test_a_gradient_that_does_not_fit_is_refused(w):
    other = with_weights(make_csr([0, 0, 0, 2, 2, 2, 2, 3], [5, 0, 4, 4, 2, 1, 0, 3], (5, 7)), w)
    smaller = make_csr([0] * 4, [0, 1, 2, 3], (5, 7))
    with pytest.raises(RuntimeError, match=r"layout torch\.sparse_csr, whose entries torch's own"):
        other.backward(smaller)


def test_a_module_with_weights_is_copied(adj_t, x):
    gate = torch.nn.Linear(1, 1).double()
    twin = copy.deepcopy(gate)
    features = torch.rand(8, 1, dtype=torch.float64)
    for module in (gate, twin):
        propagate(with_weights(adj_t, module(features).squeeze(1).sigmoid()), x).sum().backward()
    assert torch.equal(gate.weight.grad, twin.weight.grad)
