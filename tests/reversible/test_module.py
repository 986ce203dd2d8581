"""`InvertibleModule`: modules whose inverse the user writes."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import recollect.invertible as inn
import recollect.invertible._coupling as coupling_file
import recollect.invertible._module as module_file
import recollect.reversible._group as group_file
from recollect.frames import RebuildError
from recollect.memory import peak_memory
from recollect.reversible import GroupAddRev, GroupRevRes, InvertibleModule

_CALLS: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()


class Sinh(InvertibleModule):
    """y = sinh(w x), with positive w."""

    def __init__(self, width: int = 4, **options: Any) -> None:
        super().__init__(**options)
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=torch.float64))

    @property
    def calls(self) -> list[str]:
        """Not an attribute: those are put back after a rebuild."""
        return _CALLS.setdefault(self, [])

    def _forward(self, x: Tensor) -> Tensor:
        self.calls.append("forward")
        return (x * self.weight).sinh()

    def _inverse(self, y: Tensor) -> Tensor:
        self.calls.append("inverse")
        return y.asinh() / self.weight


class Shift(InvertibleModule):
    """y = x + dropout(net(context)), gated by something that may be None."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5))

    def _shift(self, context: Tensor, gate: Tensor | None) -> Tensor:
        shift = self.net(context)
        return shift if gate is None else shift * gate

    def _forward(self, x: Tensor, context: Tensor, gate: Tensor | None = None) -> Tensor:
        return x * 2 + self._shift(context, gate)

    def _inverse(self, y: Tensor, context: Tensor, gate: Tensor | None = None) -> Tensor:
        return (y - self._shift(context, gate)) / 2


