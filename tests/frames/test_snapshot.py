"""Modules of torch's own types are not observed once they are known, and are rebuilt as they were all the same."""

import copy
import functools
import weakref

import pytest
import torch
from seam_oracle import float64
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import recollect
from recollect.frames import InPlaceError, RebuildError
from recollect.frames._outline import _STILL
from recollect.frames._recorder import Recorder, recorder_of

assert float64 is not None  # a fixture of every test here


class Own(nn.Module):
    def forward(self, x):
        return x.tanh()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.GELU()), nn.Dropout(0.4), nn.Linear(6, 6))


def norms():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten())


def data(requires_grad=True):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_(requires_grad)


def call(module, x, framed=True):
    return recollect.checkpoint(module, x) if framed else module(x)


def warmed(module):
    """A module whose calls are known in training and in evaluation."""
    for training in (False, True):
        module.train(training)
        for _ in range(3):
            call(module, data()).sum().backward()
    module.zero_grad()
    return module


def is_observed(module, *arguments):
    return isinstance(recorder_of(module, arguments or (data(),)), Recorder)


# Who is observed.


@pytest.mark.parametrize("make", [net, norms, convolutions], ids=["net", "norms", "convolutions"])
def test_torchs_own_modules_are_observed_in_their_first_calls_only(make):
    module = make()
    assert is_observed(module)
    warmed(module)
    assert not is_observed(module)
    module.append(nn.ReLU())
    assert is_observed(module)
    assert not is_observed(warmed(module))


def test_an_encoder_layer_is_not_observed():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 3, 8, requires_grad=True)
    for _ in range(3):
        call(layer, x).sum().backward()
    assert not is_observed(layer, x)


def test_each_setting_of_training_flags_is_observed_once():
    module = net()
    for _ in range(3):
        call(module, data()).sum().backward()
    assert not is_observed(module)
    module[2].eval()
    assert is_observed(module)


def with_hook(module):
    module[0].register_forward_hook(lambda *_: None)


def with_own_forward(module):
    module[0].forward = lambda x: x.sin()


def with_part(module):
    module[1] = Own()


def with_function(module):
    module[0].activation = lambda x: x


def with_function_of_a_known_name(module):
    module[0].activation = functools.wraps(nn.functional.relu)(lambda x: x)


def with_tensor(module):
    module[0].table = torch.ones(6)


def with_tensors(module):
    module[0].tables = [torch.ones(6)]


def with_list(module):
    module[0].sizes = [1, 2]


def with_hidden_module(module):
    object.__setattr__(module[0], "hidden", Own())


def with_parametrization(module):
    parametrizations.weight_norm(module[0])


def with_compiled_call(module):
    module[0]._compiled_call_impl = lambda x: x


@pytest.mark.parametrize(
    "change",
    [
        with_hook, with_own_forward, with_part, with_function, with_function_of_a_known_name, with_tensor,
        with_tensors, with_list, with_hidden_module, with_parametrization, with_compiled_call,
    ],
)  # fmt: skip
def test_what_may_run_other_code_is_observed(change):
    module = warmed(net())
    change(module)
    for _ in range(3):
        call(module, data()).sum().backward()
    assert is_observed(module)


def test_a_forward_that_somebody_has_put_into_the_class_is_observed(monkeypatch):
    module = warmed(net())
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: x)
    assert is_observed(module)


def test_hooks_on_all_modules_are_observed():
    module = warmed(net())
    for register in (
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda *_: None)
        assert is_observed(module)
        handle.remove()
    assert not is_observed(module)


def test_modes_that_see_all_functions_are_observed():
    module = warmed(net())
    x = data()
    with torch.device("cpu"):  # such a mode
        assert is_observed(module, x)
    assert not is_observed(module)


def test_arguments_that_are_more_than_tensors_are_observed():
    module = warmed(net())
    assert is_observed(module, [data()])
    assert is_observed(module, data().as_subclass(type("Mine", (torch.Tensor,), {})))


