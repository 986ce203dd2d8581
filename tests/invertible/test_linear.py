"""Linear layers and convolutions against torch's, their inverses, determinants and parametrisations."""

import copy
import io
import math
import pickle
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from recollect.invertible import AdditiveCoupling, Conv1d, Conv2d, Conv3d, Linear, Sequential
from recollect.memory import peak_memory

# name: (class, arguments, keywords, shape of x)
CASES: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": (Linear, (4, 4), {}, (5, 4)),
    "linear scaled": (Linear, (4, 4), {"scaled": True}, (5, 3, 4)),
    "linear lu": (Linear, (4, 4), {"parametrization": "lu"}, (5, 4)),
    "linear free": (Linear, (4, 4), {"parametrization": None, "bias": False}, (5, 2, 2, 4)),
    "linear of one": (Linear, (1, 1), {"parametrization": "lu"}, (5, 1)),
    "linear no bias": (Linear, (3, 3), {"bias": False}, (5, 3)),
    "conv1d patches": (Conv1d, (2, 6, 3), {"scaled": True}, (5, 2, 6)),
    "conv1d lu": (Conv1d, (4, 4, 1), {"parametrization": "lu"}, (5, 4, 3)),
    "conv2d 1x1": (Conv2d, (4, 4, 1), {}, (3, 4, 2, 3)),
    "conv2d 1x1 grouped": (Conv2d, (6, 6, 1), {"groups": 3, "parametrization": "lu"}, (3, 6, 2, 2)),
    "conv2d patches": (Conv2d, (2, 12, (2, 3)), {"bias": False}, (3, 2, 4, 3)),
    "conv2d patches grouped": (Conv2d, (2, 8, 2), {"groups": 2, "scaled": True}, (3, 2, 4, 2)),
    "conv2d free grouped": (Conv2d, (4, 16, 2), {"groups": 2, "parametrization": None}, (2, 4, 2, 2)),
    "conv3d patches": (Conv3d, (1, 4, (1, 2, 2)), {"parametrization": "lu"}, (3, 1, 2, 4, 2)),
    "conv3d grouped": (Conv3d, (2, 4, (2, 1, 1)), {"groups": 2}, (3, 2, 2, 1, 3)),
}
TALL: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear tall": (Linear, (3, 5), {}, (5, 2, 3)),
    "linear tall scaled": (Linear, (3, 5), {"scaled": True}, (5, 3)),
    "linear tall free": (Linear, (3, 5), {"parametrization": None}, (5, 3)),
    "conv1d tall": (Conv1d, (2, 8, 2), {"scaled": True, "groups": 2}, (3, 2, 4)),
    "conv2d tall free": (Conv2d, (2, 6, 1), {"parametrization": None, "groups": 2}, (3, 2, 2, 2)),
}
ALL = CASES | TALL
square = pytest.mark.parametrize("name", CASES)
every = pytest.mark.parametrize("name", ALL)


def make(name, dtype=torch.float64, shake=0.4, **options):
    """A layer some way from where it begins, and an input."""
    kind, args, keywords, shape = ALL[name]
    torch.manual_seed(0)
    layer = kind(*args, **keywords, **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += shake * torch.randn_like(parameter)
    return layer.to(dtype), torch.randn(shape, dtype=torch.float64).to(dtype)


def torch_layer(name):
    """Torch's own layer of the same settings."""
    kind, args, keywords, _ = ALL[name]
    own = {key: value for key, value in keywords.items() if key in ("bias", "groups")}
    if kind is not Linear:
        own["stride"] = args[2]
    plain = next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn"))
    return plain(*args, **own, dtype=torch.float64)


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def assert_same(found, expected, tolerance=1e-10):
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert f.dtype == e.dtype
        assert float((f - e).detach().norm()) <= tolerance * max(1e-3, float(e.detach().norm()))


def gradients(layer, x, *, log_det=False, run=None):
    """Gradients of a loss in x and all parameters; the output and the loss's gradients are in the list."""
    leaf = x.detach().clone().requires_grad_()
    if log_det:
        y, one = layer.forward_and_log_det(leaf * 1)
        loss = (y.sin().flatten(1).sum(1) * one.cos()).sum() + one.sum()
    else:
        y = (run or layer)(leaf * 1)
        loss = y.float().sin().sum() if y.dtype == torch.bfloat16 else y.sin().sum()
    return [y.detach(), *torch.autograd.grad(loss, [leaf, *layer.parameters()])]


# What it computes.


@every
def test_the_output_is_that_of_torchs_layer(name):
    layer, x = make(name)
    oracle = torch_layer(name)
    assert isinstance(layer, type(oracle))
    with torch.no_grad():
        oracle.weight.copy_(layer.weight)
        if layer.bias is not None:
            oracle.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), oracle(x), rtol=1e-13, atol=1e-13)  # strides of the weights may differ


