"""Sums on a lattice against those of rational numbers."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recollect.frames import LatticeError, RebuildError, check_exact, couple, digits_of, uncouple

LONG = {torch.float32: 24, torch.float64: 53}


def rounded(value: float, k: int) -> Fraction:
    """q(t) = round(t 2^k) 2^-k, halves to even."""
    return Fraction(round(Fraction(value) * 2**k), 2**k)


def values(size: int, dtype: torch.dtype, most: float, seed: int) -> Tensor:
    """Numbers of all magnitudes below a limit, halves of a step among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, dtype=torch.float64, generator=generator)
    x = x.sign() * torch.rand(size, dtype=torch.float64, generator=generator) * most * 2.0 ** (-3 * x.abs())
    x[::3] = (x[::3] * 1024).round() / 1024
    return x.to(dtype)


@given(
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 52),
    st.integers(2, 4),
    st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_the_sum_is_exact_and_so_is_its_inverse(dtype, k, groups, seed):
    k = min(k, LONG[dtype] - 4)
    most = 2.0 ** (LONG[dtype] - k) / 2
    x = values(12 * groups, dtype, most, seed).view(1, -1)
    outputs = [values(12, dtype, most, seed + i + 1).view(1, -1) for i in range(groups)]
    blocks = [lambda z, output=output: output.clone() for output in outputs]
    y = couple(blocks, x, [()] * groups, exact=k)
    back = uncouple(blocks, y, [()] * groups, exact=k)
    for start, output in zip(range(0, 12 * groups, 12), outputs, strict=True):
        for i in range(12):
            old = rounded(float(x[0, start + i]), k)
            assert Fraction(float(back[0, start + i])) == old
            assert Fraction(float(y[0, start + i])) == old + rounded(float(output[0, i]), k)
    assert not (back.eq(0) & back.signbit()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_up_to_the_limit(dtype):
    k = 16
    largest = 2.0 ** (LONG[dtype] - k) - 2.0**-k
    x = torch.tensor([[largest, -largest, 0.0, -0.0]], dtype=dtype)
    zero = [torch.zeros_like] * 2
    assert couple(zero, x, [(), ()], exact=k).tolist() == [[largest, -largest, 0.0, 0.0]]
    step = [lambda z: torch.full_like(z, 2.0**-k), torch.zeros_like]
    with pytest.raises(LatticeError, match=r"exact=16 the stream holds .* exact=15 holds it"):
        couple(step, x, [(), ()], exact=k)
    with pytest.raises(LatticeError, match="the input of an exact stream: with exact=17"):
        couple(zero, x, [(), ()], exact=k + 1)
    with pytest.raises(LatticeError, match="inverse of"):
        uncouple([lambda z: torch.full_like(z, -(2.0**-k)), torch.zeros_like], x, [(), ()], exact=k)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("size", [3.0, 300.0, 2.0**20])
def test_what_is_out_of_range_is_refused_and_the_remedy_holds(size, grad, enabled):
    class Grows(nn.Module):
        def forward(self, z):
            return size * torch.ones_like(z)

    x = torch.zeros(2, 4, requires_grad=grad)
    blocks = [nn.Identity(), Grows()]
    first, second = couple(blocks, x, [(), ()], exact=16 if size < 256 else 3, enabled=enabled).chunk(2, 1)
    assert first.eq(0).all()
    assert second.eq(size).all()
    if size >= 256:
        with pytest.raises(LatticeError, match=r"^Grows\(\).*float32") as caught:
            couple(blocks, x, [(), ()], exact=16, enabled=enabled)
        holds = 24 - math.ceil(math.log2(size + 1))
        assert f"exact={holds} holds it" in str(caught.value)
        couple(blocks, x, [(), ()], exact=holds, enabled=enabled)
        with pytest.raises(LatticeError):
            couple(blocks, x, [(), ()], exact=holds + 1, enabled=enabled)
        couple(blocks, x.double(), [(), ()], exact=16, enabled=enabled)


def test_the_place_in_the_chain_is_named():
    x = torch.zeros(2, 4, requires_grad=True)
    for _ in range(3):
        x = couple([nn.Tanh(), nn.Tanh()], x, [(), ()], exact=16)
    with pytest.raises(LatticeError, match=r"^Softplus\(.*\), after 3 couplings: "):
        couple([lambda z: z + 200, nn.Softplus(beta=0.001)], x, [(), ()], exact=16)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", ["input", "block"])
def test_what_is_not_finite_is_refused(value, where):
    x = torch.zeros(3, 4)
    x[1, 2] = value if where == "input" else 0.0
    blocks = [nn.Tanh(), lambda z: torch.full_like(z, value) if where == "block" else z]
    with pytest.raises(LatticeError, match="the input" if where == "input" else "lambda"):
        couple(blocks, x, [(), ()], exact=16)


@pytest.mark.parametrize("value", [0, -1, 1.5, "yes", None, 53, 60])
def test_what_exact_may_be(value):
    with pytest.raises((TypeError, ValueError), match="exact"):
        check_exact(value)


def test_digits():
    assert [check_exact(value) for value in (True, False, 1, 52)] == [True, False, 1, 52]
    assert digits_of(False, torch.float32) is None
    assert [digits_of(True, dtype) for dtype in (torch.float32, torch.float64)] == [16, 40]
    assert [digits_of(23, torch.float32), digits_of(52, torch.float64)] == [23, 52]
    with pytest.raises(ValueError, match=r"below 24 for a stream in torch\.float32"):
        digits_of(24, torch.float32)
    with pytest.raises(ValueError, match="below 24"):
        couple([torch.sin, torch.sin], torch.zeros(2, 4), [(), ()], exact=30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_types_without_enough_digits_are_refused(dtype):
    with pytest.raises(TypeError, match=r"float32 or float64 .*\.float\(\)"):
        couple([torch.zeros_like] * 2, torch.zeros(2, 4, dtype=dtype), [(), ()], exact=16)


def test_the_gradient_is_that_of_the_sum():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    blocks = [lambda z: z @ weight, lambda z: weight @ z.T.sum(1)[:4] * torch.ones_like(z)]
    gradients = [
        torch.autograd.grad(couple(blocks, x, [(), ()], exact=exact).sum(), [x, weight]) for exact in (None, 45)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_autograd_keeps_nothing_for_the_rounding():
    kept: list[list[int]] = []
    for exact in (None, 16):
        numbers: list[int] = []
        x = torch.randn(3, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, n=numbers: n.append(t.numel()) or t, lambda t: t):
            couple([nn.Linear(4, 4), torch.sin], x, [(), ()], exact=exact, enabled=False)
        kept.append(numbers)
    assert kept[0] == kept[1]


def test_blocks_that_do_not_repeat_themselves_are_named():
    class Noisy(nn.Module):
        """Off by a rounding, as kernels that add up in any order."""

        def forward(self, z: Tensor) -> Tensor:
            return z.sin() * (1 + random.choice([1, 2, 3, 4, 5, 6, 7, 8]) * 2.0**-22)

    x = torch.randn(50, 8, requires_grad=True)
    random.seed(0)
    couple([Noisy(), torch.sin], x, [(), ()], certify=True).sum().backward()
    with pytest.raises(RebuildError, match=r"Noisy\(\).*other bits.*use_deterministic_algorithms.*exact=False"):
        couple([Noisy(), torch.sin], x, [(), ()], exact=16).sum().backward()


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values(kind):
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode() if kind == "fake" else torch.device("meta")
    with mode:
        x = torch.empty(3, 8, requires_grad=True)
        net = nn.Linear(4, 4)
        y = couple([net, torch.sin], couple([net, torch.sin], x, [(), ()], exact=16), [(), ()], exact=16)
        y.sum().backward()
    assert x.grad.shape == x.shape


def test_a_block_in_another_type():
    x = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.int32):
        y = couple([lambda z, dtype=dtype: (3 * z).to(dtype), torch.sin], x, [(), ()], exact=16)
        assert y.dtype is torch.float32
        back = uncouple([lambda z, dtype=dtype: (3 * z).to(dtype), torch.sin], y, [(), ()], exact=16)
        assert torch.equal(back, (x * 2**16).round() / 2**16)
