"""A pool against the histories' own methods: the same results, whatever is under way when."""

import copy
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

import pytest
import torch

from recollect.autoscale import AsyncIOPool, History
from recollect.autoscale.histories._table import Table
from recollect.frames import backward_mode

ROWS = 60
DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.float64]


def rows_of(history: History) -> torch.Tensor:
    """The tensor of a table in memory, whatever is under way."""
    records: Any = history.table.records
    return records.tensor


@pytest.fixture(params=["memory", "file"])
def make(request, tmp_path):
    """A function that makes a history in one of the places."""

    def history(width=4, dtype=torch.float32):
        number = len(list(tmp_path.iterdir()))
        return History(ROWS, width, dtype=dtype, path=tmp_path / str(number) if request.param == "file" else None)

    return history


@pytest.fixture
def pool():
    with AsyncIOPool(pool_size=2, buffer_size=50, embedding_dim=8) as pool:
        yield pool


@pytest.fixture
def gate(monkeypatch):
    """While it is closed (cleared), the pools' threads begin nothing on any table."""
    gate = threading.Event()
    gate.set()
    main = threading.current_thread()

    def waiting(method):
        def waits(*arguments):
            if threading.current_thread() is not main:
                assert gate.wait(30)
            return method(*arguments)

        return waits

    for name in ("read", "write"):
        monkeypatch.setattr(Table, name, waiting(getattr(Table, name)))
    yield gate
    gate.set()


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("recollect-io")]


def take(pool):
    rows = pool.synchronize_pull().clone()
    pool.free_pull()
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_those_of_the_synchronous_path(make, pool, dtype):
    torch.manual_seed(0)
    beside, at_once = make(dtype=dtype), History(ROWS, 4, dtype=dtype)
    for _ in range(5):
        n_id = torch.randint(ROWS, (20,))
        pool.async_pull(beside, n_id=n_id)
        expected = at_once.pull(n_id)
        x = torch.randn(30, 4)
        pool.async_push(beside, x, torch.tensor([40, 3]), torch.tensor([10, 20]))
        at_once.push(x, offset=[40, 3], count=[10, 20])
        assert torch.equal(take(pool), expected)
        n_id = torch.randperm(ROWS)[:7]
        pool.async_push(beside, x[:7], n_id=n_id)
        at_once.push(x[:7], n_id)
        pool.async_pull(beside, [5, 30], [2, 11], n_id)
        expected = torch.cat([at_once.pull(torch.tensor([5, 6, *range(30, 41)])), at_once.pull(n_id)])
        assert torch.equal(take(pool), expected)
    assert torch.equal(beside.pull(), at_once.pull())
    assert torch.equal(beside.age(), at_once.age())


@pytest.mark.parametrize("pool_size", [1, 2, 5])
def test_any_order_of_calls(make, pool_size):
    """Random calls on three histories of different widths: the queue of pulls comes out as at the time of its calls."""
    torch.manual_seed(0)
    calls = random.Random(0)
    beside = [make(width) for width in (4, 2, 8)]
    at_once = [History(ROWS, width) for width in (4, 2, 8)]
    expected = []
    with AsyncIOPool(pool_size, 50, 8) as pool:
        for _ in range(400):
            k = calls.randrange(3)
            call = calls.choice(["pull", "take", "push", "direct push", "direct pull", "age", "synchronize"])
            x = torch.randn(ROWS, at_once[k].embedding_dim)
            if call == "pull":
                n_id = torch.randint(ROWS, (calls.randrange(1, 50),))
                pool.async_pull(beside[k], n_id=n_id)
                expected.append(at_once[k].pull(n_id))
                n_id.zero_()
            elif call == "take" and expected:
                assert torch.equal(take(pool), expected.pop(0))
            elif call == "push":
                start = calls.randrange(50)
                at_once[k].push(x, offset=[start], count=[10])
                pool.async_push(beside[k], x, [start], [10])
                x.zero_()
            elif call == "direct push":
                beside[k].push(x)
                at_once[k].push(x)
            elif call == "direct pull":
                assert torch.equal(beside[k].pull(), at_once[k].pull())
            elif call == "age":
                assert torch.equal(beside[k].age(), at_once[k].age())
            elif call == "synchronize":
                pool.synchronize_push()
        while expected:
            assert torch.equal(take(pool), expected.pop(0))
        for one, other in zip(beside, at_once, strict=True):
            assert torch.equal(one.pull(), other.pull())