@every
def test_the_inverse_gives_back_the_input(name):
    layer, x = make(name)
    assert relative(layer.inverse(layer(x)), x) < 1e-12
    assert layer.check(x, rtol=1e-10, atol=1e-10)


@square
def test_the_function_gives_back_the_output(name):
    layer, x = make(name)
    y = layer(x).detach()
    assert relative(layer(layer.inverse(y.flip(0))), y.flip(0)) < 1e-12


@pytest.mark.parametrize("name", TALL)
def test_the_inverse_of_other_outputs_is_the_least_squares_solution(name):
    layer, x = make(name)
    layer.requires_grad_(False)
    y = torch.randn_like(layer(x))
    residual = layer(layer.inverse(y)) - y  # orthogonal to all that the layer can produce
    direction = layer(torch.randn_like(x)) - layer(torch.zeros_like(x))
    assert float(residual.norm()) > 0.1
    assert abs(float((residual * direction).sum())) < 1e-12 * float(residual.norm() * direction.norm())


@every
def test_it_begins_with_orthonormal_columns_in_each_group(name):
    kind, args, keywords, _ = ALL[name]
    layer = kind(*args, **keywords, dtype=torch.float64)
    first = layer.weight.detach().clone()
    layer.reset_parameters()
    assert layer.weight.numel() == 1 or not torch.equal(layer.weight, first)
    for weight in (first, layer.weight.detach()):
        for one in weight.flatten(1).chunk(keywords.get("groups", 1)):
            torch.testing.assert_close(one.T @ one, torch.eye(one.size(1), dtype=torch.float64), rtol=0, atol=1e-12)


# Gradients.


@every
def test_gradients_are_those_of_plain_autograd(name):
    layer, x = make(name)
    found = gradients(layer, x)
    for flags in ({"invertible": False}, {"checkpoint": False}):
        with layer.temp_mode(**flags):
            assert_same(found, gradients(layer, x))
    assert all(float(g.abs().max()) > 0 for g in found)


@every
def test_gradients_through_the_parametrisation_are_those_of_finite_differences(name):
    layer, x = make(name)
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x[:1].requires_grad_(), *parameters.values()))


@square
def test_reversed_it_trains(name):
    layer, x = make(name)
    y = layer(x).detach()
    layer.reverse()
    assert relative(layer(y), x) < 1e-12
    found = gradients(layer, y)
    with layer.temp_mode(checkpoint=False):
        assert_same(found, gradients(layer, y))
        assert_same(found[1:], gradients(layer, y, run=layer.inverse)[1:])
    with layer.temp_mode(reversed=False):
        assert relative(layer(x), y) < 1e-12


@pytest.mark.parametrize("name", TALL)
def test_layers_that_are_not_square_are_not_reversible_and_have_no_determinant(name):
    layer, x = make(name)
    assert not layer.reversible
    with pytest.raises(RuntimeError, match="not reversible"):
        layer.reverse()
    for call in (layer.forward_and_log_det, layer.function_and_log_det):
        with pytest.raises(NotImplementedError, match=r"weight is not square \(\d x \d\)"):
            call(x)


