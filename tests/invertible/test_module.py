"""The base of invertible modules against plain autograd: what it returns, what it keeps, what its flags do."""

import copy
import gc
import io
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import recollect
import recollect.invertible as inn
from recollect.frames import DriftWarning, FrameError, GraphFreedError, InPlaceError, RebuildError
from recollect.memory import peak_memory
from recollect.testing._zoo import ZOO

WIDTH = 4


CALLS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Swap(inn.Module):
    """(a, b) -> (b + f(a), a), reversible; notes the modes in which function and inverse run."""

    def __init__(self, width=WIDTH, dropout=0.0):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout))

    @property
    def calls(self):
        """Not an attribute: those are put back after a rebuild."""
        return CALLS.setdefault(self, [])

    def note(self, name):
        self.calls.append((name, recollect.in_dry_mode(), recollect.in_backward(), torch.is_grad_enabled()))

    def function(self, a, b):
        self.note("function")
        return b + self.block(a), a

    def inverse(self, c, a):
        self.note("inverse")
        return a, c - self.block(a)

    @property
    def reversible(self):
        return True


class Scale(inn.Module):
    """Multiply by exp(s): one input, one output."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.s = nn.Parameter(torch.randn(width) / 4)

    def function(self, x):
        return x * self.s.exp()

    def inverse(self, y):
        return y * (-self.s).exp()

    def function_and_log_det(self, x):
        return self.function(x), self.s.sum().expand(x.shape[:1])

    @property
    def reversible(self):
        return True


def scale(width=WIDTH):
    torch.manual_seed(1)
    return Scale(width).double()


def swaps(depth=4, **options):
    torch.manual_seed(0)
    return nn.ModuleList(Swap(**options) for _ in range(depth)).double()


def leaf(*shape, seed=2):
    return torch.randn(*(shape or (5, WIDTH)), generator=torch.Generator().manual_seed(seed)).double().requires_grad_()


def plain(modules, enabled=True):
    for module in modules:
        for part in module.modules():
            if isinstance(part, inn.Module):
                part.checkpoint = not enabled
                part.invertible = not enabled


def assert_same(found, expected, tolerance=1e-10):
    assert len(found) == len(expected)
    norms = [float(e.detach().norm()) for e in expected if e is not None]
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if f is not None:
            assert f.shape == e.shape
            assert float((f - e).detach().norm()) <= tolerance * max([1e-6 * max(norms), float(e.detach().norm())])


def compare(run, modules, wanted, **options):
    """Assert that outputs and gradients of ``run()``, which returns a loss, equal plain autograd's."""
    results = []
    for off in (True, False):
        plain(modules, off)
        torch.manual_seed(3)
        loss = run()
        results.append((loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True, **options)))
    assert torch.equal(results[0][0], results[1][0])
    assert any(g is not None and float(g.abs().max()) > 0 for g in results[0][1:])
    assert_same(results[1], results[0])


def through(modules, *args):
    for module in modules:
        args = module(*args)
        args = args if isinstance(args, tuple) else (args,)
    return args


def mixed(tensors):
    """A loss whose gradient with respect to each output depends on all of them."""
    return sum((t.sin() * (i + 1)).sum() for i, t in enumerate(tensors)) * tensors[0].cos().mean()


# What runs, and in which mode.


def test_function_runs_dry_first_and_in_backward_then():
    module, x = swaps(1)[0], leaf()
    loss = mixed(module(x * 1.0, x * 2.0))
    assert module.calls == [("function", True, False, True)]
    loss.backward()
    assert module.calls[1:] == [("inverse", False, True, False), ("function", False, True, True)]
    assert not recollect.in_backward()
    assert not recollect.in_dry_mode()


@pytest.mark.parametrize("flags", [{"checkpoint": False}, {"invertible": False}])
def test_without_flags_no_inverse_runs(flags):
    module, x = swaps(1)[0], leaf()
    with module.temp_mode(**flags):
        mixed(module(x * 1.0, x * 2.0)).backward()
    kept = [("function", False, False, True)]
    framed = [("function", True, False, True), ("function", False, True, True)]
    assert module.calls == (kept if "checkpoint" in flags else framed)


def test_each_function_and_inverse_of_a_chain_runs_once_in_backward():
    modules, x = swaps(6), leaf()
    loss = mixed(through(modules, x * 1.0, x * 2.0))
    for module in modules:
        module.calls.clear()
    loss.backward()
    assert [[call[0] for call in module.calls] for module in modules] == [["inverse", "function"]] * 6