class Split(InvertibleModule):
    """One tensor in, a tensor, something else and another tensor out."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Dropout(0.5))

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        a = a + self.net(b)
        return a, b * 3

    def _inverse(self, a: Tensor, b: Tensor) -> Tensor:
        b = b / 3
        return torch.cat([a - self.net(b), b], -1)


class OneTuple(InvertibleModule):
    def _forward(self, x: Tensor) -> tuple[Tensor]:
        return (x.exp(),)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.log()


def toggled(module: InvertibleModule, run: Any) -> tuple[Any, Any]:
    def with_disable(disable: bool) -> Any:
        def call() -> Tensor:
            for child in module.modules():
                if isinstance(child, InvertibleModule):
                    child.disable = disable
            return run()

        return call

    return with_disable(False), with_disable(True)


def test_trains_as_plain_and_keeps_no_input(same_training, features):
    module, x = Sinh(), features(4)
    assert torch.equal(module(x), (x * module.weight).sinh())
    same_training(lambda: module(x * 1), lambda: (x * module.weight).sinh(), [x, module.weight])
    module.calls.clear()
    module(x * 1).sum().backward()
    assert module.calls == ["forward", "inverse", "forward"]
    assert module.last_drift < 1e-14
    module.calls.clear()
    module(x).sum().backward()  # a leaf stays alive anyway: there is nothing to invert
    assert module.calls == ["forward", "forward"]


def test_disabled_runs_once(features):
    module, x = Sinh(disable=True), features(4)
    module(x * 1).sum().backward()
    module.disable = False
    with torch.no_grad():
        module(x)
    assert module.calls == ["forward", "forward"]


def test_inverse_trains(same_training, features):
    module, y = Sinh(), features(4)
    same_training(lambda: module.inverse(y * 1), lambda: y.asinh() / module.weight, [y, module.weight])
    module.calls.clear()
    module.inverse(y * 1).sum().backward()
    assert module.calls == ["inverse", "forward", "inverse"]
    torch.testing.assert_close(module.inverse(module(y)), y)
    module.disable = True
    torch.testing.assert_close(module.inverse(module(y)), y)


@pytest.mark.parametrize("gate", [None, "leaf", "computed"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_arguments_dropout_and_batch_norm(gate, direction, same_training, features):
    modules = nn.ModuleList(Shift() for _ in range(3)).double()
    x, context = features(4), features(4) * 0.5
    context = context.detach().requires_grad_()
    factor = torch.rand(7, 4, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        gates = {None: None, "leaf": factor, "computed": factor.exp()}
        h = x * 1
        for module in modules:
            h = getattr(module, direction if direction == "inverse" else "__call__")(h, context, gates[gate])
        return h

    framed, plain = toggled(modules, run)
    same_training(framed, plain, [x, context, factor, *modules.parameters()])
    found, expected = copy.deepcopy(modules), copy.deepcopy(modules)
    for chain, disable in ((found, False), (expected, True)):
        torch.manual_seed(0)
        h = x * 1
        for module in chain:
            module.disable = disable
            h = module(h, context)
        h.sin().sum().backward()
    for f, e in zip(found.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)
    assert [int(m.net[1].num_batches_tracked) for m in found] == [int(m.net[1].num_batches_tracked) for m in expected]


def test_several_outputs(same_training, features):
    first, second = Split().double(), Split().double()
    both, x = nn.ModuleList([first, second]), features(4)
    a, b = first(x)
    assert a.shape == b.shape == (7, 2)

    def run() -> Tensor:
        a, b = first(x * 1)
        c, d = second(torch.cat([a, b], -1))
        return torch.cat([c, d, b.exp()], -1)

    framed, plain = toggled(both, run)
    same_training(framed, plain, [x, *both.parameters()])
    both.eval()
    torch.testing.assert_close(first.inverse(*first(x)), x)


@pytest.mark.parametrize(
    "index",
    [
        0,
        pytest.param(1),
    ],
)
def test_one_output_of_several(index, same_training, features):
    module, x = Split().double(), features(4)
    framed, plain = toggled(module, lambda: module(x * 1)[index])
    same_training(framed, plain, [x])


def test_a_lone_output_in_a_tuple(same_training, features):
    module, x = OneTuple(), features(4)
    assert torch.equal(module(x), x.exp())
    same_training(lambda: module(x * 1), x.exp, [x])


def test_expanded_input(same_training):
    module = Sinh()
    x = torch.linspace(-1, 1, 4, dtype=torch.float64).view(1, 4).requires_grad_()
    same_training(lambda: module((x * 1).expand(5, 4)), lambda: (x * module.weight).sinh().expand(5, 4), [x])


@pytest.mark.parametrize(
    "view", [lambda x: x[:, 2:6], lambda x: x[:, ::2], lambda x: x.t()[:4].t()], ids=["slice", "stride", "transposed"]
)
def test_views_of_the_input(view, same_training, features):
    module, x = Sinh(), features(8)
    same_training(lambda: module(view(x * 1)), lambda: (view(x) * module.weight).sinh(), [x, module.weight])


def test_input_that_an_operation_before_saved(same_training, features):
    module, x = Sinh(), features(4)
    same_training(
        lambda: module(x.sigmoid()) + x.sigmoid(), lambda: (x.sigmoid() * module.weight).sinh() + x.sigmoid(), [x]
    )


def test_peak_memory_is_flat():
    class Leaky(InvertibleModule):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.weight = nn.Parameter(torch.full((4,), 1.1))

        def _forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(x * self.weight, 0.5)

        def _inverse(self, y: Tensor) -> Tensor:
            return F.leaky_relu(y, 2.0) / self.weight

    x = torch.randn(2000, 4)

    def peak(depth: int, disable: bool) -> int:
        chain = nn.Sequential(*(Leaky(disable=disable) for _ in range(depth)))
        for parameter in chain.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with peak_memory("cpu") as memory:
            chain(x * 1).sum().backward()
        return memory.peak_bytes

    assert peak(32, disable=False) <= 1.05 * peak(8, disable=False)
    assert peak(32, disable=True) > 3 * peak(8, disable=True)


def test_second_derivative(features):
    module = Sinh()
    x = features(4, rows=2)
    assert torch.autograd.gradgradcheck(lambda x, w: module(x * 1), (x, module.weight))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(how, features):
    module, x = Sinh(num_bwd_passes=2, anchor_every=3), features(4)
    module(x * 1).sum().backward()
    other = how(module)
    assert torch.equal(other(x), module(x))
    assert (other.num_bwd_passes, other.anchor_every, other.disable) == (2, 3, False)
    assert set(module.state_dict()) == {"weight"}


class TestErrors:
    def test_missing_methods(self):
        class Empty(InvertibleModule):
            pass

        with pytest.raises(NotImplementedError, match="Empty must define _forward"):
            Empty()(torch.zeros(2))
        with pytest.raises(NotImplementedError, match="Empty must define _inverse"):
            Empty().inverse(torch.zeros(2))

    def test_a_forward_without_its_underscore(self):
        class Layer(InvertibleModule):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * x

        with pytest.raises(TypeError, match=r"Layer defines forward and no _forward: .* and write _inverse too"):
            Layer()

    def test_a_forward_around_that_of_the_base(self, features):
        class Layer(Sinh):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(2 * x)

        assert torch.equal(Layer()(features(4)), Sinh()(2 * features(4)))

    def test_no_inverse_is_told_before_anything_runs(self, features):
        class Layer(InvertibleModule):
            def _forward(self, x: Tensor) -> Tensor:
                return 2 * x

        module, x = Layer(), features(4)
        with pytest.raises(NotImplementedError, match=r"Layer must define _inverse, .*disable=True makes it a plain"):
            module(x)
        with torch.no_grad():
            assert torch.equal(module(x), 2 * x)
        module.disable = True
        assert torch.equal(module(x), 2 * x)

    def test_inverse_of_another_shape(self, features):
        class Wrong(Sinh):
            def _inverse(self, y: Tensor) -> Tensor:
                return y[:, :2]

        with pytest.raises(RuntimeError, match=r"(?s)Wrong\(\).*shape \[7, 2\].*shape \[7, 4\]"):
            Wrong()(features(4) * 1).sum().backward()

    def test_inverse_that_is_none(self, features):
        class Wrong(Sinh):
            def _inverse(self, y: Tensor) -> Tensor:
                return y + 0.1

        with pytest.raises(RebuildError, match=r"Wrong\(\): .*an inverse give back what its function was given"):
            Wrong()(features(4) * 1).sum().backward()
        with pytest.warns(UserWarning, match=r"Wrong: the input that was reconstructed.*anchor_every=s"):
            Wrong(certify=False)(features(4) * 1).sum().backward()

    def test_threshold(self, features):
        class Rough(Sinh):
            def _inverse(self, y: Tensor) -> Tensor:
                return super()._inverse(y) * (1 + 1e-5)

        with pytest.raises(RebuildError, match=r"relative error of .*e-0[56].*rounding: 1e-10"):
            Rough()(features(4) * 1).sum().backward()
        module = Rough(certify=False)
        module(features(4) * 1).sum().backward()
        assert module.last_drift == pytest.approx(1e-5, rel=1e-6)
        with pytest.warns(UserWarning, match="threshold 1.0e-06"):
            Rough(drift_threshold=1e-6, certify=False)(features(4) * 1).sum().backward()

    def test_output_changed_in_place(self, features):
        module = Sinh()
        y = module(features(4) * 1)
        y.detach().mul_(2)
        with pytest.raises(RuntimeError, match=r"Sinh\(\).*output of shape \[7, 4\] was changed in place"):
            y.sum().backward()

    def test_parameter_changed_in_place(self, features):
        module = Sinh()
        y = module(features(4) * 1)
        with torch.no_grad():
            module.weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"Sinh\(\).*(weight|parameter).*changed in place"):
            y.sum().backward()

    @pytest.mark.parametrize("option", ["num_bwd_passes", "anchor_every"])
    def test_counts_below_one(self, option):
        with pytest.raises(ValueError, match=rf"{option} must be at least 1, or None \(got 0\)"):
            Sinh(**{option: 0})

    @pytest.mark.parametrize("direction", ["forward", "inverse"])
    def test_passes(self, direction, features):
        module = Sinh(num_bwd_passes=1)
        loss = F.softplus(getattr(module, direction)(features(4) * 1)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"Sinh more than 1 time\(s\)"):
            loss.backward()

    def test_passes_of_several_outputs(self, features):
        module = Split(num_bwd_passes=1).double()
        a, b = module(features(4) * 1)
        (a.sum() + b.sum()).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="more than 1 time"):
            b.sum().backward()


@pytest.mark.parametrize("certify", [True, False, "exact"])
@pytest.mark.parametrize("kind", ["add", "res", "coupling", "sequential", "layer"])
def test_certify_is_handed_to_the_frames(kind, certify, monkeypatch):
    block = nn.Linear(2, 2)
    made = {
        "add": lambda: GroupAddRev(_Second(), num_groups=2, certify=certify),
        "res": lambda: GroupRevRes(_First(), certify=certify),
        "coupling": lambda: inn.AffineCoupling(nn.Linear(2, 4), nn.Linear(2, 4), certify=certify),
        "sequential": lambda: inn.Sequential(inn.AdditiveCoupling(block, block), inn.Asinh(), certify=certify),
        "layer": lambda: inn.ActNorm(4, certify=certify),
    }[kind]()
    parts = [part for part in made.modules() if isinstance(part, inn.Measured)]
    assert all(part.certify == certify for part in parts)
    assert len({id(part.certificate) for part in parts}) == len(parts)
    seen = []

    def noting(inner):
        def run(*args, **kwargs):
            seen.append((kwargs["certify"], kwargs["certificate"]))
            return inner(*args, **kwargs)

        return run

    for room, name in ((group_file, "couple"), (coupling_file, "couple_by"), (module_file, "run_invertible")):
        monkeypatch.setattr(room, name, noting(getattr(room, name)))
    x = torch.randn(3, 4, requires_grad=True) * 1
    made(*((None, x) if kind == "res" else (x, None) if kind == "add" else (x,)))
    assert seen
    for found, certificate in seen:
        assert found == certify
        assert any(certificate is part.certificate for part in parts)


def test_what_certify_may_be():
    for refused in (1, 0, None, "loose"):
        with pytest.raises(ValueError, match=r'certify must be True, False or "exact"'):
            inn.ActNorm(4, certify=refused)
    layer = inn.ActNorm(4)
    with pytest.raises(ValueError, match="certify must be"):
        layer.certify = "strict"
    flow = inn.Sequential(inn.ActNorm(4, certify=False), inn.ActNorm(4))
    assert [part.certify for part in flow] == [False, True]


class _Second(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def forward(self, x, graph):
        return super().forward(x)


class _First(_Second):
    def forward(self, graph, x):
        return super().forward(x, graph)
