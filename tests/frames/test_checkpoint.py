"""What may go into a checkpoint and come out of it."""

import functools
from typing import NamedTuple

import pytest
import torch
from frames_zoo import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import recollect
from recollect.frames import couple
from recollect.memory import peak_memory


def randn(*shape, **options):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True, **options)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def both(function, args, inputs, pick=lambda out: out, **options):
    """Check the gradient of ``pick(function(*args))`` framed and plain."""
    grads = []
    for enabled in (False, True):
        output = pick(recollect.checkpoint(function, *args, enabled=enabled, **options))
        grads.append(torch.autograd.grad(output.sin().sum(), inputs, allow_unused=True, retain_graph=True))
    assert_same(grads[1], grads[0])


def test_tensors_in_lists_dicts_and_tuples():
    a, b, c, d = (randn(3) for _ in range(4))

    def function(items, table, pair):
        return (items[0] * items[1][0]).exp() * table["c"].sin() + pair[1].cos() * pair[0]

    both(function, ([a, [b]], {"c": c}, (2.5, d)), [a, b, c, d])


def test_keywords_by_partial():
    a, b = randn(3), randn(3)

    def function(x, *, scale, power=1.0):
        return (x * scale).exp() ** power

    both(functools.partial(function, scale=b, power=2.0), (a,), [a, b])


def test_arguments_that_are_not_tensors():
    a = randn(3)

    def function(x, nothing, flag, number, text, thing):
        assert nothing is None
        assert text == "text"
        assert isinstance(thing, object)
        return (x * number).exp() if flag else x

    both(function, (a, None, True, 3, "text", object()), [a])


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo, torch.sparse_csc])
@pytest.mark.parametrize("source", ["checkpoint", "inverse", "coupling"])
@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|invariant)")
def test_sparse_arguments(layout, source):
    dense = (torch.rand(6, 6) < 0.4).double()
    graph = dense.to_sparse(layout=layout)
    weight, x = randn(2, 2), randn(6, 4)

    def block(z, adj):
        return torch.tanh(adj @ (z @ weight))

    def swap(x, adj):
        a, b = x.chunk(2, -1)
        return torch.cat([b + block(a, adj), a], -1), adj

    def unswap(y, adj):
        b, a = y.chunk(2, -1)
        return torch.cat([a, b - block(a, adj)], -1), adj

    grads = []
    for enabled in (False, True):
        h, adj = x * 1.0, graph
        for _ in range(3):
            if source == "coupling":
                h = couple([block, block], h, [(graph,), (graph,)], enabled=enabled)
            elif source == "inverse":
                h, adj = recollect.checkpoint(swap, h, adj, inverse=unswap, enabled=enabled)
            else:
                h, _ = recollect.checkpoint(swap, h, graph, enabled=enabled)
        grads.append(torch.autograd.grad(h.sin().sum(), [x, weight]))
    assert_same(grads[1], grads[0])


@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_sparse_values_that_require_grad():
    indices = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 2]])
    values, x = randn(4), randn(3, 2)

    def function(values, x):
        return torch.sparse.mm(torch.sparse_coo_tensor(indices, values, (3, 3)), x).sin().exp()

    both(function, (values, x), [values, x])


def test_a_new_sparse_output_of_an_invertible_function():
    x, graph = randn(3, 3), torch.eye(3, dtype=torch.float64).to_sparse()

    def forward(h, adj):
        return h.exp(), adj * 2

    def inverse(y, adj):
        return y.log(), adj / 2

    grads = []
    for enabled in (False, True):
        h, adj = x * 0.1, graph
        for _ in range(2):
            h, adj = recollect.checkpoint(forward, h, adj, inverse=inverse, enabled=enabled)
        grads.append(torch.autograd.grad(h.sum(), x))
    assert_same(grads[1], grads[0])


