"""Verdicts over what is on another device: given when the numbers have arrived, and never lost."""

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import recollect
from device.emulation import device, watch
from recollect import _verdicts
from recollect.frames import (
    Certificate,
    DriftGauge,
    DriftWarning,
    LatticeError,
    RebuildError,
    couple,
    run_frame,
    run_invertible,
    settle,
)
from recollect.frames.sources._kept import Kept
from recollect.reversible import GroupAddRev


class Drifting:
    """A function that is another one in each call."""

    def __init__(self, by=0.5):
        self.calls, self.by = itertools.count(), by

    def __call__(self, h):
        return (h * (1 + self.by * next(self.calls))).exp()


@pytest.fixture(autouse=True)
def nothing_left(other):
    settle()
    yield
    settle()


def leaf(other, *shape):
    return torch.randn(*shape, device=other, requires_grad=True)


def wrong(other):
    recollect.checkpoint(Drifting(), leaf(other, 3) * 1).sum().backward()


def right(other):
    recollect.checkpoint(torch.exp, leaf(other, 3) * 1).sum().backward()


def test_an_error_comes_with_the_next_region(other):
    with watch() as log:
        wrong(other)  # the numbers are on their way
        with pytest.raises(RebuildError, match="other values") as caught:
            right(other)
    assert log.where == []
    assert any("earlier step" in note for note in caught.value.__notes__)
    right(other)  # it was told once


def test_or_when_somebody_asks(other):
    device.lag = 10**6
    wrong(other)
    with watch() as log, pytest.raises(RebuildError, match="other values"):
        settle()
    assert log.syncs == 1
    settle()


def test_a_device_that_lags_is_not_waited_for(other):
    device.lag = 10**6
    with watch() as log:
        wrong(other)
        for _ in range(5):
            right(other)
    assert log.where == []
    with pytest.raises(RebuildError):
        settle()


def test_but_not_for_ever(other):
    device.lag = 10**6
    with watch() as log:
        wrong(other)
        for _ in range(_verdicts._MOST - 1):
            right(other)
        assert log.where == []
        with pytest.raises(RebuildError):
            right(other)
    assert log.syncs == 1


class Block(nn.Linear):
    def forward(self, x, edge_index):
        return super().forward(x)


class Large(Block):
    def forward(self, x, edge_index):
        return torch.full_like(x, 300.0)


def stream(other, depth=40):
    """A step of a deep stream on the lattice."""
    torch.manual_seed(0)
    blocks = [Block(4, 4).to(other) for _ in range(2)]
    for block in blocks:
        nn.init.normal_(block.weight, std=0.01)
    layers = [GroupAddRev(nn.ModuleList(blocks), exact=True) for _ in range(depth)]

    def step(inflated=None):
        h = leaf(other, 5, 8) * 1
        for number, layer in enumerate(layers):
            h = layer(h, None)
            if number == inflated:
                h = h + 1000.0
        return h.sum()

    return step


class TestRanges:
    @pytest.mark.parametrize("lag", [0, 1, 3, 10**6])
    def test_a_deep_stream_never_waits(self, other, lag):
        device.lag = lag
        step = stream(other)
        step().backward()
        settle()
        with watch() as log:
            for _ in range(6):
                step().backward()
        assert log.where == []
        if lag == 10**6:  # one copy is sent at once, and one when each backward pass ends
            assert len(_verdicts._waiting) == 7
            assert log.copies == 1 + 6 * 2  # of floating-point numbers and of integers

    def test_nor_does_a_forward_pass_alone(self, other):
        device.lag = 10**6
        step = stream(other)
        with watch() as log, torch.no_grad():
            for _ in range(12):
                step()
        assert log.where == []
        assert log.copies == 1

    @pytest.mark.parametrize("lag", [1, 10**6])
    @pytest.mark.parametrize("training", [True, False])
    def test_none_is_lost(self, other, lag, training):
        device.lag = lag
        step = stream(other, depth=12)

        def run():
            for _ in range(3):
                loss = step(inflated=5)
                if training:
                    loss.backward()
            settle()

        with torch.set_grad_enabled(training), pytest.raises(LatticeError, match=r"exact=16 .* exact=14 holds it"):
            run()
        with contextlib.suppress(LatticeError):
            settle()

    def test_the_block_is_named(self, other):
        device.lag = 10**6
        blocks = nn.ModuleList([Block(4, 4), Large(4, 4)]).to(other)
        h = torch.zeros(5, 8, device=other, requires_grad=True) * 1
        GroupAddRev(blocks, exact=True)(h, None).sum().backward()
        with pytest.raises(LatticeError, match=r"^Large\(.*with exact=16.*got 300"):
            settle()