def test_a_graph_of_dry_mode_refuses_backward():
    module, x = scale(), leaf()
    with recollect.dry_mode():
        assert recollect.in_dry_mode()
        y = module(x * 1.0)
    assert y.requires_grad
    with pytest.raises(FrameError, match="dry mode"):
        y.sum().backward()
    with recollect.dry_mode(False):
        module(x * 1.0).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_it_is_plain(mode):
    module = swaps(1)[0]
    with mode():
        y = module(leaf(), leaf(seed=4))
    assert not y[0].requires_grad
    assert module.calls == [("function", False, False, False)]


def test_abstract_methods_say_what_to_define():
    class Nothing(inn.Module):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing must define function\(\*args\)"):
        Nothing()(torch.ones(1))
    with pytest.raises(NotImplementedError, match=r"Nothing must define inverse\(\*outputs\)"):
        Nothing().inverse(torch.ones(1))
    with pytest.raises(NotImplementedError, match="Nothing has no log-determinant"):
        Nothing().forward_and_log_det(torch.ones(1))


class Halved(inn.Module):
    """Has no inverse."""

    def function(self, x):
        return x / 2


def test_a_forward_without_a_function_is_refused():
    class Layer(inn.Module):
        def forward(self, x):
            return 2 * x

        def inverse(self, y):
            return y / 2

    with pytest.raises(TypeError, match=r"Layer defines forward and no function: .*Rename forward to function, and"):
        Layer()


def test_a_forward_around_that_of_the_base_is_allowed():
    class Checked(inn.Module):
        def forward(self, x):
            return super().forward(x.abs())

    class Layer(Checked, Scale):
        pass

    with pytest.raises(TypeError, match="Checked defines forward and no function"):
        Checked()
    module, x = Layer(), leaf()
    assert torch.equal(module(x), module.function(x.abs()))


def test_what_has_no_inverse_is_refused_before_it_runs():
    module, x = Halved(), leaf()
    with pytest.raises(NotImplementedError, match=r"Halved must define inverse, .* attribute invertible to False"):
        module(x * 1)
    with torch.no_grad():
        assert torch.equal(module(x), x / 2)
    with module.temp_mode(checkpoint=False):
        assert torch.equal(module(x), x / 2)
    module.invertible = False
    assert_same(torch.autograd.grad(module(x * 1).sin().sum(), x), torch.autograd.grad((x / 2).sin().sum(), x))


def test_an_inverse_may_be_set_on_the_module_itself():
    class Doubled(inn.Module):
        def __init__(self):
            super().__init__()
            self.inverse = lambda y: y / 2  # type: ignore[method-assign]

        def function(self, x):
            return 2 * x

    x = leaf()
    assert_same(torch.autograd.grad(Doubled()(x * 1).sin().sum(), x), torch.autograd.grad((2 * x).sin().sum(), x))


# Gradients.


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("depth", [1, 3])
def test_hazards(name, depth):
    torch.manual_seed(0)
    made = [ZOO[name](WIDTH) for _ in range(depth)]
    modules = nn.ModuleList(module for module, _ in made).double()
    x, rest = leaf(), [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in made[0][1](5)[1:]]

    def run():
        args = (x * 1.0, *rest)
        for module in modules:
            args = module(*args[: len(rest) + 1])
        return mixed(args[:2])

    compare(run, modules, [x, *(p for p in modules.parameters() if p.requires_grad)])


def test_a_counter_behind_in_backward_counts_steps():
    module, inputs = ZOO["side effect"](WIDTH)
    for step in range(1, 4):
        mixed(module(*(t.requires_grad_() * 1 for t in inputs(3)))).backward()
        assert module.steps == int(module.calls) == step


def test_x_plus_f_of_x():
    module, x = scale(), leaf()

    def run():
        h = x * 1.0
        return ((h + module(h)) * (module(h) + h)).sum()

    compare(run, [module], [x, module.s])


def test_x_plus_f_of_x_with_the_reference_dropped():
    module, x = scale(), leaf()

    def residual(h):
        return module(h) + h

    compare(lambda: residual(residual(x * 1.0)).sin().sum(), [module], [x, module.s])


def test_inputs_that_nobody_holds_are_freed_and_others_stay():
    module, x = scale(), leaf()
    held = x * 1.0
    y = module(held)
    assert held.untyped_storage().size() > 0
    reference = weakref.ref(held)
    del held
    gc.collect()
    assert reference() is None
    y.sum().backward()