def test_integer_and_non_tensor_outputs():
    x = randn(4, 5)

    def function(x):
        value, index = x.exp().max(1)
        return value, index, "text", None, x.shape[0]

    _, index, text, nothing, rows = recollect.checkpoint(function, x)
    assert (text, nothing, rows) == ("text", None, 4)
    assert torch.equal(index, x.argmax(1))
    both(function, (x,), [x], lambda out: out[0])


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "pick"),
    [
        (lambda t, u: [t, u], lambda out: out[0] * out[1]),
        (lambda t, u: {"a": t, "b": [u]}, lambda out: out["a"] * out["b"][0]),
        (lambda t, u: (t, (u,)), lambda out: out[0] * out[1][0]),
        (Pair, lambda out: out.first * out.second),
    ],
    ids=["list", "dict", "nested", "named"],
)
def test_structured_outputs(wrap, pick):
    x = randn(3)
    both(lambda x: wrap(x.exp(), x.sin().exp()), (x,), [x], pick)


@pytest.mark.parametrize("wrap", [lambda t: (t,), lambda t: [t]], ids=["tuple", "list"])
def test_outputs_of_an_invertible_function_are_its_inverse_arguments(wrap):
    x = randn(3)
    both(lambda h: wrap(h.exp()), (x * 1.0,), [x], lambda out: out[0], inverse=lambda t: t.log())


def test_a_dict_from_an_invertible_function_is_refused():
    with pytest.raises(TypeError, match=r"returns a tensor, or a tuple.*got dict"):
        recollect.checkpoint(lambda h: {"a": h.exp()}, randn(3), inverse=lambda out: out["a"].log())


@pytest.mark.parametrize("inverse", [None, lambda y: y])
@pytest.mark.parametrize(
    "function", [lambda x: x, lambda x: x.view(2, 6), lambda x: x[:2], lambda x: x.t(), lambda x: x.detach() * 1 + x]
)
def test_outputs_that_alias_inputs(function, inverse):
    x = randn(4, 3)
    grads = []
    for enabled in (False, True):
        h = x.exp()
        y = recollect.checkpoint(function, h, enabled=enabled, inverse=inverse)
        grads.append(torch.autograd.grad(y.sin().sum() + h.cos().sum(), x))
    assert_same(grads[1], grads[0])


def test_an_output_that_is_an_input_beside_another():
    x = randn(4, 3)

    def forward(h, g):
        return h, g + h.sin()

    grads = []
    for enabled in (False, True):
        h, g = x.exp(), x.sin()
        for _ in range(3):
            h, g = recollect.checkpoint(forward, h, g, inverse=lambda h, y: (h, y - h.sin()), enabled=enabled)
        grads.append(torch.autograd.grad((h * g).sin().sum(), x))
    assert_same(grads[1], grads[0])


def test_the_same_tensor_twice():
    x = randn(4, 3)
    h = x.exp()
    both(lambda a, b: a.sin() * b.exp(), (h, h), [x])


def test_self_attention():
    attention = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    x = randn(3, 2, 8)
    both(attention, (x, x, x), [x, *attention.parameters()], lambda out: out[0])


def test_a_closure_that_requires_grad():
    x, outside = randn(3), randn(3)
    middle = outside.exp()
    both(lambda x: (x * middle).sin().exp(), (x,), [x, outside])


def test_parameters_as_arguments():
    x, layer = randn(5, 3), nn.Linear(3, 3, dtype=torch.float64)
    both(nn.functional.linear, (x, layer.weight, layer.bias), [x, *layer.parameters()])


def test_a_function_without_parameters_or_saved_tensors():
    x = randn(3)
    for function in (torch.sin, lambda x: x * 2, lambda x: x + 1):
        both(function, (x,), [x])


def test_an_auxiliary_output_may_be_dropped():
    x = randn(3)
    y, auxiliary = recollect.checkpoint(lambda x: (x * 2, x.exp()), x)
    del auxiliary
    assert_same(torch.autograd.grad(y.sum(), x), [torch.full_like(x, 2.0)])


