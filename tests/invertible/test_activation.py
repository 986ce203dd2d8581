"""Activations: one slope where their pieces meet, and how precisely they are undone."""

import math

import pytest
import torch

from recollect.invertible import SELU, Asinh, LeakyReLU, Sequential

SCALE, ALPHA = 1.0507009873554805, 1.6732632423543772


def slope(module, value, dtype=torch.float64):
    """At the value itself, which in a rebuild is the inverse's, and may be its neighbour."""
    x = torch.tensor([value], dtype=dtype, requires_grad=True)
    return torch.autograd.grad(module.call_function(x).sum(), x)[0].item()


@pytest.mark.parametrize("tail", [0.5, 2.0, 5.0])
def test_the_slope_of_selu_where_the_tail_begins_and_at_zero(tail):
    module = SELU(tail)
    at_tail = SCALE * ALPHA * math.exp(-tail)
    assert slope(module, -tail) == pytest.approx(at_tail, rel=1e-12)
    assert slope(module, 0.0) == pytest.approx(SCALE * ALPHA, rel=1e-12)
    module.reverse()
    end = SCALE * ALPHA * math.expm1(-tail)
    assert slope(module, end) == pytest.approx(1 / at_tail, rel=1e-12)
    assert slope(module, 0.0) == pytest.approx(1 / (SCALE * ALPHA), rel=1e-12)


def test_the_slope_of_selu_at_its_tail_in_bfloat16():
    assert slope(SELU(), -2.0, torch.bfloat16) == pytest.approx(SCALE * ALPHA * math.exp(-2), rel=0.01)


def oracle(x, tail):
    """SELU with a straight tail, value by value."""
    whole = SCALE * ALPHA
    if x > 0:
        return SCALE * x
    if x > -tail:
        return whole * math.expm1(x)
    return whole * math.expm1(-tail) + whole * math.exp(-tail) * (x + tail)


@pytest.mark.parametrize("tail", [0.5, 2.0, 5.0])
def test_selu_by_its_formula(tail):
    x = torch.cat([torch.linspace(-9, 9, 200, dtype=torch.float64), torch.tensor([-tail, 0.0], dtype=torch.float64)])
    expected = torch.tensor([oracle(v, tail) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(SELU(tail)(x), expected, rtol=1e-12, atol=1e-14)


# name: (module, largest relative error of a recovered float32 value, as documented)
RANGES = {
    "LeakyReLU": (LeakyReLU(), 2e-7),
    "LeakyReLU 0.01": (LeakyReLU(0.01), 2e-7),
    "LeakyReLU 3": (LeakyReLU(3.0), 2e-7),
    "SELU": (SELU(), 4e-7),
    "SELU 0.5": (SELU(0.5), 4e-7),
    "SELU 5": (SELU(5.0), 3e-6),
    "Asinh": (Asinh(), 1e-5),
}


@pytest.mark.parametrize("name", RANGES)
def test_recovered_values_of_every_magnitude(name):
    module, bound = RANGES[name]
    x = torch.cat([sign * torch.logspace(-34, 34, 50_000) for sign in (-1, 1)])
    assert ((module.inverse(module(x)) - x).abs() <= bound * x.abs()).all()
    assert module.inverse(module(torch.zeros(1))) == 0


@pytest.mark.parametrize("module", [LeakyReLU(), SELU(), Asinh()], ids=str)
def test_infinities_and_what_is_no_number(module):
    x = torch.tensor([math.inf, -math.inf, math.nan], requires_grad=True)
    y = module(x * 1)
    torch.testing.assert_close(y.detach(), x.detach(), equal_nan=True)
    torch.testing.assert_close(module.inverse(y.detach()), x.detach(), equal_nan=True)


@pytest.mark.parametrize("module", [LeakyReLU(), SELU(), Asinh()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("shape", [(5,), (5, 3, 2), (0, 3), (3, 0)], ids=str)
def test_the_log_determinant_of_any_shape(module, shape):
    torch.manual_seed(0)
    x = 3 * torch.randn(shape, dtype=torch.float64)
    _, log_det = module.forward_and_log_det(x)
    x.requires_grad_()
    (slopes,) = torch.autograd.grad(module.function(x).sum(), x)
    expected = slopes.log().reshape(shape[0], math.prod(shape[1:])).sum(1)
    torch.testing.assert_close(log_det, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LeakyReLU, SELU, Asinh])
def test_a_deep_stack_in_float32(kind):
    torch.manual_seed(0)
    layers = [kind(0.9) if kind is LeakyReLU else kind() for _ in range(6)]
    model = Sequential(*layers, drift_threshold=1e-4)
    x = torch.randn(100, 8, requires_grad=True)
    found = torch.autograd.grad(model(x * 1).sin().sum(), x)
    with model.temp_mode(checkpoint=False):
        torch.testing.assert_close(found, torch.autograd.grad(model(x * 1).sin().sum(), x), rtol=1e-4, atol=1e-5)
    assert model.last_drift is not None
    assert model.last_drift < 1e-5
