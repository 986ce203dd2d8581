"""Inputs in host memory and in files: the same values, fetched ahead, nothing left behind."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from frames_zoo import assert_same, make, wanted
from torch import Tensor, nn

import recollect
from recollect.frames import InPlaceError, Offload, OffloadError
from recollect.frames.sources._file_store import file_store
from recollect.frames.sources._host_store import Copies, HostStore
from recollect.memory import peak_memory

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool,
    torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
LARGE = 70_000  # bytes from which tensors of any type are offloaded


class Stream:
    """A stream that does nothing until somebody waits for it."""

    def __init__(self, backend: Backend, name: str) -> None:
        self.backend = backend
        self.name = name
        self.work: list[Any] = []

    def wait_stream(self, other: Stream) -> None:
        self.backend.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> tuple[Stream, int]:
        return self, len(self.work)

    def wait_event(self, event: tuple[Stream, int]) -> None:
        other, position = event
        self.backend.log.append(f"{self.name} waits for {other.name}'s {position}")
        for i in range(position):
            if other.work[i] is not None:
                out, source = other.work[i]
                out.copy_(source)
                other.work[i] = None


class Backend:
    """What torch has for a device, on the CPU: the stream that computes works at once, any other when waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.running = [Stream(self, "compute")]

    def Stream(self, device: torch.device) -> Any:  # noqa: N802
        return Stream(self, "copies")

    def current_stream(self, device: torch.device) -> Any:
        return self.running[-1]

    def stream(self, stream: Any) -> Backend:
        self.running.append(stream)
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        self.running.pop()


class Deferred(Copies):
    """Copies that happen when a stream waits for them."""

    def __init__(self) -> None:
        self.backend = Backend()
        super().__init__(torch.device("cpu"), False, self.backend)

    def copy(self, out: Tensor, source: Tensor) -> None:
        out.view(torch.uint8).fill_(0xFF)
        self.backend.running[-1].work.append((out, source))
        self.backend.log.append("copies begins")

    def lend(self, memory: Tensor, stream: Any) -> None:
        self.backend.log.append(f"lent to {stream.name}")


class EveryDevice(HostStore):
    def takes(self, tensor: Tensor) -> bool:
        return True


def on_device(monkeypatch: pytest.MonkeyPatch) -> tuple[Offload, Deferred]:
    """Return a source for which tensors on the CPU are on an accelerator, and what copies them."""
    deferred, source = Deferred(), Offload()
    monkeypatch.setattr(source, "_store", EveryDevice(False, lambda device, pin: deferred))
    return source, deferred


@pytest.fixture(params=["file", "device"])
def source(request, tmp_path, monkeypatch):
    return Offload(path=tmp_path) if request.param == "file" else on_device(monkeypatch)[0]


