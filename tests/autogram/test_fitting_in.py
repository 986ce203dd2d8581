"""Engines and their models with what else there is: copies, files, torch.jit, torch.export, torch.func, GradScaler."""

import copy
import gc
import io
import pickle
import sys
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as torch_module

from recollect.aggregation import MeanWeighting, UPGradWeighting
from recollect.autogram import Engine, _capture


class Net(nn.Module):
    """Layers with a rule in a module without one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.Tanh(), nn.GroupNorm(2, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x).mean(2))


CAPTURES = 3


def network():
    torch.manual_seed(0)
    return Net().double()


def data(batch=5):
    return torch.randn(batch, 4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def losses_of(net, x=None):
    return net(data() if x is None else x).square().sum(1)


def gramian(losses, parameters):
    parameters, rows = list(parameters), []
    for loss in losses.flatten():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def captures(output):
    """Count the captures in a graph."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(child for child, _ in node.next_functions)
    return sum(type(node).__name__ == "CaptureBackward" for node in seen)


def assert_works(engine, net, expected=CAPTURES):
    losses = losses_of(net)
    assert captures(losses) == expected
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))


# Copies and files


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda value: pickle.loads(pickle.dumps(value)), "deepcopy": copy.deepcopy, "save": saved}
copied_by = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


@copied_by
@pytest.mark.parametrize("order", ["model first", "engine first"])
@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_copy_with_the_model(copied, order, batch_dim):
    net = network()
    engine = Engine(net, batch_dim=batch_dim)
    assert_works(engine, net)  # what it knows by now is no part of the copy
    if order == "model first":
        twin, other = copied((net, engine))
    else:
        other, twin = copied((engine, net))
    assert_works(other, twin)
    assert_works(engine, net)
    twin.head.weight.data.mul_(2)
    assert not torch.equal(engine.compute_gramian(losses_of(net)), other.compute_gramian(losses_of(twin)))


@copied_by
def test_settings_go_with_a_copy(copied):
    net = network()
    engine = Engine(net.body, net.head, batch_dim=0, row_bytes=1234)
    other = copied(engine)
    assert vars(other).keys() == vars(engine).keys()
    assert (other._batch_dim, other._row_bytes) == (0, 1234)
    assert [type(module) for module in other._modules] == [nn.Sequential, nn.Linear]


def test_a_shallow_copy_is_another_engine_of_the_same_modules():
    net = network()
    engine = Engine(net, batch_dim=0)
    other = copy.copy(engine)
    assert_works(other, net, expected=2 * CAPTURES)
    assert_works(engine, net, expected=2 * CAPTURES)


@copied_by
@pytest.mark.parametrize("holder", ["the module", "a layer", "another module"])
def test_a_module_that_holds_its_engine(copied, holder):
    net = network()
    if holder == "the module":
        net.engine = Engine(net, batch_dim=0)
    elif holder == "a layer":
        net.head.engine = Engine(net, batch_dim=0)
    else:
        net.body.engine, net.engine = Engine(net.head, batch_dim=0), Engine(net.body, batch_dim=0)
    twin = copied(net)
    for one in (twin, net):
        if holder == "another module":
            losses = losses_of(one)
            assert captures(losses) == CAPTURES
            found = one.engine.compute_gramian(losses) + one.body.engine.compute_gramian(losses)
            torch.testing.assert_close(found, gramian(losses, one.parameters()))
        else:
            engine = one.engine if holder == "the module" else one.head.engine
            assert engine._modules == (one,)
            assert_works(engine, one)


def test_a_module_that_holds_its_engine_is_collected():
    net = network()
    net.engine = Engine(net, batch_dim=0)
    recorder = net.engine._recorder
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None
    assert recorder not in _capture._RECORDERS.values()


@copied_by
def test_a_copy_of_the_model_alone_knows_of_no_engine(copied):
    net = network()
    engine = Engine(net, batch_dim=0)
    twin = copied(net)
    assert captures(losses_of(twin)) == 0
    assert_works(Engine(twin), twin)
    assert_works(engine, net)


def test_a_layer_that_takes_the_place_of_another_is_computed_all_the_same():
    net = network()
    engine = Engine(net, batch_dim=0)
    net.head = nn.Linear(6, 3).double()
    assert_works(engine, net, expected=CAPTURES - 1)


def test_without_engines_the_process_has_no_hook():
    net = network()
    engine = Engine(net)
    assert torch_module._global_forward_hooks
    others = [recorder for recorder in _capture._RECORDERS.values() if recorder is not engine._recorder]
    del engine
    assert list(_capture._RECORDERS.values()) == others
    assert bool(torch_module._global_forward_hooks) == bool(others)


