"""Pushes that fail, processes that are killed, clocks that overflow: what the rows and their ages are afterwards."""

import errno
import gc
import os
import random
import signal
import struct
import time

import pytest
import torch

from recollect.autoscale import AsyncIOPool, History, HistoryFileError

ROWS, WIDTH = 40, 3
KILLS = int(os.environ.get("RECOLLECT_TEST_KILLS", "50"))


@pytest.fixture(params=["memory", "file"])
def make(request, tmp_path):
    """A function that makes a history, or opens it again if it is in a file."""

    def history(**options):
        return History(ROWS, WIDTH, path=tmp_path / "h" if request.param == "file" else None, **options)

    return history


def rows(seed, count=ROWS):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def writes(part, number, error=None):
    """A way to write that fails after so many rows."""
    write = part.write

    def some(values, where):
        done = 0
        for start, stop in where:
            stop = min(stop, start + number - done)
            write(values[done : done + stop - start], ((start, stop),))
            done += stop - start
        raise error or OSError(errno.EIO, "no medium")

    return some


@pytest.mark.parametrize("written", [0, 5, 12])
@pytest.mark.parametrize("error", [OSError, RuntimeError])
@pytest.mark.parametrize("beside", [False, True], ids=["direct", "pool"])
def test_rows_that_a_push_did_not_write_are_as_they_were(make, written, error, beside, monkeypatch):
    history = make()
    history.push(rows(0))
    history.push(rows(1)[:10], offset=[5], count=[10])
    before, ages = history.pull(), history.age()
    monkeypatch.setattr(history.table.records, "write", writes(history.table.records, written, error("cut")))
    with AsyncIOPool(1, ROWS, WIDTH) as pool, pytest.raises(error, match="cut"):
        push_into(history, rows(2)[:20], [30, 0], [10, 10], pool if beside else None)
    monkeypatch.undo()
    expected, age = before.clone(), ages + (written > 0)
    new = torch.tensor([*range(30, 40), *range(10)])[:written]
    expected[new], age[new] = rows(2)[:written], 0
    assert torch.equal(history.pull(), expected)
    assert torch.equal(history.age(), age)
    if hasattr(history.table, "path"):
        del history, pool
        gc.collect()  # the traceback held it
        history = make()  # no warning: nothing was left half done
        assert torch.equal(history.pull(), expected)
        assert torch.equal(history.age(), age)
    history.push(rows(3))
    assert history.age().sum() == 0


def push_into(history, x, offset, count, pool):
    if pool is None:
        history.push(x, offset=offset, count=count)
    else:
        pool.async_push(history, x, offset, count)
        pool.synchronize_push()


def failing(monkeypatch, name, allowed, partly=0):
    """Let calls of the system fail from some call on; before that one may do a part of its work."""
    call, calls = getattr(os, name), []

    def fails(descriptor, data, position):
        calls.append(1)
        if len(calls) <= allowed:
            return call(descriptor, data, position)
        if len(calls) == allowed + 1 and partly:
            return call(descriptor, data[:partly], position)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, name, fails)


@pytest.mark.parametrize("allowed", range(6))
def test_a_disk_that_is_full_at_any_call_and_stays_so_for_a_while(tmp_path, allowed, monkeypatch):
    history = History(ROWS, WIDTH, path=tmp_path / "h")
    history.push(rows(0))
    history.push(rows(1)[:10], offset=[5], count=[10])
    before, ages = history.pull(), history.age()
    failing(monkeypatch, "pwrite", allowed)
    try:
        history.push(rows(2)[:20], offset=[30, 0], count=[10, 10])
    except OSError:
        monkeypatch.undo()
    else:
        assert allowed == 5
        monkeypatch.undo()
        return
    found, age = history.pull(), history.age()
    new = (found != before).any(1)
    expected = before.clone()
    expected[[*range(30, 40), *range(10)]] = rows(2)[:20]
    assert torch.equal(found[new], expected[new])
    assert torch.equal(age[new], torch.zeros_like(age[new]))
    assert torch.equal(age[~new], ages[~new] + bool(new.any()))
    del history
    gc.collect()  # the traceback held it
    again = History(ROWS, WIDTH, path=tmp_path / "h")
    assert torch.equal(again.pull(), found)
    assert torch.equal(again.age(), age)


