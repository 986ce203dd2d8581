"""What a region does in a later call, or leaves to a later moment, and what was found by breaking things."""

import functools
import types
import weakref

import numpy
import pytest
import torch
from frames_zoo import assert_same
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import recollect
import recollect.invertible as inn
from recollect.frames import RebuildError
from recollect.memory import peak_memory


def both(step):
    """Return the pairs of what ``step`` returns, plainly and with checkpoints, from the same seed."""
    results = []
    for wrap in (lambda f, *args, **kwargs: f(*args, **kwargs), recollect.checkpoint):
        torch.manual_seed(0)
        results.append([t.detach().clone() for t in step(wrap)])
    return results


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


class Teacher(nn.Module):
    """A momentum copy of a layer, updated in the forward pass: in place, or by new data."""

    def __init__(self, replace, every):
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.replace, self.every, self.calls = replace, every, 0

    def forward(self, x):
        self.calls += 1
        with torch.no_grad():
            if self.calls % self.every == 0:
                for p, q in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    if self.replace:
                        p.data = p.data * 0.5 + q.data * 0.5
                    else:
                        p.mul_(0.5).add_(q, alpha=0.5)
        return self.student(x).tanh()


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_parameters_that_the_region_updates(replace, every):
    def step(wrap):
        module = Teacher(replace, every)
        for _ in range(4):
            wrap(module, double(5, 4)).sum().backward()
        return [*module.teacher.parameters(), module.student.weight.grad]

    assert_same(*both(step)[::-1])


def test_a_tensor_attribute_and_a_closure_written_on_some_calls():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.total, self.calls = nn.Linear(4, 4).double(), torch.zeros(()), 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 2:
                self.total += 1
            return self.lin(x).tanh()

    def step(wrap):
        module, seen = Counts(), torch.zeros(())

        def region(x, update):
            if update:
                seen.add_(1)
            return module(x)

        for i in range(5):
            wrap(region, double(3, 4), update=i % 2 == 1).sum().backward()
        return module.total, seen, module.lin.weight.grad

    assert_same(*both(step)[::-1])


MEAN = torch.zeros(4, dtype=torch.float64)


class Kept(nn.Module):
    """Writes to a tensor that it keeps somewhere, from its third call on."""

    def __init__(self, where):
        super().__init__()
        self.lin, self.where, self.calls = nn.Linear(4, 4).double(), where, 0
        self.table = {"a": [{"mean": torch.zeros(4, dtype=torch.float64)}]}
        self.record = types.SimpleNamespace(mean=(torch.zeros(4, dtype=torch.float64),))
        self.array = numpy.zeros((2, 4))

    def tensor(self):
        if self.where == "array":
            return torch.from_numpy(self.array)
        return {"table": self.table["a"][0]["mean"], "record": self.record.mean[0], "global": MEAN}[self.where]

    def forward(self, x):
        self.calls += 1
        h = self.lin(x)
        if self.calls >= 3:
            if self.where == "array":
                self.array += h.detach().mean(0).numpy()
            else:
                (MEAN if self.where == "global" else self.tensor()).add_(h.detach().mean(0))
        return (h * (1 + self.tensor().sum())).tanh()


@pytest.mark.parametrize("where", ["table", "record", "global", "array"])
def test_what_is_kept_anywhere_and_written_later(where):
    def step(wrap):
        MEAN.zero_()
        module = Kept(where)
        for _ in range(5):
            wrap(module, double(3, 4)).sum().backward()
        return module.tensor(), module.lin.weight.grad

    assert_same(*both(step)[::-1])


def test_functions_that_a_loop_makes():
    def step(wrap):
        layers, h = [nn.Linear(4, 4).double() for _ in range(3)], double(5, 4)
        for layer in layers:
            h = wrap(lambda t: layer(t).tanh(), h)  # noqa: B023  (each has the last layer when backward runs)
        h.sum().backward()
        return [layer.weight.grad for layer in layers]

    assert_same(*both(step)[::-1])


