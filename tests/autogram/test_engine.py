"""The engine's manners: what it refuses, what it leaves behind, and what it stands."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from recollect.aggregation import UPGradWeighting
from recollect.autogram import Engine, Rows, register_rule
from recollect.autogram import _engine as engine_module
from recollect.autogram._registry import Registry
from recollect.autogram.rules import RULES
from recollect.memory import peak_memory


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(batch=6, dtype=torch.float64):
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def jacobian(losses, parameters):
    rows = []
    for loss in losses.flatten():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
        rows.append(torch.cat([g.flatten() for g in zeros]))
    return torch.stack(rows)


def gramian(losses, parameters):
    rows = jacobian(losses, list(parameters))
    return rows @ rows.T


def losses_of(net, x):
    return net(x).square().sum(1)


def hooks_of(net):
    return [hook for module in net.modules() for hook in module._forward_hooks.values()]


# What is refused


def test_no_module():
    with pytest.raises(ValueError, match="given no module"):
        Engine()


@pytest.mark.parametrize(
    ("given", "found"),
    [([[nn.Linear(2, 2)]], "list"), ([nn.Linear(2, 2), 0], "int")],
    ids=["a list of modules", "a dimension without its name"],
)
def test_what_is_no_module(given, found):
    with pytest.raises(TypeError, match=rf"was given {found}; .* Engine\(\*modules, batch_dim=0\)"):
        Engine(*given)


def test_a_module_inside_another():
    net = model()
    with pytest.raises(ValueError, match="Linear is given to the engine and is part of Sequential"):
        Engine(net[0], net)
    assert hooks_of(net) == []


def test_a_module_twice():
    net = model()
    with pytest.raises(ValueError, match="part of Sequential"):
        Engine(net, net)


@pytest.mark.parametrize("output", [torch.zeros(3, dtype=torch.long), [1.0], torch.zeros(2, dtype=torch.complex64)])
def test_an_output_without_floating_point(output):
    with pytest.raises(TypeError, match="floating-point"):
        Engine(model()).compute_gramian(output)


class Spectrum(nn.Module):
    """A complex weight, as it is or as real numbers."""

    def __init__(self, real):
        super().__init__()
        weight = torch.randn(4, 3, 2, dtype=torch.float64)
        self.weight = nn.Parameter(weight if real else torch.view_as_complex(weight))

    def forward(self, x):
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return (torch.fft.fft(x) @ weight).abs()


@pytest.mark.parametrize("batch_dim", [0, None])
def test_complex_parameters(batch_dim):
    net = nn.Sequential(nn.Linear(4, 4).double(), Spectrum(real=False))
    engine = Engine(net, batch_dim=batch_dim)
    with pytest.raises(TypeError, match=r"'1.weight' is complex.*view_as_complex"):
        engine.compute_gramian(losses_of(net, data()))
    net[1] = Spectrum(real=True)
    losses = losses_of(net, data())
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))


def test_an_output_without_a_graph():
    net = model()
    with torch.no_grad():
        losses = losses_of(net, data())
    with pytest.raises(ValueError, match="no graph"):
        Engine(net).compute_gramian(losses)


@pytest.mark.parametrize("batch_dim", [1, -2])
def test_a_batch_dimension_that_the_output_has_not(batch_dim):
    net = model()
    engine = Engine(net, batch_dim=batch_dim)
    with pytest.raises(ValueError, match=rf"batch_dim is {batch_dim}, and output has the shape \[6\]"):
        engine.compute_gramian(losses_of(net, data()))


def test_weights_of_another_shape_change_nothing():
    net = model()
    engine = Engine(net, batch_dim=0)
    with pytest.raises(ValueError, match=r"weights of shape \[6, 6\] for losses of shape \[6\]"):
        engine.backward(losses_of(net, data()), lambda gramian: gramian)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("weights", [[1.0] * 6, np.ones(6), None], ids=["list", "ndarray", "None"])
def test_weights_that_are_no_tensor_change_nothing(weights):
    net = model()
    with pytest.raises(TypeError, match=rf"returned {type(weights).__name__}; .* a tensor .* of shape \[6\]"):
        Engine(net, batch_dim=0).backward(losses_of(net, data()), lambda gramian: weights)
    assert all(p.grad is None for p in net.parameters())


# Shapes


@pytest.mark.parametrize("batch_dim", [0, -1, None])
def test_one_dimension(batch_dim):
    net = model()
    engine = Engine(net, batch_dim=batch_dim)
    losses = losses_of(net, data())
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))


@pytest.mark.parametrize("batch_dim", [0, 1, 2, None])
def test_three_dimensions(batch_dim):
    net = model()
    engine = Engine(net, batch_dim=batch_dim)
    outputs = net(data(5))  # [5, 3]
    losses = torch.stack([outputs, outputs.sin()], 1).movedim(0, batch_dim or 0)
    found = engine.compute_gramian(losses)
    assert found.shape == (*losses.shape, *reversed(losses.shape))
    k = losses.dim()
    square = found.permute(*range(k), *reversed(range(k, 2 * k))).reshape(losses.numel(), losses.numel())
    torch.testing.assert_close(square, gramian(losses, net.parameters()))


def test_a_scalar_gives_the_squared_norm():
    net = model()
    engine = Engine(net)
    loss = losses_of(net, data()).mean()
    torch.testing.assert_close(engine.compute_gramian(loss), gramian(loss, net.parameters()).squeeze())


@pytest.mark.parametrize("batch_dim", [0, None])
def test_no_losses(batch_dim):
    net = model()
    engine = Engine(net, batch_dim=batch_dim)
    assert engine.compute_gramian(losses_of(net, data(0))).shape == (0, 0)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_outputs_dtype(batch_dim, dtype):
    net = model(dtype)
    engine = Engine(net, batch_dim=batch_dim)
    losses = losses_of(net, data(dtype=dtype))
    found = engine.compute_gramian(losses)
    assert found.dtype == dtype
    expected = gramian(losses, net.parameters())
    torch.testing.assert_close(found, expected, rtol=0.1 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


@pytest.mark.parametrize("inside", [False, True], ids=["called outside", "called inside"])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_autocast(batch_dim, inside):
    net = model(torch.float32)
    engine = Engine(net, batch_dim=batch_dim)
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(net, data(dtype=torch.float32)).float() + losses_of(net, data(dtype=torch.float32)).float()
        if inside:
            found = engine.compute_gramian(losses)
    if not inside:
        found = engine.compute_gramian(losses)
    torch.testing.assert_close(found, gramian(losses, net.parameters()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_autocast_is_for_the_model_alone(batch_dim):
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    engine = Engine(net, batch_dim=batch_dim)
    losses = losses_of(net, torch.rand(6, 64))
    outside = engine.compute_gramian(losses)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine.compute_gramian(losses), outside)


# Calls one after another


@pytest.mark.parametrize("batch_dim", [0, None])
def test_freezing_behind_the_forward_pass(batch_dim):
    net = model()
    engine = Engine(net, batch_dim=batch_dim)
    losses = losses_of(net, data())
    expected = gramian(losses, net[2].parameters())
    net[0].requires_grad_(False)
    torch.testing.assert_close(engine.compute_gramian(losses), expected)


def test_freezing_between_calls():
    net = model()
    engine = Engine(net, batch_dim=0)
    for frozen in (None, 0, 2, 0):
        for k in (0, 2):
            net[k].requires_grad_(k != frozen)
        losses = losses_of(net, data())
        expected = gramian(losses, [p for p in net.parameters() if p.requires_grad])
        torch.testing.assert_close(engine.compute_gramian(losses), expected)


def test_batches_of_other_sizes():
    net = model()
    engine = Engine(net, batch_dim=0)
    for batch in (6, 4, 1, 5, 2):
        losses = losses_of(net, data(batch))
        torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))


def test_one_graph_several_times():
    net = model()
    engine = Engine(net, batch_dim=0)
    losses = losses_of(net, data())
    first = engine.compute_gramian(losses)
    assert torch.equal(engine.compute_gramian(losses), first)
    part = engine.compute_gramian(losses[1:4])
    torch.testing.assert_close(part, first[1:4, 1:4])


def test_gradients_are_left_alone():
    net = model()
    engine = Engine(net, batch_dim=0)
    losses = losses_of(net, data())
    engine.compute_gramian(losses)
    assert all(p.grad is None for p in net.parameters())
    losses.sum().backward()
    other = model()
    losses_of(other, data()).sum().backward()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_backward_weights_the_losses():
    net = model()
    engine = Engine(net, batch_dim=0)
    losses = losses_of(net, data())
    expected = losses.detach().clone()
    weights = engine.backward(losses, lambda found: found.diagonal().float())
    rows = jacobian(losses_of(net, data()), list(net.parameters()))
    expected = rows.square().sum(1)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-5)
    grads = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(grads, weights.double() @ rows)


def test_other_parameters_do_not_count():
    net = model()
    engine = Engine(net[2], batch_dim=0)
    losses = losses_of(net, data())
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net[2].parameters()))


@pytest.mark.parametrize("hooked", [0, 1, 4])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_modules_that_the_output_does_not_depend_on(batch_dim, hooked):
    net, other = model(), model()
    for parameter in list(net.parameters())[:hooked]:  # those have passes of their own
        parameter.register_hook(lambda grad: grad)
    engine = Engine(net, batch_dim=batch_dim)
    with pytest.warns(UserWarning, match=r"Gramian is zero: .*no trainable parameter.*\(Sequential\)"):
        assert not engine.compute_gramian(losses_of(other, data())).any()


@pytest.mark.parametrize("given", [(), (UPGradWeighting(),)])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_the_warning_points_at_the_line_that_called_the_engine(batch_dim, given):
    engine, losses = Engine(model(), batch_dim=batch_dim), losses_of(model(), data())
    with pytest.warns(UserWarning, match="Gramian is zero") as warned:
        (engine.backward if given else engine.compute_gramian)(losses, *given)
    assert [warning.filename for warning in warned] == [__file__]


def test_no_trainable_parameter_is_nothing_to_warn_of():
    net = model()
    assert not Engine(nn.Tanh(), batch_dim=0).compute_gramian(losses_of(net, data())).any()
    assert not Engine(copy.deepcopy(net).requires_grad_(False)).compute_gramian(losses_of(net, data())).any()


@pytest.mark.parametrize("hooked", ["used", "unused"])
def test_one_parameter_that_counts_is_enough(hooked):
    net = model()
    for parameter in net[0 if hooked == "used" else 2].parameters():
        parameter.register_hook(lambda grad: grad)
    losses = net[0](data()).square().sum(1)
    torch.testing.assert_close(Engine(net, batch_dim=0).compute_gramian(losses), gramian(losses, net.parameters()))


def test_several_modules():
    net = model()
    engine = Engine(net[0], net[2], batch_dim=0)
    losses = losses_of(net, data())
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))


def test_modules_that_torch_has_compiled_to_a_script():
    net = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit: it is deprecated
        whole = nn.Sequential(
            torch.jit.script(net[:2]), net[2], torch.jit.trace(nn.Linear(3, 3).double(), data()[:, :3])
        )
    engine = Engine(whole, batch_dim=0)
    losses = losses_of(whole, data())
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, whole.parameters()))


@pytest.mark.parametrize("kept", [True, False], ids=["buffers kept", "buffers given away"])
@pytest.mark.filterwarnings("ignore")  # of torch.jit, and the like
def test_compiled_parts_that_went_backward_before(kept):
    with torch._functorch.config.patch(donated_buffer=not kept):
        torch._dynamo.reset()
        block = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 5))
        block.compile(backend="aot_eager")
        net = nn.Sequential(nn.Linear(4, 5), block, nn.Linear(5, 3)).double()
        engine = Engine(net, batch_dim=0)
        losses_of(net, data()).sum().backward()
        losses = losses_of(net, data())
        found, refusal = None, ""
        try:
            found = engine.compute_gramian(losses)
        except RuntimeError as error:
            refusal = str(error)
        if found is None:
            assert not kept
            assert "donated_buffer=False" in refusal
        else:  # torch 2.11 gives nothing away here
            torch.testing.assert_close(found, gramian(losses, net.parameters()))


def test_modules_that_overlap():
    net, last = model(), nn.Linear(5, 2).double()
    one, other = nn.Sequential(net[0], net[2]), nn.Sequential(net[0], last)
    engine = Engine(one, other, batch_dim=0)
    losses = one(data()).square().sum(1) + other(data()).square().sum(1)
    expected = gramian(losses, [*one.parameters(), *last.parameters()])
    torch.testing.assert_close(engine.compute_gramian(losses), expected)


def test_an_engine_made_after_the_forward_pass():
    net = model()
    losses = losses_of(net, data())
    torch.testing.assert_close(Engine(net, batch_dim=0).compute_gramian(losses), gramian(losses, net.parameters()))


# What it leaves behind


@pytest.mark.parametrize("batch_dim", [0, None])
def test_several_engines(batch_dim):
    net = model()
    whole, part, again = Engine(net, batch_dim=0), Engine(net[0], batch_dim=batch_dim), Engine(net, batch_dim=batch_dim)
    losses = losses_of(net, data())
    torch.testing.assert_close(whole.compute_gramian(losses), gramian(losses, net.parameters()))
    torch.testing.assert_close(part.compute_gramian(losses), gramian(losses, net[0].parameters()))
    torch.testing.assert_close(again.compute_gramian(losses), gramian(losses, net.parameters()))


def test_captures_go_with_the_engine():
    net = model()
    engine = Engine(net)
    reference = weakref.ref(engine)
    assert "CaptureBackward" in str(net[0](data()).grad_fn)
    gc.disable()
    try:
        engine.compute_gramian(losses_of(net, data()))
        del engine
        assert reference() is None  # no cycle holds it
    finally:
        gc.enable()
    assert "CaptureBackward" not in str(net[0](data()).grad_fn)


def test_a_model_gets_no_hooks():
    net = model()
    engine = Engine(net)
    assert hooks_of(net) == []
    assert engine is not None


def test_a_graph_that_outlives_its_engine():
    net = model()
    engine = Engine(net)
    losses = losses_of(net, data())
    del engine
    losses.sum().backward()
    assert net[0].weight.grad is not None


def test_the_graph_goes_without_the_garbage_collector():
    net = model()
    engine = Engine(net, batch_dim=0)
    gc.collect()
    gc.disable()
    try:
        losses = losses_of(net, data())
        engine.compute_gramian(losses)
        reference = weakref.ref(losses)
        x = data().requires_grad_()
        inner = losses_of(net, x)
        engine.compute_gramian(inner)
        leaf = weakref.ref(x)
        del losses, inner, x
        assert reference() is None
        assert leaf() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_of_the_model(how):
    net = model()
    engine = Engine(net, batch_dim=0)
    if how == "deepcopy":
        twin = copy.deepcopy(net)
    elif how == "pickle":
        packed = pickle.dumps(net)
        assert b"recollect" not in packed
        twin = pickle.loads(packed)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert "Capture" not in type(twin[0](data()).grad_fn).__name__
    second = Engine(twin, batch_dim=0)
    for one, of in ((engine, net), (second, twin)):
        losses = losses_of(of, data())
        assert "CaptureBackward" in str(of[0](data()).grad_fn)
        torch.testing.assert_close(one.compute_gramian(losses), gramian(losses, of.parameters()))


def test_a_models_state_is_its_own():
    net = model()
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    Engine(net)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before
    assert list(net.state_dict()) == list(model().state_dict())


# Exceptions


class Fails(nn.Module):
    """Raises in backward as long as it is told to."""

    def __init__(self):
        super().__init__()
        self.failing = True

    def forward(self, x):
        x = x.clone()

        def refuse(grad):
            if self.failing:
                raise RuntimeError("refused")

        x.register_hook(refuse)
        return x


@pytest.mark.parametrize("batch_dim", [0, None])
def test_an_exception_resets_the_engine(batch_dim):
    fails = Fails()
    net = nn.Sequential(nn.Linear(4, 5), fails, nn.Linear(5, 3)).double()
    engine = Engine(net, batch_dim=batch_dim)
    losses = losses_of(net, data())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="refused"):
            engine.compute_gramian(losses)
        assert engine._recorder.visit is None
    fails.failing = False
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))


@pytest.fixture
def registry(monkeypatch):
    registry = Registry(RULES)
    monkeypatch.setattr(engine_module, "_REGISTRY", registry)
    return registry


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(5))

    def forward(self, x):
        return x * self.scale + self.shift


@pytest.mark.parametrize("sharing", [None, lambda layer, inputs, axes: axes], ids=["unknown", "declared"])
def test_registering_a_rule(registry, sharing):
    seen = []

    def rule(layer, inputs, grads):
        seen.append((layer, inputs[0].shape, grads[0].shape))
        return {"scale": Rows((inputs[0] * grads[0]).sum(1)), "shift": Rows(grads[0].sum(1))}

    register_rule(Scale, rule, sharing)
    net = nn.Sequential(nn.Linear(4, 5), Scale()).double()
    engine = Engine(net, batch_dim=0)
    losses = losses_of(net, data())
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))
    assert seen == [(net[1], (1, 6, 5) if sharing is None else (6, 1, 5), (6, 6, 5) if sharing is None else (6, 1, 5))]


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_rule_that_leaves_a_parameter_out(registry, batch_dim):
    register_rule(Scale, lambda layer, inputs, grads: {"scale": Rows((inputs[0] * grads[0]).sum(1))})
    net = nn.Sequential(nn.Linear(4, 5), Scale()).double()
    engine = Engine(net, batch_dim=batch_dim)
    for _ in range(2):
        losses = losses_of(net, data())
        torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (
            lambda g: Rows(g),
            ValueError,
            r"of Scale gives 6 rows of shape \[6, 5\] for 'shift'; .* 6 rows of shape \[5\]",
        ),
        (lambda g: Rows(g.sum(1)[:4]), ValueError, r"4 rows of shape \[5\] for 'shift'"),
        (lambda g: g.sum(1), TypeError, "of Scale gives a Tensor for 'shift'; a rule gives Rows, Outer"),
    ],
    ids=["another shape", "too few rows", "a tensor"],
)
def test_a_rule_that_gives_what_does_not_fit(registry, factor, error, message):
    register_rule(Scale, lambda layer, inputs, grads: {name: factor(grads[0]) for name in ("scale", "shift")})
    net = nn.Sequential(nn.Linear(4, 5), Scale()).double()
    engine = Engine(net, batch_dim=0)
    with pytest.raises(error, match=message):
        engine.compute_gramian(losses_of(net, data()))


def test_a_rule_that_raises_resets_the_engine(registry):
    def rule(layer, inputs, grads):
        raise ZeroDivisionError("no rule")

    register_rule(Scale, rule)
    net = nn.Sequential(nn.Linear(4, 5), Scale()).double()
    engine = Engine(net, batch_dim=0)
    losses = losses_of(net, data())
    with pytest.raises(ZeroDivisionError, match="no rule"):
        engine.compute_gramian(losses)
    losses.sum().backward()
    assert net[1].scale.grad is not None


# The graph


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_graph_that_need_not_stay_is_freed(batch_dim):
    net = model()
    engine = Engine(net, batch_dim=batch_dim)
    for _ in range(2):  # the first time, it is found out what rules cover
        losses = losses_of(net, data())
        kept = engine.compute_gramian(losses)
        assert torch.equal(engine.compute_gramian(losses, retain_graph=False), kept)
    with pytest.raises(RuntimeError, match="second time"):
        losses.sum().backward()


def test_a_graph_that_need_not_stay_costs_no_memory():
    net = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(64, 64, bias=False), nn.Tanh())))
    engine = Engine(net, batch_dim=0)

    def peak(retain_graph):
        engine.compute_gramian(net(torch.rand(256, 64)).sum(1))
        with peak_memory("cpu") as memory:
            losses = net(torch.rand(256, 64)).sum(1)
            engine.compute_gramian(losses, retain_graph=retain_graph)
        assert losses.requires_grad
        return memory.current_bytes

    assert peak(False) < peak(True) - 7 * 256 * 64 * 4


@pytest.mark.parametrize(
    ("weighting", "found"), [(UPGradWeighting, "the class UPGradWeighting"), ("upgrad", "'upgrad'")]
)
def test_what_weighs_can_be_called(weighting, found):
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=rf"such as UPGradWeighting\(\) \(got {found}\)"):
        Engine(model).backward(model(torch.randn(3)), weighting)
    assert model.weight.grad is None
