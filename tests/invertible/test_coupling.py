"""Additive and affine couplings against plain autograd, the explicit Jacobian, and counted evaluations."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from recollect import eager_release
from recollect.frames import InPlaceError
from recollect.invertible import AdditiveCoupling, AffineCoupling, Sequential
from recollect.memory import peak_memory

KINDS = {"additive": (AdditiveCoupling, 1), "affine": (AffineCoupling, 2)}


CALLS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Block(nn.Module):
    """A small network with dropout that counts its calls: not in an attribute, which a rebuild puts back."""

    def __init__(self, channels: int, factor: int, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Linear(channels, 2 * channels)
        self.second = nn.Linear(2 * channels, factor * channels)
        self.dropout = dropout

    def forward(self, z, scale=None):
        CALLS[self] = CALLS.get(self, 0) + 1
        h = F.dropout(self.first(z).tanh(), self.dropout, self.training)
        return self.second(h if scale is None else h * scale)


def make(kind, groups=2, layers=3, channels=4, dropout=0.3, **options):
    coupling, factor = KINDS[kind]
    return Sequential(
        *(coupling(*(Block(channels, factor, dropout) for _ in range(groups)), **options) for _ in range(layers))
    ).double()


def gradients(model, x, *args):
    """Gradients of a loss on outputs and log-determinant, with the model's random draws fixed."""
    torch.manual_seed(1)
    y, log_det = model.forward_and_log_det(x.sin(), *args)
    loss = y.sin().sum() + log_det.square().sum()
    del y
    wanted = [x, *args, *model.parameters()]
    return torch.autograd.grad(loss, wanted, allow_unused=True)