def test_nothing_waits_for_the_worker_but_what_needs_it(pool, gate):
    history, other = History(ROWS, 4), History(ROWS, 4)
    gate.clear()
    x, n_id = torch.ones(ROWS, 4), torch.arange(ROWS)
    pool.async_push(history, x, n_id=n_id)
    pool.async_pull(history, n_id=torch.arange(3))
    x.zero_(), n_id.fill_(5)
    assert other.pull().sum() == 0  # not in the pool: nothing to wait for
    assert rows_of(history).sum() == 0
    gate.set()
    assert take(pool).tolist() == [[1.0] * 4] * 3


def test_own_methods_wait_for_the_pool(pool, gate):
    for method, expected in {
        "pull": lambda found: found.sum() == 4 * ROWS,
        "age": lambda found: found.sum() == 0,
        "state_dict": lambda found: found["pushes"] == 1,
        "__deepcopy__": lambda found: found.pull().sum() == 4 * ROWS,
    }.items():
        history = History(ROWS, 4, save_histories=True)
        gate.clear()
        pool.async_push(history, torch.ones(ROWS, 4))
        threading.Timer(0.05, gate.set).start()
        call = (lambda h=history: copy.deepcopy(h)) if method == "__deepcopy__" else getattr(history, method)
        assert expected(call())


def test_another_pool_waits_for_the_first(pool, gate):
    history = History(ROWS, 4)
    gate.clear()
    pool.async_push(history, torch.ones(ROWS, 4))
    threading.Timer(0.05, gate.set).start()
    with AsyncIOPool(1, 50, 4) as other:
        other.async_pull(history, n_id=torch.tensor([7]))
        assert rows_of(history).sum() == 4 * ROWS  # already
        assert take(other).tolist() == [[1.0] * 4]


def test_pulls_beyond_the_pool_wait_for_a_buffer_and_block_nothing(pool):
    histories = [History(ROWS, 4) for _ in range(5)]
    for value, history in enumerate(histories):
        history.push(torch.full((ROWS, 4), float(value)))
        pool.async_pull(history, n_id=torch.arange(3))
    started = [pull.future is not None for pull in pool._pulls._pulls]
    assert started == [True, True, False, False, False]
    pool.async_push(histories[0], torch.zeros(ROWS, 4))
    pool.synchronize_push()  # with all buffers taken
    for value in range(5):
        assert take(pool).unique().tolist() == [value]
    assert len(pool._pulls._buffers._free) == 2


def test_a_push_waits_for_the_oldest_if_there_are_too_many(pool, gate):
    history = History(ROWS, 4)
    gate.clear()
    for value in range(2):
        pool.async_push(history, torch.full((ROWS, 4), float(value)))
    threading.Timer(0.05, gate.set).start()
    pool.async_push(history, torch.full((ROWS, 4), 2.0))  # would stop here for ever if it did not let go
    assert history.pull().unique().tolist() == [2]
    assert len(pool._pushes._buffers._free) == 2


def test_buffers_are_used_again(pool):
    history = History(ROWS, 4)
    addresses = set()
    for size in (50, 3, 50, 20):
        pool.async_pull(history, n_id=torch.arange(size))
        addresses.add(pool.synchronize_pull().data_ptr())
        pool.free_pull()
    assert len(addresses) == 1


@pytest.mark.parametrize("where", [{"n_id": torch.arange(3)}, {"offset": [0], "count": [3]}], ids=["rows", "parts"])
def test_rows_kept_beyond_their_buffer_are_noticed_by_autograd(make, pool, where):
    history = make()
    weight = torch.ones(4, requires_grad=True)
    pool.async_pull(history, **where)
    loss = (pool.synchronize_pull() * weight).sum()  # saved for the weight's gradient
    pool.free_pull()
    pool.async_pull(history, **where)
    pool.synchronize_pull()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_rebuild_pushes_nothing(pool):
    history = History(ROWS, 4)
    with backward_mode():
        pool.async_push(history, torch.ones(ROWS, 4))
    pool.synchronize_push()
    assert history.pull().sum() == 0
    assert history.age().sum() == 0


def test_inference_mode(make, pool):
    history = make()
    with torch.inference_mode():
        pool.async_push(history, torch.ones(ROWS, 4))
        pool.async_pull(history, n_id=torch.arange(3))
        assert take(pool).sum() == 12
    pool.async_push(history, torch.zeros(ROWS, 4))
    pool.async_pull(history, n_id=torch.arange(3))
    assert take(pool).sum() == 0


