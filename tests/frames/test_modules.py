"""What modules hold besides parameters: it changes once per forward, and a rebuild sees the forward's."""

import functools
from types import SimpleNamespace

import pytest
import torch
from frames_zoo import WIDTH, Block, assert_same, each_source, make, wanted
from torch import nn

import recollect
from recollect.frames import InPlaceError, couple


def silently(reason, raises=AssertionError):
    return pytest.mark.xfail(strict=True, raises=raises, reason=reason)


def buffers_of(net):
    return {name: buffer.clone() for name, buffer in net.named_buffers()}


@each_source
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_statistics_change_once_per_forward(source, momentum):
    states = []
    for enabled in (False, True):
        net, x = make(source, norm=True)
        for block in net.blocks:
            block.norm.momentum = momentum
        for step in range(3):
            loss = net(x, enabled).sin().sum()
            loss.backward(retain_graph=True)
            loss.backward()
            assert all(block.norm.num_batches_tracked == step + 1 for block in net.blocks)
        states.append(buffers_of(net))
    for name, buffer in states[0].items():
        assert torch.equal(states[1][name], buffer), name


def test_batch_norm_in_nested_frames_changes_once():
    states = []
    for enabled in (False, True):
        net, x = make("coupling", norm=True)
        y = recollect.checkpoint(lambda h, net=net, enabled=enabled: net(h, enabled).sin(), x, enabled=enabled)
        y.sum().backward()
        states.append(buffers_of(net))
    for name, buffer in states[0].items():
        assert torch.equal(states[1][name], buffer), name


@each_source
def test_batch_norm_buffers_stay_the_same_objects(source):
    net, x = make(source, norm=True)
    before = {name: (id(b), b.data_ptr()) for name, b in net.named_buffers()}
    net(x).sum().backward()
    assert {name: (id(b), b.data_ptr()) for name, b in net.named_buffers()} == before


def reach(bn):
    """Ways in which a region may get at a module."""
    table = {"norm": {"list": [bn]}}
    holder = SimpleNamespace(bn=bn)

    class Trainer:
        def __init__(self):
            self.bn = bn

        def run(self, x):
            return self.bn(x).sin()

    class Caller(Trainer):
        __call__ = Trainer.run

    def inner(x):
        return bn(x).sin()

    def middle(x):
        return inner(x)

    trainer = Trainer()
    return {
        "module": bn,
        "method": bn.forward,
        "closure": lambda x: bn(x).sin(),
        "closure of closure": middle,
        "partial": functools.partial(lambda m, x: m(x).sin(), bn),
        "keyword of partial": functools.partial(lambda x, m: m(x).sin(), m=bn),
        "default": lambda x, m=bn: m(x).sin(),
        "dict of lists": lambda x: table["norm"]["list"][0](x).sin(),
        "callable object": Caller(),
        "global": through_global,
        "function from a global": through_global_function,
        "functions from globals": through_global_functions,
        "object in closure": lambda x: holder.bn(x).sin(),
        "self in closure": lambda x: trainer.bn(x).sin(),
        "method of an object": trainer.run,
    }


GLOBAL_NORM = nn.BatchNorm1d(4).double()


def through_global(x):
    return GLOBAL_NORM(x).sin()


def through_global_function(x):
    return through_global(x)


def through_global_functions(x):
    return through_global_function(x)


HIDDEN = {"functions from globals", "object in closure", "self in closure", "method of an object"}


@pytest.mark.parametrize(
    "way",
    [pytest.param(way) if way in HIDDEN else way for way in reach(nn.BatchNorm1d(4))],
)
def test_modules_are_found_however_a_function_reaches_them(way):
    bn = nn.BatchNorm1d(4).double()
    function = reach(bn)[way]
    bn = GLOBAL_NORM if "global" in way else bn
    before = int(bn.num_batches_tracked)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    recollect.checkpoint(function, x).sum().backward()
    assert int(bn.num_batches_tracked) == before + 1


def test_a_module_as_an_argument():
    bn = nn.BatchNorm1d(4).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    recollect.checkpoint(lambda m, x: m(x).sin(), bn, x).sum().backward()
    assert int(bn.num_batches_tracked) == 1


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
def test_spectral_norm(kind):
    apply = nn.utils.parametrizations.spectral_norm if kind == "parametrization" else nn.utils.spectral_norm
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        blocks = nn.ModuleList(apply(nn.Linear(4, 4, dtype=torch.float64)) for _ in range(2))
        x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(3):
            h = x * 1.0
            for _ in range(2):  # tied: the vectors move at each call
                h = couple(blocks, h, [(), ()], enabled=enabled).sin()
            h = recollect.checkpoint(lambda z, b=blocks[0]: b(z[:, :4]).sin(), h, enabled=enabled)
            grads = torch.autograd.grad(h.sum(), wanted(blocks, x))
        results.append((*grads, *buffers_of(blocks).values()))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("apply", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_parametrized_weights(apply):
    torch.manual_seed(0)
    layer = apply(nn.Linear(4, 4, dtype=torch.float64))
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    grads = []
    for enabled in (False, True):
        h = x * 1.0
        for _ in range(3):
            h = couple([layer, layer], h, [(), ()], enabled=enabled)
        grads.append(torch.autograd.grad(h.sin().sum(), wanted(layer, x)))
    assert_same(grads[1], grads[0])


class Counter(nn.Module):
    """Its output depends on a buffer that it updates."""

    def __init__(self, replace):
        super().__init__()
        self.replace = replace
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, z):
        if self.replace:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return (z * float(self.calls)).sin()


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("source", ["checkpoint", "coupling"])
def test_a_rebuild_sees_the_buffers_of_the_forward(source, replace):
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        block = Counter(replace)
        h = x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(3):
            if source == "coupling":
                h = couple([block, block], h * 1.0, [(), ()], enabled=enabled)
            else:
                h = recollect.checkpoint(block, h, enabled=enabled)
        loss = h.sum()
        grads = torch.autograd.grad(loss, x, retain_graph=True)
        results.append((*grads, *torch.autograd.grad(loss, x), block.calls))
    assert float(results[0][-1]) == (6 if source == "coupling" else 3)
    assert_same(results[1], results[0])


