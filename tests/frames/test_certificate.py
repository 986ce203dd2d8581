"""What is rebuilt is compared with what was computed: a region that is not the same again is refused."""

import itertools
import math
import random
import sys

import numpy as np
import pytest
import torch
from seam_oracle import Wrap, assert_right, data, each_source, float64, results, width
from torch import nn

import recollect
from recollect.frames import Add, Certificate, DriftWarning, FrameError, RebuildError, couple_by, run_invertible
from recollect.invertible import AdditiveCoupling
from recollect.reversible import GroupAddRev

assert float64 is not None  # a fixture of every test here

each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)

SETTINGS = {"scale": 1.0, "add": 0}
TABLE = torch.ones(4)


class Noisy(nn.Module):
    """Linear, something that is not the same again, linear.

    Args:
        noise: what happens between.
        zeros: the last layer is zero, so that the output hides all of it.
    """

    def __init__(self, noise, zeros=False):
        super().__init__()
        self.first, self.last, self.noise = nn.Linear(4, 4), nn.Linear(4, 4), noise
        if zeros:
            nn.init.zeros_(self.last.weight)

    def forward(self, h):
        return self.last(self.noise(self.first(h).tanh()).sin())


def by_numpy(h):
    return h * torch.from_numpy(np.random.rand(*h.shape) + 0.5).to(h.dtype)  # noqa: NPY002


def by_one_number_of_numpy(h):
    return h * float(np.random.rand() + 0.5)  # noqa: NPY002


def by_one_element(h):
    mask = torch.zeros_like(h)
    mask[np.random.randint(len(h)), np.random.randint(4)] = 1  # noqa: NPY002
    return h + mask


def by_rows(h):
    return h[random.sample(range(len(h)), len(h))]


def by_columns(h):
    return h[:, random.sample(range(4), 4)]


def by_sign(h):
    return h * random.choice([-1.0, 1.0, -0.5, 0.5, 3.0, -3.0])


def by_layers(h):
    return h.tanh() if recollect.in_backward() else h.sin() * 2


def by_a_counter(h):
    SETTINGS["add"] += 1
    return h + SETTINGS["add"]


def by_entropy(h):
    return h + torch.frombuffer(bytearray(random.SystemRandom().randbytes(4)), dtype=torch.uint8).to(h.dtype) / 50


NOISES = (
    by_numpy, by_one_number_of_numpy, by_one_element, by_rows, by_columns, by_sign, by_layers, by_a_counter, by_entropy,
)  # fmt: skip


def seeded():
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    SETTINGS["add"] = 0


def loss_of(wrap, source, block, dtype=torch.float64, leaf=False):
    x = torch.randn(16, width(source), dtype=dtype, requires_grad=True)
    return wrap.over(source, block.to(dtype), x if leaf else x * 1).square().sum()


each_input = pytest.mark.parametrize("leaf", [False, True], ids=["output of another layer", "leaf"])


# Regions that are not the same again.


@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
@each_source
@each_dtype
@pytest.mark.parametrize("zeros", [False, True], ids=["shown", "hidden"])
@each_input
@pytest.mark.parametrize("noise", NOISES)
def test_a_region_that_is_not_the_same_again_is_refused(source, dtype, zeros, noise, leaf):
    seeded()
    loss = loss_of(Wrap(True), source, Noisy(noise, zeros), dtype, leaf)
    with pytest.raises(RebuildError, match=r"Noisy|swap") as caught:
        loss.backward()
    assert len(str(caught.value)) > 60


@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
@each_source
@each_input
@pytest.mark.parametrize("zeros", [False, True], ids=["shown", "hidden"])
def test_a_global_setting_that_changed_is_refused(source, zeros, leaf):
    SETTINGS["scale"] = 1.0
    loss = loss_of(Wrap(True), source, Noisy(lambda h: h * SETTINGS["scale"], zeros), leaf=leaf)
    SETTINGS["scale"] = 1.5
    with pytest.raises(RebuildError, match=r"Noisy|swap"):
        loss.backward()


@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
@each_source
@each_input
@pytest.mark.parametrize("zeros", [False, True], ids=["shown", "hidden"])
def test_a_global_tensor_that_was_changed_through_numpy_is_refused(source, zeros, leaf):
    TABLE.fill_(1.0)
    loss = loss_of(Wrap(True), source, Noisy(lambda h: h * TABLE, zeros), leaf=leaf)
    TABLE.numpy()[2] += 0.5  # counts no version
    with pytest.raises(FrameError, match=r"Noisy|swap"):
        loss.backward()


