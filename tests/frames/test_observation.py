"""What a region runs and writes is observed: the world after backward is the one after the forward, bit for bit."""

import functools
import gc
import threading
import types
import weakref

import pytest
import torch
from seam_oracle import (
    SOURCES,
    Wrap,
    assert_equal,
    assert_right,
    assert_right_or_refused,
    both,
    data,
    each_source,
    float64,
    results,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import recollect

assert float64 is not None  # a fixture of every test here


class Cell(nn.Module):
    """A linear layer, and ``body(cell, h)``; tensors of ``state`` are buffers."""

    def __init__(self, body, **state):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.body = body
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, h):
        return self.body(self, h)


def assert_right_over(source, make, between=None, steps=1, also=None, check=assert_right):
    """Compare gradients and buffers of ``make()``'s module after some steps, with ``between`` before each backward."""

    def step(wrap):
        module, x = make(), data(source)
        found = []
        for _ in range(steps):
            y = wrap.over(source, module, x.detach().requires_grad_())
            if between is not None:
                between(module)
            y.square().sum().backward()
            found.append(y)
        return [*found, *results(module), *(also(module) if also is not None else [])]

    check(step)


# Buffers.


def _mean(h):
    return h.detach().mean(0)


def _lerp(cell, h):
    h = cell.lin(h)
    cell.mean.data.lerp_(_mean(h), 0.5)
    return (h - cell.mean).tanh()


def _copy(cell, h):
    h = cell.lin(h)
    cell.mean.data.copy_(_mean(h))
    return (h - cell.mean).tanh()


def _set(cell, h):
    h = cell.lin(h)
    cell.mean.data = cell.mean.data + _mean(h)
    return (h - cell.mean).tanh()


def _no_grad(cell, h):
    h = cell.lin(h)
    with torch.no_grad():
        cell.mean.mul_(0.9).add_(_mean(h))
    return (h - cell.mean).tanh()


def _view(cell, h):
    h = cell.lin(h)
    cell.mean.view(2, 2)[0].data.add_(_mean(h)[:2])
    return (h - cell.mean).tanh()


def _numpy(cell, h):
    h = cell.lin(h)
    cell.mean.numpy()[:] += _mean(h).numpy()
    return (h - cell.mean).tanh()


def _detached(cell, h):
    h = cell.lin(h)
    cell.mean.detach().add_(_mean(h))
    return (h - cell.mean).tanh()


@each_source
@pytest.mark.parametrize("body", [_lerp, _copy, _set, _no_grad, _view, _numpy, _detached])
def test_a_buffer_is_written_once_whatever_the_way(source, body):
    assert_right_over(source, lambda: Cell(body, mean=torch.zeros(4)), steps=2)


def test_a_buffer_of_another_module_is_written_once():
    def step(wrap):
        other = Cell(_lerp, mean=torch.zeros(4))
        module = Cell(lambda cell, h: (cell.lin(h) + other.mean.data.add_(_mean(h))).tanh())
        wrap(module, data()).square().sum().backward()
        return results(module, other)

    assert_right(step)


@each_source
@pytest.mark.parametrize("rebuilds", [1, 3])
def test_a_buffer_is_written_once_however_often_the_region_is_rebuilt(source, rebuilds):
    def step(wrap):
        module = Cell(_lerp, mean=torch.zeros(4))
        loss = wrap.over(source, module, data(source)).square().sum()
        for _ in range(rebuilds):
            loss.backward(retain_graph=True)
        return results(module)

    assert_right(step)


def _batch_norm(cell, h):
    return F.batch_norm(cell.lin(h), cell.m, cell.v, None, None, cell.training, 0.1)


def _instance_norm(cell, h):
    return F.instance_norm(cell.lin(h).mT[None], cell.m, cell.v, None, None, True, 0.1)[0].mT


def _native(cell, h):
    return torch.native_batch_norm(cell.lin(h), None, None, cell.m, cell.v, True, 0.1, 1e-5)[0]


def _twice(cell, h):
    return _batch_norm(cell, _batch_norm(cell, h))


