"""ActNorm's first batch: in either direction, once, and for values that could break it."""

import copy
import io
import math

import pytest
import torch

from recollect.invertible import ActNorm, Linear, Sequential


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
def test_cuda():
    torch.manual_seed(0)
    module = ActNorm(3).cuda()
    x = (5 + 3 * torch.randn(50, 3, device="cuda")).requires_grad_()
    y = module(x * 1)
    torch.testing.assert_close(y.std(0), torch.ones(3, device="cuda"))
    found = torch.autograd.grad(y.sin().sum(), x)
    module.checkpoint = False
    torch.testing.assert_close(found, torch.autograd.grad(module(x * 1).sin().sum(), x), rtol=1e-4, atol=1e-5)