def test_no_error_hides_another(other):
    device.lag = 10**6
    wrong(other)
    wrong(other)
    with pytest.raises(RebuildError) as caught:
        settle()
    assert any(note.startswith("Another one: RebuildError") for note in caught.value.__notes__)


def test_a_backward_that_fails_loses_none(other):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError

    y = recollect.checkpoint(Drifting(), Fails.apply(leaf(other, 3)))
    with pytest.raises(ArithmeticError):
        y.sum().backward()
    with pytest.raises(RebuildError):
        settle()


def test_what_waits_for_a_verdict_holds_no_memory(other):
    device.lag = 10**6
    kept = []

    def region(h):
        return h.exp()

    x = leaf(other, 3) * 1
    kept.append(weakref.ref(x))
    y = recollect.checkpoint(region, x)
    y.sum().backward()
    del x, y
    gc.collect()
    assert kept[0]() is None
    assert _verdicts.outstanding()


def test_figures_are_of_the_step_that_was_certified(other):
    device.lag = 10**6
    certificate = Certificate()

    def step():
        run_frame(torch.exp, (leaf(other, 3) * 1,), {}, Kept(), certificate=certificate).sum().backward()

    step()
    first = certificate.figures
    certificate.reset()
    assert (certificate.equal, certificate.rounded) == (0, 0)  # reading waits, and counts where it belongs
    assert first.equal > 0
    step()
    with watch() as log:
        assert certificate.equal == first.equal
    assert log.syncs == 1


class TestDrift:
    def chain(self, other, gauge, depth=30):
        torch.manual_seed(0)
        blocks = [nn.Linear(4, 4).to(other) for _ in range(2)]
        for block in blocks:
            nn.init.normal_(block.weight, std=0.3)
        h = leaf(other, 5, 8) * 1
        for _ in range(depth):
            h = couple(blocks, h, [(), ()], gauge=gauge, certify=False)
        h.sum().backward()

    def test_it_is_read_when_it_is_asked_for(self, other):
        device.lag = 10**6
        gauge = DriftGauge("chain", threshold=torch.inf)
        with watch() as log:
            self.chain(other, gauge, depth=4)
        assert log.where == []
        with watch() as log:
            assert 0 < gauge.last < 1e-3
            assert gauge.last == gauge.last
        assert log.syncs == 1

    def test_it_is_that_of_the_cpu(self, other):
        gauges = [DriftGauge("chain", threshold=torch.inf) for _ in range(2)]
        self.chain(other, gauges[0], depth=6)
        self.chain("cpu", gauges[1], depth=6)
        assert 0 < gauges[0].last < 1e-3
        assert 0 < gauges[1].last < 1e-3

    def test_a_warning_comes_with_the_next_step(self, other):
        gauge = DriftGauge("chain", threshold=1e-12)
        self.chain(other, gauge, depth=4)
        with watch() as log, pytest.warns(DriftWarning, match="chain"):
            right(other)
        assert log.where == []

    def test_a_measurement_belongs_to_its_step(self, other):
        gauge = DriftGauge("chain", threshold=torch.inf)
        device.lag = 10**6
        self.chain(other, gauge, depth=4)
        gauge.last = None
        assert gauge.last is None
        settle()
        assert gauge.last is None
        self.chain(other, gauge, depth=4)
        assert gauge.last > 0

    def test_zeros_measure_nothing(self, other):
        gauge = DriftGauge("chain")
        h = torch.zeros(3, 4, device=other, requires_grad=True) * 1
        couple([torch.sin, torch.sin], h, [(), ()], gauge=gauge).sum().backward()
        assert gauge.last is None

    def test_a_wrong_inverse_of_zeros_is_infinitely_off(self, other):
        gauge = DriftGauge("chain", threshold=torch.inf)
        h = torch.zeros(3, device=other, requires_grad=True) * 1
        y = frames_inverse(h, gauge)
        y.sum().backward()
        assert gauge.last == torch.inf


def frames_inverse(h, gauge):
    return run_invertible(lambda x: (x + 1.0).exp(), torch.log, (h,), gauge=gauge, certify=False)


def test_what_nobody_asks_for_is_told_at_the_end_of_the_process():
    script = (
        "import torch, itertools, recollect\n"
        "from device import emulation\n"
        "emulation.install()\n"
        "calls = itertools.count()\n"
        "x = torch.ones(3, device='other', requires_grad=True)\n"
        "recollect.checkpoint(lambda h: (h * (1 + next(calls))).exp(), x * 1).sum().backward()\n"
        "print('trained')\n"
    )
    places = [str(Path(__file__).parents[1]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "trained\n"
    assert "found when the process ended: RebuildError" in done.stderr