def test_a_list_with_many_entries():
    def step(wrap):
        class Log(nn.Module):
            def __init__(self):
                super().__init__()
                self.lin, self.log = nn.Linear(2, 2).double(), [0.0] * 2000

            def forward(self, x):
                self.log.append(float(x.detach().sum()))
                return self.lin(x).exp()

        module = Log()
        for _ in range(3):
            wrap(module, double(1, 2)).sum().backward()
        return module.lin.weight.grad, torch.tensor(float(len(module.log)))

    assert_same(*both(step)[::-1])


def test_a_parameter_that_is_frozen_between_forward_and_backward():
    def step(wrap):
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        loss = wrap(net, double(5, 4)).square().sum()
        net[0].weight.requires_grad_(False)
        loss.backward()
        return net[2].weight.grad, net[0].bias.grad

    assert_same(*both(step)[::-1])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("certify", [True, False])
def test_noise_that_an_operation_fills_after_it_was_saved(training, certify):
    def step(wrap):
        x = double(6, 4)
        options = {} if wrap is not recollect.checkpoint else {"certify": certify}
        wrap(lambda t: F.rrelu(t, training=training), x, **options).sum().backward()
        return (x.grad,)

    assert_same(*both(step)[::-1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bias": False}, {"bidirectional": True}], ids=str)
def test_a_workspace_whose_bytes_are_not_all_written(kind, options):
    """oneDNN's recurrent layers in bfloat16 save memory of their own form, with bytes that nobody has written."""

    def step(wrap):
        module = kind(12, 8, batch_first=True, **options)
        x = double(5, 7, 12).detach().float().requires_grad_()
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                wrap(module, x)[0].float().square().sum().backward()
        return (x.grad, *(parameter.grad for parameter in module.parameters()))

    assert_same(*both(step)[::-1])


def test_operations_that_save_other_tensors_while_they_are_watched():
    def step(wrap):
        x = double(10, 2, 5)
        lengths = torch.full((2,), 10), torch.full((2,), 4)
        targets = torch.ones(2, 4, dtype=torch.long)
        for _ in range(2):
            wrap(lambda t: F.ctc_loss(t.log_softmax(2), targets, *lengths), x).backward()
        return (x.grad,)

    assert_same(*both(step)[::-1])


def test_a_selective_checkpoint_around_buffers():
    def policy(context, op, *args, **kwargs):
        saved = op == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def step(wrap):
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()).double()
        contexts = (
            {}
            if wrap is not recollect.checkpoint
            else {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}
        )
        for _ in range(2):
            wrap(net, double(5, 4), **contexts).square().sum().backward()
        return [*(p.grad for p in net.parameters()), *(buffer.double() for buffer in net.buffers())]

    assert_same(*both(step)[::-1])


def test_a_checkpoint_around_a_chain_is_flat_in_depth():
    def peak(depth):
        layers = [inn.AdditiveCoupling(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(depth)]

        def run(h):
            for layer in layers:
                h = layer(h)
            return h

        for _ in range(2):
            with peak_memory() as memory:
                recollect.checkpoint(run, torch.randn(512, 64, requires_grad=True) * 1).sum().backward()
        return memory.peak_bytes

    assert peak(16) < 1.2 * peak(4)


@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
def test_a_wrong_inverse_is_refused_in_every_attempt():
    x = double(5) * 1
    y = recollect.checkpoint(torch.exp, x, inverse=lambda y: y.log() + 1)
    del x
    for _ in range(2):
        with pytest.raises(RebuildError):
            y.sum().backward(retain_graph=True)


def test_values_beside_infinities_are_compared():
    import random

    def region(h):
        h = h * (1 + random.random())
        return h.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf).logsumexp(1)

    with pytest.raises(RebuildError):
        recollect.checkpoint(region, double(4, 4) * 1).sum().backward()


class Trains(nn.Module):
    """Trains a part of itself in its forward pass: by gradients alone, or by an optimizer's steps."""

    def __init__(self, optimizer):
        super().__init__()
        self.lin, self.own = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.optimizer = None if optimizer is None else optimizer(self.own.parameters(), 0.1)

    def forward(self, x):
        with torch.enable_grad():
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            self.own(x.detach()).tanh().sum().backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return self.lin(x).tanh() * self.own(x).detach()


def _momentum(parameters, rate):
    return torch.optim.SGD(parameters, rate, momentum=0.9)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam, _momentum])