@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
@pytest.mark.parametrize("make", [AdditiveCoupling, lambda a, b: GroupAddRev(nn.ModuleList([a, b]))])
@pytest.mark.parametrize("zeros", [False, True], ids=["shown", "hidden"])
@pytest.mark.parametrize("rows", [16, 2000])  # of few elements all are compared, of many a sample
def test_layers_refuse_blocks_that_are_not_the_same_again(make, zeros, rows):
    class Takes(Noisy):
        def forward(self, h, *_):
            return super().forward(h)

    seeded()
    layer = make(Takes(by_numpy, zeros), Takes(lambda h: h))
    inputs = (torch.zeros(2, 0, dtype=torch.long),) if isinstance(layer, GroupAddRev) else ()
    h = torch.randn(rows, 8, requires_grad=True) * 1
    for _ in range(3):
        h = layer(h, *inputs)
    with pytest.raises(RebuildError, match="Takes"):
        h.square().sum().backward()


def test_a_nested_region_that_is_not_the_same_again_is_refused():
    seeded()
    inner = Noisy(by_numpy)
    x = data()
    loss = recollect.checkpoint(lambda h: recollect.checkpoint(inner, h.sin()).cos(), x).square().sum()
    with pytest.raises(RebuildError):
        loss.backward()


def test_an_inverse_that_is_wrong_is_refused_or_warned_of():
    x = data()
    loss = recollect.checkpoint(lambda h: h.exp() * 2, x, inverse=lambda y: (y / 2.1).log()).sum()
    with pytest.raises((RebuildError, DriftWarning)):
        loss.backward()


# Regions that are the same again.


@each_source
@pytest.mark.parametrize(
    "middle",
    [
        lambda h: h * torch.nan,
        lambda h: h / torch.zeros(4),
        lambda h: torch.where(h > 0, h, torch.nan),
        lambda h: h * 0,
        lambda h: h * 1e-300,
        lambda h: h.to(torch.complex128).exp().real,
        lambda h: (h * 1e3).to(torch.int64).to(h.dtype) + h,
        lambda h: h[:0].sum() + h,
        lambda h: torch.nn.functional.dropout(h, 0.5),
        lambda h: h[torch.randperm(len(h))],
    ],
    ids=["nan", "inf", "some nan", "zeros", "tiny", "complex", "integers", "empty", "dropout", "permuted"],
)
@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
def test_values_of_all_kinds_are_accepted_when_they_are_the_same(source, middle):
    Wrap(True).over(source, Noisy(lambda h: middle(h)), data(source)).square().sum().backward()


@pytest.mark.parametrize("certify", [True, "exact", False])
def test_the_setting_changes_no_number(certify):
    def step(wrap):
        wrap.options = {"certify": certify} if wrap.framed else {}
        module, x = Noisy(torch.sin), data()
        wrap(module, x).square().sum().backward()
        return results(module)

    assert_right(step)


def test_other_settings_are_refused():
    with pytest.raises(ValueError, match="certify"):
        recollect.checkpoint(torch.sin, data(), certify="always")


# Rounding.


def rounded(h):
    """Relative noise of about one unit in the last place of float32."""
    return h * torch.from_numpy(1 + 2e-7 * np.random.choice([-1.0, 1.0], h.shape)).to(h.dtype)  # noqa: NPY002


@each_source
def test_differences_within_rounding_are_accepted(source):
    block, grads = Noisy(rounded), []
    for framed in (False, True):
        seeded()
        torch.manual_seed(0)
        block.zero_grad()
        loss_of(Wrap(framed), source, block, torch.float32).backward()
        grads.append(torch.cat([p.grad.flatten() for p in block.parameters()]))
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 1e-5


def test_differences_within_rounding_are_refused_where_exactness_is_asked_for():
    seeded()
    loss = loss_of(Wrap(True, certify="exact"), "checkpoint", Noisy(rounded), torch.float32)
    with pytest.raises(RebuildError, match="Noisy"):
        loss.backward()


def test_the_rounding_of_float32_is_none_of_float64():
    seeded()
    loss = loss_of(Wrap(True), "checkpoint", Noisy(rounded), torch.float64)
    with pytest.raises(RebuildError, match="Noisy"):
        loss.backward()


@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
@each_source
@pytest.mark.parametrize("noise", [by_numpy, by_rows, rounded])
def test_without_certificate_everything_is_accepted(source, noise):
    seeded()
    loss_of(Wrap(True, certify=False), source, Noisy(noise)).backward()


# Figures.


def _swap(block):
    def swap(x):
        a, b = x.chunk(2, -1)
        return torch.cat([b + block(a), a], -1)

    def unswap(y):
        b, a = y.chunk(2, -1)
        return torch.cat([a, b - block(a)], -1)

    return swap, unswap