@pytest.mark.parametrize("name", ["linear lu", "conv2d patches grouped", "linear tall"])
def test_double_backward(name):
    layer, x = make(name)

    def second():
        leaf = x.clone().requires_grad_()
        loss = layer(leaf * 1).sin().sum()
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [leaf, *layer.parameters()], allow_unused=True)

    found = second()
    with layer.temp_mode(checkpoint=False):
        expected = second()
    assert [f is None for f in found] == [e is None for e in expected]
    assert_same([f for f in found if f is not None], [e for e in expected if e is not None])


# Log-determinants.


@square
def test_log_determinant_is_that_of_the_jacobian(name):
    layer, x = make(name)
    layer.requires_grad_(False)
    y, log_det = layer.forward_and_log_det(x)
    assert torch.equal(y, layer(x))
    for i in range(x.size(0)):
        one = x[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(layer.function, one).reshape(one.numel(), one.numel())
        assert abs(float(log_det[i]) - float(torch.linalg.slogdet(jacobian).logabsdet)) < 1e-10
    back, inverse_log_det = layer.inverse_and_log_det(y)
    assert relative(back, x) < 1e-12
    assert torch.equal(inverse_log_det, -log_det)
    scales = "scaled" in ALL[name][2] or ALL[name][2].get("parametrization", "orthogonal") != "orthogonal"
    assert (float(log_det.abs().max()) > 0.01) == scales


@square
def test_gradients_of_the_log_determinant(name):
    layer, x = make(name)
    groups = ALL[name][2].get("groups", 1)
    for turn in (False, True):
        with layer.temp_mode(reversed=turn):
            outputs = layer.function(x).detach()
            _, log_det = layer.forward_and_log_det(outputs if turn else x)
            positions = math.prod(outputs.shape[1:-1] if isinstance(layer, Linear) else outputs.shape[2:])
            matrices = layer.weight.flatten(1)
            matrices = matrices.reshape(groups, -1, matrices.size(1))
            oracle = torch.linalg.slogdet(matrices).logabsdet.sum() * (-positions if turn else positions)
            torch.testing.assert_close(log_det, oracle.expand_as(log_det), rtol=1e-10, atol=1e-10)
            if log_det.requires_grad:
                found = torch.autograd.grad(log_det[0], list(layer.parameters()), allow_unused=True)
                expected = torch.autograd.grad(oracle, list(layer.parameters()), allow_unused=True)
                for parameter, f, e in zip(layer.parameters(), found, expected, strict=True):
                    zeros = torch.zeros_like(parameter)
                    assert_same([zeros if f is None else f], [zeros if e is None else e])


@square
def test_gradients_of_both_are_those_of_plain_autograd(name):
    layer, x = make(name)
    for turn in (False, True):
        with layer.temp_mode(reversed=turn):
            given = layer.function(x).detach() if turn else x
            found = gradients(layer, given, log_det=True)
            with layer.temp_mode(checkpoint=False):
                assert_same(found, gradients(layer, given, log_det=True))


# Inputs.


@every
def test_empty_batch(name):
    layer, x = make(name)
    for run in (layer.forward, layer.function):
        empty = x[:0].clone().requires_grad_()
        y = run(empty * 1)
        assert y.shape == layer(x)[:0].shape
        assert layer.inverse(y).shape == empty.shape
        for gradient in torch.autograd.grad(y.sum(), [empty, *layer.parameters()]):
            assert not gradient.any()
    if layer.reversible:
        assert layer.forward_and_log_det(x[:0])[1].shape == (0,)


@every
def test_inputs_that_are_not_contiguous(name):
    layer, x = make(name)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    expected = gradients(layer, x)
    for one in (strided, turned, x[:1].expand_as(x)):
        found = gradients(layer, one)
        assert_same(found, gradients(layer, one.contiguous()))
        if one is not x and torch.equal(one, x):
            assert_same(found, expected)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(("conv2d", "conv3d"))])
def test_channels_last(name):
    layer, x = make(name)
    last = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    assert_same(gradients(layer, last), gradients(layer, x))