def test_a_backward_inside_a_region_counts_once(optimizer, early_stop):
    def step(wrap):
        module = Trains(optimizer)
        options = {} if wrap is not recollect.checkpoint else {"early_stop": early_stop}
        for _ in range(3):
            wrap(module, double(3, 4), **options).sum().backward()
        return [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]

    assert_same(*both(step)[::-1])


@pytest.mark.parametrize("linear", [True, False])
def test_a_backward_inside_a_function_counts_once(linear):
    def step(wrap):
        outer, inner = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

        def region(x):
            y = inner(x.detach())
            (y if linear else y.square()).sum().backward()
            return outer(x).tanh()

        for _ in range(2):
            wrap(region, double(3, 4)).sum().backward()
        return [p.grad for module in (outer, inner) for p in module.parameters()]

    assert_same(*both(step)[::-1])


def test_a_tensor_in_an_object_that_is_an_argument():
    class Average:
        def __init__(self):
            self.value, self.runs = torch.zeros(3000, dtype=torch.float64), False

        def update(self, h):
            if self.runs:
                self.value.lerp_(h.detach().mean().expand(3000), 0.5)

    def step(wrap):
        lin, average = nn.Linear(4, 4).double(), Average()

        def region(x, average):
            h = lin(x)
            average.update(h)
            return h.tanh()

        for i in range(4):
            average.runs = i > 0
            wrap(region, double(3, 4), average).sum().backward()
        return lin.weight.grad, average.value

    assert_same(*both(step)[::-1])


@pytest.mark.parametrize("where", ["attribute", "mapping"])
def test_a_table_that_the_first_call_makes_and_the_second_updates(where):
    class Averages(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.held = nn.Linear(40, 40).double(), {} if where == "mapping" else None

        def forward(self, x):
            h = self.lin(x)
            table = self.held.get("table") if where == "mapping" else self.held
            if table is None:
                table = h.new_zeros(40, 40)
                if where == "mapping":
                    self.held["table"] = table
                else:
                    self.held = table
            else:
                with torch.no_grad():
                    table.mul_(0.5).add_(h[:1].T * h[:1])
            return h * (1 + table.mean())

    def step(wrap):
        module = Averages()
        for _ in range(4):
            wrap(module, double(3, 40)).square().sum().backward()
        return module.lin.weight.grad, module.held["table"] if where == "mapping" else module.held

    assert_same(*both(step)[::-1])


class Holder:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net


KEPT_ALIVE: list = []  # what a weak reference is to
HIDING = {  # how a network is kept in an attribute, and found again
    "list": (lambda net: [net], lambda hidden: hidden[0]),
    "mapping": (lambda net: {"net": net}, lambda hidden: hidden["net"]),
    "object": (lambda net: types.SimpleNamespace(net=net), lambda hidden: hidden.net),
    "slots": (Holder, lambda hidden: hidden.net),
    "attribute": (lambda net: net, lambda hidden: hidden),
    "function": (lambda net: lambda: net, lambda hidden: hidden()),
    "method": (lambda net: net.forward, lambda hidden: hidden.__self__),
    "reference": (weakref.ref, lambda hidden: hidden()),
}


class Hides(nn.Module):
    """Has a momentum copy that is no submodule, and updates it on some calls."""

    def __init__(self, how, every, replace):
        super().__init__()
        self.lin, self.every, self.replace, self.calls = nn.Linear(40, 40).double(), every, replace, 0
        net = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40)).double().requires_grad_(False)
        KEPT_ALIVE.append(net)
        hide, self.found = HIDING[how]
        object.__setattr__(self, "hidden", hide(net))

    def forward(self, x):
        self.calls += 1
        if self.calls % self.every == 0:
            with torch.no_grad():
                net = self.found(self.hidden)
                if self.replace:
                    net[0].weight.data = net[0].weight.data.lerp(self.lin.weight, 0.5)
                else:
                    net[0].weight.lerp_(self.lin.weight, 0.5)
                net[1].running_mean.add_(1)
        return self.lin(x).tanh()


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("how", HIDING)
def test_a_module_that_is_hidden_from_registration_is_written_once(how, every, replace):
    def step(wrap):
        module = Hides(how, every, replace)
        net = module.found(module.hidden)
        for _ in range(6):
            wrap(module, double(5, 40)).sum().backward()
        return [module.lin.weight.grad, net[0].weight, net[1].running_mean]

    assert_same(*both(step)[::-1])