def test_results_have_the_type_of_the_module(pool):
    history = History(ROWS, 4, dtype=torch.bfloat16)
    for dtype in (torch.float64, torch.float16):
        history.to(dtype)
        pool.async_pull(history, n_id=torch.arange(3))
        assert take(pool).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 1, 1), r"pool_size must be at least 1 \(got 0\)"),
        ((1, -1, 1), r"buffer_size must be at least 1 \(got -1\)"),
        ((1, 1, 0), r"embedding_dim must be at least 1 \(got 0\)"),
        ((2.5, 1, 1), r"pool_size must be an integer of at least 1 \(got 2.5\)"),
        ((1, "8", 1), r"buffer_size must be an integer of at least 1 \(got '8'\)"),
    ],
)
def test_bad_sizes(arguments, match):
    with pytest.raises(ValueError, match=match):
        AsyncIOPool(*arguments)


def test_too_many_rows_name_the_size_that_is_needed(pool):
    history = History(200, 4)
    with pytest.raises(ValueError, match=r"buffer_size=51, embedding_dim=4\) at least \(got buffer_size=50, embedd"):
        pool.async_pull(history, n_id=torch.arange(51))
    with pytest.raises(ValueError, match="buffer_size=53"):
        pool.async_pull(history, [0], [50], torch.arange(3))
    with pytest.raises(ValueError, match="embedding_dim=9"):
        pool.async_pull(History(5, 9), n_id=torch.arange(3))
    pool.async_push(history, torch.ones(200, 4))  # the size is that of pulls alone
    pool.async_pull(history, n_id=torch.arange(50))
    assert take(pool).sum() == 200
    with pytest.raises(RuntimeError, match="there is no pull"):
        pool.synchronize_pull()


def test_without_a_pull(pool):
    for call in (pool.synchronize_pull, pool.free_pull):
        with pytest.raises(RuntimeError, match="there is no pull"):
            call()
    pool.synchronize_push()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"x": torch.ones(3, 4), "offset": [58], "count": [3]}, IndexError),
        ({"x": torch.ones(3, 4), "offset": [0, 1], "count": [2, 1]}, ValueError),
        ({"x": torch.ones(3, 5), "offset": [0], "count": [3]}, ValueError),
        ({"x": torch.ones(2, 4), "n_id": torch.tensor([1, 60])}, IndexError),
        ({"x": torch.ones(2, 4).int(), "n_id": torch.tensor([1, 6])}, TypeError),
    ],
    ids=["range", "overlap", "width", "rows", "dtype"],
)
def test_bad_pushes_are_refused_in_the_caller(make, pool, arguments, error):
    history = make()
    with pytest.raises(error):
        pool.async_push(history, **arguments)
    assert history.age().sum() == 0
    assert history.pull().sum() == 0


def test_bad_pulls_are_refused_in_the_caller(pool):
    history = History(ROWS, 4)
    for arguments, error in (({"n_id": torch.tensor([60])}, IndexError), ({"offset": [59], "count": [2]}, IndexError)):
        with pytest.raises(error):
            pool.async_pull(history, **arguments)
    with pytest.raises(ValueError, match="got offset alone"):
        pool.async_pull(history, offset=[0])
    assert len(pool._pulls) == 0


@pytest.fixture
def broken(monkeypatch):
    """Reading or writing it fails."""
    history = History(ROWS, 4)

    def fails(*_):
        raise OSError("no medium")

    def breaks(name):
        monkeypatch.setattr(history.table, name, fails)
        return history

    return breaks


@pytest.mark.parametrize(
    "call",
    [
        lambda pool, history: pool.synchronize_push(),
        lambda pool, history: history.pull(),
        lambda pool, history: history.age(),
        lambda pool, history: pool.settle(history),
        lambda pool, history: pool.clear(),
        lambda pool, history: pool.close(),
    ],
    ids=["synchronize_push", "pull", "age", "settle", "clear", "close"],
)
def test_an_error_in_a_push_surfaces_once(pool, broken, call):
    history = broken("write")
    pool.async_push(history, torch.ones(ROWS, 4))
    with pytest.raises(OSError, match="no medium"):
        call(pool, history)
    pool.synchronize_push()


