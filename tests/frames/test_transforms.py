"""Function transforms, tracing and forward mode: frames step aside, or answer as plain."""

import pytest
import torch
from frames_zoo import assert_same, each_source, make, nothing_left
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import recollect
from recollect.frames import frames_apply

# torch.func's forward mode loads decompositions through torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def functional(source, enabled, **options):
    net, x = make(source, depth=2, **options)
    parameters = {k: v.detach() for k, v in net.named_parameters()}

    def loss(parameters, x):
        return functional_call(net, parameters, (x, enabled)).sin().sum()

    return net, loss, parameters, x.detach()


@each_source
def test_func_grad(source):
    results = []
    for enabled in (False, True):
        _, loss, parameters, x = functional(source, enabled)
        results.append(list(grad(loss)(parameters, x).values()))
    assert_same(results[1], results[0])


@each_source
def test_func_grad_of_each_sample(source):
    results = []
    for enabled in (False, True):
        _, loss, parameters, x = functional(source, enabled)
        results.append(list(vmap(grad(loss), (None, 0))(parameters, x).values()))
    assert_same(results[1], results[0])


@each_source
@pytest.mark.parametrize("transform", [jacrev, hessian])
def test_jacobians(source, transform):
    results = []
    for enabled in (False, True):
        _, loss, parameters, x = functional(source, enabled)
        results.append(transform(lambda x, loss=loss, p=parameters: loss(p, x))(x[:2]))
    assert_same(results[1], results[0])


@each_source
def test_vjp_and_jvp(source):
    results = []
    for enabled in (False, True):
        net, _, _, x = functional(source, enabled)
        function = lambda x, net=net, enabled=enabled: net(x, enabled)  # noqa: E731
        pulled = vjp(function, x)[1](torch.ones_like(x))
        results.append((*pulled, jvp(function, (x,), (torch.ones_like(x),))[1]))
    assert_same(results[1], results[0])


@each_source
def test_vmap_without_grad(source):
    net, x = make(source)
    with torch.no_grad():
        assert_same(vmap(net)(x), net(x))


def test_frames_step_aside():
    seen = []
    x = torch.randn(3)
    assert frames_apply()
    grad(lambda x: (seen.append(frames_apply()), x.sum())[1])(x)
    with torch.no_grad():
        seen.append(frames_apply())
    with torch.inference_mode():
        seen.append(frames_apply())
    with recollect.dry_mode():
        seen.append(frames_apply())
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        seen.append(frames_apply())
    assert seen == [False] * 5
    assert frames_apply()


@each_source
def test_where_saved_tensor_hooks_are_disabled(source):
    net, x = make(source)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        y = net(x)
    y.sum().backward()
    assert not any(net.calls)


@each_source
def test_vmap_inside_a_frame(source):
    net, x = make(source, depth=2)
    for block in net.blocks:
        block.forward = vmap(block.forward)
    grads = [torch.autograd.grad(net(x, e).sin().sum(), [x, *net.parameters()]) for e in (False, True)]
    assert_same(grads[1], grads[0])


@each_source
@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="torch.func.grad refuses the frame's saved-tensor hooks")
def test_func_grad_inside_a_frame(source):
    net, x = make(source, depth=2)
    for block in net.blocks:
        block.forward = lambda z, f=block.forward: f(z) + grad(lambda z: z.sin().sum())(z)
    grads = [torch.autograd.grad(net(x, e).sin().sum(), [x, *net.parameters()]) for e in (False, True)]
    assert_same(grads[1], grads[0])


@each_source
def test_functional_call_around_frames(source):
    net, x = make(source, norm=True)
    other = {k: (v.detach() * 1.5).requires_grad_() for k, v in net.named_parameters()}
    grads = []
    for enabled in (False, True):
        y = functional_call(net, other, (x, enabled))
        grads.append(torch.autograd.grad(y.sin().sum(), [x, *other.values()]))
    assert_same(grads[1], grads[0])


@each_source
def test_functional_call_with_parameters_that_have_a_history(source):
    net, x = make(source)
    leaf = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    grads = []
    for enabled in (False, True):
        y = functional_call(net, {k: v.detach() * leaf for k, v in net.named_parameters()}, (x, enabled))
        grads.append(torch.autograd.grad(y.sin().sum(), [x, leaf]))
    assert_same(grads[1], grads[0])


@pytest.mark.parametrize("vectorize", [False, True])
@each_source
def test_autograd_functional_jacobian(source, vectorize):
    net, x = make(source, depth=2, dropout=0.0)
    results = [
        torch.autograd.functional.jacobian(lambda x, e=enabled: net(x, e).sin().sum(0), x, vectorize=vectorize)
        for enabled in (False, True)
    ]
    assert_same(results[1], results[0])
    nothing_left()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing():
    net, x = make("coupling")
    net.eval()
    traced = torch.jit.trace(net, x.detach())
    assert_same(traced(2 * x.detach()), net(2 * x).detach())


@pytest.mark.parametrize("source", ["coupling", "inverse", "checkpoint"])
def test_forward_mode(source):
    net, x = make(source, depth=2)
    tangents = []
    for enabled in (False, True):
        with forward_ad.dual_level():
            y = net(forward_ad.make_dual(x.detach(), torch.ones_like(x)), enabled)
            tangents.append(forward_ad.unpack_dual(y).tangent.detach())
    assert_same(tangents[1], tangents[0])


def test_forward_over_reverse_mode():
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, dtype=torch.float64)

    def product(enabled):
        p = x.clone().requires_grad_()
        with forward_ad.dual_level():
            y = recollect.checkpoint(lambda x: x.sin() * x.exp(), forward_ad.make_dual(p, v), enabled=enabled)
            (g,) = torch.autograd.grad(y.sum(), p, create_graph=True)
            return forward_ad.unpack_dual(g).tangent.detach()

    assert_same(product(True), product(False))
