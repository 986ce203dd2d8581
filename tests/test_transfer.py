"""Copies beside a computation, on a device that writes down what it is asked for, and does it only when it must."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recollect
from recollect._transfer import Buffer, Buffers, Fetch, Lane, Order, Streams, streams_of
from recollect.autoscale import AsyncIOPool, History

CPU = torch.device("cpu")


class Stream:
    """Work that is done, in its order, when somebody waits for it."""

    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name, self.done = device, name, 0
        self.work: list = []

    def do(self, until: int | None = None) -> None:
        until = len(self.work) if until is None else until
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()

    def wait_stream(self, other: Stream) -> None:
        self.device.log.append(f"{self.name} waits for {other.name}")
        until = len(other.work)
        self.work.append(lambda: other.do(until))

    def wait_event(self, event: Event) -> None:
        self.device.log.append(f"{self.name} waits for {event.stream.name}'s {event.number}")
        self.work.append(lambda: event.stream.do(event.until))

    def record_event(self) -> Event:
        self.device.events += 1
        event = Event(self, len(self.work), self.device.events)
        self.device.log.append(f"{self.name} records {event.number}")
        return event


class Event:
    def __init__(self, stream: Stream, until: int, number: int) -> None:
        self.stream, self.until, self.number = stream, until, number

    def synchronize(self) -> None:
        self.stream.device.log.append(f"host waits for {self.stream.name}'s {self.number}")
        self.stream.do(self.until)


class Device:
    """What torch has for a device, on the CPU. Each thread has its current stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events = 0
        self.names = iter(("to device", "to host"))
        self.compute = Stream(self, "compute")
        self._local = threading.local()

    def Stream(self, device: torch.device) -> Any:  # noqa: N802
        return Stream(self, next(self.names))

    def current_stream(self, device: torch.device) -> Any:
        return getattr(self._local, "stream", self.compute)

    def stream(self, stream: Any) -> Device:
        self._local.stream = stream
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        del self._local.stream


class Deferred(Lane):
    """Copies when the stream does its work; what is not copied yet is NaN."""

    def __init__(self, device: Device) -> None:
        super().__init__(CPU, device)
        self.fake = device

    def copy(self, out: Tensor, source: Tensor, *, pinned: bool = True) -> None:
        assert pinned
        stream = self.fake.current_stream(CPU)
        self.fake.log.append(f"{stream.name} copies")
        out.fill_(torch.nan)
        stream.work.append(lambda: out.copy_(source))

    def lend(self, memory: Tensor, stream: Stream) -> None:
        self.fake.log.append(f"{tuple(memory.shape)} lent to {stream.name}")


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def streams(device: Device) -> Streams:
    return Streams(CPU, lambda _: Deferred(device))


def taken(log: list[str]) -> list[str]:
    """Return what was written down since the last time."""
    found = list(log)
    log.clear()
    return found


class Lent(Tensor):
    """A tensor that writes down for whom its memory is kept."""

    def record_stream(self, stream: Stream) -> None:
        stream.device.log.append(f"{tuple(self.shape)} lent to {stream.name}")


def test_what_one_stream_computed_is_used_behind_it_on_another(device):
    tensors = [torch.zeros(3).as_subclass(Lent)]
    order = Order(tensors, device)
    order.before(tensors)
    assert taken(device.log) == []  # the same stream
    with device.stream(Stream(device, "another")):
        order.before(tensors)
    assert taken(device.log) == ["another waits for compute", "(3,) lent to another"]
    Order([torch.zeros(3)]).before([torch.zeros(3)])  # nothing is computed beside a CPU


@pytest.mark.parametrize("behind", [False, True])
def test_a_lane_runs_beside_the_stream_that_computes(device, behind):
    lane = Deferred(device)
    source, out = torch.zeros(2), torch.zeros(2)
    device.compute.work.append(lambda: source.fill_(3))
    result, event = lane.run(lambda: (lane.copy(out, source), "result")[1], behind=behind)
    assert result == "result"
    waits = ["to device waits for compute"] if behind else []
    assert taken(device.log) == [*waits, "to device copies", "to device records 1"]
    assert device.current_stream(CPU) is device.compute
    assert out.isnan().all()
    event.synchronize()
    assert out.tolist() == ([3, 3] if behind else [0, 0])


