"""Batch normalisation against torch's layers, and ActNorm's first batch."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from recollect.invertible import ActNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, Identity, Linear, Sequential


def pair(kind, channels, dtype=torch.float64, **options):
    """Return an invertible layer and torch's with the same weights, neither of them the trivial ones."""
    torch.manual_seed(0)
    module = kind(channels, **options).to(dtype)
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    plain = getattr(nn, kind.__name__)(channels, **options).to(dtype)
    plain.load_state_dict(module.state_dict())
    return module, plain


def gradients(module, x):
    x = x.detach().requires_grad_()
    y = module(x * 1)
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"affine": False, "track_running_stats": False}], ids=["full", "bare"])
@pytest.mark.parametrize("found", [2, 5])
def test_another_number_of_channels_is_refused_before_anything_changes(training, options, found):
    module = BatchNorm1d(3, **options).train(training)
    before = copy.deepcopy(module.state_dict())
    for refused in (module, module.inverse):
        with pytest.raises(ValueError, match=rf"has 3 channels in dimension 1 \(got shape \[4, {found}\]\)"):
            refused(torch.randn(4, found))
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value)


@pytest.mark.parametrize(("kind", "shape"), [(BatchNorm1d, (3,)), (BatchNorm2d, (4, 3)), (BatchNorm3d, (4, 3, 1, 1))])
def test_another_number_of_dimensions(kind, shape):
    with pytest.raises(ValueError, match=rf"got {len(shape)}D input"):
        kind(3)(torch.randn(shape))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_counts_as_in_torch(momentum):
    module, plain = pair(BatchNorm1d, 3, momentum=momentum)
    for size in (4, 0, 6):
        x = torch.randn(size, 3, dtype=torch.float64)
        torch.testing.assert_close(module(x), plain(x))
    for found, expected in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


def strided():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64)
    return {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "reversed": x.permute(3, 1, 2, 0),
        "sliced": x[:, :, ::2],
        "expanded": x[..., :1].expand(4, 3, 6, 5),
    }


@pytest.mark.parametrize("layout", strided())
def test_layouts_in_training(layout):
    module, plain = pair(BatchNorm2d, 3)
    x = strided()[layout]
    assert module(x).stride() == plain(x).stride()
    for found, expected in zip(gradients(module, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("parameters", ["same", "float32"])
def test_low_precision_in_training(dtype, parameters):
    module, plain = pair(BatchNorm1d, 4, dtype if parameters == "same" else torch.float32)
    module.drift_threshold = 1.0
    x = (3 + 2 * torch.randn(64, 4)).to(dtype)
    y, mean, scale = module.function(x)
    assert torch.equal(y, plain(x))
    eps = torch.finfo(dtype).eps
    restored = module.inverse(y, mean, scale)
    assert (restored.float() - x.float()).norm() <= 4 * eps * x.float().norm()
    for found, expected in zip(gradients(module, x), gradients(plain, x), strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).float().norm() <= 8 * eps * max(1.0, float(expected.float().norm()))


def test_autocast_in_training():
    torch.manual_seed(0)
    model = Sequential(Linear(8, 8), BatchNorm1d(8), Linear(8, 8), BatchNorm1d(8), drift_threshold=1.0)
    plain = copy.deepcopy(model)
    plain.checkpoint = False
    x = torch.randn(64, 8)

    def run(module):
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(module, x)

    for found, expected in zip(run(model), run(plain), strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).float().norm() <= 0.05 * max(1.0, float(expected.float().norm()))


@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1.0), (1e4, 1e-3), (5.0, 0.0), (0.0, 0.0), (0.0, 1e-30)])
def test_the_inverse_of_channels_that_are_nearly_constant(mean, deviation):
    torch.manual_seed(0)
    module = BatchNorm1d(4)
    x = mean + deviation * torch.randn(64, 4)
    with torch.no_grad():
        restored = module.inverse(*module.function(x))
    assert (restored - x).norm() <= 1e-6 * x.norm()


def test_going_over_to_evaluation_before_backward():
    module, plain = pair(BatchNorm1d, 3)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    found, expected = module(x * 1), plain(x * 1)
    module.eval()
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), x), rtol=1e-10, atol=1e-12
    )


def test_a_layer_used_twice_in_a_step():
    module, plain = pair(BatchNorm1d, 3)
    x = torch.randn(6, 3, dtype=torch.float64)
    found = gradients(Sequential(module, Identity(), module), x)
    expected = gradients(nn.Sequential(plain, plain), x)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)
    assert module.num_batches_tracked == 2
    torch.testing.assert_close(module.running_var, plain.running_var)


