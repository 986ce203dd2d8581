"""What holds of every layer: gradients, inverse, determinant, memory, and steps that leave nothing behind."""

import copy
import gc
import math
import pickle

import pytest
import torch
from torch import nn

from recollect import in_backward
from recollect import invertible as inn
from recollect.frames import _chain
from recollect.memory import peak_memory
from recollect.testing._zoo import ZOO

# name: (module, shape of an input, whether it has a log-determinant in evaluation)
LAYERS = {
    "BatchNorm1d": (lambda: inn.BatchNorm1d(4), (6, 4), True),
    "BatchNorm1d sequence": (lambda: inn.BatchNorm1d(4), (3, 4, 5), True),
    "BatchNorm1d bare": (lambda: inn.BatchNorm1d(4, affine=False), (6, 4), True),
    "BatchNorm1d average": (lambda: inn.BatchNorm1d(4, momentum=None), (6, 4), True),
    "BatchNorm2d": (lambda: inn.BatchNorm2d(3), (2, 3, 2, 3), True),
    "BatchNorm3d": (lambda: inn.BatchNorm3d(2), (2, 2, 2, 1, 3), True),
    "ActNorm": (lambda: inn.ActNorm(4), (6, 4), True),
    "ActNorm images": (lambda: inn.ActNorm(3), (2, 3, 2, 2), True),
    "ActNorm last": (lambda: inn.ActNorm(5, dim=-1), (2, 3, 5), True),
    "Flatten": (lambda: inn.Flatten(), (3, 2, 2), True),
    "Flatten part": (lambda: inn.Flatten(-3, -2, dims=(2, 3)), (4, 2, 3, 2), True),
    "Unflatten": (lambda: inn.Unflatten(-2, (2, -1)), (3, 6, 2), True),
    "Permute": (lambda: inn.Permute(0, 2, 1), (3, 4, 2), True),
    "Permute list": (lambda: inn.Permute([0, -1, 1, 2]), (2, 2, 3, 2), True),
    "ConstantPad": (lambda: inn.ConstantPad((1, 2, 0, 3), value=1.5), (2, 3, 4), False),
    "PixelShuffle": (lambda: inn.PixelShuffle(2), (2, 8, 1, 2), True),
    "PixelUnshuffle": (lambda: inn.PixelUnshuffle(2), (2, 1, 4, 2), True),
    "LeakyReLU": (lambda: inn.LeakyReLU(), (5, 4), True),
    "LeakyReLU sequence": (lambda: inn.LeakyReLU(0.5), (5, 4, 2), True),
    "SELU": (lambda: inn.SELU(), (5, 4), True),
    "SELU short tail": (lambda: inn.SELU(tail=0.5), (5, 4), True),
    "Asinh": (lambda: inn.Asinh(), (5, 4), True),
}


@pytest.fixture(params=LAYERS)
def name(request):
    return request.param


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    module = LAYERS[name][0]().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
        if hasattr(module, "initialized"):
            module.initialized.fill_(True)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return module.to(dtype)


def sample(name, dtype=torch.float64):
    return (2 * torch.randn(LAYERS[name][1], dtype=torch.float64)).to(dtype)


def gradients(module, x):
    """Gradients of a weighting of the output, through something before that keeps nothing."""
    x = x.detach().requires_grad_()
    y = module(x * 1.0)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]