def test_keep_saves_the_inverse():
    calls = []

    class Noted(Scale):
        def inverse(self, y):
            calls.append(1)
            return super().inverse(y)

    module, x = Noted().double(), leaf()
    h = x * 1.0
    module(h, keep=(t for t in [h])).sum().backward()
    assert calls == []
    module(x * 1.0, keep=(t for t in [h][:0])).sum().backward()
    assert calls == [1]


def test_several_backward_passes():
    modules, x = swaps(4, dropout=0.3), leaf()
    wanted = [x, *modules.parameters()]
    plain(modules)
    torch.manual_seed(0)
    expected = torch.autograd.grad(mixed(through(modules, x * 1.0, x * 2.0)), wanted)
    plain(modules, False)
    torch.manual_seed(0)
    loss = mixed(through(modules, x * 1.0, x * 2.0))
    for subset in (wanted, wanted[3:5], wanted[-1:], wanted[:1], wanted):
        found = torch.autograd.grad(loss, subset, retain_graph=True)
        assert_same(found, [e for w, e in zip(wanted, expected, strict=True) if any(w is s for s in subset)])
    assert_same(torch.autograd.grad(loss, wanted), expected)
    with pytest.raises((GraphFreedError, RuntimeError), match="second time"):
        torch.autograd.grad(loss, wanted)


def test_double_backward():
    modules, x = swaps(3), leaf()
    results = []
    for off in (True, False):
        plain(modules, off)
        (g,) = torch.autograd.grad(mixed(through(modules, x * 1.0, x * 2.0)), x, create_graph=True)
        results.append((g.detach(), *torch.autograd.grad(g.sin().sum(), [x, *modules.parameters()])))
    assert_same(results[1], results[0])


def test_batched_gradients():
    modules, x = swaps(3, dropout=0.2), leaf()
    results = []
    for off in (True, False):
        plain(modules, off)
        torch.manual_seed(0)
        y = through(modules, x * 1.0, x * 2.0)[0]
        directions = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(1)).double()
        wanted = [x, *modules.parameters()]
        results.append(torch.autograd.grad(y, wanted, directions, is_grads_batched=True, allow_unused=True))
    assert_same(results[1], results[0])


def test_branches_from_the_middle_of_a_chain():
    modules, head, x = swaps(5), scale(), leaf()

    def run():
        h, total = (x * 1.0, x * 2.0), 0.0
        for module in modules:
            h = module(*h)
            total = total + head(h[0]).sin().sum() + h[1].cos().sum()
        return total

    compare(run, [*modules, head], [x, *modules.parameters(), head.s])


def test_two_consumers_of_one_output():
    first, second, third, x = scale(), scale(), scale(), leaf()

    def run():
        h = first(x * 1.0)
        return (second(h).sin() * third(h).cos()).sum()

    compare(run, [first, second, third], [x, first.s, second.s, third.s])


def test_one_module_several_times_in_a_chain():
    module, x = swaps(1)[0], leaf()
    compare(lambda: mixed(through([module] * 4, x * 1.0, x * 2.0)), [module], [x, *module.parameters()])


@pytest.mark.parametrize(
    "view",
    [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t.expand(3, *t.shape), lambda t: t.chunk(2, -1)[1]],
    ids=["transposed", "strided", "expanded", "chunk"],
)
def test_inputs_that_are_views(view):
    x = leaf(4, 4)
    module = scale(view(x).shape[-1])
    compare(lambda: module(module(view(x * 1.0))).sin().sum(), [module], [x, module.s])


def test_a_leaf_and_a_parameter_as_inputs():
    module, x = swaps(1)[0], leaf()
    weight = nn.Parameter(leaf(seed=8).detach())
    compare(lambda: mixed(module(x, weight)), [module], [x, weight, *module.parameters()])


def test_an_input_without_grad():
    module, x = swaps(1)[0], leaf()
    data = leaf(seed=7).detach()
    compare(lambda: mixed(module(*module(data, data + 1))), [module], list(module.parameters()))
    compare(lambda: mixed(module(*module(data, x * 2))), [module], [x, *module.parameters()])


def test_autocast():
    module, x = Swap().float(), leaf().float().detach().requires_grad_()
    results = []
    for off in (True, False):
        plain([module], off)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(*module(x * 1.0, x * 2.0))
        results.append([y[0].dtype, *torch.autograd.grad(mixed([t.float() for t in y]), [x, *module.parameters()])])
    assert results[0][0] == results[1][0]
    assert_same(results[1][1:], results[0][1:], 2e-2)  # a bfloat16 sum is not inverted exactly