def test_double_backward():
    module, plain = pair(BatchNorm1d, 3)
    results = []
    for layer in (module, plain):
        torch.manual_seed(1)
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(layer(x * 1).sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_gradients_of_the_log_determinant_take_the_statistics_as_constants():
    module, _ = pair(BatchNorm1d, 3)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    _, log_det = module.forward_and_log_det(x * 1)
    given, to_weight = torch.autograd.grad(log_det.sum(), [x, module.weight], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(given, torch.zeros_like(x))
    torch.testing.assert_close(to_weight, 6 / module.weight.detach())


def test_a_weight_of_zero_in_training():
    module = BatchNorm1d(3)
    nn.init.zeros_(module.weight)
    x = torch.randn(6, 3, requires_grad=True)
    with pytest.raises(ValueError, match="set invertible=False"):
        module(x * 1).sum().backward()
    module.invertible = False
    module(x * 1).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_samples_by_the_running_statistics():
    torch.manual_seed(0)
    model = Sequential(Linear(4, 4), BatchNorm1d(4), Linear(4, 4)).double()
    for _ in range(3):
        model(2 + torch.randn(32, 4, dtype=torch.float64))
    model.eval()
    z = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(model(model.inverse(z)), z, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "shape"), [(BatchNorm1d, (64, 16)), (BatchNorm2d, (8, 16, 7, 5))])
def test_cuda(kind, shape):
    module, plain = pair(kind, 16)
    module.cuda(), plain.cuda()
    x = 1 + torch.randn(shape, dtype=torch.float64, device="cuda")
    for found, expected in zip(gradients(module, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for found, expected in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("dim", "shape"), [(1, (50, 3)), (1, (9, 3, 7)), (1, (4, 3, 5, 2)), (-1, (20, 4, 3)), (2, (20, 4, 3))]
)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_outputs_are_normalised_from_the_first_batch_on(dim, shape, reverse):
    torch.manual_seed(0)
    module = ActNorm(3, dim=dim).double().reverse(reverse)
    x = 5 + 3 * torch.randn(shape, dtype=torch.float64)
    values = module(x).detach().movedim(dim, 0).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(values.std(1), torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert module.initialized
    before = copy.deepcopy(module.state_dict())
    module(2 * x)
    assert torch.equal(module.loc, before["loc"])
    assert torch.equal(module.log_scale, before["log_scale"])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_the_other_direction_does_not_initialise(reverse):
    module = ActNorm(3).reverse(reverse)
    module.call_inverse(5 + torch.randn(20, 3))
    assert not module.initialized


def test_going_back_to_forward_keeps_what_was_trained_in_reverse():
    module = ActNorm(3).reverse()
    module(5 + torch.randn(20, 3))
    learned = module.loc.detach().clone()
    module.reverse()(9 + torch.randn(20, 3))
    assert torch.equal(module.loc, learned)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
@pytest.mark.parametrize("flags", [{}, {"invertible": False}, {"checkpoint": False}], ids=str)
def test_the_first_step_in_a_chain(flags, reverse):
    """Initialising changes parameters in the region itself; gradients are those for the values that it set."""
    torch.manual_seed(0)
    model = Sequential(ActNorm(4), Linear(4, 4), ActNorm(4), Linear(4, 4)).double().reverse(reverse)
    x = 5 + 3 * torch.randn(50, 4, dtype=torch.float64)
    for name, value in flags.items():
        setattr(model, name, value)
    first = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    model.checkpoint = False  # and everything is initialised by now
    for found, expected in zip(first, torch.autograd.grad(model(x).sin().sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_an_optimizer_from_before_the_first_batch_trains_the_parameters():
    torch.manual_seed(0)
    module = ActNorm(3).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    x = 5 + 3 * torch.randn(50, 3, dtype=torch.float64)
    module(x.requires_grad_() * 1).sum().backward()
    loc, grad = module.loc.detach().clone(), module.loc.grad.clone()
    optimizer.step()
    torch.testing.assert_close(module.loc.detach(), loc - 0.1 * grad.sign(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_the_log_determinant_of_the_first_batch(reverse):
    module = ActNorm(3).double().reverse(reverse)
    x = 5 + 3 * torch.randn(20, 3, 4, dtype=torch.float64)
    y, log_det = module.forward_and_log_det(x)
    expected = -4 * x.transpose(0, 1).flatten(1).std(1).log().sum()
    torch.testing.assert_close(log_det, expected.expand(20), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.call_inverse(y), x, rtol=1e-10, atol=1e-10)


def test_a_check_in_training_initialises_nothing():
    module = ActNorm(3)
    assert module.check(5 + torch.randn(20, 3))
    assert not module.initialized
    assert module.loc.abs().sum() == 0


def test_being_initialised_is_saved():
    module = ActNorm(3)
    module(5 + torch.randn(20, 3))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = ActNorm(3)
    other.load_state_dict(torch.load(file))
    x = torch.randn(20, 3)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("size", [0, 1])
def test_a_batch_too_small_to_initialise_passes_unchanged(size):
    module = ActNorm(3)
    x = torch.randn(size, 3, requires_grad=True)
    y, log_det = module.forward_and_log_det(x * 1)
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    assert torch.equal(log_det, torch.zeros(size))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(size, 3))


@pytest.mark.parametrize(
    ("dtype", "deviation"),
    [(torch.float32, 1e-42), (torch.float32, 1e-30), (torch.float32, 0.0), (torch.float16, 1e-6), (torch.float64, 0.0)],
    ids=str,
)
def test_a_scale_without_an_inverse_in_its_type_is_not_taken(dtype, deviation):
    torch.manual_seed(0)
    module = ActNorm(2).to(dtype)
    x = torch.randn(20, 2, dtype=torch.float64)
    x[:, 1] *= deviation
    x = x.to(dtype)
    y = module(x)
    assert module.initialized
    assert torch.isfinite(y).all()
    assert torch.isfinite(module(torch.ones_like(x))).all()
    assert torch.isfinite(module.inverse(y)).all()


def test_statistics_of_low_precision_are_taken_in_float32():
    torch.manual_seed(0)
    x = (100 + torch.randn(1000, 2)).bfloat16()
    module = ActNorm(2)
    y = module(x)
    torch.testing.assert_close(module.loc.detach(), x.float().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(y.std(0), torch.ones(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_leave_it_to_the_next_batch(bad):
    module = ActNorm(2)
    x = torch.randn(20, 2)
    x[3, 1] = bad
    module(x)
    assert not module.initialized
    module(torch.randn(20, 2))
    assert module.initialized


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_first_batch_on_cuda():
    torch.manual_seed(0)
    module = ActNorm(3).cuda()
    x = (5 + 3 * torch.randn(50, 3, device="cuda")).requires_grad_()
    y = module(x * 1)
    torch.testing.assert_close(y.std(0), torch.ones(3, device="cuda"))
    found = torch.autograd.grad(y.sin().sum(), x)
    module.checkpoint = False
    torch.testing.assert_close(found, torch.autograd.grad(module(x * 1).sin().sum(), x), rtol=1e-4, atol=1e-5)


class Reads(TorchDispatchMode):
    """Counts how often a value is read from a tensor, which waits for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_of(run):
    with Reads() as reads:
        run()
    return reads.count


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_actnorm_waits_for_the_device_in_its_first_call_only(reverse):
    module, x = ActNorm(3).reverse(reverse), torch.randn(20, 3, requires_grad=True)
    module.checkpoint = False  # frames read fingerprints on the CPU, where nothing waits

    def step():
        module(x * 1)

    assert reads_of(step) > 0
    assert [reads_of(step) for _ in range(3)] == [0, 0, 0]
    module.load_state_dict(copy.deepcopy(module).state_dict())
    assert reads_of(step) == 1
    assert reads_of(step) == 0
    module.reset_parameters()
    assert not module.initialized
    assert reads_of(step) > 0  # initialises anew
    assert module.initialized
    module.initialized.fill_(False)
    module(7 + x)
    torch.testing.assert_close(module(7 + x).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert reads_of(step) == 0


def test_actnorm_reads_its_flag_again_after_a_load():
    module, fresh = ActNorm(3), ActNorm(3)
    module(5 + torch.randn(20, 3))
    module.load_state_dict(fresh.state_dict())
    y = module(9 + torch.randn(50, 3))
    torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).double()):
        loc = twin.loc.detach().clone()
        twin(torch.randn(5, 3).to(loc))
        assert torch.equal(twin.loc, loc)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}], ids=str)
def test_batch_norm_waits_for_no_device_in_forward(options):
    module, plain = pair(BatchNorm1d, 3, **options)
    module.checkpoint = False  # frames read fingerprints on the CPU, where nothing waits
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def step():
        module(x * 1).sum().backward()

    step()
    assert reads_of(lambda: module(x * 1)) == 0
    step()
    for _ in range(3):
        plain(x)
    for found, expected in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    state = {name: value + 4 if name == "num_batches_tracked" else value for name, value in plain.state_dict().items()}
    module.load_state_dict(state), plain.load_state_dict(state)
    for _ in range(2):
        module(x), plain(x)
    for found, expected in zip(module.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize(
    ("kind", "shape"), [(BatchNorm1d, (6, 3)), (BatchNorm2d, (4, 3, 2, 2)), (BatchNorm3d, (4, 3, 2, 1, 2))]
)
def test_state_dicts_of_torchs_layers_and_back(kind, shape, options):
    torch.manual_seed(0)
    theirs = getattr(nn, kind.__name__)(3, **options)
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    theirs(torch.randn(shape))
    ours, back = kind(3, **options), getattr(nn, kind.__name__)(3, **options)
    ours.load_state_dict(theirs.state_dict())
    back.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for training in (True, False):
        x = torch.randn(shape)
        for layer in (ours, theirs, back):
            layer.train(training)
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(back(x), expected)


def test_state_dicts_hold_tensors_only():
    model = Sequential(ActNorm(4), Linear(4, 4), BatchNorm1d(4), Identity())
    assert all(isinstance(value, torch.Tensor) for value in model.state_dict().values())