@every
def test_float32(name):
    layer, x = make(name, torch.float32)
    y = layer(x)
    assert y.dtype == torch.float32
    assert relative(layer.inverse(y), x) < 1e-5
    found = gradients(layer, x)
    with layer.temp_mode(checkpoint=False):
        assert_same(found, gradients(layer, x), 1e-5)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@every
def test_autocast(name, half):
    layer, x = make(name, torch.float32, shake=0.1, drift_threshold=1.0)
    with torch.autocast("cpu", half):
        y = layer(x)
        back = layer.inverse(y)
        weight = layer.weight
        found = gradients(layer, x)
        with layer.temp_mode(checkpoint=False):
            expected = gradients(layer, x)
        if layer.reversible:
            log_det = layer.forward_and_log_det(x)[1]
            torch.testing.assert_close(log_det, layer.function_and_log_det(x)[1])
            assert log_det.dtype == torch.float32
    assert y.dtype == half
    assert back.dtype == torch.float32
    assert torch.equal(weight, layer.weight)  # as without autocast
    assert relative(back, x) < 0.05
    assert torch.equal(found[0], expected[0])
    assert_same(found[1:], expected[1:], 0.05)


@square
def test_reversed_under_autocast(name):
    layer, x = make(name, torch.float32, shake=0.1, drift_threshold=1.0)
    y = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16), layer.temp_mode(reversed=True):
        found = gradients(layer, y)
        with layer.temp_mode(checkpoint=False):
            assert_same(found, gradients(layer, y), 0.05)
    assert relative(found[0], x) < 1e-4


@every
def test_half_precision_throughout(name):
    layer, x = make(name, torch.bfloat16, shake=0.1, drift_threshold=1.0)
    y = layer(x)
    assert y.dtype == layer.weight.dtype == layer.inverse(y).dtype == torch.bfloat16
    assert relative(layer.inverse(y), x) < 0.1
    found = gradients(layer, x)
    with layer.temp_mode(checkpoint=False):
        assert_same(found, gradients(layer, x), 0.1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["linear scaled", "conv2d 1x1 grouped", "linear tall"])
def test_without_grad_and_in_evaluation(name, mode):
    layer, x = make(name)
    expected = layer(x).detach()
    with mode():
        assert torch.equal(layer.eval()(x), expected)
        assert relative(layer.inverse(expected), x) < 1e-12


# Training.


@every
def test_training_keeps_it_invertible(name):
    layer, x = make(name, torch.float32)
    target = torch.randn_like(layer(x))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x * 1) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert relative(layer.inverse(layer(x)), x) < 1e-4
    if layer.parametrization == "orthogonal" and not ALL[name][2].get("scaled"):
        for one in layer.weight.detach().flatten(1).chunk(ALL[name][2].get("groups", 1)):
            torch.testing.assert_close(one.T @ one, torch.eye(one.size(1)), rtol=0, atol=2e-6)


def test_large_orthogonal_weights_stay_orthogonal_in_float32():
    torch.manual_seed(0)
    layer = Linear(256, 256, bias=False)
    with torch.no_grad():
        layer.matrices.skew.normal_(std=0.3)
    weight = layer.weight.detach()
    assert float((weight.T @ weight - torch.eye(256)).abs().max()) < 5e-6
    x = torch.randn(8, 256)
    assert relative(layer.inverse(layer(x)), x) < 5e-6