def assert_same(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= tolerance * b.norm().clamp_min(1.0)


@pytest.mark.parametrize("direction", ["forward", "reversed"])
@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_dropout_and_two_evaluations_of_each_block(kind, groups, direction):
    model = make(kind, groups).reverse(direction == "reversed")
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    x = torch.randn(7, 4 * groups, dtype=torch.float64, requires_grad=True)
    found = gradients(model, x)
    assert [CALLS[block] for block in blocks] == [2] * len(blocks)
    with model.temp_mode(checkpoint=False):
        assert_same(found, gradients(model, x))
    with model.temp_mode(invertible=False):
        assert_same(gradients(model, x), found)


@pytest.mark.parametrize("kind", KINDS)
def test_without_seed_a_block_without_randomness_is_right(kind):
    model = make(kind, dropout=0.0)
    for layer in model:
        layer.seed = False
    x = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    found = gradients(model, x)
    with model.temp_mode(checkpoint=False):
        assert_same(found, gradients(model, x))


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_inverse_and_log_determinant(kind, groups):
    model = make(kind, groups, layers=2).eval()
    x = torch.randn(3, 4 * groups, dtype=torch.float64)
    y, log_det = model.forward_and_log_det(x)
    assert log_det.shape == (3,)
    for row, value in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: model(r[None])[0], row)
        assert torch.allclose(torch.linalg.slogdet(jacobian)[1], value, rtol=1e-12, atol=1e-12)
    back, inverse_log_det = model.inverse_and_log_det(y)
    assert torch.allclose(back, x, rtol=1e-12, atol=1e-12)
    assert torch.allclose(inverse_log_det, -log_det, rtol=1e-12, atol=1e-12)
    model.reverse()
    again, reversed_log_det = model.forward_and_log_det(y)
    assert torch.allclose(again, x, rtol=1e-12, atol=1e-12)
    assert torch.allclose(reversed_log_det, -log_det, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_of_the_blocks_get_their_gradient(kind):
    coupling, factor = KINDS[kind]
    model = coupling(Block(4, factor), Block(4, factor)).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(5, 1, dtype=torch.float64, requires_grad=True)
    found = gradients(model, x, scale)
    model.checkpoint = False
    assert_same(found, gradients(model, x, scale))


@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_any_dimension(kind, dim):
    coupling, factor = KINDS[kind]

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(()))

        def forward(self, z):
            return torch.cat([(self.weight * z).sin()] * factor, dim)

    model = Sequential(*(coupling(Scale(), Scale(), dim=dim) for _ in range(3))).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    found = gradients(model, x)
    with model.temp_mode(checkpoint=False):
        assert_same(found, gradients(model, x))
    assert torch.allclose(model.inverse(model(x)), x, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_input_without_grad_and_frozen_block(kind):
    model = make(kind, dropout=0.0)
    for parameter in model[1].blocks[0].parameters():
        parameter.requires_grad_(False)
    x = torch.randn(7, 8, dtype=torch.float64)

    def step():
        model.zero_grad()
        model(x).sin().sum().backward()
        return [p.grad for p in model.parameters()]

    found = step()
    with model.temp_mode(checkpoint=False):
        assert_same(found, step())


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative(kind):
    model = make(kind, dropout=0.0, layers=2)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def second():
        (gradient,) = torch.autograd.grad(model(x.sin()).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *model.parameters()], allow_unused=True)

    found = second()
    with model.temp_mode(checkpoint=False):
        assert_same(found, second(), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_and_repeated_gradients(kind):
    model = make(kind, layers=2)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    y = model(x.sin())
    directions = torch.randn(4, *y.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, directions, retain_graph=True, is_grads_batched=True)
    for direction, found in zip(directions, batched, strict=True):
        (alone,) = torch.autograd.grad(y, x, direction, retain_graph=True)
        assert torch.allclose(found, alone, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reversed"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_depth(kind, direction):
    def peak(layers):
        model = make(kind, layers=layers, channels=16, dropout=0.0).float().reverse(direction == "reversed")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            parameter.data.mul_(0.1)  # well conditioned at any depth
        x = torch.randn(500, 32)

        def step():
            y, log_det = model.forward_and_log_det(x.clone().requires_grad_().sin())
            loss = y.square().mean() - log_det.mean()
            del y, log_det
            loss.backward()

        step()
        with peak_memory() as memory:
            step()
        return memory.peak_bytes

    assert peak(24) <= 1.05 * peak(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, dtype):
    # A float32 rounding error in what is reconstructed can change a block's bfloat16 result by its last digit.
    model = make(kind, layers=2, dropout=0.0, drift_threshold=0.05).float()
    x = torch.randn(9, 8, requires_grad=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y, log_det = model.forward_and_log_det(x.sin())
        return torch.autograd.grad(y.square().sum() + log_det.sum(), [x, *model.parameters()])

    found = step()
    with model.temp_mode(checkpoint=False):
        assert_same(found, step(), 1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda(kind):
    model = make(kind).cuda()
    x = torch.randn(7, 8, dtype=torch.float64, device="cuda", requires_grad=True)
    found = gradients(model, x)
    with model.temp_mode(checkpoint=False):
        assert_same(found, gradients(model, x))


def test_the_log_determinant_of_low_precision_is_summed_in_float32():
    model = AffineCoupling(nn.Linear(2000, 4000), nn.Linear(2000, 4000), drift_threshold=1.0).bfloat16()
    x = torch.randn(3, 4000).bfloat16()
    _, log_det = model.forward_and_log_det(x)
    assert log_det.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_strided_input(kind):
    model = make(kind, dropout=0.0)
    y, log_det = model.forward_and_log_det(torch.randn(0, 8, dtype=torch.float64, requires_grad=True))
    (y.sum() + log_det.sum()).backward()
    assert y.shape == (0, 8)
    assert log_det.shape == (0,)
    x = torch.randn(8, 7, dtype=torch.float64).t().requires_grad_()
    found = gradients(model, x)
    with model.temp_mode(checkpoint=False):
        assert_same(found, gradients(model, x))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state(kind):
    model = make(kind, dropout=0.0)
    model[1].checkpoint = False
    x = torch.randn(5, 8, dtype=torch.float64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), make(kind, dropout=0.0)):
        flag = twin[1].checkpoint
        twin.load_state_dict(model.state_dict())
        assert twin[1].checkpoint == flag  # a setting, not state
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_check_finds_nothing(kind):
    assert make(kind).check(torch.randn(4, 8, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_keep_names_stays_under_eager_release(kind, log_det):
    model = make(kind, layers=1)[0]
    run = model.forward_and_log_det if log_det else model
    x = torch.randn(4, 8, dtype=torch.float64)
    for keep, size in (((), 0), ((x,), 256), ((torch.ones(2), x), 256)):
        with eager_release():
            outputs = run(x, keep=keep)
            assert x.untyped_storage().size() == size
            (outputs[0] if log_det else outputs).sum().backward()
        assert x.untyped_storage().size() == 256
        del outputs


@pytest.mark.parametrize("direction", ["forward", "reversed"])
@pytest.mark.parametrize("kind", KINDS)
def test_check_with_arguments_of_the_blocks(kind, direction):
    coupling, factor = KINDS[kind]
    model = coupling(Block(4, factor), Block(4, factor)).double().reverse(direction == "reversed")
    x, scale = torch.randn(5, 8, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64)
    for flags in ({}, {"invertible": False}):
        with model.temp_mode(**flags):
            assert model.check(x, scale, rtol=1e-9, atol=1e-9)
    other = "inverse" if direction == "forward" else "function"
    right = getattr(model, other)
    setattr(model, other, lambda y, scale: right(y, 0.9 * scale))
    with pytest.raises(AssertionError, match="does not give back input 0"):
        model.eval().check(x, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_with_batch_norm_and_its_statistics(kind):
    coupling, factor = KINDS[kind]

    def block():
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4 * factor))

    model = Sequential(*(coupling(block(), block()) for _ in range(2))).double()
    plain = copy.deepcopy(model)
    plain.checkpoint = False
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    assert_same(gradients(model, x), gradients(plain, x))
    for found, expected in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(found, expected)


class TestErrors:
    def test_too_few_blocks(self):
        with pytest.raises(ValueError, match=r"at least two blocks.*got 1"):
            AdditiveCoupling(nn.Linear(2, 2))

    def test_a_size_that_the_groups_do_not_divide(self):
        with pytest.raises(ValueError, match=r"divisible by 2 .got shape \[3, 5\]"):
            AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))(torch.randn(3, 5))

    def test_no_tensor(self):
        with pytest.raises(TypeError, match=r"takes a tensor.*got NoneType"):
            AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))(None)

    @pytest.mark.parametrize("enabled", [True, False])
    def test_a_block_of_another_shape(self, enabled):
        model = AffineCoupling(nn.Linear(2, 2), nn.Linear(2, 2))
        model.checkpoint = enabled
        with pytest.raises(ValueError, match=r"Linear.*shape \[3, 4\], 2 times .* got \[3, 2\]"):
            model(torch.randn(3, 4))

    def test_a_block_that_changes_its_input(self):
        class InPlace(nn.Module):
            def forward(self, z):
                return z.mul_(2)

        with pytest.raises(InPlaceError, match=r"InPlace\(\): the block changed its own input in place"):
            AdditiveCoupling(InPlace(), InPlace())(torch.randn(3, 4))

    def test_a_scale_without_bound(self):
        with pytest.raises(ValueError, match="max_log_scale must be positive"):
            AffineCoupling(nn.Linear(2, 4), nn.Linear(2, 4), max_log_scale=0.0)