@each_source
@pytest.mark.parametrize("body", [_batch_norm, _instance_norm, _native, _twice])
def test_kernels_that_count_no_version_write_once(source, body):
    assert_right_over(source, lambda: Cell(body, m=torch.zeros(4), v=torch.ones(4)), steps=2)


@each_source
def test_running_statistics_of_a_submodule_that_is_never_called(source):
    def body(cell, h):
        return F.batch_norm(cell.lin(h), cell.norm.running_mean, cell.norm.running_var, None, None, True, 0.1)

    assert_right_over(source, lambda: Cell(body, norm=nn.BatchNorm1d(4)))


@each_source
@pytest.mark.parametrize("rows", [10, 5_000, 300_000])
@pytest.mark.parametrize("way", ["in place", "data", "scatter", "replaced"])
def test_a_bank_that_is_read_and_written(source, rows, way):
    def body(cell, h):
        h = cell.lin(h)
        old = cell.bank[:8].clone()
        new = old * 0.5 + h.detach()[:8]
        if way == "in place":
            cell.bank[:8] = new
        elif way == "data":
            cell.bank.data[:8].copy_(new)
        elif way == "scatter":
            cell.bank.index_copy_(0, torch.arange(8), new)
        else:
            cell.bank = torch.cat([new, cell.bank[8:]])
        return h * (1 + torch.cat([old, old]))

    check = assert_right_or_refused if rows * 4 > 1 << 20 else assert_right
    assert_right_over(source, lambda: Cell(body, bank=torch.zeros(rows, 4)), steps=2, check=check)


def _born(cell, h):
    cell.load = _mean(h) if cell.load is None else cell.load + _mean(h)
    return cell.lin(h) * cell.load


def _registered(cell, h):
    if "scale" not in cell._buffers:
        cell.register_buffer("scale", _mean(h))
    return cell.lin(h) * cell.scale


def _parameter(cell, h):
    if not hasattr(cell, "gain"):
        cell.gain = nn.Parameter(_mean(h))
    return cell.lin(h) * cell.gain


def _parameter_for_none(cell, h):
    if cell.load is None:
        cell.load = nn.Parameter(torch.randn(4))
    return F.dropout(cell.lin(h) * cell.load, 0.2)


def _layer(cell, h):
    if cell.load is None:
        cell.load = nn.Linear(4, 4)
    return F.dropout(cell.load(h), 0.2)


def _lists(cell, h):
    if len(cell.layers) < 2:
        cell.layers.append(nn.Linear(4, 4))
        cell.gains.append(nn.Parameter(torch.randn(4)))
    for layer, gain in zip(cell.layers, cell.gains, strict=True):
        h = layer(h).tanh() * gain
    return F.dropout(h, 0.2)


def _deleted(cell, h):
    if hasattr(cell, "start"):
        cell.register_buffer("scale", cell.start.clone())
        del cell.start
        return cell.lin(h) * 3
    return cell.lin(h) * cell.scale


def _unset():
    cell = Cell(_born)
    cell.register_buffer("load", None)
    return cell


def _empty():
    cell = Cell(_lists)
    cell.layers, cell.gains = nn.ModuleList(), nn.ParameterList()
    return cell


def _plain(body):
    cell = Cell(body)
    cell.load = None
    return cell


def _no_parameter():
    cell = Cell(_parameter_for_none)
    cell.register_parameter("load", None)
    return cell


@each_source
@pytest.mark.parametrize(
    "make",
    [
        _unset,
        lambda: Cell(_registered),
        lambda: Cell(_parameter),
        lambda: Cell(_deleted, start=torch.ones(4)),
        lambda: _plain(_parameter_for_none),
        _no_parameter,
        lambda: _plain(_layer),
        _empty,
    ],
    ids=[
        "None",
        "buffer",
        "parameter",
        "deleted",
        "parameter for None",
        "parameter in its place",
        "layer",
        "lists",
    ],
)
def test_what_is_born_in_the_forward(source, make):
    assert_right_over(source, make)
    assert_right_over(source, make, steps=2)