def test_outputs_go_backward_one_after_the_other():
    x = randn(3)
    linear, exponential = recollect.checkpoint(lambda x: (x * 2, x.exp().cos()), x)
    exponential.sum().backward()
    linear.sum().backward()
    assert_same(x.grad, 2 - x.exp().sin() * x.exp())


def test_a_tensor_returned_from_a_closure_keeps_its_own_graph():
    x, other = randn(3), randn(3).exp()
    y, same = recollect.checkpoint(lambda x: (x.exp(), other), x)
    assert same is other
    del y
    same.sin().sum().backward()


def test_an_unused_input_has_no_gradient():
    x, unused = randn(3), randn(3)
    both(lambda x, u: x.exp().sin(), (x, unused), [x, unused])


def test_enabled_false_runs_plain():
    calls = []

    def function(x):
        calls.append(1)
        return x.exp()

    x = randn(3)
    recollect.checkpoint(function, x, enabled=False).sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("keep", [True, False])
def test_keep_holds_an_input_of_an_invertible_function(keep):
    inverted = []

    def inverse(y, z):
        inverted.append(1)
        return y.log(), (z - y).clone()

    def run():
        h, g = x.exp(), x.sin()
        kept = [h, g] if keep else []
        y, z = recollect.checkpoint(lambda a, b: (a.exp(), b + a.exp()), h, g, inverse=inverse, keep=kept)
        return (y.sin() * z.cos()).sum()

    x = randn(100)
    actual = torch.autograd.grad(run(), x)
    with recollect.dry_mode(False):
        a, b = x.exp(), x.sin()
        expected = torch.autograd.grad((a.exp().sin() * (b + a.exp()).cos()).sum(), x)
    assert_same(actual, expected)
    assert bool(inverted) is not keep


def test_an_inverse_may_leave_out_kept_arguments_at_the_end():
    x, scale = randn(3), torch.full((3,), 2.0, dtype=torch.float64)
    h = x * 1.0
    both(lambda h, s: (h * s).exp(), (h, scale), [x], inverse=lambda y: y.log() / 2, keep=[scale])


def test_an_expanded_input_of_an_invertible_function():
    row = randn(1, 3)
    h = (row * 1.0).expand(4, 3)
    both(lambda h: h.exp(), (h,), [row], inverse=lambda y: y.log())


def test_a_transposed_input_of_an_invertible_function():
    x = randn(4, 3)
    grads = []
    for enabled in (False, True):
        h = (x * 0.1).t()
        for _ in range(3):
            h = recollect.checkpoint(lambda h: h.exp(), h, inverse=lambda y: y.log().contiguous(), enabled=enabled)
        grads.append(torch.autograd.grad(h.sin().sum(), x))
    assert_same(grads[1], grads[0])


