"""What a region does in a later call, or leaves to a later moment, and what was found by breaking things."""

import types

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