@pytest.mark.filterwarnings("ignore:.*Lazy modules.*")
@each_source
def test_lazy_modules_that_the_region_materialises(source):
    assert_right_over(
        source, lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(4))
    )


# Attributes.


class _Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.adapters = nn.ModuleDict({k: nn.Linear(4, 4) for k in "ab"})
        self.active, self.enabled, self.scaling = ["a"], {"all": True}, types.SimpleNamespace(value=1.0)

    def forward(self, x):
        h = self.base(x)
        for name in self.active if self.enabled["all"] else ():
            h = h + self.scaling.value * self.adapters[name](x)
        return h.tanh()


@each_source
@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "active", ["b"]),
        lambda m: m.active.append("b"),
        lambda m: m.active.clear(),
        lambda m: m.enabled.update(all=False),
        lambda m: setattr(m.scaling, "value", 3.0),
    ],
    ids=["list replaced", "list grown", "list emptied", "dict", "namespace"],
)
def test_adapters_are_those_of_the_forward(source, change):
    assert_right_over(source, _Adapted, between=change)


def test_an_adapter_switched_between_many_forwards():
    def step(wrap):
        module, x = _Adapted(), torch.randn(16, 4)
        losses = []
        for names in (["a"], ["b"], ["a", "b"], []):
            module.active = names
            losses.append(wrap(module, x).square().sum())
        for loss in losses:
            loss.backward()
        return results(module)

    assert_right(step)


@each_source
@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_the_probability_of_dropout_is_that_of_the_forward(source, kind):
    make = lambda: nn.Sequential(nn.Linear(4, 4), kind(0.1), nn.Linear(4, 4))  # noqa: E731
    assert_right_over(source, make, between=lambda m: setattr(m[1], "p", 0.5))


@each_source
def test_the_negative_slope_the_eps_and_the_momentum_are_those_of_the_forward(source):
    def change(module):
        module[1].eps, module[1].momentum, module[2].negative_slope = 0.5, 0.9, 0.7

    make = lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LeakyReLU(0.1))  # noqa: E731
    assert_right_over(source, make, between=change, also=lambda m: [torch.tensor([m[1].eps, m[1].momentum])])


@each_source
@pytest.mark.parametrize("zeros", [False, True])
def test_a_temperature_changed_between_is_seen_behind_a_layer_of_zeros(source, zeros):
    def make():
        module = Cell(lambda cell, h: cell.last((cell.lin(h) / cell.temperature).tanh()), temperature=1.0)
        module.last = nn.Linear(4, 4)
        if zeros:
            nn.init.zeros_(module.last.weight)
        return module

    assert_right_over(source, make, between=lambda m: setattr(m, "temperature", 5.0))


class _Box:
    def __init__(self):
        self.n = 0


def _count_int(cell):
    cell.n += 1
    return cell.n


def _count_list(cell):
    cell.seen.append(1)
    return len(cell.seen)


def _count_dict(cell):
    cell.log["n"] = cell.log.get("n", 0) + 1
    return cell.log["n"]


def _count_deep(cell):
    cell.deep["a"][0]["n"] += 1
    return cell.deep["a"][0]["n"]


def _count_object(cell):
    cell.box.n += 1
    return cell.box.n


def _count_child(cell):
    cell.lin.calls = getattr(cell.lin, "calls", 0) + 1
    return cell.lin.calls


@each_source
@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("count", [_count_int, _count_list, _count_dict, _count_deep, _count_object, _count_child])
def test_counters_count_forwards(source, count, shown):
    def body(cell, h):
        n = count(cell)
        return (cell.lin(h) / (1 + n * shown)).softmax(-1)

    def make():
        return Cell(body, n=0, seen=[], log={}, deep={"a": [{"n": 0}]}, box=_Box())

    def numbers(cell):
        calls = getattr(cell.lin, "calls", 0)
        read = [cell.n, len(cell.seen), cell.log.get("n", 0), cell.deep["a"][0]["n"], cell.box.n, calls]
        return [torch.tensor(read)]

    assert_right_over(source, make, steps=2, also=numbers)