@pytest.mark.parametrize("source", ["inverse", "coupling"])
def test_figures_of_what_was_certified(source):
    certificate, block, h = Certificate(), Noisy(torch.sin), data(source)
    for _ in range(3):
        if source == "inverse":
            swap, unswap = _swap(block)
            h = run_invertible(swap, unswap, (h,), certificate=certificate)
        else:
            h = couple_by(Add(), [block, torch.sin], h, [(), ()], certificate=certificate)[0]
    assert certificate.equal + certificate.rounded == 0
    h.square().sum().backward()
    assert certificate.equal + certificate.rounded > 0
    assert 0 <= certificate.largest < 1e-9
    certificate.reset()
    assert (certificate.equal, certificate.rounded, certificate.largest) == (0, 0, 0.0)


# Drift is not a failure of the certificate.


def _drifting(kind, depth, std):
    for _ in range(depth):
        blocks = [nn.Linear(8, 8), nn.Linear(8, 8)]
        for block in blocks:
            nn.init.normal_(block.weight, std=std)
        if kind == "coupling":
            yield AdditiveCoupling(*blocks)
        else:
            swap, unswap = _swap(blocks[0])
            yield lambda h, swap=swap, unswap=unswap: recollect.checkpoint(swap, h, inverse=unswap)


@pytest.mark.parametrize(
    ("kind", "depth", "std"),
    [("coupling", 20, 0.3), ("inverse", 40, 0.3), ("coupling", 20, 0.5), ("inverse", 30, 0.5)],
    ids=["coupling", "inverse", "coupling, far", "inverse, far"],
)
def test_a_chain_that_merely_drifts_is_not_refused_and_warns(kind, depth, std):
    torch.set_default_dtype(torch.float32)
    x = h = torch.randn(16, 16, requires_grad=True)
    for layer in _drifting(kind, depth, std):
        h = layer(h)
    with pytest.warns(DriftWarning):
        (h / h.detach().norm()).square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore::recollect.frames.DriftWarning")
@each_source
def test_under_autocast_a_rebuild_is_within_rounding(source, kind):
    torch.set_default_dtype(torch.float32)
    block = Noisy(torch.sin)
    x = torch.randn(16, width(source))
    grads = []
    for framed in (False, True):
        block.zero_grad()
        with torch.autocast("cpu", kind):
            h = x.requires_grad_() * 1
            for _ in range(8):
                h = Wrap(framed).over(source, block, h)
                h = h.float() if source == "checkpoint" else h
        assert h.dtype is torch.float32
        h.square().mean().backward()
        grads.append(block.first.weight.grad.clone())
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < (1e-6 if source == "checkpoint" else 2e-2)


class TestInfinities:
    """Values that are finite are compared beside infinities and NaN, and so is where those stand."""

    def refused(self, function, size):
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        y = recollect.checkpoint(function, x * 1)
        with pytest.raises(RebuildError, match="has other values"):
            y.nan_to_num(neginf=0.0).sum().backward()

    @pytest.mark.parametrize("size", [6, 3000])
    @pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
    def test_values_beside_them(self, size, value):
        def function(x):
            noise = torch.from_numpy(np.random.default_rng().random(size))
            noise[0] = value
            return torch.logaddexp(x + noise, x.new_zeros(()))

        self.refused(function, size)

    @pytest.mark.parametrize("size", [6, 3000])
    def test_their_places(self, size):
        calls = itertools.count()

        def function(x):
            shift = torch.zeros(size, dtype=torch.float64)
            shift[next(calls)] = -math.inf
            return torch.logaddexp(shift, x)

        self.refused(function, size)

    @pytest.mark.parametrize("size", [6, 3000])
    def test_what_is_the_same_again_is_accepted(self, size):
        shift = torch.zeros(size, dtype=torch.float64)
        shift[::2] = -math.inf
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        torch.logaddexp(x + shift, x).sum().backward()
        expected, x.grad = x.grad, None
        recollect.checkpoint(lambda x: torch.logaddexp(x + shift, x), x * 1).sum().backward()
        assert torch.equal(x.grad, expected)


def test_what_several_operations_save_is_read_once(monkeypatch):
    evidence = sys.modules["recollect.frames._evidence"]
    read = []

    def counted(plain):
        def run(*args, **options):
            read.append(max((a.numel() for a in args if isinstance(a, torch.Tensor)), default=0))
            return plain(*args, **options)

        return run

    monkeypatch.setattr(evidence, "fingerprint", counted(evidence.fingerprint))
    monkeypatch.setattr(evidence, "difference", counted(evidence.difference))
    x = torch.randn(64, 128, requires_grad=True)
    layer = nn.Linear(128, 128)

    def region(x):
        y = layer(x).relu()  # saved by relu, by the product, by the cubes (a square and twice the product)
        return layer(y) + y * y * y

    recollect.checkpoint(region, x).sum().backward()
    found, x.grad = x.grad, None
    assert len([n for n in read if n == 64 * 128]) == 4  # y and its square, in the forward pass and in the rebuild
    region(x).sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=0, atol=0)
