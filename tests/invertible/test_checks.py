"""`Module.check` finds what is wrong, says which of the three it is, and leaves everything as it was."""

import pytest
import torch
from torch import nn

import recollect
import recollect.invertible as inn
from recollect.frames import DriftWarning
from recollect.testing._zoo import ZOO

WIDTH = 4


def inputs(*shape):
    return torch.randn(*(shape or (6, WIDTH)), generator=torch.Generator().manual_seed(1))


class Scale(inn.Module):
    """Right in everything; what is below breaks one thing of it."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.tensor([0.5, -0.5, 0.25, 1.0]))

    def function(self, x):
        return x * self.s.exp()

    def inverse(self, y):
        return y * (-self.s).exp()


class WrongInverse(Scale):
    def inverse(self, y):
        return y * (-self.s).exp() + 0.5


class WrongShape(Scale):
    def inverse(self, y):
        return super().inverse(y)[:-1]


class NoInput(Scale):
    def inverse(self, y):
        return None


class Unrepeatable(Scale):
    """Its second run differs, whatever the random state."""

    def function(self, x):
        return super().function(x) + (0.5 if recollect.in_backward() else 0.0)

    def inverse(self, y):
        return super().inverse(y)


class Noise(inn.Module):
    """The dropout's mask is drawn by the inverse again."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))

    def function(self, a, b):
        return b + self.block(a), a

    def inverse(self, c, a):
        return a, c - self.block(a)


class SwappedNoise(inn.Module):
    """Two draws, which the inverse makes in the other order: wrong in training, and right in evaluation."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def function(self, a, b):
        c = a + self.dropout(self.first(b).tanh())
        return c, b + self.dropout(self.second(c).tanh())

    def inverse(self, c, d):
        b = d - self.dropout(self.second(c).tanh())
        return c - self.dropout(self.first(b).tanh()), b


class Doubling(torch.autograd.Function):
    """The identity, whose gradient is what it saves: 1, and 2 in a rebuild."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.full_like(x, 2.0 if recollect.in_backward() else 1.0))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class WrongGradient(Scale):
    """Repeats its outputs, but not what it saves for them."""

    def function(self, x):
        return super().function(Doubling.apply(x))


class OtherSaved(Scale):
    """Saves other tensors in a rebuild."""

    def function(self, x):
        return super().function(x) * (x.exp() / x.exp() if recollect.in_backward() else 1.0)


class WrongInverseInTraining(Scale):
    def inverse(self, y):
        return y * (-self.s).exp() + (1.0 if self.training else 0.0)


class IllConditioned(inn.Module):
    def function(self, x):
        return x * 1e-6 + 1.0

    def inverse(self, y):
        return (y - 1.0) * 1e6


def failure(module, *args, **options):
    with pytest.raises(AssertionError) as caught:
        module.check(*(args or (inputs(),)), **options)
    return str(caught.value)


def test_right_ones_pass():
    assert Scale().check(inputs()) is True
    assert Noise().check(inputs(), inputs()) is True
    assert Noise().eval().check(inputs(), inputs()) is True
    assert Scale().double().check(inputs().double(), rtol=0, atol=1e-14)
    assert Scale().check(inputs(0, WIDTH))


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_passes(name):
    torch.manual_seed(0)
    module, make = ZOO[name](WIDTH)
    args = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in make(5)]
    assert module.double().check(*args, rtol=1e-9, atol=1e-9)
    assert module.eval().check(*args, rtol=1e-9, atol=1e-9)


def test_a_wrong_inverse():
    message = failure(WrongInverse())
    assert message.startswith("WrongInverse: the inverse does not give back input 0: largest difference 5.0e-01")
    assert "(rtol=0.001, atol=1e-05)" in message
    assert "double" not in message
    assert "shape [5, 4] instead of [6, 4]" in failure(WrongShape())
    assert "the inverse returned 1 value(s) and no tensor for input 0" in failure(NoInput())


def test_what_the_tolerance_forgives_the_certificate_may_not():
    message = failure(WrongInverse(), inputs(), atol=10.0)
    assert message.startswith("WrongInverse: there are no gradients, and there are with plain autograd: WrongInverse(")
    module = WrongInverse()
    module.certify = False
    with pytest.warns(DriftWarning):
        assert module.check(inputs(), atol=10.0)


def test_precision_as_the_cause():
    message = failure(IllConditioned())
    assert "the inverse does not give back input 0" in message
    assert "in double precision it does" in message
    assert IllConditioned().check(inputs().double())


def test_a_function_that_does_not_repeat():
    message = failure(Unrepeatable())
    assert message.startswith("Unrepeatable: a second run of the function does not repeat output 0: largest difference")
    assert "seed" not in message


def test_randomness_without_seed_as_the_cause():
    module = Noise()
    module.seed = False
    message = failure(module, inputs(), inputs())
    assert "a second run of the function does not repeat output 0" in message
    assert "with seed=True, which replays random numbers, it does" in message