def test_a_counter_outside_of_modules_that_decides_the_output_is_refused():
    # One that does not show is the region's own: it can ask recollect.in_backward().
    def step(wrap):
        n, lin = 0, nn.Linear(4, 4)

        def region(h):
            nonlocal n
            n += 1
            return (lin(h) / (1 + n)).tanh()

        wrap(region, data()).square().sum().backward()
        return [*results(lin), torch.tensor(n)]

    assert_right_or_refused(step)


# Modules that are reached in unusual ways.


def _reached(how, layers):
    def walk(h):
        for layer in layers:
            h = layer(h)
        return h

    class Holder:
        def __init__(self):
            self.inner = types.SimpleNamespace(net={"layers": [layers]})

        def run(self, h):
            return functools.reduce(lambda h, layer: layer(h), self.inner.net["layers"][0], h)

    reference = weakref.ref(layers[0])
    return {
        "comprehension": lambda h: torch.cat([walk(part) for part in h.chunk(2)]),
        "generator": lambda h: torch.cat(list(map(walk, h.chunk(2)))),
        "method": Holder().run,
        "partial": functools.partial(Holder.run, Holder()),
        "nested function": lambda h: (lambda: (lambda: (lambda: walk(h))())())(),
        "weak reference": lambda h: layers[1](reference()(h)),
        "forward": lambda h: layers[1].forward(layers[0].forward(h)),
    }[how]


_WAYS = ("comprehension", "generator", "method", "partial", "nested function", "weak reference", "forward")


@each_source
@pytest.mark.parametrize("how", _WAYS)
def test_modules_are_seen_however_they_are_reached(source, how):
    def step(wrap):
        layers = [nn.Linear(4, 4), nn.BatchNorm1d(4)]
        run = _reached(how, layers)
        for _ in range(2):
            wrap.over(source, run, data(source)).square().sum().backward()
        return results(*layers)

    # A module whose forward is called directly runs no hook; what it did is seen only as far as tensors show it.
    (assert_right_or_refused if how == "forward" else assert_right)(step)


@pytest.mark.parametrize("container", [list, dict, tuple, nn.ModuleList])
def test_hundreds_of_layers(container):
    def step(wrap):
        layers = [nn.Linear(4, 4) if i % 2 else nn.BatchNorm1d(4) for i in range(302)]
        held = dict(enumerate(layers)) if container is dict else container(layers)

        def run(h):
            for i in range(len(held)):
                h = held[i](h)
            return h

        wrap(run, data()).square().sum().backward()
        return results(*layers)

    assert_right(step)


def test_parametrizations_under_a_cache_around_the_forward():
    def step(wrap):
        lin = parametrizations.spectral_norm(nn.Linear(4, 4))
        with parametrize.cached():
            y = wrap(lambda h: lin(lin(h).tanh()), data())
        y.square().sum().backward()
        return results(lin)

    assert_right(step)


# What the region did not read may change, and what it read may not.


@each_source
def test_other_networks_of_the_same_object_are_stepped(source):
    def step(wrap):
        gan = types.SimpleNamespace(generator=nn.Linear(4, 4), critic=nn.Linear(4, 4), ema=nn.BatchNorm1d(4))
        optimizer = torch.optim.Adam([*gan.critic.parameters(), *gan.ema.parameters()], 0.1)
        y = wrap.over(source, lambda h: gan.generator(h).tanh(), data(source))
        (gan.critic(y.detach()[:, :4]).sum() + gan.ema(y.detach()[:, :4]).square().sum()).backward()
        optimizer.step()
        gan.ema.running_mean.zero_()
        y.square().sum().backward()
        return results(gan.generator, gan.critic, gan.ema)

    assert_right(step)