def test_an_error_in_a_push_surfaces_in_the_next_calls(pool, broken):
    history, other = broken("write"), History(ROWS, 4)
    pool.async_pull(other, n_id=torch.arange(3))
    for call in (
        lambda: pool.async_push(other, torch.ones(ROWS, 4)),
        lambda: pool.async_pull(other, n_id=torch.arange(3)),
        pool.synchronize_pull,
    ):
        pool.async_push(history, torch.ones(ROWS, 4))
        pool._pushes._pushes[-1].future.exception()  # the worker is there
        with pytest.raises(OSError, match="no medium"):
            call()
    assert take(pool).sum() == 0
    assert len(pool._pushes._buffers._free) == 1


def test_an_error_in_a_pull_surfaces_until_it_is_freed(pool, broken):
    history, other = broken("read"), History(ROWS, 4)
    for _ in range(3):
        pool.async_pull(history, n_id=torch.arange(3))
        pool.async_pull(other, n_id=torch.arange(2))
    for _ in range(3):
        for _ in range(2):
            with pytest.raises(OSError, match="no medium"):
                pool.synchronize_pull()
        pool.free_pull()
        assert take(pool).shape == (2, 4)
    assert len(pool._pulls) == 0


def test_clear_gives_up_what_an_interrupted_step_asked_for(pool):
    history = History(ROWS, 4)
    for _ in range(4):
        pool.async_pull(history, n_id=torch.arange(3))
    pool.async_push(history, torch.ones(ROWS, 4))
    pool.clear()
    pool.async_pull(history, n_id=torch.arange(2))
    assert take(pool).tolist() == [[1.0] * 4] * 2


def test_close_does_what_is_left_and_ends_the_thread(gate):
    before = workers()
    history = History(ROWS, 4)
    pool = AsyncIOPool(2, 50, 4)
    assert workers() == before  # it starts with its first job
    gate.clear()
    pool.async_pull(history, n_id=torch.arange(3))
    pool.async_push(history, torch.ones(ROWS, 4))
    assert len(workers()) == len(before) + 1
    threading.Timer(0.05, gate.set).start()
    pool.close()
    assert workers() == before
    assert history.pull().sum() == 4 * ROWS
    pool.close()
    pool.async_pull(history, n_id=torch.arange(3))  # and starts anew
    assert take(pool).sum() == 12
    pool.close()
    assert workers() == before


def test_a_dropped_pool_does_what_is_left_and_ends_the_thread(gate):
    before = workers()
    history = History(ROWS, 4)
    pool = AsyncIOPool(2, 50, 4)
    gate.clear()
    pool.async_push(history, torch.ones(ROWS, 4))
    threading.Timer(0.05, gate.set).start()
    gone = weakref.ref(pool)
    gc.disable()
    try:
        del pool
        assert gone() is None
    finally:
        gc.enable()
    assert workers() == before
    assert history.pull().sum() == 4 * ROWS


def test_the_end_of_the_process_does_what_is_left(tmp_path):
    program = """
import sys, torch
from recollect.autoscale import AsyncIOPool, History
history = History(20000, 64, path=sys.argv[1])
pool = AsyncIOPool(4, 10, 64)
for value in range(1, 4):
    pool.async_push(history, torch.full((20000, 64), float(value)))
"""
    path = tmp_path / "h"
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stderr == ""
    history = History(20000, 64, path=path)
    assert history.pull().unique().tolist() == [3]


def test_copies_have_the_sizes_and_nothing_under_way(pool):
    pool.async_pull(History(ROWS, 4), n_id=torch.arange(3))
    for other in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert (other.pool_size, other.buffer_size, other.embedding_dim) == (2, 50, 8)
        with pytest.raises(RuntimeError, match="there is no pull"):
            other.synchronize_pull()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", ["device", "memory", "file"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_cuda(place, dtype, tmp_path):
    """The streams run beside a long computation; what it makes is pushed, and what is pulled goes into it."""
    torch.manual_seed(0)
    rows, width = 20_000, 64
    options = {"device": {"device": "cuda"}, "memory": {}, "file": {"path": tmp_path / "h"}}[place]
    beside, at_once = History(rows, width, dtype=dtype, **options).cuda(), History(rows, width, dtype=dtype).cuda()
    weight = torch.randn(width, width, device="cuda") / width**0.5
    n_id = torch.randint(rows, (10_000,))
    with AsyncIOPool(2, 10_000, width) as pool:
        for _ in range(10):
            pool.async_pull(beside, n_id=n_id)
            x = torch.randn(8000, width, device="cuda")
            for _ in range(20):
                x = (x @ weight).tanh()
            pool.async_push(beside, x, [12_000, 0], [5000, 3000])
            expected = at_once.pull(n_id)
            at_once.push(x, offset=[12_000, 0], count=[5000, 3000])
            del x  # its memory must not be given to others before it was read
            torch.full((8000, width), 7.0, device="cuda")
            found = pool.synchronize_pull()
            assert found.device.type == "cuda"
            assert torch.equal(found, expected)
            pool.free_pull()
    assert torch.equal(beside.pull(), at_once.pull())


