"""The emulated device: values, random numbers, and what is counted."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from device.emulation import device, watch


def test_values_and_gradients_are_those_of_the_cpu(other):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(5, 3, 6, 6)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    net.to(other)
    actual = torch.autograd.grad(net(x.to(other)).square().sum(), list(net.parameters()))
    for one, two in zip(actual, expected, strict=True):
        assert one.device.type == other
        torch.testing.assert_close(one.cpu(), two)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_fused_cells_are_those_of_the_cpu(other, kind):
    torch.manual_seed(0)
    net, x = kind(3, 4, num_layers=2, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    expected = torch.autograd.grad(net(x)[0].square().sum(), list(net.parameters()))
    net.to(other)
    actual = torch.autograd.grad(net(x.to(other))[0].square().sum(), list(net.parameters()))
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), two)


def test_tensors_share_memory_and_count_versions_as_on_any_device(other):
    x = torch.zeros(2, 3, device=other)
    row = x[1]
    version = x._version
    row.add_(1)
    assert x._version == version + 1
    assert row.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert x.cpu().tolist() == [[0, 0, 0], [1, 1, 1]]


def test_tensors_of_the_cpu_are_refused(other):
    x = torch.ones(3, device=other)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([x, torch.ones(3)])
    assert (x + torch.tensor(1.0)).sum().item() == 6


def test_random_numbers_come_from_its_own_generator(other):
    before = torch.get_rng_state()
    torch.get_device_module(other).manual_seed(3)
    state = torch.get_device_module(other).get_rng_state()
    first = torch.rand(4, device=other), F.dropout(torch.ones(20, device=other), 0.5)
    torch.get_device_module(other).set_rng_state(state)
    second = torch.rand(4, device=other), F.dropout(torch.ones(20, device=other), 0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(torch.rand(4, device=other), first[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_has_types_of_its_own(other):
    net, x = nn.Linear(3, 3, device=other), torch.ones(2, 3, device=other)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(other, dtype=dtype):
            y = net(x)
            assert (y.dtype, y.softmax(-1).dtype) == (dtype, torch.float32)
    assert net(x).dtype == torch.float32


WAITS = {
    "a number": lambda x: x[0, 0].item(),
    "a truth value": lambda x: bool((x > 0).all()),
    "a copy": lambda x: x.cpu(),
    "a list": lambda x: x.tolist(),
    "equality": lambda x: torch.equal(x, x),
    "places": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a masked write": lambda x: x.clone().__setitem__(x[:, 0] > 0, x[:1]),
    "a selection": lambda x: x.masked_select(x > 0),
    "different values": lambda x: x.unique(),
    "repetitions": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long, device=x.device), 0),
    "a factor": lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(3, device=x.device)),
    "an inverse": lambda x: torch.linalg.inv(x),
    "a solution": lambda x: torch.linalg.solve(x, x),
    "eigenvalues": lambda x: torch.linalg.eigh(x @ x.T),
}
DOES_NOT = {
    "sums": lambda x: (x @ x).sum(),
    "rows": lambda x: x[torch.arange(2, device=x.device)],
    "a masked fill": lambda x: x.clone().masked_fill_(x > 0, 0.0),
    "a choice": lambda x: torch.where(x > 0, x, 0),
    "repetitions of known number": lambda x: x.repeat_interleave(
        torch.ones(3, dtype=torch.long, device=x.device), 0, output_size=3
    ),
    "a factor without its check": lambda x: torch.linalg.cholesky_ex(x @ x.T),
    "an inverse without its check": lambda x: torch.linalg.inv_ex(x),
    "a tensor from the host": lambda x: torch.ones(3).to(x.device),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_counted(other, name):
    torch.manual_seed(0)
    x = torch.randn(3, 3, device=other)
    with watch() as log:
        WAITS[name](x)
    assert log.syncs >= 1
    assert len(log.where) == log.syncs
    assert "outside of the library" in log.where[0]


@pytest.mark.parametrize("name", DOES_NOT)
def test_what_does_not_is_not(other, name):
    x = torch.randn(3, 3, device=other)
    with watch() as log:
        DOES_NOT[name](x)
    assert log.where == []


def test_copies_that_do_not_block_arrive_late(other):
    x, host = torch.ones(3, device=other), torch.zeros(3)
    event = torch.get_device_module(other).Event()
    with watch() as log:
        host.copy_(x, non_blocking=True)
        event.record()
        x.add_(1)
        assert host.isnan().all()
        assert not event.query()
        assert event.query()  # the second time it is asked
    assert host.tolist() == [1, 1, 1]
    assert (log.syncs, log.copies) == (0, 1)
    device.lag = 1000
    host.copy_(x, non_blocking=True)
    event.record()
    with watch() as log:
        event.synchronize()
    assert log.syncs == 1
    assert host.tolist() == [2, 2, 2]


def test_copies_that_block_are_counted_apart(other):
    x = torch.ones(3)
    with watch() as log:
        torch.tensor([1.0, 2.0], device=other)
        x.to(other)
        there = torch.zeros(3, device=other).copy_(x)
    assert len(log.sent) == 3
    assert all(line.startswith("copy to the device at") for line in log.sent)
    with watch() as log:
        x.to(other, non_blocking=True)
        there.copy_(x, non_blocking=True)
        there.clone()
        torch.full((2,), 3.0, device=other)
        there + torch.tensor(1.0)
    assert log.sent == log.where == []