def test_a_first_write_in_a_later_call_is_named():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.table, self.calls = nn.Linear(40, 40).double(), torch.ones(40, 40).double(), 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                self.table.mul_(2)
            return (self.lin(x) @ self.table).tanh()

    def step(wrap):
        module = Late()
        for i in range(3):
            loss = wrap(module, double(3, 40)).sum()
            if i == 1 and wrap is recollect.checkpoint:
                with pytest.raises(RebuildError, match=r"wrote to a tensor of shape \[40, 40\] in a later call"):
                    loss.backward()
            else:
                module.zero_grad()
                loss.backward()
        return module.lin.weight.grad, module.table

    assert_same(*both(step)[::-1])


def test_gradients_of_a_part_that_runs_after_another_asked_for_some():
    def step(wrap):
        first, second = Trains(None), Trains(None)

        def region(x):
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(first.own(x.detach()).tanh().sum(), first.own.weight)
            return second(first.lin(x) + slope.sum())

        for _ in range(2):
            wrap(region, double(3, 4)).sum().backward()
        return [p.grad for p in (*first.lin.parameters(), *second.parameters())]

    assert_same(*both(step)[::-1])


def counted(layers, x):
    for layer in layers:
        layer.count += 1
        x = layer(x).sin() * layer.count
    return x


def with_names_that_come_and_go(layers, x):
    for layer in layers:
        if hasattr(layer, "extra"):
            del layer.extra
            x = x * 2
        else:
            layer.extra = 3.0
        x = layer(x).sin()
    return x


def swapped(layers, x):
    layers[0].weight, layers[1].weight = layers[1].weight, layers[0].weight
    for layer in layers:
        x = layer(x).sin()
    return x


def given_other_data(layers, x):
    for layer in layers:
        layer.weight.data = layer.weight.data * 1.1
        x = F.linear(x, layer.weight * 1).sin()
    return x


def with_a_hook_more(layers, x):
    for layer in layers:
        if len(layer._forward_hooks) < 2:
            layer.register_forward_hook(lambda module, args, output: output * 1.5)
        x = layer(x).sin()
    return x


def with_a_parameter_made(layers, x):
    for layer in layers:
        if not hasattr(layer, "gain"):
            layer.gain = nn.Parameter(torch.randn(4, dtype=torch.float64))
        x = F.dropout(layer(x), 0.2) * layer.gain
    return x


def with_a_buffer_made_and_updated(layers, x):
    for layer in layers:
        if "total" not in layer._buffers:
            layer.register_buffer("total", torch.zeros((), dtype=torch.float64))
        layer.total += 1
        x = layer(x).sin() * layer.total
    return x


def with_a_table_made_and_updated(layers, x):
    for layer in layers:
        if not hasattr(layer, "table"):
            layer.table = torch.zeros(4, dtype=torch.float64)
        else:
            layer.table.add_(1)
        x = layer(x).sin() + layer.table * x
    return x


def with_a_layer_more(layers, x):
    for layer in layers:
        if not layer._modules:
            layer.inner = nn.Linear(4, 4).double()
        x = layer.inner(layer(x)).sin()
    return x