class Doubled(Scale):
    """Of two inputs; saves neither."""

    def function(self, a, b):
        return a * self.s.exp(), b * 2.0

    def inverse(self, c, d):
        return c * (-self.s).exp(), d / 2.0


def test_an_output_changed_in_place_is_right_or_refused():
    modules, x = [*swaps(3), Doubled().double()], leaf()

    def run():
        a, b = through(modules, x * 1.0, x * 2.0)
        b.mul_(2.0)
        return a.sin().sum() + b.sum()

    plain(modules)
    expected = torch.autograd.grad(run(), x)
    plain(modules, False)
    try:
        found = torch.autograd.grad(run(), x)
    except InPlaceError:
        return
    assert_same(found, expected)


def test_an_inverse_that_updates_a_buffer():
    class Counted(Scale):
        def __init__(self):
            super().__init__()
            self.register_buffer("inverted", torch.zeros(()))

        def inverse(self, y):
            self.inverted += 1
            return super().inverse(y)

    module, x = Counted().double(), leaf()
    compare(lambda: module(x * 1.0).sin().sum(), [module], [x, module.s])


# Outputs.


def test_requires_grad_of_outputs_is_that_of_plain_execution():
    class Mixed(inn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(WIDTH))

        def function(self, x, k, nothing, flag):
            return x * self.w, x.argmax(-1), x > 0, x.detach() * 2, k, nothing, flag

        def inverse(self, y, *rest):
            k, nothing, flag = rest[-3:]
            return y / self.w, k, nothing, flag

    module, x = Mixed(), leaf()
    args = (torch.arange(3), None, "flag")
    with module.temp_mode(checkpoint=False):
        expected = module(x * 1.0, *args)
    found = module(x * 1.0, *args)
    assert [getattr(t, "requires_grad", None) for t in found] == [True, False, False, False, False, None, None]
    assert [getattr(t, "requires_grad", None) for t in found] == [getattr(t, "requires_grad", None) for t in expected]
    assert [getattr(t, "dtype", t) for t in found] == [getattr(t, "dtype", t) for t in expected]
    compare(lambda: module(x * 1.0, *args)[0].sin().sum(), [module], [x, module.w])
    module.requires_grad_(False)
    assert not any(getattr(t, "requires_grad", False) for t in module(x.detach(), *args))


class Square(inn.Module):
    """Hides the sign, which its inverse needs; with ``negative`` the counts are from the end."""

    def __init__(self, visible=1):
        super().__init__()
        self.visible = visible

    @property
    def num_outputs(self):
        return self.visible

    def function(self, x):
        return x.square(), x.sign()

    def inverse(self, y, sign):
        return y.sqrt() * sign, "surplus"

    @property
    def num_inputs(self):
        return 1


@pytest.mark.parametrize("visible", [1, -1])
def test_hidden_outputs(visible):
    module, x = Square(visible), leaf()
    y = module(x * 1.0)
    assert torch.equal(y, x.square())
    assert torch.equal(module.process(module.inverse(*module.function(x)), inverse=True), x)
    compare(lambda: module(x * 1.0).exp().sum(), [module], [x])
    assert module.check(x.detach())


@pytest.mark.parametrize("visible", [0, 3, -2])
def test_a_wrong_number_of_outputs_is_an_error(visible):
    with pytest.raises(ValueError, match=rf"Square: num_outputs is {visible}, of 2 value\(s\)"):
        Square(visible)(leaf())


def test_outputs_may_be_a_list_and_a_lone_one_comes_bare():
    class Lists(Swap):
        def function(self, a, b):
            return list(super().function(a, b))

        def inverse(self, c, a):
            return list(super().inverse(c, a))

    module, x = Lists().double(), leaf()
    assert isinstance(module(x * 1.0, x * 2.0), tuple)
    compare(lambda: mixed(module(x * 1.0, x * 2.0)), [module], [x, *module.parameters()])
    assert torch.is_tensor(Square()(x))


# Flags.


def test_flags_change_between_steps():
    modules, x = swaps(3, dropout=0.3), leaf()
    wanted = [x, *modules.parameters()]
    results = []
    for checkpoint, invertible in [(False, False), (True, True), (True, False), (False, False), (True, True)]:
        for module in modules:
            module.checkpoint, module.invertible = checkpoint, invertible
            assert module.checkpoint is (checkpoint or invertible)
            assert module.invertible is invertible
        torch.manual_seed(0)
        results.append(torch.autograd.grad(mixed(through(modules, x * 1.0, x * 2.0)), wanted))
    for found in results[1:]:
        assert_same(found, results[0])