@each_source
@pytest.mark.parametrize("learns", [False, True])
def test_what_a_region_inside_another_puts_back_the_other_does_not_read(source, learns):
    """It has gradients of its own on the way: the inner region is rebuilt while the outer one runs."""

    def step(wrap):
        net, critic, norm = nn.Linear(4, 4), nn.Linear(4, 1), nn.BatchNorm1d(4)
        table = {"generator": [net], "others": [critic, norm]}
        for parameter in (*critic.parameters(), *norm.parameters()):
            parameter.grad = torch.ones_like(parameter)

        def inner(h):
            return table["generator"][0](h).tanh()

        def block(h):
            z = h.detach().requires_grad_()
            with torch.enable_grad():
                loss = wrap(inner, z).sin().square().sum()
                if learns:
                    loss.backward()
                    g = z.grad
                else:
                    (g,) = torch.autograd.grad(loss, z)
            return inner(h) + 0.1 * g

        y = wrap.over(source, block, data(source))
        with torch.no_grad():
            critic.weight.add_(1)
            norm.weight.add_(1)
            norm.running_mean.add_(1)
        y.square().sum().backward()
        return results(net, critic, norm)

    assert_right(step)


@each_source
def test_an_expert_that_was_not_chosen_is_stepped(source):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, h):
            return self.experts[1](h).tanh()

    def change(module):
        with torch.no_grad():
            module.experts[0].weight.add_(1)
            module.experts[2].bias.data.zero_()

    assert_right_over(source, Experts, between=change)


@each_source
def test_a_table_that_is_not_read_changes(source):
    make = lambda: Cell(lambda cell, h: cell.lin(h).tanh(), table=torch.zeros(4))  # noqa: E731
    assert_right_over(source, make, between=lambda m: m.table.add_(1))


# What modules hold as attributes lives on, and is handed out as it is.


class Masked(nn.Module):
    """Multiplies by tensors that it holds: an attribute, one in a list, and a view of a larger one."""

    def __init__(self):
        super().__init__()
        self.lin, self.scale = nn.Linear(4, 4), torch.rand(4)
        self.more, self.large = [torch.rand(16, 4)], torch.rand(64, 4)

    def forward(self, h):
        return (self.lin(h).tanh() * self.scale * self.more[0] * self.large[8:24]).sin()


@each_source
def test_attributes_that_are_replaced_afterwards(source):
    def change(module):
        module.scale, module.more, module.large = torch.zeros(4), [torch.zeros(16, 4)], torch.zeros(64, 4)

    assert_right_over(source, Masked, between=change)


@each_source
def test_attributes_that_are_changed_afterwards_are_refused(source):
    def step(wrap, change):
        torch.manual_seed(0)
        module = Masked()
        loss = wrap.over(source, module, data(source)).square().sum()
        change(module)
        loss.backward()

    for change in (lambda m: m.scale.zero_(), lambda m: m.more[0].add_(1), lambda m: m.large[10].mul_(2)):
        with pytest.raises(recollect.frames.FrameError, match=r"Masked|swap"):
            step(Wrap(True), change)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(Wrap(False), change)


def test_attributes_need_no_fingerprints():
    module, certificate = Masked(), recollect.frames.Certificate()
    for _ in range(3):
        certificate.reset()
        x = data()
        y = recollect.frames.run_frame(module, (x,), {}, recollect.frames.Kept(), certificate=certificate)
        y.sum().backward()
        assert certificate.equal == 2  # what tanh returns and what sin is given; the factors are the module's