class Twice(torch.autograd.Function):
    """Reads its saved tensors twice."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x.sin() * scale

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors
        again, scale = ctx.saved_tensors
        assert torch.equal(x, again)
        return grad * x.cos() * scale, (grad * again.sin()).sum(0)


@pytest.mark.parametrize("source", ["checkpoint", "coupling"])
def test_saved_tensors_read_twice(source):
    x, scale = randn(4, 6), randn(3)

    def block(z):
        return Twice.apply(z.tanh(), scale.exp())

    grads = []
    for enabled in (False, True):
        h = x * 1.0
        for _ in range(3):
            if source == "coupling":
                h = couple([block, block], h, [(), ()], enabled=enabled)
            else:
                h = torch.cat([recollect.checkpoint(block, c, enabled=enabled) for c in h.chunk(2, -1)], -1)
        grads.append(torch.autograd.grad(h.sum(), [x, scale]))
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("source", ["checkpoint", "coupling"])
def test_a_gradient_taken_inside_a_region(source, inner):
    # A force field: the energy's gradient is part of the forward, and is itself trained.
    layer, head = nn.Linear(3, 8, dtype=torch.float64), nn.Linear(8, 1, dtype=torch.float64)
    x = randn(5, 6)

    def energy(z):
        return head(nn.functional.dropout(torch.tanh(layer(z)), 0.3))

    def run(enabled, inner):
        def force(z):
            total = recollect.checkpoint(energy, z, enabled=inner).sum()
            return torch.autograd.grad(total, z, create_graph=True)[0].sin()

        torch.manual_seed(1)
        h = x * 1.0
        for _ in range(2):
            if source == "coupling":
                h = couple([force, force], h, [(), ()], enabled=enabled)
            else:
                h = torch.cat([recollect.checkpoint(force, c, enabled=enabled) for c in h.chunk(2, -1)], -1)
        return torch.autograd.grad(h.exp().sum(), [x, *layer.parameters(), head.weight])

    expected = run(False, False)
    assert_same(run(False, inner), expected)
    assert_same(run(True, inner), expected)


# (a reentrant checkpoint calls backward in backward, which saved-tensor hooks around it cannot serve)
@pytest.mark.parametrize(("outer", "reentrant"), [(True, False), (False, False), (False, True)])
def test_together_with_torch_checkpoint(outer, reentrant):
    weight, x = randn(4, 4), randn(3, 4)

    def layer(h):
        return nn.functional.dropout(torch.tanh(h @ weight), 0.4).exp()

    def ours(f, h):
        return recollect.checkpoint(f, h)

    def theirs(f, h):
        return torch_checkpoint(f, h, use_reentrant=reentrant)

    first, second = (ours, theirs) if outer else (theirs, ours)
    grads = []
    for a, b in (((lambda f, h: f(h)),) * 2, (first, second)):
        torch.manual_seed(1)
        y = a(lambda h, b=b: layer(b(layer, h)).sin(), x * 1.0)
        y.sum().backward()
        grads.append([x.grad, weight.grad])
        x.grad = weight.grad = None
    assert_same(grads[1], grads[0])


def test_anomaly_mode():
    x = randn(3)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        recollect.checkpoint(lambda x: x.sin().exp(), x).sum().backward()
    assert_same(x.grad, x.cos() * x.sin().exp())


def test_a_checkpoint_keeps_its_input_only():
    x = torch.randn(1000, requires_grad=True)

    def function(x):
        for _ in range(10):
            x = x.sin()
        return x.sum()

    with peak_memory("cpu") as memory:
        loss = recollect.checkpoint(function, x)
    assert memory.current_bytes <= 64
    with peak_memory("cpu") as memory:
        plain = function(x)
    assert memory.current_bytes >= 9 * 4000
    del loss, plain


@pytest.mark.parametrize("enabled", [True, False])
def test_an_inverse_is_a_function(enabled):
    with pytest.raises(TypeError, match=r"inverse must be a function of the outputs \(got True\)"):
        recollect.checkpoint(torch.exp, torch.randn(3, requires_grad=True), inverse=True, enabled=enabled)


class TestEarlyStop:
    @pytest.mark.parametrize("certify", [True, False])
    @pytest.mark.parametrize("after", [nn.Identity(), nn.Linear(4, 4, dtype=torch.float64), nn.Tanh()])
    def test_noise_that_an_operation_fills_after_it_has_saved_it(self, certify, after):
        region = nn.Sequential(nn.RReLU(), after)
        gradients = []
        for enabled in (False, True):
            torch.manual_seed(0)
            x = randn(8, 4)
            y = recollect.checkpoint(region, x * 1, certify=certify, enabled=enabled)
            gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
        assert torch.equal(*gradients)

    def test_what_comes_after_the_last_that_is_needed_does_not_run_again(self):
        calls = []

        def region(x):
            y = x.sin()
            calls.append(recollect.in_backward())
            return y * 2

        recollect.checkpoint(region, randn(4) * 1).sum().backward()
        assert calls == [False]