def through(source: Offload, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    held = source.keep(args, kwargs)
    held.returned(None)
    return held.inputs()


def files(path: Any) -> list[str]:
    return [str(file) for file in path.rglob("*.frame")]


def bits(tensor: Tensor) -> bytes:
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(dense.view(torch.uint8).tolist())


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Views of a tensor [8, 6]."""
    return {
        "dense": x,
        "transposed": x.t(),
        "columns": x[:, 1:4],
        "every other": x[::2, ::3],
        "one": x[3, 4],
        "expanded": x[:, :1].expand(8, 100),
        "expanded twice": x[:1, :1].expand(5, 100),
        "windows": x.reshape(-1).unfold(0, 5, 2),
        "gaps and overlaps": x.as_strided((2, 2, 3), (20, 1, 1)),
        "permuted": x.view(2, 4, 6).permute(2, 0, 1),
        "one row": x[2:3],
    }


# Values.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_strides_and_flags_of_every_type_and_layout(dtype, source):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2 if dtype is torch.bool else 100, (8, 6), generator=generator).to(dtype)
    floats = dtype.is_floating_point or dtype.is_complex
    for name, view in layouts(x).items():
        if not floats:
            view = torch.cat([view.reshape(-1)] * (LARGE // max(1, view.nbytes) + 1))
        (found,), _ = through(source, view)
        assert found.shape == view.shape, name
        assert found.stride() == view.stride(), name
        assert found.dtype is view.dtype
        assert found.data_ptr() != view.data_ptr()
        assert bits(found) == bits(view), name
        assert not found.requires_grad
        assert found._base is None


def test_lazy_conjugates_and_negatives(source):
    z = torch.randn(4, 3, dtype=torch.complex128)
    (conj, neg), _ = through(source, z.conj(), z.conj().imag)
    assert torch.equal(conj, z.conj())
    assert torch.equal(neg, z.conj().imag)


@dataclass
class Pair:
    first: Tensor
    rest: list[Any]


def test_tensors_in_containers_and_what_is_the_same_object(source):
    x, y = torch.randn(3, requires_grad=True) * 2, torch.randn(2, 5)
    marker = object()
    (pair, again), kwargs = through(source, Pair(x, [y, marker, {"y": y}]), x, scale=(y, 3, None))
    assert isinstance(pair, Pair)
    assert torch.equal(pair.first, x)
    assert pair.first is again
    assert pair.first.requires_grad
    assert pair.first.is_leaf
    assert pair.rest[1] is marker
    assert pair.rest[0] is pair.rest[2]["y"] is kwargs["scale"][0]
    assert torch.equal(pair.rest[0], y)
    assert kwargs["scale"][1:] == (3, None)


def test_what_stays_by_reference(source):
    weight = nn.Parameter(torch.randn(4, 4))
    index, empty, sparse = torch.arange(5), torch.empty(0, 3), torch.eye(3).to_sparse()
    (w, t, i, e, s), _ = through(source, weight, weight.t(), index, empty, sparse)
    assert w.data_ptr() == t.data_ptr() == weight.data_ptr()
    assert t.stride() == (1, 4)
    assert i is index
    assert e.shape == (0, 3)
    assert s is sparse
    held = source.keep((weight,), {})
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(InPlaceError, match=r"shape \[4, 4\] was changed in place"):
        held.inputs()


def test_the_values_are_those_of_the_forward(tmp_path):
    source, x = Offload(path=tmp_path), torch.arange(6.0)
    held = source.keep((x,), {})
    x.zero_()
    after = source.keep((x,), {})
    x.data.fill_(7)
    assert torch.equal(held.inputs()[0][0], torch.arange(6.0))
    assert torch.equal(after.inputs()[0][0], torch.zeros(6))
    (first,), (second,) = held.inputs()[0], held.inputs()[0]
    first.fill_(1)  # as a region may
    assert torch.equal(second, torch.arange(6.0))
    assert torch.equal(held.inputs()[0][0], torch.arange(6.0))


def test_on_the_cpu_host_memory_is_where_tensors_are():
    x = torch.randn(5)
    held = Offload().keep((x,), {})
    assert held.inputs()[0][0] is x
    x += 1
    with pytest.raises(InPlaceError):
        held.inputs()


def test_what_calls_share_is_stored_once(tmp_path):
    source, x = Offload(path=tmp_path), torch.randn(10_000)
    mask = torch.rand(100_000) > 0.5
    held = [source.keep((x + i,), {"mask": mask}) for i in range(5)]
    assert [h.inputs()[1]["mask"].equal(mask) for h in held] == [True] * 5
    total = sum(os.path.getsize(file) for file in files(tmp_path))
    assert 5 * x.nbytes + mask.nbytes <= total < 5 * (x.nbytes + 64) + 2 * mask.nbytes
    del held[0]  # whose file has the mask
    assert held[-1].inputs()[1]["mask"].equal(mask)
    mask[0] ^= True
    changed = source.keep((), {"mask": mask})
    assert changed.inputs()[1]["mask"].equal(mask)
    assert held[-1].inputs()[1]["mask"][0] != mask[0]


def test_a_storage_at_the_address_of_another_one_is_not_taken_for_it(source):
    held = []
    for i in range(20):
        held.append(source.keep((torch.full((100,), float(i)),), {}))
        held[-1].returned(None)
    assert [float(h.inputs()[0][0][7]) for h in held] == list(range(20))
    with torch.inference_mode():
        x = torch.ones(3)
        first = source.keep((x,), {})
        first.returned(None)
        x += 1
        second = source.keep((x,), {})
        second.returned(None)
    assert first.inputs()[0][0].tolist() == [1, 1, 1]
    assert second.inputs()[0][0].tolist() == [2, 2, 2]


# The order of streams.


def test_copies_and_computation_in_order(monkeypatch):
    source, deferred = on_device(monkeypatch)
    log = deferred.backend.log
    x = [torch.full((4,), float(i)) for i in range(3)]
    held = []
    for i in range(3):
        held.append(source.keep((x[i],), {}))
        assert log[-2] == "copies waits for compute"
        held[-1].returned(None)
        assert log[-1] == f"compute waits for copies's {i + 1}"
        x[i].fill_(-1)  # its memory serves another tensor
    log.clear()
    assert held[2].inputs()[0][0].tolist() == [2] * 4
    # Its own copy and the one before are both under way before its own is waited for.
    assert [entry.startswith("compute") for entry in log] == [False, False, False, False, True]
    log.clear()
    assert held[1].inputs()[0][0].tolist() == [1] * 4
    assert [entry.startswith("compute") for entry in log] == [False, False, True]
    assert held[0].inputs()[0][0].tolist() == [0] * 4


def test_a_tensor_that_the_region_changes_while_it_is_copied_is_refused(monkeypatch):
    source, _ = on_device(monkeypatch)
    x = torch.ones(4)
    held = source.keep((x,), {})
    x += 1
    held.returned(None)
    with pytest.raises(InPlaceError, match=r"shape \[4\] was changed in place by the region"):
        held.inputs()


def test_what_is_dropped_on_the_way_is_waited_for(monkeypatch):
    source, deferred = on_device(monkeypatch)
    log = deferred.backend.log
    held = source.keep((torch.ones(4),), {})
    log.clear()
    del held  # the region raised
    assert log == ["compute waits for copies's 1"]
    first, second, third = (source.keep((torch.full((4,), float(i)),), {}) for i in range(3))
    for one in (third, first, second):
        one.returned(None)
    third.inputs()
    log.clear()
    del second, one  # whose tensors were fetched ahead
    assert log == ["compute waits for copies's 6"]
    first.inputs()


def test_another_stream_of_backward(monkeypatch):
    source, deferred = on_device(monkeypatch)
    first, second = (source.keep((torch.full((4,), float(i)),), {}) for i in range(2))
    first.returned(None)
    second.returned(None)
    second.inputs()
    other = Stream(deferred.backend, "other")
    deferred.backend.running.append(other)
    deferred.backend.log.clear()
    assert first.inputs()[0][0].tolist() == [0] * 4
    assert deferred.backend.log == ["other waits for copies's 4", "lent to other", "compute waits for copies's 4"]


# Files.


def test_files_come_and_go_with_the_graph(tmp_path):
    gc.disable()
    try:
        source = Offload(path=tmp_path / "new" / "folder")
        held = [source.keep((torch.randn(1000),), {}) for _ in range(4)]
        assert len(files(tmp_path)) == 4
        held[3].inputs()  # fetches 2 ahead
        held[2] = None
        held[0] = None
        held[3].inputs()
        assert len(files(tmp_path)) == 2
        held.clear()
        store = file_store(tmp_path / "new" / "folder")
        store.pause()  # waits for what is being read ahead
        store.resume()
        assert files(tmp_path) == []
        folder = store._folder.path
        assert folder.exists()
        del source, store
        assert not folder.exists()
    finally:
        gc.enable()


def test_the_one_before_is_read_ahead(tmp_path, monkeypatch):
    from recollect.frames.sources import _file_store

    read = []
    original = _file_store._read
    monkeypatch.setattr(_file_store, "_read", lambda wanted: read.append(wanted[0][1].path.stem) or original(wanted))
    source = Offload(path=tmp_path)
    held: list[Any] = [source.keep((torch.full((3,), float(i)),), {}) for i in range(4)]
    names = [one._stored[0].place[0].path.stem for one in held]
    for i in (3, 2, 1, 0):
        assert held[i].inputs()[0][0].tolist() == [i] * 3
    source.keep((torch.ones(1),), {}).inputs()  # everything before has been done
    assert read[:4] == names[::-1]  # each of them once
    held[3].inputs()
    held[1].inputs()  # 2 was read for nothing
    assert held[2]._fetch is None
    assert held[0]._fetch is not None
    held[2] = None
    assert held[3].inputs()[0][0].tolist() == [3] * 3
    assert held[1]._fetch is not None  # the one before that still lives


def test_a_file_that_disappears_or_is_cut(tmp_path):
    source = Offload(path=tmp_path)
    held = source.keep((torch.randn(100),), {})
    held.inputs()
    (file,) = files(tmp_path)
    os.truncate(file, 100)
    with pytest.raises(OffloadError, match=r"frame: .* cannot be read back \(it ends 300 bytes early"):
        held.inputs()
    os.unlink(file)
    with pytest.raises(OffloadError, match="No such file") as caught:
        held.inputs()
    assert file in str(caught.value)
    assert "Offload(path=" in str(caught.value)


def test_a_disk_that_is_full(tmp_path):
    program = f"""
    import resource, signal, torch
    from pathlib import Path
    from recollect.frames import Offload, OffloadError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    source = Offload(path={str(tmp_path)!r})
    small = source.keep((torch.ones(10),), {{}})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    large = source.keep((torch.ones(10_000),), {{}})
    for what in (lambda: large.inputs(), lambda: source.keep((torch.ones(1),), {{}}), lambda: large.inputs()):
        try:
            what()
        except OffloadError as error:
            assert {str(tmp_path)!r} in str(error) and "cannot be written (File too large)" in str(error), error
        else:
            raise AssertionError
    assert sum(file.stat().st_size for file in Path({str(tmp_path)!r}).rglob("*.frame")) == 64
    assert small.inputs()[0][0].tolist() == [1] * 10
    del large
    source.keep((torch.ones(1),), {{}}).inputs()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)  # what else writes at the end is none of this
    """
    run_program(program)
    assert list(tmp_path.iterdir()) == []


def run_program(program: str, returncode: int = 0) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == returncode, done.stderr
    assert done.stderr == ""


def test_nothing_is_left_at_exit_after_an_error_or_for_long_after_a_kill(tmp_path):
    start = f"""
    import os, signal, torch
    from recollect.frames import Offload
    source = Offload(path={str(tmp_path)!r})
    held = [source.keep((torch.ones(1000) * i,), {{}}) for i in range(3)]
    held[2].inputs()
    """
    start = textwrap.dedent(start)
    run_program(start)
    assert list(tmp_path.iterdir()) == []
    run_program(start + "raise SystemExit(3)", returncode=3)
    assert list(tmp_path.iterdir()) == []
    run_program(start + "os.kill(os.getpid(), signal.SIGKILL)", returncode=-9)
    (left,) = tmp_path.iterdir()
    source = Offload(path=tmp_path)
    assert not left.exists()
    run_program(start)
    assert file_store(tmp_path)._folder.path.exists()  # which is in use
    del source


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forked_processes(tmp_path):
    program = f"""
    import os, torch
    from pathlib import Path
    from recollect.frames import Offload
    torch.set_num_threads(1)
    source = Offload(path={str(tmp_path)!r})
    for trial in range(20):
        held = [source.keep((torch.full((100_000,), float(i)),), {{}}) for i in range(3)]
        if trial % 2:
            held[2].inputs()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for i in (2, 1, 0):
                    assert float(held[i].inputs()[0][0][-1]) == i
                own = [source.keep((torch.full((10,), 10.0 + i),), {{}}) for i in range(3)]
                assert [float(one.inputs()[0][0][0]) for one in own] == [10, 11, 12]
                del held, own
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert [float(one.inputs()[0][0][-1]) for one in held] == [0, 1, 2]
    """
    run_program(program)
    Offload(path=tmp_path)
    assert files(tmp_path) == []


def test_several_threads(tmp_path):
    source, failures = Offload(path=tmp_path), []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                held = [source.keep((torch.full((50,), number + i / 100),), {}) for i in range(8)]
                for i in reversed(range(8)):
                    assert torch.equal(held[i].inputs()[0][0], torch.full((50,), number + i / 100))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert files(tmp_path) == []


# Arguments.


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"host memory or to files \(got device='cpu' and path="):
        Offload("cpu", tmp_path)
    with pytest.raises(ValueError, match="got pin_memory=True and path="):
        Offload(path=tmp_path, pin_memory=True)
    for device in ("nowhere", "meta", "cuda"):
        with pytest.raises(ValueError, match=f"device='{device}'.*'cpu'"):
            Offload(device)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(ValueError, match=r"path='.*': a folder in which files can be written is expected \("):
            Offload(path=path)


def test_a_source_can_be_copied_and_pickled(tmp_path):
    for source in (Offload(), Offload(path=tmp_path), Offload("cpu", pin_memory=False)):
        for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
            assert repr(other) == repr(source)
            assert other._store is source._store
            assert through(other, torch.ones(2))[0][0].tolist() == [1, 1]


# In frames.


def chain(depth: int, width: int = 64) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)).double()


def step(layers: nn.ModuleList, x: Tensor, **options: Any) -> Tensor:
    h = x * 1.0
    for layer in layers:
        h = recollect.checkpoint(layer, h, **options)
    return h.sin().sum()


def test_a_chain_keeps_one_tensor_in_memory(tmp_path):
    x = torch.randn(500, 64, dtype=torch.float64)
    peaks = {}
    for depth in (4, 16):
        layers = chain(depth)
        for source in (None, Offload(path=tmp_path)):
            step(layers, x, source=source).backward()
            with peak_memory("cpu") as memory:
                step(layers, x, source=source).backward()
            peaks[depth, source is None] = memory.peak_bytes / x.nbytes
    assert peaks[16, True] > peaks[4, True] + 10
    assert peaks[16, False] < peaks[4, False] + 1


def test_gradients_of_several_backward_passes(source):
    layers, x = chain(5, 8), torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layers.parameters()]
    expected = step(layers, x, enabled=False)
    loss = step(layers, x, source=source)
    assert torch.equal(loss, expected)
    first = torch.autograd.grad(expected, leaves, create_graph=True)
    for _ in range(2):
        assert_same(torch.autograd.grad(loss, leaves, retain_graph=True), first)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    assert_same(
        torch.autograd.grad(sum(g.square().sum() for g in again), leaves),
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves),
    )
    partial = torch.autograd.grad(step(layers, x, source=source), layers[3][0].weight)
    assert_same(partial, [first[1 + 6]])


def test_frames_within_frames(source):
    layers, x = chain(6, 8), torch.randn(6, 8, dtype=torch.float64, requires_grad=True)

    def half(x: Tensor, which: int) -> Tensor:
        for layer in layers[3 * which : 3 * which + 3]:
            x = recollect.checkpoint(layer, x, source=source)
        return x

    leaves = [x, *layers.parameters()]
    for outer in (None, source):
        h = x * 1.0
        for which in range(2):
            h = recollect.checkpoint(half, h, which, source=outer)
        found = torch.autograd.grad(h.sin().sum(), leaves)
        assert_same(found, torch.autograd.grad(step(layers, x, enabled=False), leaves))


def test_files_are_gone_when_the_graph_is(tmp_path):
    layers, x = chain(4, 8), torch.randn(6, 8, dtype=torch.float64)
    source = Offload(path=tmp_path)
    loss = step(layers, x, source=source)
    assert len(files(tmp_path)) == 4
    del loss
    assert files(tmp_path) == []
    step(layers, x, source=source).backward()
    assert files(tmp_path) == []

    class RegionError(Exception):
        pass

    def fail(h: Tensor) -> Tensor:
        raise RegionError

    with pytest.raises(RegionError):
        recollect.checkpoint(fail, step(layers, x, source=source) * x, source=source)
    assert files(tmp_path) == []


def test_a_file_that_disappears_is_an_error_of_backward(tmp_path):
    layers, x = chain(3, 8), torch.randn(6, 8, dtype=torch.float64)
    source = Offload(path=tmp_path)
    loss = step(layers, x, source=source)
    source.keep((x,), {}).inputs()  # all was written
    for file in files(tmp_path):
        os.unlink(file)
    with pytest.raises(OffloadError, match="No such file"):
        loss.backward()


def test_frames_of_several_threads(tmp_path):
    source, results = Offload(path=tmp_path), {}

    def work(number: int) -> None:
        net, x = make("checkpoint", depth=3)
        loss = net(x * (1 + number), source=source).sin().sum()
        plain = net(x * (1 + number), enabled=False).sin().sum()
        leaves = wanted(net, x)
        results[number] = torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for found, expected in results.values():
        assert_same(found, expected)