@each_source
def test_an_attribute_that_is_the_argument(source):
    class Storing(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.seen = nn.Linear(4, 4), torch.zeros(1)

        def forward(self, h):
            return (self.lin(self.seen).tanh() * self.seen).sin() * h

    def step(wrap):
        module = Storing()
        x = torch.randn(16, 4, requires_grad=True)
        module.seen = x.detach()
        y = wrap.over(source, module, x if source == "checkpoint" else torch.cat([x, x], -1))
        module.seen = torch.ones(1)
        y.square().sum().backward()
        return [x.grad, *results(module)]

    assert_right(step)


@each_source
@pytest.mark.parametrize("way", ["in place", "data", "replaced"])
def test_an_attribute_that_the_region_itself_moves(source, way):
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.scale = nn.Linear(4, 4), torch.ones(4)

        def forward(self, h):
            h = self.lin(h)
            moved = 0.9 * self.scale + 0.1 * h.detach().abs().mean(0)
            if way == "in place":
                self.scale.copy_(moved)
            elif way == "data":
                self.scale.data.copy_(moved)
            else:
                self.scale = moved
            return (h * self.scale).tanh()

    def step(wrap):
        module, found = Moving(), list[torch.Tensor]()
        for _ in range(3):
            x = data(source)
            y = wrap.over(source, module, x)
            found += torch.autograd.grad(y.square().sum(), list(module.parameters()))
            found.append(module.scale.clone())
        return found

    # An inverse runs the block before it is looked whether somebody has changed what the block saved.
    (assert_right_or_refused if (source, way) == ("inverse", "in place") else assert_right)(step)


@each_source
def test_a_step_on_weights_that_the_region_read_is_refused(source):
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), data(source)
    loss = Wrap(True).over(source, module, x).square().sum()
    with torch.no_grad():
        module[0].weight.sub_(0.1)
    with pytest.raises(recollect.frames.FrameError, match=r"Linear|swap|Sequential"):
        loss.backward()


@each_source
@pytest.mark.parametrize("way", ["in place", "data"])
@pytest.mark.parametrize("zeros", [False, True])
def test_a_bias_that_the_region_read_and_autograd_did_not_save(source, way, zeros):
    """Plain autograd is right here, because it needs no bias again; a rebuild does."""

    def make():
        module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        if zeros:
            nn.init.zeros_(module[2].weight)
        return module

    def change(module):
        with torch.no_grad():
            (module[0].bias if way == "in place" else module[0].bias.data).add_(0.5)

    assert_right_over(source, make, between=change, check=assert_right_or_refused)


def test_what_autograd_no_longer_holds_may_change():
    def step(wrap):
        def region(h):
            distances = torch.cdist(lin(h), code)
            nearest = code[distances.argmin(1)]
            scores = (h @ code.mT).softmax(-1)  # saved, and dropped with its graph
            del scores
            with torch.no_grad():
                code.mul_(0.9)
            return lin(h) + nearest

        lin, code = nn.Linear(4, 4), torch.randn(8, 4)
        wrap(region, data()).square().sum().backward()
        return [*results(lin), code]

    assert_right_or_refused(step)


@each_source
def test_a_codebook_that_moves_in_the_forward(source):
    def body(cell, h):
        h = cell.lin(h)
        nearest = cell.code[torch.cdist(h, cell.code).argmin(1)]
        with torch.no_grad():
            cell.code.mul_(0.9)
        return h + (h - nearest).square()

    assert_right_over(source, lambda: Cell(body, code=torch.randn(8, 4)), steps=2)


# Outputs that the region did not make.


@pytest.mark.parametrize("kind", ["made before", "view", "leaf", "input", "of another region", "twice"])
def test_outputs_that_the_region_did_not_make(kind):
    def step(wrap):
        p, x = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
        w = p + 1
        if kind == "view":
            w = w[1:]
        elif kind == "leaf":
            w = p
        elif kind == "of another region":
            w = wrap(torch.sin, w)
        returned = {"input": lambda h: ((h * w).sin(), h), "twice": lambda h: (w, w)}
        a, b = wrap(returned.get(kind, lambda h: ((h * p).sin(), w)), x)
        loss = a.sum() + b.square().sum()
        loss.backward(retain_graph=True)
        w.sum().backward()
        return [p.grad, x.grad if x.grad is not None else x]

    assert_right(step)


# What a region leaves behind.


@each_source
@pytest.mark.parametrize("kind", ["loss", "features", "list", "hook"])
def test_what_a_region_leaves_behind_is_the_forwards(source, kind):
    def body(cell, h):
        y = cell.lin(h).tanh()
        left = y.square().mean() if kind == "loss" else y * 2
        cell.left = [left] if kind == "list" else left
        return y

    def step(wrap):
        module = Cell(body)
        if kind == "hook":
            module.register_forward_hook(lambda module, args, output: setattr(module, "left", output * 3))
        y = wrap.over(source, module, data(source))
        left = module.left[0] if kind == "list" else module.left
        (y.square().sum() + left.square().sum()).backward()
        now = module.left[0] if kind == "list" else module.left
        assert now is left
        return [left, *results(module)]

    assert_right(step)