UNEVEN = [((2, 3), 1), ((4, 1), 1), ((1, 2), -1), ((3, 2), 2)]


@pytest.mark.parametrize("direction", ["forward", "reversed"])
@pytest.mark.parametrize(("sizes", "dim"), UNEVEN)
@pytest.mark.parametrize("kind", KINDS)
def test_uneven_groups(kind, sizes, dim, direction):
    """X'_1 = T(X_1, f_1(X_2)) and X'_2 = T(X_2, f_2(X'_1))."""
    coupling, factor = KINDS[kind]

    class Along(nn.Module):
        def __init__(self, given, made):
            super().__init__()
            self.linear = nn.Linear(given, factor * made)

        def forward(self, z):
            return F.dropout(self.linear(z.movedim(dim, -1)).tanh(), 0.2, self.training).movedim(-1, dim)

    first, second = sizes
    model = Sequential(
        *(coupling(Along(second, first), Along(first, second), dim=dim, sizes=sizes) for _ in range(3))
    ).double()
    model.reverse(direction == "reversed")
    shape = [4, 3, 3] if dim == 2 else [4, 3]
    shape[dim] = sum(sizes)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = gradients(model, x)
    with model.temp_mode(checkpoint=False):
        assert_same(found, gradients(model, x))
    with model.temp_mode(invertible=False):
        assert_same(found, gradients(model, x))
    model.eval()
    y, log_det = model.forward_and_log_det(x)
    assert torch.allclose(model.inverse(y), x, atol=1e-10)
    assert model.check(x.detach(), rtol=1e-9, atol=1e-9)
    for row, value in zip(x.detach(), log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: model(r[None])[0].flatten(), row)
        assert torch.allclose(torch.linalg.slogdet(jacobian.flatten(1))[1], value, atol=1e-9)


def test_what_uneven_groups_compute():
    f, g = nn.Linear(3, 2).double(), nn.Linear(2, 3).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    y = AdditiveCoupling(f, g, sizes=(2, 3))(x)
    first = x[:, :2] + f(x[:, 2:])
    assert torch.allclose(y, torch.cat([first, x[:, 2:] + g(first)], 1), atol=1e-12)
    f, g = nn.Linear(3, 4).double(), nn.Linear(2, 6).double()
    y = AffineCoupling(f, g, sizes=(2, 3), max_log_scale=1.5)(x)
    raw, shift = f(x[:, 2:]).chunk(2, 1)
    first = x[:, :2] * (1.5 * (raw / 1.5).tanh()).exp() + shift
    raw, shift = g(first).chunk(2, 1)
    assert torch.allclose(y, torch.cat([first, x[:, 2:] * (1.5 * (raw / 1.5).tanh()).exp() + shift], 1), atol=1e-12)


def test_equal_sizes_of_more_groups_may_be_named():
    blocks = [nn.Linear(2, 2) for _ in range(3)]
    x = torch.randn(3, 6)
    named = AdditiveCoupling(*blocks, sizes=(2, 2, 2))
    assert torch.equal(named(x), AdditiveCoupling(*blocks)(x))
    assert "sizes=(2, 2, 2)" in repr(named)