# Forks.


def in_child(function):
    """Run a function in a forked child and return whether it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(30)
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")


@forks
@pytest.mark.parametrize("started", [False, True], ids=["fresh", "in use"])
def test_a_fork_finds_what_was_pushed_and_goes_on_on_both_sides(started):
    history, ahead = History(ROWS, 4), History(ROWS, 4)
    x, n_id = torch.randn(ROWS, 4), torch.arange(0, 50, 2)
    pool = AsyncIOPool(2, 50, 4)
    ahead.push(x)
    if started:
        pool.async_push(history, x)
        pool.async_pull(ahead, n_id=n_id)

    def go_on(value):
        if started:
            assert torch.equal(take(pool), x[n_id])
            assert torch.equal(history.pull(), x)
        for k in range(4):
            pool.async_push(history, torch.full((ROWS, 4), value + k))
        pool.async_pull(history, n_id=n_id)
        assert bool((take(pool) == value + 3).all())
        assert bool((history.pull() == value + 3).all())
        pool.close()

    assert in_child(lambda: go_on(100.0))
    go_on(7.0)  # what the child did is not here


@forks
def test_a_fork_waits_for_what_is_under_way_and_files_have_it_once(tmp_path, gate):
    history, pool = History(ROWS, 4, path=tmp_path / "h"), AsyncIOPool(4, 50, 4)
    gate.clear()
    for k in range(3):
        pool.async_push(history, torch.full((ROWS, 4), float(k)))
    threading.Timer(0.05, gate.set).start()

    def look():
        assert bool((history.pull() == 2).all())
        assert history.table.clock.pushes == 3

    assert in_child(look)
    look()
    pool.close()


@forks
def test_an_error_from_before_a_fork_is_told_on_both_sides(broken, pool):
    pool.async_push(broken("write"), torch.ones(ROWS, 4))

    def told():
        with pytest.raises(OSError, match="no medium"):
            pool.synchronize_push()
        pool.synchronize_push()

    assert in_child(told)
    told()


@forks
def test_a_forked_pool_ends_with_the_child():
    pool, history = AsyncIOPool(2, 50, 4), History(ROWS, 4)
    pool.async_push(history, torch.ones(ROWS, 4))

    def drop():
        nonlocal pool
        before = workers()
        pool.async_push(history, torch.zeros(ROWS, 4))
        assert len(workers()) == len(before) + 1
        del pool
        gc.collect()
        assert workers() == before
        assert not history.pull().any()

    assert in_child(drop)
    assert history.pull().sum() == 4 * ROWS


@forks
def test_forks_while_another_thread_uses_a_pool():
    history, pool, over = History(ROWS, 4), AsyncIOPool(2, 50, 4), threading.Event()

    def use():
        while not over.is_set():
            pool.async_push(history, torch.ones(ROWS, 4))
            pool.async_pull(history, n_id=torch.arange(50))
            take(pool)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        for _ in range(10):
            assert in_child(lambda: AsyncIOPool(1, 5, 4).async_push(History(5, 4), torch.ones(5, 4)))
    finally:
        over.set()
        thread.join()
    pool.close()


@forks
def test_a_fork_of_a_process_that_computes_in_several_threads():
    """OpenMP's threads are not in the child either."""
    program = """
import os, torch
from recollect.autoscale import AsyncIOPool, History
torch.set_num_threads(2)
history, pool, x = History(40_000, 32), AsyncIOPool(2, 40_000, 32), torch.randn(40_000, 32) * 2
pool.async_push(history, x)
child = os.fork()
assert torch.get_num_threads() == (1 if child == 0 else 2)
assert torch.equal(history.pull(), x)
pool.async_push(history, x * 3)
assert torch.equal(history.pull(), x * 3)
pool.close()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