def test_modules_with_noise_that_is_filled_late_are_observed():
    module = nn.Sequential(nn.Linear(6, 6), nn.RReLU())
    assert is_observed(warmed(module))


def test_nobody_is_kept_alive():
    module = warmed(net())
    reference = weakref.ref(module[0].weight)
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())
    assert reference() is None


# What changes between forward and backward.


def other_p(module):
    module[2].p = 0.9


def evaluation(module):
    module.eval()


def other_parameter(module):
    module[0].weight = nn.Parameter(torch.zeros_like(module[0].weight))


def no_parameter(module):
    del module[0].bias
    module[0].register_parameter("bias", None)


def other_part(module):
    module[1] = nn.Identity()


def no_part(module):
    del module[1]


def frozen(module):
    module[0].weight.requires_grad_(False)


def new_attribute(module):
    module[0].note = "something"


def new_hook(module):
    module[0].register_forward_hook(lambda module, args, output: output * 3)


CHANGES = (other_p, evaluation, other_parameter, other_part, frozen, new_attribute, new_hook)


def held(module):
    return [
        (name, {key: id(value) for key, value in vars(part).items() if not isinstance(value, (dict, set))})
        for name, part in module.named_modules()
    ]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [net, norms], ids=["net", "norms"])
def test_a_rebuild_has_what_the_forward_had_and_leaves_what_is_there(change, make):
    if change is other_p and make is norms:
        pytest.skip("there is no dropout")
    gradients = []
    for framed in (False, True):
        module, x = warmed(make()), data()
        parameters = list(module.parameters())
        torch.manual_seed(3)
        y = call(module, x, framed)
        change(module)
        before = held(module)
        flags = [p.requires_grad for p in parameters]
        y.square().sum().backward()
        assert held(module) == before
        assert [p.requires_grad for p in parameters] == flags
        gradients.append([x.grad] + [p.grad for p in parameters])
        gradients[-1] += [copy.deepcopy(b) for b in module.buffers()]
    frozen_one = 1 if change is frozen else None
    for i, (one, other) in enumerate(zip(*gradients, strict=True)):
        if i != frozen_one:
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("change", [no_parameter, no_part])
@pytest.mark.parametrize("make", [net, norms], ids=["net", "norms"])
def test_what_is_no_longer_registered_is_not_passed_over(change, make):
    module = warmed(make())
    y = call(module, data())
    change(module)
    with pytest.raises(RebuildError, match="differs from the forward"):
        y.square().sum().backward()


def test_a_parameter_that_was_changed_in_place_is_refused_if_it_is_read():
    module = warmed(net())
    y = call(module, data())
    with torch.no_grad():
        module[1][0].weight.add_(1.0)
    with pytest.raises(InPlaceError, match="in place"):
        y.sum().backward()


def test_another_tensor_in_a_rebuild_is_refused():
    module, x = warmed(net()), data()
    h = x * 1
    y = call(module, h)
    h.detach().numpy()[0] += 1.0
    with pytest.raises(RebuildError, match="other values"):
        y.sum().backward()


@pytest.mark.parametrize("times", [1, 3])
def test_running_statistics_count_once(times):
    module, plain = warmed(norms()), warmed(norms())
    y = call(module, data())
    for _ in range(times):
        y.sum().backward(retain_graph=True)
    plain(data())
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), plain.buffers(), strict=True))


# Frames within frames.


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_rebuild_ends_where_the_next_frame_keeps_its_input(depth):
    runs = []

    def level(i):
        def region(x):
            runs.append(i)
            return recollect.checkpoint(level(i + 1), x.sin()) if i + 1 < depth else x.sin()

        return region

    x = data()
    recollect.checkpoint(level(0), x * 1).sum().backward()
    assert sorted(runs) == sorted([*range(depth)] * 2)
    expected = data()
    h = expected * 1
    for _ in range(depth):
        h = h.sin()
    h.sum().backward()
    assert torch.equal(x.grad, expected.grad)


