"""The error of what a chain reconstructs: measured, warned of, and bounded by anchors."""

import math
import warnings

import pytest
import torch
from frames_zoo import assert_same, make, wanted
from torch import nn

import recollect
from recollect.frames import DRIFT_THRESHOLD, DriftGauge, DriftWarning, RebuildError, couple
from recollect.frames._drift import DriftProbe


def expanding(depth, gauge, dtype=torch.float32, gain=3.0, **options):
    """Run a chain of couplings without normalisation, whose inverse loses digits at each layer."""
    torch.manual_seed(0)
    layers = [[nn.Linear(8, 8, dtype=dtype) for _ in range(2)] for _ in range(depth)]
    x = torch.randn(20, 16, dtype=dtype, requires_grad=True)
    params = [x, *(p for layer in layers for block in layer for p in block.parameters())]

    def run(enabled):
        h = x * 1.0
        for layer in layers:
            blocks = [lambda z, b=b: gain * torch.relu(b(z)) for b in layer]
            h = couple(blocks, h, [(), ()], gauge=gauge, enabled=enabled, **options)
        return torch.autograd.grad((h / h.detach().norm()).sum(), params)

    return run


def test_a_chain_records_its_drift():
    gauge = DriftGauge("chain")
    assert gauge.last is None
    expanding(10, gauge, torch.float64, gain=1.0)(True)
    assert 0 <= gauge.last < 1e-10


def test_nothing_is_recorded_without_a_rebuild():
    gauge = DriftGauge("chain")
    net, x = make("coupling")
    y = net(x, gauge=gauge)
    assert gauge.last is None
    with torch.no_grad():
        net(x, gauge=gauge)
    assert gauge.last is None
    y.sum().backward()
    assert gauge.last is not None


def test_sixty_expanding_blocks_warn_and_name_the_remedies():
    gauge = DriftGauge("Deep(60)")
    run = expanding(60, gauge)
    with pytest.warns(
        DriftWarning, match=r"Deep\(60\).*relative error.*anchor_every=s.*normalise.*float64.*checkpoint"
    ):
        run(True)
    assert gauge.last > DRIFT_THRESHOLD


@pytest.mark.parametrize("anchor_every", [1, 4])
def test_anchors_bound_the_drift(anchor_every):
    gauge = DriftGauge("chain")
    run = expanding(60, gauge, anchor_every=anchor_every)
    actual, expected = run(True), run(False)  # warnings are errors
    assert gauge.last <= DRIFT_THRESHOLD
    assert_same(actual, expected, 1e-2)


def test_the_drift_is_about_the_true_error():
    gauge = DriftGauge("chain", threshold=math.inf)
    grown = []
    for depth in (5, 20, 35):
        expanding(depth, gauge)(True)
        grown.append(gauge.last)
    assert grown[0] < grown[1] < grown[2]


def test_the_threshold_is_the_callers():
    with pytest.warns(DriftWarning, match="threshold 1.0e-12"):
        expanding(10, DriftGauge("chain", threshold=1e-12))(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expanding(60, DriftGauge("chain", threshold=math.inf))(True)


def test_a_drift_that_is_not_a_number_warns():
    for value in ("nan", "inf"):
        gauge = DriftGauge("chain")
        with pytest.warns(DriftWarning, match=value):
            gauge.record(float(value))
    gauge.last = None
    gauge.record(DRIFT_THRESHOLD)
    gauge.record(DRIFT_THRESHOLD / 2)
    assert gauge.last == DRIFT_THRESHOLD


def test_a_warning_is_repeated_when_it_has_become_ten_times_worse():
    gauge = DriftGauge("chain", threshold=1e-3)
    with pytest.warns(DriftWarning, match=r"2\.0e-03"):
        gauge.record(2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gauge.record(1.9e-2)
    with pytest.warns(DriftWarning, match=r"2\.1e-02"):
        gauge.record(2.1e-2)


def test_the_probe_does_not_move_the_random_stream():
    net, x = make("coupling")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    net(x, gauge=DriftGauge("chain")).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_against_the_formula():
    torch.manual_seed(0)
    gauge = DriftGauge("chain", threshold=math.inf)
    tensors = [torch.randn(4, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    probe = DriftProbe(tensors, gauge)
    probe.measure([t.clone() for t in tensors])
    assert gauge.last == 0
    probe.measure([1.25 * t for t in tensors])
    assert gauge.last == pytest.approx(0.25)
    probe.measure([torch.zeros_like(t) for t in tensors])
    assert gauge.last == pytest.approx(1)


def test_the_probe_of_zeros_and_of_nothing():
    gauge = DriftGauge("chain", threshold=math.inf)
    probe = DriftProbe([torch.zeros(4), torch.zeros(0, 3)], gauge)
    probe.measure([torch.zeros(4), torch.zeros(0, 3)])
    assert gauge.last in (None, 0)
    probe.measure([torch.ones(4), torch.zeros(0, 3)])
    assert gauge.last == math.inf


def test_the_probe_keeps_a_small_sample():
    tensor = torch.randn(300, 400)
    probe = DriftProbe([tensor], DriftGauge("chain"))
    assert sum(v.numel() for pair in probe._samples for v in pair) <= 512
    assert all(v.untyped_storage().nbytes() <= 256 * 8 for pair in probe._samples for v in pair)


def test_complex_and_low_precision_drift():
    for dtype, limit in ((torch.complex128, 1e-10), (torch.bfloat16, 0.5)):
        gauge = DriftGauge("chain", threshold=math.inf)
        torch.manual_seed(0)
        h = torch.randn(10, 8, dtype=dtype, requires_grad=True) * 1.0
        for _ in range(4):
            h = couple([torch.tanh, torch.tanh], h, [(), ()], gauge=gauge)
        h.abs().sum().backward()
        assert gauge.last < limit


def test_an_anchored_chain_of_frames_with_dropout():
    gauge = DriftGauge("chain")
    net, x = make("coupling", depth=9, dropout=0.4)
    torch.manual_seed(1)
    expected = torch.autograd.grad(net(x, enabled=False).sum(), wanted(net, x))
    torch.manual_seed(1)
    actual = torch.autograd.grad(net(x, gauge=gauge, anchor_every=3).sum(), wanted(net, x))
    assert_same(actual, expected)
    assert gauge.last < 1e-10


def test_a_wrong_inverse_of_a_checkpoint_is_refused():
    h = torch.randn(10, requires_grad=True) * 1.0
    y = recollect.checkpoint(lambda h: h.exp() + h.sin(), h, inverse=lambda y: y)
    del h
    with pytest.raises(RebuildError, match="inverse"):
        y.sum().backward()