def test_a_row_that_was_written_half_starts_again(tmp_path, monkeypatch):
    history = History(ROWS, WIDTH, path=tmp_path / "h")
    history.push(rows(0))
    # Calls: the mark, the stamps, then the records, of which two rows and a half are written.
    failing(monkeypatch, "pwrite", allowed=2, partly=2 * WIDTH * 4 + 6)
    with pytest.raises(OSError, match="space"):
        history.push(rows(1)[:10], offset=[5], count=[10])
    monkeypatch.undo()
    expected, age = rows(0), torch.ones(ROWS, dtype=torch.int64)
    expected[5:7], age[5:7] = rows(1)[:2], 0
    expected[7], age[7] = 0, 2
    assert torch.equal(history.pull(), expected)
    assert torch.equal(history.age(), age)
    assert history.never_pushed() == 1


def test_an_interrupted_push_is_mended_by_the_next_call(tmp_path, monkeypatch):
    history = History(ROWS, WIDTH, path=tmp_path / "h")
    history.push(rows(0))
    monkeypatch.setattr(history.table.records, "write", writes(history.table.records, 3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        history.push(rows(1)[:10], offset=[5], count=[10])
    monkeypatch.undo()
    expected, age = rows(0), torch.ones(ROWS, dtype=torch.int64)
    expected[5:8], age[5:8] = rows(1)[:3], 0
    assert torch.equal(history.pull(), expected)
    assert torch.equal(history.age(), age)


@pytest.mark.parametrize("call", ["reset", "load"])
def test_a_reset_or_a_load_that_fails_leaves_no_row_that_is_neither_old_nor_new(tmp_path, call, monkeypatch):
    history, other = History(ROWS, WIDTH, path=tmp_path / "h"), History(ROWS, WIDTH, save_histories=True)
    history.push(rows(0))
    other.push(rows(1))
    failing(monkeypatch, "pwrite", allowed=2)
    with pytest.raises(OSError, match="space"):
        history.reset_parameters() if call == "reset" else history.load_state_dict(other.state_dict())
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=f"the {ROWS} rows of that push start again at 0"):
        assert history.never_pushed() == ROWS
    assert history.pull().abs().sum() == 0


# Counts beyond 32 bits.


@pytest.mark.parametrize("number", [2**31 - 1, 2**32 - 2, 2**32 - 1, 2**33])
def test_ages_after_billions_of_pushes(make, number):
    history = make()
    history.push(rows(0))
    history.table.clock.note(number, 0)
    for k in range(3):
        history.push(rows(1)[:2], offset=[2 * k], count=[2])
    history.push(rows(2)[:1], offset=[39], count=[1])
    expected = torch.tensor([3, 3, 2, 2, 1, 1, *[number + 3] * 33, 0])
    found = history.age()
    if number >= 2**32 - 3:  # what was pushed long before is as old as 32 bits can tell
        assert bool((found[6:39] >= 2**31 - 8).all())
        expected[6:39] = found[6:39]
    assert torch.equal(found, expected)
    assert history.never_pushed() == 0
    if hasattr(history.table, "path"):
        del history
        history = make()
        assert torch.equal(history.age(), expected)


def test_the_state_after_billions_of_pushes(make):
    history = make()
    history.push(rows(0)[:5], offset=[0], count=[5])
    history.table.clock.note(2**32 + 5, 0)
    history.push(rows(1)[:2], offset=[3], count=[2])
    other = History(ROWS, WIDTH)
    other.load_state_dict({name: value.clone() for name, value in history.table.state().items()})
    assert torch.equal(other.pull(), history.pull())
    assert torch.equal(other.age()[:5], history.age()[:5])
    assert other.never_pushed() == history.never_pushed() == ROWS - 5


def test_renumbering_that_was_cut_leaves_the_rows(tmp_path, monkeypatch):
    history = History(ROWS, WIDTH, path=tmp_path / "h")
    history.push(rows(0)[:30], offset=[0], count=[30])
    history.table.clock.note(2**32 - 1, 0)
    monkeypatch.setattr(history.table.stamps, "write", writes(history.table.stamps, 7, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        history.push(rows(1))
    monkeypatch.undo()
    del history
    gc.collect()  # the traceback held it
    with pytest.warns(UserWarning, match="while it renumbered the ages"):
        history = History(ROWS, WIDTH, path=tmp_path / "h")
    assert torch.equal(history.pull()[:30], rows(0)[:30])
    assert history.never_pushed() == 10
    assert bool((history.age()[:30] >= 2**31 - 8).all())


@pytest.mark.parametrize("stamps", [torch.full((ROWS, 1), 2), torch.full((ROWS, 1), -1)], ids=["later", "negative"])
def test_a_state_with_stamps_of_no_push_is_refused(make, stamps):
    history, other = make(), History(ROWS, WIDTH, save_histories=True)
    other.push(rows(0))
    with pytest.raises(RuntimeError, match="stamps: numbers of at most 1 pushes are expected"):
        history.load_state_dict(other.state_dict() | {"stamps": stamps.int()})
    assert history.never_pushed() == ROWS


# Killed processes.


def first_of(number):
    return (number * 611) % 3000


def push_on(path, beside, said):
    """Push numbers, each to a thousand rows, and say so, until the end comes."""
    torch.set_num_threads(1)
    history = History(4000, 16, path=path)
    pool = AsyncIOPool(2, 4000, 16) if beside else None
    for number in range(1, 1_000_000):
        x = torch.full((1000, 16), float(number))
        if pool is not None:
            pool.async_push(history, x, [first_of(number)], [1000])
            history.settle()
        else:
            history.push(x, offset=[first_of(number)], count=[1000])
        os.write(said, struct.pack("<q", number))


@pytest.mark.filterwarnings("ignore:.*in the middle of a push")
@pytest.mark.parametrize("beside", [False, True], ids=["direct", "pool"])
def test_processes_that_are_killed_lose_no_push_that_was_over(tmp_path, beside):
    """A row has what the push of its age wrote, or is empty if its last push was cut; all other rows are as said."""
    generator = random.Random(beside)
    for attempt in range(-(-KILLS // 2)):
        path, (hears, says) = tmp_path / str(attempt), os.pipe()
        process = torch.multiprocessing.get_context("fork").Process(target=push_on, args=(path, beside, says))
        process.start()
        os.close(says)
        heard = os.read(hears, 8)
        time.sleep(generator.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while more := os.read(hears, 1 << 16):
            heard += more
        os.close(hears)
        last = struct.unpack("<q", heard[-8:])[0]
        assert len(heard) == 8 * last
        history = History(4000, 16, path=path)
        pushes, ages, values = history.table.clock.pushes, history.age(), history.pull()
        assert last <= pushes <= last + 1
        assert torch.equal(values, torch.where(ages < pushes, pushes - ages, 0)[:, None].expand(-1, 16).float())
        expected = torch.zeros(4000)
        for number in range(1, last + 1):
            expected[first_of(number) :][:1000] = number
        cut = torch.zeros(4000, dtype=torch.bool)
        if pushes > last:
            cut[first_of(pushes) :][:1000] = True
        found = values[:, 0]
        assert torch.equal(found[~cut], expected[~cut])
        assert bool(((found == expected) | (found == 0) | (found == pushes))[cut].all())
        del history


def refused(path):
    with pytest.raises(HistoryFileError, match="in use by another history"):
        History(ROWS, WIDTH, path=path)


def test_an_opener_beside_a_writer_is_refused_and_changes_nothing(tmp_path):
    history = History(ROWS, WIDTH, path=tmp_path / "h")
    history.push(rows(0))
    context = torch.multiprocessing.get_context("fork")
    other = context.Process(target=refused, args=(tmp_path / "h",))
    other.start()
    other.join()
    assert other.exitcode == 0
    with pytest.raises(HistoryFileError, match="in use by another history"):
        History(ROWS, WIDTH, path=tmp_path / "h")
    history.push(rows(1)[:3], offset=[0], count=[3])
    assert torch.equal(history.pull(), torch.cat([rows(1)[:3], rows(0)[3:]]))