def test_wrong_gradients():
    message = failure(WrongGradient())
    assert message.startswith(
        "WrongGradient: the gradient of input 0 is not that of plain autograd: largest difference"
    )
    assert message.endswith("; a training step raises RebuildError instead, unless certify is False")
    module = WrongGradient()
    module.certify = False
    assert failure(module) == message.removesuffix(
        "; a training step raises RebuildError instead, unless certify is False"
    )
    assert module.certify is False
    message = failure(OtherSaved())
    assert message.startswith("OtherSaved: there are no gradients, and there are with plain autograd: OtherSaved(")


def test_draws_in_another_order():
    torch.manual_seed(0)
    message = failure(SwappedNoise(), inputs(), inputs())
    assert "SwappedNoise: the gradient of " in message
    assert "in training mode SwappedNoise: the inverse does not give back input " in message
    assert "draw random numbers in another order" in message
    plain = SwappedNoise()
    plain.checkpoint = False
    assert plain.check(inputs(), inputs())


def test_parts_that_draw_each_by_itself():
    # Each layer replays its own draws, although those of the whole are inverted in the other order.
    flow = inn.Sequential(Noise(), Noise(), Noise())
    assert flow.check(inputs(), inputs())
    coupling = inn.AdditiveCoupling(*(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)) for _ in range(2)), dim=-1)
    assert coupling.check(inputs())
    assert coupling.reverse().check(inputs())


def test_training_mode_is_tried_in_evaluation_too():
    assert "the gradient of s" in failure(WrongInverseInTraining().eval())
    assert "the inverse does not" in failure(WrongInverseInTraining())


def test_the_direction_and_the_flags_are_the_modules_own():
    class Reversible(WrongInverse):
        reversible = True

    assert "the inverse does not give back input 0" in failure(Reversible().reverse())
    module = WrongInverseInTraining().eval()
    module.invertible = False
    assert module.check(inputs())


class Stateful(inn.Module):
    """Writes into its input, its buffers and its parameters."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("calls", torch.zeros(()))

    def function(self, a, b):
        if not self.ready and not recollect.in_backward():
            self.shift.data = b.detach().mean(0)
            self.ready.fill_(True)
        self.calls.add_(1)
        b = b.clone() if b.requires_grad else b.zero_().add_(inputs())
        return b - self.shift + self.norm(a).tanh() * self.calls, a

    def inverse(self, c, a):
        return a, c + self.shift - self.norm(a).tanh() * (self.calls + 1)


def test_nothing_is_changed():
    torch.manual_seed(0)
    module, a, b = Stateful(), inputs(), inputs()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.norm.eval()
    state = {k: v.clone() for k, v in module.state_dict().items() if torch.is_tensor(v)}
    objects = [*map(id, module.buffers()), *map(id, module.parameters())]
    before, generator = (a.clone(), b.clone()), torch.get_rng_state()
    assert module.check(a, b)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())
    assert [*map(id, module.buffers()), *map(id, module.parameters())] == objects
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
    assert (module.training, module.norm.training) == (True, False)
    assert not recollect.in_backward()
    assert not recollect.in_dry_mode()


def test_nothing_is_changed_by_a_failure():
    module = inn.Sequential(Noise(), Noise().eval())
    module.seed = False
    module.invertible = False
    generator = torch.get_rng_state()
    failure(module, inputs(), inputs())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [layer.training for layer in module] == [True, False]
    assert (module.checkpoint, module.invertible) == (True, False)


def test_the_plain_run_is_plain_all_the_way_down():
    modes = []

    class Inner(Scale):
        def function(self, x):
            modes.append((recollect.in_dry_mode(), recollect.in_backward()))
            return super().function(x)

    class Outer(inn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(Inner())

        def function(self, a, b):
            return b + self.block(a * 2), a

        def inverse(self, c, a):
            return a, c - self.block(a * 2)

    assert Outer().check(inputs(), inputs())
    assert (False, False) in modes


def test_torch_checkpoints_inside():
    from torch.utils.checkpoint import checkpoint

    class Foreign(Noise):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.Tanh())

        def function(self, a, b):
            return b + checkpoint(self.inner, a * 1.0, use_reentrant=False), a

        def inverse(self, c, a):
            return a, c - checkpoint(self.inner, a * 1.0, use_reentrant=False)

    torch.manual_seed(0)
    assert Foreign().check(inputs(), inputs())


def test_unused_and_integer_inputs():
    class Lookup(inn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, WIDTH)

        def function(self, x, index, unused):
            self.last = index
            return x + self.table(index), unused

        def inverse(self, y, unused):
            return y - self.table(self.last), None, unused

    assert Lookup().check(inputs(), torch.tensor([0, 1, 2, 0, 1, 2]), inputs())