# Hooks of others


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_hook_for_all_modules(first):
    net = network()
    engine = Engine(net, batch_dim=0) if first == "ours" else None
    handle = torch_module.register_module_forward_hook(
        lambda module, inputs, output: output * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        assert_works(engine or Engine(net, batch_dim=0), net)
    finally:
        handle.remove()


def test_a_hook_that_is_put_before_all_others_makes_do_without_captures():
    net = network()
    engine = Engine(net, batch_dim=0)
    handle = torch_module.register_module_forward_hook(
        lambda module, inputs, output: output * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        hooks: Any = torch_module._global_forward_hooks  # an OrderedDict
        hooks.move_to_end(handle.id, last=False)
        assert_works(engine, net, expected=0)
    finally:
        handle.remove()


def test_a_call_that_is_on_its_way_when_the_last_engine_goes():
    """torch looks up whether a hook takes keyword arguments after it has made the list of hooks."""
    layer = nn.Linear(4, 3)
    engine = Engine(layer)
    x = torch.randn(2, 4)
    assert _capture._capture(layer, (x,), layer.forward(x)) is None
    assert _capture._capture(layer, (x,), {}, layer.forward(x)) is not None
    assert engine is not None


# Models that are traced, scripted, exported, compiled


def scripted_and_saved(net, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    file.seek(0)
    return torch.jit.load(file)


FORMS = {
    "traced": torch.jit.trace,
    "scripted": lambda net, x: torch.jit.script(net),
    "scripted and saved": scripted_and_saved,
    "exported": lambda net, x: torch.export.export(net, (x,)).module(),
    "symbolic": lambda net, x: torch.fx.symbolic_trace(net),
    "made by make_fx": lambda net, x: make_fx(net)(x),
    "compiled": lambda net, x: torch.compile(net, backend="aot_eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore")  # of torch.jit, and the like
@pytest.mark.parametrize("form", FORMS)
def test_models_in_another_form(form):
    torch._dynamo.reset()
    net = network()
    engine = Engine(net, batch_dim=0)
    other = FORMS[form](net, data())
    fixed = form in ("exported", "made by make_fx")  # to the size of the batch
    for x in (data(5), data(5 if fixed else 3)):
        torch.testing.assert_close(other(x), net(x))
    losses = losses_of(other)
    assert captures(losses) == (CAPTURES if form == "symbolic" else 0)
    torch.testing.assert_close(losses, losses_of(net))
    own = torch.autograd.grad(losses.sum(), list(other.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(losses_of(net).sum(), list(net.parameters()))
    if form != "made by make_fx":  # which has the parameters as constants
        torch.testing.assert_close(own, theirs)
    assert_works(engine, net)


@pytest.mark.parametrize("form", ["compiled", "symbolic"])
def test_the_gramian_of_a_model_in_another_form_with_the_same_parameters(form):
    torch._dynamo.reset()
    net = network()
    engine = Engine(net, batch_dim=0)
    losses = losses_of(FORMS[form](net, data()))
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))


# Transforms of functions


def test_gradients_for_each_element_by_vmap():
    net = network()
    engine = Engine(net, batch_dim=0)

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(net.named_parameters()), data())
    rows = torch.cat([grad.flatten(1) for grad in grads.values()], 1)
    torch.testing.assert_close(engine.compute_gramian(losses_of(net)), rows @ rows.T)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("how", ["themselves", "functions of them", "others"])
def test_parameters_that_are_replaced_for_a_call(how, batch_dim):
    """What stood in a layer during the call need not be what stands there when a rule is asked."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 50, bias=False), nn.Tanh(), nn.Linear(50, 40)).double()
    for layer in (net[0], net[2]):
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))  # never written to, as what takes their place
    engine = Engine(net, batch_dim=batch_dim)
    given = dict(net.named_parameters())
    if how == "functions of them":
        given = {name: 2 * p for name, p in given.items()}
    elif how == "others":
        given["0.weight"] = torch.randn_like(given["0.weight"], requires_grad=True)
    x = torch.randn(2, 40, dtype=torch.float64)
    losses = torch.func.functional_call(net, given, (x,)).square().sum(1)
    torch.testing.assert_close(engine.compute_gramian(losses), gramian(losses, net.parameters()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which torch uses there
def test_forward_mode():
    net = network()
    x = data()
    expected = torch.func.jvp(net, (x,), (x,))[1]
    engine = Engine(net)
    torch.testing.assert_close(torch.func.jvp(net, (x,), (x,))[1], expected)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, x))).tangent
    torch.testing.assert_close(tangent, expected)
    assert_works(engine, net)


# Overflow


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
def test_a_grad_scaler_finds_overflow_and_lowers_its_scale(batch_dim, as_list):
    net = mlp()
    engine, optimizer = Engine(net, batch_dim=batch_dim), torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    x, y = torch.randn(16, 10), torch.randint(3, (16,))
    before = [p.detach().clone() for p in net.parameters()]
    scales, moved = [], []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = nn.functional.cross_entropy(net(x).float(), y, reduction="none")
        scaled = scaler.scale(losses)
        engine.backward(list(scaled) if as_list else scaled, UPGradWeighting(), on_overflow="pass")
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(any(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)))
    assert scales[0] == 2.0**23
    assert scales[-1] < scales[0]
    assert moved == sorted(moved)  # steps are skipped as long as there is overflow
    assert [moved[0], moved[-1]] == [False, True]
    assert all(p.isfinite().all() for p in net.parameters())


def overflowing(net):
    """Return losses that are finite, as their gradients are, but not the squares of these."""
    return net(torch.randn(4, 10, generator=torch.Generator().manual_seed(1))).sum(1) * 1e25


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_gramian_that_overflows_where_losses_do_not(batch_dim):
    net = mlp()
    engine = Engine(net, batch_dim=batch_dim)
    losses = overflowing(net)
    grads = torch.autograd.grad(losses.sum(), list(net.parameters()), retain_graph=True)
    assert losses.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    weights = engine.backward(losses, UPGradWeighting(), on_overflow="pass")
    assert weights.shape == losses.shape
    assert not weights.requires_grad
    assert weights.isnan().all()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    before = copy.deepcopy(net.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_by_default_overflow_is_an_error_that_changes_nothing():
    net = mlp()
    with pytest.raises(ValueError, match="the Gramian is not finite"):
        Engine(net, batch_dim=0).backward(overflowing(net), UPGradWeighting())
    assert all(p.grad is None for p in net.parameters())


def test_what_is_finite_passes_as_ever():
    net, other = mlp(), mlp()
    x = torch.randn(4, 10)
    weights = Engine(net).backward(net(x).square().sum(1), UPGradWeighting(), on_overflow="pass")
    assert torch.equal(weights, Engine(other).backward(other(x).square().sum(1), UPGradWeighting()))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_a_weighting_is_not_asked_about_what_is_not_finite():
    def never(gramian):
        raise AssertionError("called")

    net = mlp()
    Engine(net).backward(overflowing(net), never, on_overflow="pass")


@pytest.mark.parametrize("wrong", ["skip", None, True, ["pass"]])
def test_a_wrong_on_overflow_changes_nothing(wrong):
    net = mlp()
    asked: list = []
    with pytest.raises(ValueError, match=r"on_overflow is .*'raise'.*'pass'"):
        Engine(net).backward(net(torch.randn(4, 10)).sum(1), asked.append, on_overflow=wrong)
    assert asked == []
    assert all(p.grad is None for p in net.parameters())


# Forms of losses


@pytest.mark.parametrize("batch_dim", [0, 1, 2, None])
def test_a_flat_gramian(batch_dim):
    net = mlp(torch.float64)
    outputs = net(torch.randn(5, 10).double())  # [5, 3]
    losses = torch.stack([outputs, outputs.sin()], 1).movedim(0, batch_dim or 0)
    engine = Engine(net, batch_dim=batch_dim)
    flat = engine.compute_gramian(losses, flat=True)
    torch.testing.assert_close(flat, gramian(losses, net.parameters()))
    general = engine.compute_gramian(losses)
    assert general.shape == (*losses.shape, *reversed(losses.shape))
    i, j = (1, 0, 1), (0, 1, 1)
    assert general[(*i, *reversed(j))] == flat.view(*losses.shape, *losses.shape)[(*i, *j)]


@pytest.mark.parametrize(("losses", "m"), [(lambda y: y.sum(), 1), (lambda y: y.sum(1), 4), (lambda y: y[:0], 0)])
def test_a_flat_gramian_of_few_dimensions(losses, m):
    net = mlp()
    found = Engine(net).compute_gramian(losses(net(torch.randn(4, 10))), flat=True)
    assert found.shape == (m, m)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_losses_of_several_shapes(kind, flat):
    net = mlp(torch.float64)
    outputs = net(torch.randn(4, 10).double())
    losses = kind([outputs.square().mean(), outputs.sin(), outputs[0], net[0].weight.norm()])
    vector = torch.cat([loss.reshape(-1) for loss in losses])
    found = Engine(net).compute_gramian(losses, flat=flat)
    assert found.shape == (17, 17)
    torch.testing.assert_close(found, gramian(vector, net.parameters()))


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_list_of_the_losses_of_two_tasks(batch_dim):
    net = mlp(torch.float64)
    outputs = net(torch.randn(4, 10).double())
    losses = [outputs[:, 0].square(), outputs[:, 1:].sin().sum(1)]
    found = Engine(net, batch_dim=batch_dim).compute_gramian(losses)
    torch.testing.assert_close(found, gramian(torch.cat(losses), net.parameters()))


def test_a_parameter_itself_in_a_list():
    net = mlp(torch.float64)
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    net.register_parameter("scale", scale)
    assert Engine(net).compute_gramian([scale]).tolist() == [[1.0]]


@pytest.mark.parametrize("recording", [True, False], ids=["in grad mode", "under no_grad"])
def test_backward_of_a_list(recording):
    net, other = mlp(torch.float64), mlp(torch.float64)
    x = torch.randn(4, 10).double()
    outputs, twins = net(x), other(x)
    losses, seen = [outputs[0], outputs.square().mean()], []

    def weighting(gramian):
        seen.append(gramian)
        return gramian.diagonal()

    with torch.set_grad_enabled(recording):
        weights = Engine(net).backward(losses, weighting)
    vector = torch.cat([twins[0], twins.square().mean()[None]])
    expected = gramian(vector, other.parameters())
    torch.testing.assert_close(seen, [expected])
    torch.testing.assert_close(weights, expected.diagonal())
    vector.backward(expected.diagonal())
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda y: [], ValueError, "no losses in the list"),
        (lambda y: [y, 1.0], TypeError, r"losses\[1\] must be a tensor of a floating-point type, and is float"),
        (lambda y: [y, y.long()], TypeError, r"losses\[1\] .* a tensor of torch.int64"),
        (lambda y: [y, y.detach()], ValueError, r"losses\[1\] has no graph.*leave it out"),
        (lambda y: [y, y.double()], TypeError, r"of torch.float32 and losses\[1\] of torch.float64.*\.to\("),
        (lambda y: [y, y.to("meta")], ValueError, r"on cpu and losses\[1\] on meta.*\.to\("),
        (lambda y: {"a": y}, TypeError, "and is dict"),
    ],
    ids=["empty", "float", "integers", "detached", "dtypes", "devices", "dict"],
)
def test_lists_that_are_no_losses(wrong, error, message):
    net = mlp()
    engine, losses = Engine(net), wrong(net(torch.randn(4, 10)))
    with pytest.raises(error, match=message):
        engine.compute_gramian(losses)
    with pytest.raises(error, match=message):
        engine.backward(losses, MeanWeighting())
    assert all(p.grad is None for p in net.parameters())


def test_weights_of_another_shape_for_a_list():
    net = mlp()
    outputs = net(torch.randn(4, 10))
    with pytest.raises(ValueError, match=r"weights of shape \[2\] for losses of shape \[13\]"):
        Engine(net).backward([outputs, outputs.sum()], lambda gramian: gramian.new_ones(2))
    assert all(p.grad is None for p in net.parameters())


def test_the_warning_of_a_list_points_at_the_line_that_called_the_engine():
    engine, other = Engine(mlp()), mlp()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine.compute_gramian([other(torch.randn(4, 10)).sum()])
    assert [warning.filename for warning in warned] == [__file__]


def test_threads_that_share_an_engine():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    engine, interval = Engine(model), sys.getswitchinterval()
    inputs = [torch.randn(5, 4, dtype=torch.float64) for _ in range(2)]
    expected = [engine.compute_gramian(model(x).square().sum(1)) for x in inputs]
    faults = []

    def work(k):
        for _ in range(20):
            found = engine.compute_gramian(model(inputs[k]).square().sum(1))
            if not torch.allclose(found, expected[k]):
                faults.append(k)

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not faults


def test_settings_of_a_layer_that_change_after_its_call():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)).double()
    engine, x = Engine(model, certify_every=0), torch.randn(3, 4, dtype=torch.float64)
    expected = engine.compute_gramian(model(x).sin().sum(1))
    losses = model(x).sin().sum(1)
    model[1].eps = 1.0
    torch.testing.assert_close(engine.compute_gramian(losses), expected)


def test_settings_of_operations_are_kept_apart():
    """A permutation and an index may be said by equal numbers."""
    layer = nn.Linear(3, 3).double()
    engine = Engine(layer)
    for batch in (2, 3):
        hidden = layer(torch.randn(batch, 4, 3, dtype=torch.float64))[torch.arange(batch)].permute(1, 0, 2)
        losses = hidden.square().sum((1, 2))
        assert engine.compute_gramian(losses).shape == (4, 4)
    assert engine.certificate.checks == 2