# Random numbers.

ARGUMENTS = {
    nn.ModuleDict: (), nn.ModuleList: (), nn.Sequential: (), nn.Unflatten: (1, (1, 4)), nn.Linear: (4, 4),
    nn.Bilinear: (4, 4, 4), nn.Embedding: (4, 4), nn.BatchNorm1d: (4,), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (4,),
    nn.InstanceNorm1d: (4,), nn.InstanceNorm2d: (4,), nn.InstanceNorm3d: (4,), nn.GroupNorm: (2, 4),
    nn.LayerNorm: (4,), nn.RMSNorm: (4,), nn.AvgPool1d: (2,), nn.AvgPool2d: (2,), nn.AvgPool3d: (2,),
    nn.MaxPool1d: (2,), nn.MaxPool2d: (2,), nn.MaxPool3d: (2,), nn.AdaptiveAvgPool1d: (2,), nn.AdaptiveAvgPool2d: (2,),
    nn.AdaptiveAvgPool3d: (2,), nn.ConstantPad1d: (1, 0.5), nn.ConstantPad2d: (1, 0.5), nn.ZeroPad2d: (1,),
    nn.PixelShuffle: (2,), nn.Upsample: (8,), nn.Softmax: (-1,), nn.LogSoftmax: (-1,),
}  # fmt: skip


class Draws(TorchDispatchMode):
    """Counts operations, and those that draw random numbers."""

    def __init__(self):
        super().__init__()
        self.all, self.random = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random.append(str(func))
        return func(*args, **(kwargs or {}))


def inputs_of(kind):
    name = kind.__name__
    if kind is nn.Embedding:
        return (torch.tensor([0, 3]),)
    if kind is nn.Bilinear:
        return torch.rand(4, 4), torch.rand(4, 4)
    spatial = 3 if name.endswith("3d") else 2 if name.endswith("2d") or kind is nn.PixelShuffle else 1
    if name == "Linear" or name == "LayerNorm" or name == "RMSNorm":
        return (torch.rand(3, 4),)
    return (torch.rand(3, 4, *[6] * spatial),)


@pytest.mark.parametrize("kind", sorted(_STILL - {nn.ModuleList, nn.ModuleDict}, key=str))
@pytest.mark.parametrize("training", [False, True])
def test_modules_that_count_as_still_draw_nothing(kind, training):
    arguments = ARGUMENTS.get(kind, (4, 4, 3) if "Conv" in kind.__name__ else ())
    module = kind(*arguments).train(training)
    inputs = inputs_of(kind)
    before = torch.get_rng_state()
    with Draws() as draws:
        module(*inputs)
    assert not draws.random
    assert torch.equal(torch.get_rng_state(), before)
    if arguments and kind is not nn.Sequential:
        assert draws.all > 0


def test_the_count_sees_a_module_that_draws():
    with Draws() as draws:
        nn.Dropout(0.5)(torch.rand(3))
    assert draws.random


@pytest.mark.parametrize("make", [norms, convolutions, net])
def test_known_modules_whose_parts_draw_nothing_have_no_random_state(make):
    module = warmed(make())
    draws = any(isinstance(part, nn.Dropout) for part in module.modules())
    assert recorder_of(module, (data(),)).may_draw is draws


class Noise(TorchDispatchMode):
    """Adds noise to what Linear layers return."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out + torch.rand_like(out) if func is torch.ops.aten.addmm.default else out


def test_noise_of_a_mode_around_known_modules_is_that_of_the_forward():
    results = []
    for framed in (False, True):
        module = warmed(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
        with torch.no_grad():
            for i, parameter in enumerate(module.parameters()):
                parameter.fill_(0.1 * (i + 1))
        x = data()
        torch.manual_seed(3)
        with Noise():
            y = call(module, x, framed)
            y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