def test_flags_depend_on_each_other():
    module = Scale()
    assert (module.checkpoint, module.invertible, module.seed, module.reversed) == (True, True, True, False)
    module.checkpoint = False
    assert not module.invertible
    module.checkpoint = True
    assert module.invertible
    module.checkpoint = module.invertible = False
    assert not module.checkpoint
    module.invertible = True
    assert module.checkpoint
    assert module.invertible


def flags_of(module):
    return module.seed, module.checkpoint, module.invertible, module.reversed


def test_temp_mode_nests_and_restores():
    module = Scale()
    with module.temp_mode(checkpoint=False) as same:
        assert same is module
        assert flags_of(module) == (True, False, False, False)
        with module.temp_mode(invertible=True, seed=False, reversed=True):
            assert flags_of(module) == (False, True, True, True)
            with module.temp_mode(invertible=False, reversed=False):
                assert flags_of(module) == (False, True, False, False)
            assert flags_of(module) == (False, True, True, True)
        assert flags_of(module) == (True, False, False, False)
    assert flags_of(module) == (True, True, True, False)

    class BodyError(Exception):
        pass

    def fail():
        with module.temp_mode(invertible=False, reversed=True):
            module.seed = False
            raise BodyError

    with pytest.raises(BodyError):
        fail()
    assert flags_of(module) == (True, True, True, False)


def test_temp_mode_errors_change_nothing():
    module = Square()
    with pytest.raises(TypeError, match=r"temp_mode takes seed, checkpoint, invertible, reversed \(got dry\)"):
        module.temp_mode(dry=True).__enter__()
    with pytest.raises(ValueError, match="invertible=True needs checkpoint=True"):
        module.temp_mode(checkpoint=False, invertible=True).__enter__()
    with pytest.raises(RuntimeError, match="Square is not reversible"):
        module.temp_mode(seed=False, reversed=True).__enter__()
    assert flags_of(module) == (True, True, True, False)


def test_without_seed_random_numbers_are_not_replayed():
    module = swaps(1, dropout=0.5)[0]
    x = torch.ones(64, WIDTH, dtype=torch.float64, requires_grad=True)
    module.checkpoint = False
    torch.manual_seed(0)
    expected = torch.autograd.grad(module(x * 1, x * 1)[0].sum(), list(module.parameters()))
    module.checkpoint = True
    gradients = {}
    for seed in (True, False):
        module.seed = module.certify = seed
        torch.manual_seed(0)
        with nullcontext() if seed else pytest.warns(DriftWarning):
            gradients[seed] = torch.autograd.grad(module(x * 1, x * 1)[0].sum(), list(module.parameters()))
    assert_same(gradients[True], expected)
    assert not torch.allclose(gradients[False][1], expected[1])
    module.certify = True
    with pytest.raises(RebuildError, match=r"Swap.*seed=False"):
        module(x * 1, x * 1)[0].sum().backward()


def test_state_dict_holds_tensors_that_mean_the_same_in_either_direction():
    module = Scale().reverse()
    module.seed, module.invertible = False, False
    assert all(isinstance(value, torch.Tensor) for value in module.state_dict().values())
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = Scale()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert flags_of(other) == (True, True, True, False)
    x = torch.randn(5, 4)
    assert torch.equal(other.function(x), module.function(x))
    assert torch.equal(other.reverse()(x), module(x))


@pytest.mark.parametrize("strict", [True, False])
def test_state_dicts_with_flags_of_earlier_versions_set_them(strict):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = inn.Sequential(Scale(), Scale())

    model, state = Nested(), Nested().state_dict()
    flags = {"seed": False, "checkpoint": True, "invertible": False, "reversed": True}
    for prefix in ("layers.", "layers.0.", "layers.1."):
        state[f"{prefix}_extra_state"] = flags
    before = dict(state)
    model.load_state_dict(state, strict=strict)
    assert list(state) == list(before)
    for module in (model.layers, *model.layers):
        assert flags_of(module) == (False, True, False, True)
    assert torch.equal(model.layers[1].s, state["layers.0.s"])  # in the opposite order
    with pytest.raises(RuntimeError, match="_extra_state"):
        model.load_state_dict({**Nested().state_dict(), "layers._extra_state": torch.zeros(())})