def test_a_buffer_updated_in_evaluation_mode():
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        block = Counter(replace=False).eval()
        h = x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            h = recollect.checkpoint(block, h, enabled=enabled)
        results.append((*torch.autograd.grad(h.sum(), x), block.calls))
    assert_same(results[1], results[0])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((4,), 2.0, dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, z):
        return (z * self.scale * self.weight).sin()


class Framed(nn.Module):
    enabled = True

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        h = recollect.checkpoint(self.inner, x, enabled=self.enabled)
        return couple([self.inner, self.inner], torch.cat([h, x], -1), [(), ()], enabled=self.enabled)


def functional_gradients(names):
    model = Framed(Scaled())
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    given = {name: torch.full((4,), 3.0, dtype=torch.float64, requires_grad=name.endswith("weight")) for name in names}
    grads = []
    for model.enabled in (False, True):
        y = torch.func.functional_call(model, given, (x,))
        grads.append(torch.autograd.grad(y.sum(), [x, *(t for t in given.values() if t.requires_grad)]))
    return grads


def test_functional_call_with_other_parameters():
    grads = functional_gradients(["inner.weight"])
    assert_same(grads[1], grads[0])


def test_functional_call_with_other_buffers():
    grads = functional_gradients(["inner.scale", "inner.weight"])
    assert_same(grads[1], grads[0])


def test_a_buffer_replaced_after_the_forward():
    module = Scaled()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(module(x).sum(), x)
    y = recollect.checkpoint(module, x)
    module.scale = module.scale * 5
    assert_same(torch.autograd.grad(y.sum(), x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_changed_in_place_after_the_forward_is_an_error(training):
    module = Scaled().train(training)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = recollect.checkpoint(module, x)
    module.scale.mul_(5)
    with pytest.raises(InPlaceError, match="Scaled"):
        y.sum().backward()


def test_a_parameter_replaced_after_the_forward():
    module = Scaled()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    first = module.weight
    expected = torch.autograd.grad(module(x).sum(), [x, first])
    y = recollect.checkpoint(module, x)
    module.weight = nn.Parameter(torch.full((4,), 9.0, dtype=torch.float64))
    second = module.weight
    assert_same(torch.autograd.grad(y.sum(), [x, first]), expected)
    assert module.weight is second


def embed(nested):
    table = nn.Embedding(5, 4, max_norm=1.0, dtype=torch.float64)
    index = torch.tensor([0, 1, 2])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def block(h, enabled=True):
        return (h * table(index)).sin()

    def run(enabled):
        if nested:
            function = lambda h: recollect.checkpoint(block, h, enabled=enabled).cos()  # noqa: E731
            return recollect.checkpoint(function, x, enabled=enabled)
        return recollect.checkpoint(block, recollect.checkpoint(block, x, enabled=enabled), enabled=enabled)

    with torch.no_grad():
        table(index)  # normalised from here on
    expected = torch.autograd.grad(run(False).sum(), [x, table.weight])
    assert_same(torch.autograd.grad(run(True).sum(), [x, table.weight]), expected)


@pytest.mark.parametrize("nested", [True, False])
def test_an_embedding_with_max_norm_in_two_frames(nested):
    embed(nested)


def test_a_lazy_module_in_a_frame():
    torch.manual_seed(0)
    layer = nn.LazyLinear(4, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    loss = recollect.checkpoint(lambda z: layer(z).sin(), x).sum()
    actual = torch.autograd.grad(loss, wanted(layer, x))
    assert_same(actual, torch.autograd.grad(layer(x).sin().sum(), wanted(layer, x)))


def test_module_hooks_and_shared_blocks():
    block = Block(WIDTH // 2).double()
    forward, seen = [], []
    block.register_forward_hook(lambda m, i, o: forward.append(recollect.in_backward()))
    block.register_full_backward_hook(lambda m, gi, go: seen.append(1))
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    grads = []
    for enabled in (False, True):
        seen.clear()
        y = couple([block, block], x * 1.0, [(), ()], enabled=enabled)
        grads.append(torch.autograd.grad(y.sin().sum(), wanted(block, x)))
        assert seen == [1, 1]
    assert_same(grads[1], grads[0])
    assert forward == [False] * 4 + [True] * 2