def assert_same(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * max(1.0, float(b.norm()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_and_check(name, training):
    module, x = make(name).train(training), sample(name)
    plain = copy.deepcopy(module)
    plain.checkpoint = False
    assert_same(gradients(module, x), gradients(plain, x))
    assert module.check(x, rtol=1e-9, atol=1e-9)
    for found, expected in zip(module.buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected)  # once a step, and not in a check


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inverse_in_a_sequential_and_in_chains(name, training):
    module, x = make(name).train(training), sample(name)
    model = inn.Sequential(module, inn.Identity()).train(training)
    plain = copy.deepcopy(model)
    plain.checkpoint = False
    assert_same(gradients(model, x), gradients(plain, x))
    outputs = model.function(x)
    assert torch.allclose(model.inverse(*outputs), x, atol=1e-10)


def test_log_determinant(name):
    module, x = make(name).eval(), sample(name)
    if not LAYERS[name][2]:
        with pytest.raises(NotImplementedError, match="no log-determinant"):
            module.forward_and_log_det(x)
        return
    y, log_det = module.forward_and_log_det(x)
    assert torch.equal(y, module(x))
    assert log_det.shape == x.shape[:1]
    for row, value in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: module(r[None])[0], row)
        expected = torch.linalg.slogdet(jacobian.reshape(row.numel(), row.numel()))[1]
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-12)
    outputs = module.function(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    *_, back = module.inverse_and_log_det(*outputs)
    assert torch.allclose(back, -log_det, rtol=1e-12, atol=1e-12)


def test_reversed_training(name):
    module, x = make(name).eval(), sample(name)
    if not module.reversible:
        with pytest.raises(RuntimeError, match="not reversible"):
            module.reverse()
        return
    y = module(x).detach()
    module.reverse()
    assert torch.allclose(module(y), x, atol=1e-10)
    plain = copy.deepcopy(module)
    plain.checkpoint = False
    assert_same(gradients(module, y), gradients(plain, y))
    if LAYERS[name][2]:
        back, log_det = module.forward_and_log_det(y)
        assert torch.allclose(log_det, -module.reverse().forward_and_log_det(back)[1], atol=1e-10)


def test_copies_and_state(name):
    module, x = make(name).eval(), sample(name)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), LAYERS[name][0]().double().eval()):
        twin.load_state_dict(module.state_dict())
        assert torch.equal(twin(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(name, dtype):
    module, x = make(name, torch.float32).eval(), sample(name)
    module.drift_threshold = 1.0
    wide = make(name).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        found = gradients(module, x.to(dtype))
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    assert_same([g.double() for g in found], gradients(wide, x.to(dtype).double()), tolerance)


def test_empty_and_strided_inputs(name):
    module, x = make(name).eval(), sample(name)
    empty = x[:0].requires_grad_()
    y = module(empty * 1.0)
    y.sum().backward()
    assert y.shape == (0, *module(x).shape[1:])
    assert empty.grad.shape == empty.shape
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert not strided.is_contiguous()
    assert_same(gradients(module, strided), gradients(module, x))


def test_a_chain_of_all_that_keep_the_shape_is_flat_in_memory():
    def peak(repeats):
        torch.manual_seed(0)
        layers = [
            layer
            for _ in range(repeats)
            for layer in (
                inn.ActNorm(8),
                inn.Linear(8, 8),
                inn.BatchNorm1d(8),
                inn.LeakyReLU(0.7),
                inn.SELU(0.5),
                inn.Asinh().reverse(),
                inn.Asinh(),
                inn.Unflatten(1, (2, 4)),
                inn.Permute(0, 2, 1),
                inn.Flatten(),
            )
        ]
        model = inn.Sequential(*layers, drift_threshold=1.0).double()
        x = torch.randn(2000, 8, dtype=torch.float64)

        def step():
            y = model(x.clone().requires_grad_() * 1.0)
            loss = y.square().mean()
            del y
            loss.backward()

        step()
        with peak_memory() as memory:
            step()
        return memory.peak_bytes

    assert peak(8) <= 1.05 * peak(2)


class TestBatchNorm:
    @pytest.mark.parametrize(
        "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
    )
    @pytest.mark.parametrize(
        ("kind", "shape"), [("1d", (6, 3)), ("1d", (4, 3, 5)), ("2d", (2, 3, 2, 4)), ("3d", (2, 3, 2, 2, 2))]
    )
    def test_it_is_torchs(self, kind, shape, options):
        torch.manual_seed(0)
        module = getattr(inn, f"BatchNorm{kind}")(3, **options).double()
        plain = getattr(nn, f"BatchNorm{kind}")(3, **options).double()
        plain.load_state_dict(module.state_dict())
        for training in (True, True, True, False):
            module.train(training), plain.train(training)
            x = torch.randn(shape, dtype=torch.float64) * 3 + 1
            assert_same(gradients(module, x), gradients(plain, x), 1e-12)
            for found, expected in zip(module.buffers(), plain.buffers(), strict=True):
                assert torch.allclose(found.double(), expected.double(), atol=1e-12)

    def test_the_inverse_in_training_needs_the_batchs_statistics(self):
        module = inn.BatchNorm1d(3, track_running_stats=False).double()
        x = torch.randn(5, 3, dtype=torch.float64)
        y, mean, scale = module.function(x)
        assert torch.allclose(module.inverse(y, mean, scale), x, atol=1e-12)
        with pytest.raises(ValueError, match="no running statistics"):
            module.inverse(y)

    def test_a_weight_of_zero(self):
        module = inn.BatchNorm1d(3).eval()
        with torch.no_grad():
            module.weight[1] = 0
        with pytest.raises(ValueError, match=r"channel\(s\) \[1\] is 0"):
            module.inverse(torch.randn(2, 3))
        with torch.no_grad():
            module.weight[1], module.bias[1] = 1e-8, 1.0
        with pytest.raises(ValueError, match="so small beside the bias"):
            module.inverse(torch.randn(2, 3))

    def test_an_empty_batch_in_training(self):
        module = inn.BatchNorm1d(3)
        x = torch.randn(0, 3, requires_grad=True)
        module(x * 1.0).sum().backward()
        assert x.grad.shape == (0, 3)
        assert torch.equal(module.running_mean, torch.zeros(3))

    def test_one_value_per_channel(self):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            inn.BatchNorm1d(3)(torch.randn(1, 3))

    def test_log_determinant_in_training_takes_the_statistics_as_constants(self):
        module = make("BatchNorm2d").train()
        x = sample("BatchNorm2d")
        y, log_det = module.forward_and_log_det(x)
        variance = x.var((0, 2, 3), unbiased=False)
        expected = 6 * (module.weight.abs().log() - 0.5 * (variance + module.eps).log()).sum()
        assert torch.allclose(log_det, expected.expand(2), atol=1e-10)
        assert torch.equal(y, copy.deepcopy(module)(x))


class TestActNorm:
    def test_the_first_batch_initialises(self):
        torch.manual_seed(0)
        module = inn.ActNorm(4).double()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        x = 5 + 3 * torch.randn(50, 4, 6, dtype=torch.float64)
        y = module(x.requires_grad_() * 1.0)
        assert torch.allclose(y.mean((0, 2)), torch.zeros(4, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(y.std((0, 2)), torch.ones(4, dtype=torch.float64), atol=1e-12)
        y.square().sum().backward()
        before = module.loc.detach().clone()
        optimizer.step()
        assert not torch.equal(module.loc, before)
        after = module.loc.detach().clone()
        module(2 * x)
        assert torch.equal(module.loc, after)

    def test_gradients_of_the_initialising_step(self):
        torch.manual_seed(0)
        model = inn.Sequential(inn.ActNorm(4), inn.Linear(4, 4), inn.ActNorm(4)).double()
        plain = copy.deepcopy(model)
        plain.checkpoint = False
        x = 5 + 3 * torch.randn(50, 4, dtype=torch.float64)
        assert_same(gradients(model, x), gradients(plain, x))
        assert model.load_state_dict(plain.state_dict())
        assert model[0].initialized

    def test_what_initialises_nothing(self):
        module = inn.ActNorm(3)
        for x in (torch.randn(1, 3), torch.randn(0, 3), torch.full((4, 3), math.nan)):
            module(x)
            assert not module.initialized
        module.eval()(torch.randn(9, 3))
        assert not module.initialized
        assert module.check(torch.randn(9, 3))
        assert not module.initialized

    def test_a_constant_channel_keeps_its_scale(self):
        module = inn.ActNorm(2)
        x = torch.randn(9, 2)
        x[:, 1] = 7.0
        y = module(x)
        assert module.log_scale[1] == 0
        assert torch.isfinite(y).all()
        module.reset_parameters()
        assert not module.initialized
        assert module.loc.abs().sum() == 0

    @pytest.mark.parametrize("shape", [(3, 5), (3,), (2, 5, 4)])
    def test_another_shape(self, shape):
        with pytest.raises(ValueError, match="4 channels in dimension 1"):
            inn.ActNorm(4)(torch.randn(shape))

    def test_bad_arguments(self):
        for arguments in ((0,), (3, 0)):
            with pytest.raises(ValueError, match="at least one channel"):
                inn.ActNorm(*arguments)


class TestShapes:
    def test_torchs_own(self):
        x = torch.randn(2, 4, 6, 6)
        assert torch.equal(inn.Flatten(1, 2)(x), nn.Flatten(1, 2)(x))
        assert torch.equal(inn.Unflatten(1, (2, 2))(x), nn.Unflatten(1, (2, 2))(x))
        assert torch.equal(inn.PixelShuffle(2)(x), nn.PixelShuffle(2)(x))
        assert torch.equal(inn.PixelUnshuffle(3)(x), nn.PixelUnshuffle(3)(x))
        assert torch.equal(inn.ConstantPad((1, 0, 2, 3), 0.5)(x), nn.ConstantPad2d((1, 0, 2, 3), 0.5)(x))
        assert torch.equal(inn.Permute(3, 1, 0, 2)(x), x.permute(3, 1, 0, 2))

    def test_flatten_without_sizes(self):
        with pytest.raises(ValueError, match=r"give Flatten\(dims"):
            inn.Flatten().inverse(torch.randn(2, 6))

    def test_a_permutation_of_the_batch_has_no_log_determinant(self):
        module = inn.Permute(1, 0)
        assert module.check(torch.randn(2, 3))
        with pytest.raises(NotImplementedError, match="moves the batch"):
            module.forward_and_log_det(torch.randn(2, 3))

    def test_sizes_that_the_factor_does_not_divide(self):
        with pytest.raises(ValueError, match=r"that 4 divides .got shape \[1, 3, 2, 2\]"):
            inn.PixelShuffle(2)(torch.randn(1, 3, 2, 2))
        with pytest.raises(ValueError, match=r"that it divides .got shape \[1, 3, 2, 5\]"):
            inn.PixelUnshuffle(2)(torch.randn(1, 3, 2, 5))

    @pytest.mark.parametrize("module", [inn.Flatten(0), inn.Unflatten(0, (2, 2))], ids=["Flatten", "Unflatten"])
    def test_joining_the_batch_has_no_log_determinant(self, module):
        assert module.check(torch.randn(4, 3))
        with pytest.raises(NotImplementedError, match="moves the batch"):
            module.forward_and_log_det(torch.randn(4, 3))

    def test_other_sizes_than_were_given(self):
        with pytest.raises(ValueError, match=r"dims=\(3, 3\)\) joins .*got \(4, 5\)"):
            inn.Flatten(dims=(3, 3))(torch.randn(2, 4, 5))

    @pytest.mark.parametrize("kind", [inn.PixelShuffle, inn.PixelUnshuffle])
    def test_a_factor_of_zero(self, kind):
        with pytest.raises(ValueError, match=r"scale_factor must be at least 1 \(got 0\)"):
            kind(0)

    @pytest.mark.parametrize("dims", [(0, 0), (0, 2), (1,)])
    def test_not_a_permutation(self, dims):
        with pytest.raises(ValueError, match="named once"):
            inn.Permute(*dims)

    @pytest.mark.parametrize("padding", [(1,), (1, -1), 2])
    def test_padding_that_crops(self, padding):
        with pytest.raises(ValueError, match="two numbers, 0 or more"):
            inn.ConstantPad(padding)


class TestActivations:
    def test_torchs_own(self):
        x = torch.linspace(-1.9, 5, 100)
        assert torch.equal(inn.LeakyReLU(0.01)(x), nn.LeakyReLU(0.01)(x))
        assert torch.allclose(inn.SELU(2.0)(x), nn.SELU()(x), atol=1e-6)
        assert torch.equal(inn.Asinh()(x), x.asinh())

    def test_the_tail_of_selu_is_its_tangent(self):
        module = inn.SELU(tail=1.5)
        x = torch.tensor([-1.5 - 1e-6, -1.5 + 1e-6, -50.0], dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(module(x).sum(), x)
        expected = 1.0507009873554805 * 1.6732632423543772 * math.exp(-1.5)
        assert torch.allclose(slopes, torch.full_like(slopes, expected), atol=1e-5)

    @pytest.mark.parametrize(
        ("module", "bound"),
        [(inn.LeakyReLU(), 2e-7), (inn.SELU(), 4e-6), (inn.Asinh(), 1e-5)],
        ids=lambda v: str(v)[:9],
    )
    def test_stability_in_float32(self, module, bound):
        x = torch.cat([s * torch.logspace(-6, 30, 2000) for s in (-1, 1)])
        assert ((module.inverse(module(x)) - x).abs() <= bound * x.abs()).all()

    @pytest.mark.parametrize("module", [inn.LeakyReLU(), inn.SELU(), inn.Asinh(), inn.ActNorm(5000)], ids=str)
    def test_log_determinants_of_low_precision_are_summed_in_float32(self, module):
        x = torch.randn(3, 5000).bfloat16()
        _, found = module.eval().forward_and_log_det(x)
        _, expected = module.forward_and_log_det(x.float())
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=1e-3)

    @pytest.mark.parametrize("kind", [inn.LeakyReLU, inn.SELU])
    def test_bad_arguments(self, kind):
        with pytest.raises(ValueError, match="inplace=True would change an input"):
            kind(inplace=True)
        for value in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="positive"):
                kind(value)


def test_running_statistics_change_in_the_forward_pass_only():
    seen = []

    class Watched(inn.BatchNorm1d):
        def function(self, x):
            seen.append(in_backward())
            return super().function(x)

    module = Watched(3).double()
    module(torch.randn(5, 3, dtype=torch.float64, requires_grad=True) * 1.0).sum().backward()
    assert seen == [False, True]
    assert module.num_batches_tracked == 1


def stack():
    torch.manual_seed(0)
    return [ZOO[name](3)[0] for name in ("plain", "output is the input", "two dropouts")]


def forward(modules, x):
    args = (x * 1.0, x * 2.0)
    for module in modules:
        args = module(*args)
    return args[0].sum() + args[1].sin().sum()


def steps(modules, x, optimizer, number):
    """Train, with every third graph gone through in part, twice, or not at all."""
    for i in range(number):
        loss = forward(modules, x)
        if i % 3 == 0:
            torch.autograd.grad(loss, modules[1].block.bias, retain_graph=i % 2 == 0)
        elif i % 3 == 1:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    del loss


def counted():
    gc.collect()
    things = gc.get_objects()
    return len(things), sum(isinstance(type(t), type) and issubclass(type(t), torch.Tensor) for t in things)


def test_ten_thousand_steps_without_growth():
    modules = stack()
    x = torch.randn(2, 3, requires_grad=True)
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=1e-5)
    steps(modules, x, optimizer, 1_000)
    objects, tensors = counted()
    slots = len(_chain._slots)
    steps(modules, x, optimizer, 9_000)
    later = counted()
    assert later[1] <= tensors
    assert len(_chain._slots) <= slots
    assert later[0] <= objects + 20  # nine thousand steps would leave nine thousand of anything


@pytest.mark.parametrize("name", ZOO)
def test_bytes_of_a_step(name):
    torch.manual_seed(0)
    module, make = ZOO[name](3)
    args = tuple(a.requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in make(4))

    def step():
        outputs = module(args[0] * 1.0, *args[1:])
        (outputs[0].sum() + outputs[1].sin().sum()).backward()
        module.zero_grad()
        for a in args:
            if torch.is_tensor(a):
                a.grad = None

    step()
    gc.collect()
    gc.disable()
    try:
        with peak_memory("cpu") as memory:
            step()
            first = memory.current_bytes
            for _ in range(20):
                step()
            assert memory.current_bytes <= first
            assert memory.peak_bytes > 0
    finally:
        gc.enable()


def test_checks_leave_nothing():
    x = torch.randn(4, 3)
    module = inn.Sequential(inn.Identity(), ZOO["plain"](3)[0])
    module.check(x, x)
    before = counted()
    for _ in range(20):
        module.check(x, x)
    after = counted()
    assert after[1] <= before[1]
    assert after[0] <= before[0] + 10