def test_repr_shows_the_flags():
    module = Scale()
    assert repr(module) == "Scale(reversed=False, checkpoint=True, invertible=True, seed=True)"
    module.checkpoint = False
    assert repr(module.reverse()) == "Scale(reversed=True, checkpoint=False)"

    class Own(inn.Module, nn.Linear):
        pass

    assert repr(Own(2, 3)).startswith("Own(in_features=2, out_features=3, bias=True, reversed=False, checkpoint=True")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_alike(duplicate):
    module, x = swaps(1)[0].reverse(), leaf()
    module.seed = False
    other = duplicate(module)
    assert flags_of(other) == flags_of(module)
    results = [torch.autograd.grad(mixed(m(x * 1.0, x * 2.0)), [x, *m.parameters()]) for m in (module, other)]
    assert_same(results[1], results[0], 0.0)
    assert other.last_drift is not None
    assert all(a is not b for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_anchor_every_is_checked():
    class Anchored(inn.Module):
        def __init__(self):
            super().__init__(anchor_every=0)

    with pytest.raises(ValueError, match=r"anchor_every must be at least 1, or None \(got 0\)"):
        Anchored()


# Direction.


def test_reversing():
    module, x, z = swaps(1)[0], leaf(), leaf(seed=5)
    assert module.reversible
    assert module.reverse() is module
    assert module.reversed
    assert module.reverse(True).reversed
    assert torch.equal(module(x, z)[1], module.inverse(x, z)[1])
    assert (module.call_function, module.call_inverse) == (module.inverse, module.function)
    assert not module.reverse().reversed
    assert (module.call_function, module.call_inverse) == (module.function, module.inverse)
    module.reversed = True
    assert not module.reverse(False).reversed
    with pytest.raises(RuntimeError, match="Square is not reversible"):
        Square().reverse()
    with pytest.raises(RuntimeError, match="Square is not reversible"):
        Square().reversed = True
    assert not Square().reverse(False).reversed


def test_reversed_training():
    modules, x = swaps(4, dropout=0.3), leaf()
    for module in list(modules)[::2]:
        module.reverse()
    compare(lambda: mixed(through(modules, x * 1.0, x * 2.0)), modules, [x, *modules.parameters()])
    assert all(module.check(x.detach(), x.detach() + 1) for module in modules)


def test_reversed_undoes():
    module, x = swaps(1)[0], leaf()
    y = module(x, x * 2)
    assert_same(module.reverse()(*y), (x, x * 2))


def test_log_determinants():
    module, x = scale(), leaf()
    jacobian = torch.autograd.functional.jacobian(lambda row: module(row[None])[0], x.detach()[0])
    for direction in (1, -1):
        y, log_det = module.forward_and_log_det(x * 1.0)
        assert torch.equal(y, module(x))
        assert log_det.shape == (5,)
        assert torch.allclose(log_det, direction * torch.linalg.slogdet(jacobian)[1].expand(5), atol=1e-12)
        compare(
            lambda: sum((t.sin() * (i + 1)).sum() for i, t in enumerate(module.forward_and_log_det(x * 1.0))),
            [module],
            [x, module.s],
        )
        module.reverse()


# Memory.


def kept(depth, width=64, batch=256):
    torch.manual_seed(0)
    modules = nn.ModuleList(Swap(width) for _ in range(depth))
    x = torch.randn(batch, width, requires_grad=True)
    mixed(through(modules, x * 1.0, x * 2.0)).backward()
    with peak_memory("cpu") as memory:
        loss = mixed(through(modules, x * 1.0, x * 2.0))
        after = memory.current_bytes
        loss.backward()
    parameters = sum(p.numel() * 4 for p in modules.parameters())
    return after, memory.peak_bytes, parameters


def test_memory_is_flat_in_depth_although_inputs_are_passed_on():
    unit = 64 * 256 * 4
    shallow, deep = kept(4), kept(32)
    assert deep[0] - shallow[0] < unit  # what the graph holds after the forward
    assert deep[1] - shallow[1] < unit + deep[2]  # and the peak of the step, in which gradients come into being


def test_what_is_held_after_a_backward_that_retains_is_bounded():
    modules, x = swaps(8), leaf()
    loss = mixed(through(modules, x * 1.0, x * 2.0))
    wanted = [x, *modules.parameters()]
    with peak_memory("cpu") as memory:
        sizes = []
        for _ in range(6):
            torch.autograd.grad(loss, wanted, retain_graph=True)
            sizes.append(memory.current_bytes)
    assert max(sizes[1:]) <= sizes[0]
    assert sizes[0] <= 4 * x.numel() * 8