def test_hooks_are_taken_away_again():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for source in SOURCES:
        Wrap(True).over(source, module, data(source)).square().sum().backward()
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules())


# Size and threads.


@pytest.mark.parametrize("source", SOURCES)
def test_a_deep_chain_is_freed_by_counting_alone(source):
    block = nn.Linear(4, 4)
    nn.init.normal_(block.weight, std=0.01)  # a map that amplifies would drift
    h = data(source)
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(h)
        for _ in range(300):
            h = Wrap(True).over(source, block, h)
        loss = h.sum()
        del h
        loss.backward()
        del loss
        assert reference() is None
    finally:
        gc.enable()


@each_source
def test_threads_train_side_by_side(source):
    expected = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 8 if source != "checkpoint" else 4, generator=generator)
        module = Cell(_lerp, mean=torch.zeros(4))
        expected.append((module, x))
    found = [None] * 4

    def work(i):
        module, x = expected[i]
        module.zero_grad()
        module.mean.zero_()
        Wrap(True).over(source, module, x * 1).square().sum().backward()
        found[i] = [t.clone() for t in results(module)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (module, x), now in zip(expected, found, strict=True):
        module.zero_grad()
        module.mean.zero_()
        Wrap(False).over(source, module, x).square().sum().backward()
        assert_equal(list(zip(results(module), now, strict=True)))


def test_threads_that_meet_inside_their_regions():
    """Each region waits until the other one is inside: a lock over whole forwards would never let them meet."""
    barrier = threading.Barrier(2, timeout=10)
    failures = []

    def region(h):
        if not recollect.in_backward():
            barrier.wait()
        return h.sin()

    def work():
        try:
            x = torch.ones(4, requires_grad=True)
            recollect.checkpoint(region, x).sum().backward()
            assert torch.allclose(x.grad, torch.cos(x))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_oracle_sees_a_step_that_differs():
    def step(wrap):
        return [torch.tensor(float(wrap.framed))]

    with pytest.raises(AssertionError):
        assert_equal(both(step))


class Shrinking(nn.Module):
    """Writes to what it reads, before it reads it: a parameter, a buffer, a tensor that is neither."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("scale", torch.rand(4) + 1)
        self.plain = torch.rand(4) + 1

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
            self.scale.mul_(1.1)
            self.plain.mul_(1.2)
        return x @ self.weight * self.scale * self.plain


def _leaf(write):
    weight = torch.randn(4, 4, requires_grad=True)
    held = {"weight": weight}

    def region(x):
        with torch.no_grad():
            write(held["weight"])
        return (x @ weight).tanh()

    return region, [weight]


def _module():
    module = Shrinking()
    return module, [module.weight]


@pytest.mark.parametrize(
    "make",
    [
        _module,
        lambda: _leaf(lambda weight: weight.mul_(0.9)),
        lambda: _leaf(lambda weight: weight[0].mul_(0.9)),
        lambda: _leaf(lambda weight: weight.copy_(weight / weight.norm())),
        lambda: _leaf(lambda weight: weight.t().add_(1)),
    ],
    ids=["module", "leaf", "row", "normed", "transposed"],
)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_region_may_change_parameters_in_place_before_it_reads_them(make, needs_grad):
    def run(wrap):
        torch.manual_seed(0)
        region, leaves = make()
        found = []
        for _ in range(3):
            x = torch.randn(3, 4, requires_grad=needs_grad)
            loss = wrap(region, x).square().sum()
            for retain in (True, False):
                loss.backward(retain_graph=retain)
            found += [x.grad, *(leaf.grad for leaf in leaves), *(leaf.detach().clone() for leaf in leaves)]
            for leaf in leaves:
                leaf.grad = None
        return found

    for expected, found in zip(run(lambda f, x: f(x)), run(recollect.checkpoint), strict=True):
        assert expected is found or torch.equal(expected, found)