def updated(layers, x):
    with torch.no_grad():
        for layer in layers:
            layer.bias.mul_(0.9)
    for layer in layers:
        x = layer(x).sin() * layer.bias.detach()
    return x


FUNCTIONS = [
    counted, with_names_that_come_and_go, swapped, given_other_data, with_a_hook_more, with_a_parameter_made,
    with_a_buffer_made_and_updated, with_a_table_made_and_updated, with_a_layer_more, updated,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_function_does_to_layers_of_torch_that_it_names(function):
    """Their attributes, registers and memory begin again with what they were, and are afterwards what they were."""
    names = []

    def step(wrap):
        layers = [nn.Linear(4, 4).double() for _ in range(3)]
        for layer in layers:
            layer.count = 0
        found = []
        for i in range(4):
            x = double(5, 4)
            y = wrap(lambda t: function(layers, t), x)
            if i == 2:
                layers[1].count += 10
            y.sum().backward()
            found.append(x.grad)
        names.append([(sorted(vars(layer)), len(layer._forward_hooks)) for layer in layers])
        counts = torch.tensor([float(layer.count) for layer in layers])
        held = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
        return (*found, counts, *held, *(p.grad for layer in layers for p in layer.parameters() if p.grad is not None))

    assert_same(*both(step)[::-1])
    assert names[0] == names[1]


class Normed(nn.Module):
    """Normalises by a kernel that counts no versions of the buffers that it writes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, h):
        return F.batch_norm(h, self.mean, self.var, None, None, True, 0.3).tanh()


NETWORKS: dict[str, list[nn.Module]] = {}


def test_a_function_that_is_known_calls_another_module_of_a_global_container_directly():
    def region(h):
        for net in NETWORKS["now"]:
            h = net.forward(h)
        return h

    for kind in (nn.Tanh, Normed):  # the second time the function's code is known, and that it writes is not
        x, net, plain = torch.randn(6, 4, requires_grad=True), kind(), kind()
        NETWORKS["now"] = [plain]
        expected = torch.autograd.grad(region(x).sin().sum(), x)
        NETWORKS["now"] = [net]
        found = torch.autograd.grad(recollect.checkpoint(region, x).sin().sum(), x)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        for buffer, true in zip(net.buffers(), plain.buffers(), strict=True):
            assert torch.equal(buffer, true)
    NETWORKS.clear()


class Counting(nn.Module):
    """Counts its calls in an attribute, and the rows that it has seen in a buffer."""

    def __init__(self):
        super().__init__()
        self.lin, self.calls = nn.Linear(4, 4), 0
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, h):
        self.calls += 1
        self.rows += h.size(0)
        return self.lin(h).tanh()


class Holding(nn.Module):
    """Calls functions that it holds in a list, which nobody has registered."""

    def __init__(self, *functions):
        super().__init__()
        self.functions = list(functions)

    def forward(self, h):
        for function in self.functions:
            h = function(h)
        return h


WAYS = {
    "a comprehension over a global container": lambda net: (
        lambda h: sum([one.forward(h) for one in NETWORKS["now"]], 0 * h)
    ),
    "a function in a list of a module": lambda net: Holding(lambda h: net.forward(h)),
    "a function that a function in a list names": lambda net: Holding(
        functools.partial(lambda run, h: run(h), lambda h: [net][0].forward(h))
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_is_called_directly_counts_once(way):
    found = []
    for framed in (False, True):
        torch.manual_seed(0)
        net = Counting()
        NETWORKS["now"] = [net]
        region, x = WAYS[way](net), torch.randn(6, 4, requires_grad=True)
        for _ in range(2):
            y = recollect.checkpoint(region, x) if framed else region(x)
            y.sin().sum().backward()
        found.append((net.calls, net.rows.item(), x.grad, net.lin.weight.grad))
    NETWORKS.clear()
    assert found[0][:2] == found[1][:2] == (2, 12.0)
    for a, b in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