class Calls(TorchDispatchMode):
    """Count the calls of operators."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


def test_the_weight_is_computed_once_in_forward_once_in_the_inverse_and_once_in_the_rebuild():
    layers = [make("linear")[0] for _ in range(3)]
    x = make("linear")[1].requires_grad_()
    with Calls() as calls:
        y = x * 1
        for layer in layers:
            y = layer(y)
        assert calls.counts[torch.ops.aten.linalg_inv_ex] == 3
        y.sum().backward()
    assert calls.counts[torch.ops.aten.linalg_inv_ex] == 9


@pytest.mark.parametrize("parametrization", ["orthogonal", "lu", None])
@pytest.mark.parametrize("kind", [Linear, Conv2d])
def test_memory_does_not_grow_with_depth(kind, parametrization):
    def peak(depth, **flags):
        torch.manual_seed(0)
        options = {"parametrization": parametrization}
        layers = [kind(4, 4, **options) if kind is Linear else kind(4, 4, 1, **options) for _ in range(depth)]
        for layer in layers:
            for key, value in flags.items():
                setattr(layer, key, value)
        x = torch.randn(4096, 4) if kind is Linear else torch.randn(16, 4, 16, 16)
        with peak_memory() as memory:
            y = x * 1
            for layer in layers:
                y = layer(y)
            y.square().sum().backward()
        return memory.peak_bytes

    assert peak(24) < 1.15 * peak(4)
    assert peak(24, checkpoint=False) > 3 * peak(24)


def test_in_a_chain_with_others():
    def build():
        torch.manual_seed(0)
        block = lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))  # noqa: E731
        return Sequential(
            Linear(6, 6, scaled=True),
            AdditiveCoupling(block(), block()),
            Linear(6, 6, parametrization="lu"),
            Sequential(Linear(6, 6), AdditiveCoupling(block(), block())),
            Linear(6, 6, parametrization=None),
        ).double()

    x = torch.randn(7, 6, dtype=torch.float64)
    flow, plain = build(), build()
    for module in plain.modules():
        if hasattr(module, "temp_mode"):
            module.checkpoint = False
    assert_same(gradients(flow, x), gradients(plain, x))
    assert_same(gradients(flow, x, log_det=True), gradients(plain, x, log_det=True))
    y, log_det = flow.forward_and_log_det(x)
    assert relative(flow.inverse(y), x) < 1e-12
    jacobian = torch.autograd.functional.jacobian(lambda one: plain(one[None])[0], x[0])
    assert abs(float(torch.linalg.slogdet(jacobian).logabsdet) - float(log_det[0].detach())) < 1e-10
    flow.reverse()
    plain.reverse()
    assert_same(gradients(flow, y.detach()), gradients(plain, y.detach()))


def test_convolutions_in_a_chain():
    def build():
        torch.manual_seed(0)
        return Sequential(
            Conv2d(2, 8, 2, scaled=True), Conv2d(8, 8, 1, groups=2, parametrization="lu"), Conv2d(8, 16, 1)
        ).double()

    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    net, plain = build(), build()
    for module in plain.modules():
        if hasattr(module, "temp_mode"):
            module.checkpoint = False
    assert_same(gradients(net, x), gradients(plain, x))
    assert relative(net.inverse(net(x)), x) < 1e-12


# Copies.


@every
def test_state_dict_round_trip(name):
    layer, x = make(name)
    kind, args, keywords, _ = ALL[name]
    other = kind(*args, **keywords, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.inverse(x := layer(x)), layer.inverse(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@every
def test_copies_are_independent(name, copied):
    layer, x = make(name)
    other = copied(layer)
    assert type(other) is type(layer)
    expected = layer(x).detach()
    assert torch.equal(other(x), expected)
    assert_same(gradients(other, x), gradients(layer, x))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    assert not torch.equal(other(x), expected)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", ["linear", "linear scaled", "conv2d patches", "linear tall"])
def test_an_orthogonal_weight_survives_changes_of_the_dtype(name):
    for route in ([torch.float32, torch.float64], [torch.bfloat16, torch.float32], [torch.bfloat16, torch.float64]):
        layer, x = make(name)
        for dtype in route:
            layer.to(dtype)
        x = x.to(dtype)
        assert relative(layer.inverse(layer(x)), x) < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["linear", "conv2d patches"])
def test_an_orthogonal_weight_survives_a_state_of_another_dtype(name):
    narrow, x = make(name, torch.float32)
    layer, _ = make(name)
    layer.load_state_dict(narrow.state_dict())
    assert relative(layer.inverse(layer(x.double())), x) < 1e-14
    torch.testing.assert_close(layer.weight.float(), narrow.weight, rtol=1e-5, atol=1e-5)
    rounded = {k: v.bfloat16().float() if torch.is_tensor(v) else v for k, v in narrow.state_dict().items()}
    narrow.load_state_dict(rounded)
    assert relative(narrow.inverse(narrow(x)), x) < 2e-6


# The weight.


@every
def test_assigning_a_weight(name):
    layer, x = make(name)
    other, _ = make(name, shake=0.0)
    parametrized = layer.parametrization is not None
    for value in (layer.weight.detach(), nn.Parameter(layer.weight.detach())):
        other.reset_parameters()
        before = [key for key, _ in other.named_parameters()]
        if not parametrized:
            value = nn.Parameter(value)
        other.weight = value
        torch.testing.assert_close(other.weight, layer.weight, rtol=1e-12, atol=1e-12)
        assert [key for key, _ in other.named_parameters()] == before
    assert relative(other.inverse(other(x)), x) < 1e-12


def test_assigning_a_weight_that_cannot_be():
    layer = Linear(3, 3)
    before = layer.weight
    with pytest.raises(ValueError, match=r"columns that are not orthonormal .* use scaled=True"):
        layer.weight = 2 * torch.eye(3)
    with pytest.raises(ValueError, match=r"columns that are not orthogonal .* use parametrization=\"lu\""):
        Linear(3, 3, scaled=True).weight = torch.ones(3, 3)
    with pytest.raises(ValueError, match="singular"):
        Linear(3, 3, parametrization="lu").weight = torch.ones(3, 3)
    with pytest.raises(ValueError, match=r"shape \[3, 3\] \(got shape \[3, 4\]\)"):
        layer.weight = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"shape \[3, 3\] \(got NoneType\)"):
        layer.weight = None
    assert torch.equal(layer.weight, before)
    scaled = Linear(3, 3, scaled=True)
    scaled.weight = torch.diag(torch.tensor([1.0, 2.0, -3.0]))
    torch.testing.assert_close(scaled.weight, torch.diag(torch.tensor([1.0, 2.0, -3.0])))


def test_a_weight_changed_before_backward_is_refused():
    layer, x = make("linear lu")
    loss = layer(x.requires_grad_() * 1).sum()
    layer.weight = torch.eye(4)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("name", ["linear", "linear lu", "linear free", "linear tall", "conv2d patches"])
def test_on_the_meta_device(name):
    kind, args, keywords, shape = ALL[name]
    layer = kind(*args, **keywords, device="meta")
    with nullcontext() if layer.bias is None else torch.no_grad():
        assert layer(torch.randn(shape, device="meta")).is_meta
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    x = torch.randn(shape)
    assert relative(real.inverse(real(x)), x) < 1e-5


# Settings.


def test_settings_show():
    assert repr(Linear(2, 2, scaled=True)) == (
        "Linear(\n  parametrization='orthogonal', in_features=2, out_features=2, bias=True, reversed=False, "
        "checkpoint=True, invertible=True, seed=True\n  (matrices): Cayley(groups=1, rows=2, columns=2, scaled=True)\n)"
    )
    assert "groups=2, parametrization=None" not in repr(Conv2d(2, 2, 1, groups=2))
    assert "(matrices): LU(groups=2, rows=1, columns=1)" in repr(Conv2d(2, 2, 1, groups=2, parametrization="lu"))
    assert "(matrices)" not in repr(Linear(2, 2, parametrization=None))


def test_options_of_the_base_are_taken():
    assert Linear(2, 2, anchor_every=3).anchor_every == 3
    assert Conv1d(2, 2, 1, anchor_every=3).anchor_every == 3
    with pytest.raises(ValueError, match="anchor_every"):
        Conv1d(2, 2, 1, anchor_every=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"parametrization": "householder"}, r'must be "orthogonal", "lu" or None \(got \'householder\'\)'),
        ({"parametrization": "lu", "scaled": True}, r"scaled=True belongs to .* \(got 'lu'"),
        ({"parametrization": None, "scaled": True}, r"scaled=True belongs to .* \(got None"),
        ({"dtype": torch.complex64}, r"needs a real dtype \(got torch.complex64\)"),
    ],
)
def test_settings_that_do_not_fit(keywords, message):
    for make_one in (lambda: Linear(2, 2, **keywords), lambda: Conv2d(2, 2, 1, **keywords)):
        with pytest.raises(ValueError, match=message):
            make_one()


def test_lu_needs_a_square_weight():
    with pytest.raises(ValueError, match=r"needs a square weight \(got 3 x 2\)"):
        Linear(2, 3, parametrization="lu")
    with pytest.raises(ValueError, match=r"needs a square weight \(got 8 x 4\)"):
        Conv2d(2, 16, 2, groups=2, parametrization="lu")


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(name):
    layer, x = make(name)
    expected = layer(x).detach()
    layer.to("cuda")
    x = x.detach().cuda().requires_grad_()
    torch.testing.assert_close(layer(x).cpu(), expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(layer(x * 1).sin().sum(), [x, *layer.parameters()])
    with layer.temp_mode(checkpoint=False):
        plain = torch.autograd.grad(layer(x * 1).sin().sum(), [x, *layer.parameters()])
    for f, e in zip(found, plain, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("sizes", "found"), [((4, 3), "in_features=4, out_features=3"), ((0, 2), "in_features=0")])
def test_fewer_outputs_than_inputs(sizes, found):
    with pytest.raises(ValueError, match=rf"at least as many outputs as inputs \(got {found}"):
        Linear(*sizes)


def test_the_log_determinant_needs_a_batch():
    layer = Linear(3, 3)
    x = torch.randn(3)
    torch.testing.assert_close(layer.inverse(layer(x)), x)
    with pytest.raises(ValueError, match=r"needs a batch dimension: .* \(got \[3\]\)"):
        layer.forward_and_log_det(x)


def test_parameters_are_those_that_the_parametrisation_needs():
    def names(**options):
        return {name: tuple(p.shape) for name, p in Linear(3, 3, **options).named_parameters()}

    assert names() == {"bias": (3,), "matrices.skew": (1, 3, 3)}
    assert names(scaled=True) == {"bias": (3,), "matrices.log_scale": (1, 3), "matrices.skew": (1, 3, 3)}
    assert names(parametrization="lu", bias=False) == {"matrices.packed": (1, 3, 3)}
    assert names(parametrization=None) == {"weight": (3, 3), "bias": (3,)}


def test_without_parametrisation_it_takes_torchs_weights():
    plain, layer = nn.Linear(3, 3), Linear(3, 3, parametrization=None)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_an_orthogonal_weight_keeps_lengths_and_its_determinant(size):
    torch.manual_seed(0)
    signs = set()
    for _ in range(12):
        layer = Linear(size, size, bias=False, dtype=torch.float64)
        sign = torch.linalg.det(layer.weight).sign().item()
        with torch.no_grad():
            layer.matrices.skew.normal_(std=3)
        x = torch.randn(5, size, dtype=torch.float64)
        torch.testing.assert_close(layer(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
        assert torch.linalg.det(layer.weight).sign().item() == sign
        signs.add(sign)
    assert signs == {-1.0, 1.0}  # rotations and reflections alike


def test_the_cayley_transform_against_its_definition():
    torch.manual_seed(0)
    layer = Linear(5, 5, dtype=torch.float64)
    base = layer.weight.detach()
    with torch.no_grad():
        layer.matrices.skew.normal_()
    lower = layer.matrices.skew[0].detach().tril(-1)
    A, identity = (lower - lower.T) / 2, torch.eye(5, dtype=torch.float64)
    expected = base @ (identity + A) @ torch.linalg.inv(identity - A)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_scales_belong_to_inputs():
    torch.manual_seed(0)
    layer = Linear(3, 5, scaled=True, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.matrices.log_scale.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
    lengths = layer.weight.detach().norm(dim=0)
    torch.testing.assert_close(lengths, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).exp())


def test_the_lu_factors_against_their_definition():
    torch.manual_seed(0)
    layer = Linear(5, 5, parametrization="lu", dtype=torch.float64)
    with torch.no_grad():
        layer.matrices.packed.normal_()
    packed, sign = layer.matrices.packed[0].detach(), layer.matrices.sign[0]
    L = packed.tril(-1) + torch.eye(5)
    U = packed.triu(1) + torch.diag(sign * packed.diag().exp())
    P = torch.zeros(5, 5, dtype=torch.float64)
    for row, place in enumerate(layer.matrices.permutation[0].tolist()):
        P[row, place] = 1
    assert not torch.equal(P, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(layer.weight.detach(), P @ L @ U, rtol=1e-12, atol=1e-12)
    _, log_det = layer.forward_and_log_det(torch.randn(2, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(log_det, (3 * packed.diag().sum()).expand(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parametrization", ["orthogonal", "lu"])
def test_frozen_and_shared_weights(parametrization):
    torch.manual_seed(0)
    layer = Linear(4, 4, parametrization=parametrization, dtype=torch.float64)
    layer.matrices.requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run():
        loss = layer(layer(layer(x * 1).tanh() * 1)).sin().sum()
        return torch.autograd.grad(loss, [x, layer.bias])

    found = run()
    with layer.temp_mode(checkpoint=False):
        for f, e in zip(found, run(), strict=True):
            torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


def test_a_singular_free_weight_says_so():
    layer = Linear(2, 2, parametrization=None)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    with pytest.raises(RuntimeError, match="singular"):
        layer.inverse(torch.ones(1, 2))


FREE = [name for name in ALL if ALL[name][2].get("parametrization", "orthogonal") is None]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", FREE)
def test_a_free_layer_and_torchs_have_the_same_state(name, assign):
    layer, x = make(name)
    theirs = torch_layer(name).double()
    expected = theirs(x)
    layer.load_state_dict(theirs.state_dict(), assign=assign)
    torch.testing.assert_close(layer(x), expected)
    back = torch_layer(name).double()
    back.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(back(x), expected)


@pytest.mark.parametrize("assign", [False, True])
@every
def test_any_layer_takes_a_weight_of_torchs_that_its_parametrisation_can_become(name, assign):
    source, x = make(name)
    theirs = torch_layer(name).double()
    theirs.load_state_dict(source.torch_state_dict())
    torch.testing.assert_close(theirs(x), source(x))
    kind, args, keywords, _ = ALL[name]
    other = nn.ModuleList([kind(*args, **keywords, dtype=torch.float64)])
    other.load_state_dict({f"0.{key}": value for key, value in theirs.state_dict().items()}, assign=assign)
    torch.testing.assert_close(other[0](x), theirs(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(other[0].inverse(theirs(x)), x, rtol=1e-6, atol=1e-6)
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("kind", [Linear, lambda a, b, **options: Conv1d(a, b, 1, **options)])
def test_a_weight_of_torchs_that_the_parametrisation_cannot_become(kind):
    layer = kind(3, 3)
    plain = nn.Linear(3, 3) if isinstance(layer, Linear) else nn.Conv1d(3, 3, 1)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"orthogonal parametrization cannot become.*parametrization=None") as error:
        layer.load_state_dict(plain.state_dict())
    assert "Missing" not in str(error.value)
    for name in ("matrices.base", "matrices.skew"):
        assert torch.equal(layer.state_dict()[name], before[name])
    with pytest.raises(RuntimeError, match=r"weight must be a tensor of shape"):
        layer.load_state_dict({**plain.state_dict(), "weight": torch.zeros(2, 3)})
    free = kind(3, 3, parametrization="lu")
    free.load_state_dict(plain.state_dict())
    torch.testing.assert_close(free.weight, plain.weight, rtol=1e-5, atol=1e-6)