def test_sizes_that_cannot_be():
    two, three = [nn.Linear(2, 2) for _ in range(2)], [nn.Linear(2, 2) for _ in range(3)]
    with pytest.raises(ValueError, match="sum of all groups but the first"):
        AdditiveCoupling(*three, sizes=(2, 1, 2))
    for sizes in ((2,), (2, 0), (2, 2, 2), (3, -1)):
        with pytest.raises(ValueError, match="sizes must be 2 positive numbers"):
            AffineCoupling(*two, sizes=sizes)
    with pytest.raises(ValueError, match=r"of sizes \(2, 3\): it must exist, and its size be 5"):
        AdditiveCoupling(*two, sizes=(2, 3))(torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"sizes=\(...\) allows two groups of different sizes"):
        AdditiveCoupling(*two)(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        AdditiveCoupling(nn.Linear(3, 3), nn.Linear(2, 3), sizes=(2, 3))(torch.randn(3, 5))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_the_stream_is_as_wide_as_the_parameters(kind, wide, half):
    coupling, factor = KINDS[kind]
    model = Sequential(*(coupling(nn.Linear(3, 3 * factor), nn.Linear(3, 3 * factor)) for _ in range(2))).to(wide)
    seen = []
    model[1].blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    x = torch.randn(5, 6).to(half)
    for flags in ({}, {"invertible": False}, {"checkpoint": False}):
        with torch.autocast("cpu", half), model.temp_mode(**flags):
            y, log_det = model.forward_and_log_det(x)
            assert model(x).dtype == y.dtype == log_det.dtype == wide
            back = model.inverse(y)
            assert back.dtype == wide
            assert torch.allclose(back, x.to(wide), atol=2e-2)
    if wide is torch.float32:  # autocast leaves float64 alone
        assert set(seen) == {half}
    assert model.to(half)(x).dtype == half  # outside of autocast it stays what it is


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("direction", ["forward", "reversed"])
@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_gradients_are_those_with_everything_kept(kind, direction, groups):
    torch.manual_seed(0)
    coupling, factor = KINDS[kind]

    def block():
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8 * factor))

    first = nn.Linear(6, 8 * groups)
    layers = Sequential(*(coupling(*(block() for _ in range(groups))) for _ in range(6)))
    layers.reverse(direction == "reversed")
    start = torch.randn(20, 6)

    def step():
        first.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layers(first(start))
            assert y.dtype == torch.float32
            loss = y.square().mean()
        loss.backward()
        return first.weight.grad.clone()

    found = step()
    with layers.temp_mode(checkpoint=False):
        expected = step()
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_takes_a_gradient_inside(kind, frozen):
    coupling, factor = KINDS[kind]

    class Energy(nn.Module):
        """The gradient of an energy with respect to the group, as in Hamiltonian and score networks."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, z):
            with torch.enable_grad():
                given = z if z.requires_grad else z.detach().requires_grad_()
                (force,) = torch.autograd.grad(self.linear(given).tanh().square().sum(), given, create_graph=True)
            return torch.cat([force] * factor, 1)

    model = Sequential(*(coupling(Energy(), nn.Linear(3, 3 * factor)) for _ in range(3))).double()
    if frozen:  # so that this block is inverted and never rebuilt for its parameters
        model[1].blocks[0].requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def step():
        loss = model(x * 1).sin().sum()
        return torch.autograd.grad(loss, [x, *(p for p in model.parameters() if p.requires_grad)])

    found = step()
    with model.temp_mode(checkpoint=False):
        assert_same(found, step(), 1e-9)
    y = model(x)
    assert torch.allclose(model.inverse(y), x, atol=1e-10)
    with torch.no_grad():
        assert torch.allclose(model.inverse(y), x, atol=1e-10)
        assert torch.allclose(model[0].inverse(model[0](x)), x, atol=1e-10)
    assert model.check(x.detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_later_output_is_needed_of_a_block_that_takes_a_gradient_inside(kind):
    """The last coupling is inverted for the one before, and nothing of its first block is asked for."""
    coupling, factor = KINDS[kind]

    class Force(nn.Module):
        def forward(self, z):
            with torch.enable_grad():
                given = z.detach().requires_grad_()
                (force,) = torch.autograd.grad(given.sin().sum(), given)
            return torch.cat([force] * factor, 1)

    layers = [coupling(nn.Linear(3, 3 * factor), nn.Linear(3, 3 * factor)), coupling(Force(), Force())]
    model = Sequential(*layers).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    found = gradients(model, x)
    with model.temp_mode(checkpoint=False):
        assert_same(found, gradients(model, x))