def test_the_current_stream_is_given_back_after_an_error(device):
    with pytest.raises(ZeroDivisionError):
        Deferred(device).run(lambda: 1 // 0, behind=True)
    assert device.current_stream(CPU) is device.compute


def test_without_streams_a_copy_is_over_when_it_returns():
    lane, out = Lane(CPU, object()), torch.zeros(2)
    assert lane.current() is lane.stream is None
    assert lane.run(lambda: lane.copy(out, torch.ones(2)), behind=True) == (None, None)
    assert out.tolist() == [1, 1]


def test_what_a_lane_asks_of_a_tensor():
    class Memory:
        def record_stream(self, stream):
            asked.append(("lent to", stream))

        def copy_(self, source, *, non_blocking):
            asked.append((source, non_blocking))

    asked: list[Any] = []
    lane, memory = Lane(CPU, object()), Memory()
    lane.lend(memory, "stream")
    lane.copy(memory, "source")
    lane.copy(memory, "source", pinned=False)
    assert asked == [("lent to", "stream"), ("source", True), ("source", False)]


def test_what_goes_to_the_host_comes_after_what_computes_it(device, streams):
    x, out = torch.zeros(3, 2), torch.zeros(3, 2)
    device.compute.work.append(lambda: x.fill_(5))
    event = streams.fetch(x, out)
    assert taken(device.log) == [
        "to host waits for compute",
        "to host copies",
        "to host records 1",
        "(3, 2) lent to to host",
    ]
    event.synchronize()
    assert out.unique().tolist() == [5]


def test_what_goes_to_the_device_is_waited_for_by_what_computes_with_it(device, streams):
    buffer = Buffer(24)
    values = buffer.view((3, 2), torch.float32).fill_(7)
    result = streams.send(values, buffer)
    assert taken(device.log) == ["to device copies", "to device records 1"]
    assert streams.receive(result, buffer.in_use) is result
    assert taken(device.log) == ["compute waits for to device's 1", "(3, 2) lent to compute"]
    assert result.isnan().all()
    device.compute.do()
    assert result.unique().tolist() == [7]


def test_a_buffer_is_written_when_the_copy_from_it_is_over(device, streams):
    buffer = Buffer(24)
    result = streams.send(buffer.view((3, 2), torch.float32).fill_(7), buffer)
    taken(device.log)
    buffer.view((3, 2), torch.float32).fill_(8)
    assert taken(device.log) == ["host waits for to device's 1"]
    assert result.unique().tolist() == [7]


def test_buffers_are_bounded_and_grow():
    buffers = Buffers(2)
    first, second = buffers.take(8), buffers.take(16)
    assert buffers.take(1) is None
    buffers.give(first)
    third = buffers.take(12)
    assert (first.nbytes, second.nbytes, third.nbytes) == (8, 16, 16)
    buffers.give(Buffer(4))  # not from here
    assert buffers.take(1) is None


def test_a_pool_waits_for_what_it_must(monkeypatch, device, streams):
    """Two rounds through one buffer for pulls and one for pushes; the device works as late as it can."""
    monkeypatch.setattr("recollect.autoscale.histories._queues.streams_of", lambda device: streams)
    history, other = History(4, 2), History(4, 2)
    compute: Callable[[Any], None] = device.compute.work.append
    with AsyncIOPool(1, 4, 2) as pool:
        first, second = torch.zeros(4, 2), torch.zeros(4, 2)
        compute(lambda: first.fill_(1))
        pool.async_push(history, first)
        pool.synchronize_push()
        assert taken(device.log) == [
            "to host waits for compute",
            "to host copies",
            "to host records 1",
            "(4, 2) lent to to host",
            "host waits for to host's 1",
        ]
        pool.async_pull(history, n_id=torch.arange(4))
        before = pool.synchronize_pull()
        pool.free_pull()
        compute(lambda: second.fill_(2))
        pool.async_push(other, second)
        pool.synchronize_push()
        taken(device.log)
        pool.async_pull(other, n_id=torch.arange(3))
        after = pool.synchronize_pull()
        assert taken(device.log) == [
            "host waits for to device's 2",
            "to device copies",
            "to device records 4",
            "compute waits for to device's 4",
            "(3, 2) lent to compute",
        ]
        device.compute.do()
        assert before.unique().tolist() == [1]
        assert after.unique().tolist() == [2]
        pool.free_pull()


def test_the_cpu_needs_no_streams():
    assert streams_of(CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    device = torch.device("cuda", torch.cuda.current_device())
    streams = streams_of(device)
    assert streams_of(device) is streams
    x = torch.randn(4096, 512, device=device)
    weight = torch.randn(512, 512, device=device) / 23
    buffer, back = Buffer(x.numel() * 4), Buffer(x.numel() * 4)
    for _ in range(5):
        for _ in range(10):
            x = (x @ weight).tanh()
        out = back.view((4096, 512), torch.float32)
        streams.fetch(x, out).synchronize()
        assert torch.equal(out, x.cpu())
        result = streams.send(buffer.view((4096, 512), torch.float32).copy_(out), buffer)
        assert torch.equal(streams.receive(result, buffer.in_use), x)


class Asked:
    """A device with events that are over when they have been asked twice; it writes down what is asked of it."""

    def __init__(self, streams: bool) -> None:
        self.log: list[str] = []
        if streams:
            self.current_stream = lambda device: f"the stream of {device}"

    def Event(self) -> Asked.Marker:  # noqa: N802
        self.log.append("event")
        return Asked.Marker(self.log)

    class Marker:
        def __init__(self, log: list[str]) -> None:
            self.log, self.asked = log, 0

        def record(self, stream: str = "the only one") -> None:
            self.log.append(f"record on {stream}")

        def query(self) -> bool:
            self.asked += 1
            self.log.append("query")
            return self.asked > 1

        def synchronize(self) -> None:
            self.log.append("synchronize")


@pytest.mark.parametrize("streams", [True, False])
def test_late_values_have_an_event_behind_their_copy(streams: bool) -> None:
    backend, values = Asked(streams), torch.tensor([1.0, 2.0])
    fetch = Fetch(values, backend)
    where = "the stream of cpu" if streams else "the only one"
    assert taken(backend.log) == ["event", f"record on {where}"]
    values.zero_()  # what the device does next
    assert fetch.is_late
    assert not fetch.is_here()
    assert fetch.is_here()
    assert taken(backend.log) == ["query", "query"]
    assert fetch.read().tolist() == [1.0, 2.0]
    assert taken(backend.log) == ["query"]


def test_who_reads_early_waits_for_the_event() -> None:
    backend = Asked(streams=True)
    fetch = Fetch(torch.tensor([1.0, 2.0]), backend)
    taken(backend.log)
    assert fetch.read().tolist() == [1.0, 2.0]
    assert taken(backend.log) == ["query", "synchronize"]


def test_values_on_the_cpu_are_there() -> None:
    fetch = Fetch(torch.tensor([1.0]))
    assert (fetch.is_late, fetch.is_here(), fetch.read().item()) == (False, True, 1.0)


def test_streams_events_and_pinned_copies_are_in_this_file_alone() -> None:
    """But for what allocates: tables and copies that are pinned themselves."""
    source = Path(recollect.__file__).parent
    told = {
        "streams": r"\.Stream\(|\.Event\(|record_stream|wait_stream|record_event",
        "pinned": r"pin_memory=|pin_memory\(\)",
    }
    found = {
        kind: {str(file.relative_to(source)) for file in source.rglob("*.py") if re.search(words, file.read_text())}
        for kind, words in told.items()
    }
    assert found["streams"] == {"_transfer.py"}
    allocating = {"autoscale/histories/_memory.py", "frames/sources/_offload.py", "frames/sources/_stores.py"}
    assert found["pinned"] == {"_transfer.py", *allocating}
