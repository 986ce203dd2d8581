"""What a history in a file survives, what it refuses, and what it takes of memory."""

import copy
import functools
import gc
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recollect.autoscale import History, HistoryFileError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="histories in files need a POSIX system")
ROWS, WIDTH = 1200, 6


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history"


def rows(seed=0, count=ROWS, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def run(program, *arguments):
    """Run a program and return the process once it has written a line, or ended."""
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


KILLED = """
import sys, time, torch
from recollect.autoscale import History
history = History(1200, 6, dtype=getattr(torch, sys.argv[2]), path=sys.argv[1])
x = torch.randn(1200, 6, generator=torch.Generator().manual_seed(0))
history.push(x)
history.push(x[:10], offset=torch.tensor([100]), count=torch.tensor([10]))
history.push(x[:3], torch.tensor([1199, 0, 7]))
print("pushed", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_killed_process_leaves_all_that_it_pushed(path, dtype):
    process, line = run(KILLED, path, str(dtype).removeprefix("torch."))
    assert line == "pushed"
    with pytest.raises(HistoryFileError, match="in use by another history"):
        History(ROWS, WIDTH, dtype=dtype, path=path)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    expected = History(ROWS, WIDTH, dtype=dtype)
    expected.push(rows())
    expected.push(rows()[:10], offset=[100], count=[10])
    expected.push(rows()[:3], torch.tensor([1199, 0, 7]))
    found = History(ROWS, WIDTH, dtype=dtype, path=path)
    assert torch.equal(found.pull(), expected.pull())
    assert torch.equal(found.age(), expected.age())
    found.push(rows()[:1], offset=[5], count=[1])
    assert found.age(torch.tensor([5, 6, 0])).tolist() == [0, 3, 1]


def dying(write):
    """A way to write that ends after five rows."""

    def write_five(values, where):
        ((start, _),) = where
        write(values[:5], ((start, start + 5),))
        raise KeyboardInterrupt

    return write_five


@pytest.mark.parametrize("fails", ["stamps", "records"])
def test_rows_of_a_push_that_was_cut_start_again(path, fails, monkeypatch):
    history = History(ROWS, WIDTH, path=path)
    history.push(rows())
    history.push(rows(1)[:20], offset=[50], count=[20])
    part = getattr(history.table, fails)
    monkeypatch.setattr(part, "write", dying(part.write))
    with pytest.raises(KeyboardInterrupt):
        history.push(rows(2)[:30], offset=[40], count=[30])
    monkeypatch.undo()
    del history, part
    gc.collect()  # the traceback held it
    with pytest.warns(UserWarning, match=r"in the middle of a push; the (5|30) rows"):
        history = History(ROWS, WIDTH, path=path)
    expected, age = rows(), torch.full((ROWS,), 2)
    expected[50:70], age[50:70] = rows(1)[:20], 1
    torn = slice(40, 45 if fails == "stamps" else 70)
    expected[torn], age[torn] = 0, 3
    assert torch.equal(history.pull(), expected)
    assert torch.equal(history.age(), age)
    del history
    assert torch.equal(History(ROWS, WIDTH, path=path).pull(), expected)  # and without a warning


@pytest.mark.parametrize("fails", ["stamps", "records"])
def test_a_reset_that_was_cut_leaves_no_row_that_is_neither_old_nor_empty(path, fails, monkeypatch):
    history = History(ROWS, WIDTH, path=path)
    history.push(rows())
    part = getattr(history.table, fails)
    write = functools.partial(dying(part.write), torch.zeros(5, part.shape[1]), ((0, 5),))
    monkeypatch.setattr(part, "zero_", write)
    with pytest.raises(KeyboardInterrupt):
        history.reset_parameters()
    monkeypatch.undo()
    del history, part, write
    gc.collect()  # the traceback held it
    with pytest.warns(UserWarning, match="in the middle of a push"):
        history = History(ROWS, WIDTH, path=path)
    assert history.never_pushed() == ROWS
    assert history.pull().abs().sum() == 0


def corrupt(change):
    def apply(path):
        content = bytearray(path.read_bytes())
        path.write_bytes(change(content))

    return apply


def put(position, value):
    def change(content):
        content[position : position + len(value)] = value
        return content

    return corrupt(change)


WRONG = {
    "cut by a byte": (corrupt(lambda content: content[:-1]), r"a history file of 41088 bytes \(got 41087 bytes"),
    "longer by a byte": (corrupt(lambda content: content + b"x"), r"got 41089 bytes: it was cut or extended"),
    "cut within the header": (corrupt(lambda content: content[:20]), r"got a file of 20 bytes"),
    "empty": (corrupt(lambda content: b""), r"got a file of 0 bytes"),
    "something else": (put(0, b"\x89PNG\r\n\x1a\n"), r"begins with b'RCLHIST\\x00' \(got b'\\x89PNG"),
    "half made": (put(0, bytes(4096)), r"got zeros: making it was interrupted"),
    "another version": (put(8, b"\x02"), r"expected version 1 .*\(got version 2\)"),
    "another type": (put(12, b"float16\0"), r"in torch\.float32 \(got 1200 rows of 6 channels in torch\.float16\)"),
    "other rows": (put(28, b"\xb1\x04"), r"expected 1200 rows .*\(got 1201 rows of 6 channels"),
    "other channels": (put(36, b"\x07"), r"expected 1200 rows of 6 channels .*\(got 1200 rows of 7 channels"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named_and_left_alone(path, case):
    History(ROWS, WIDTH, path=path).push(rows())
    change, match = WRONG[case]
    change(path)
    before = path.read_bytes()
    with pytest.raises(HistoryFileError, match=match) as caught:
        History(ROWS, WIDTH, path=path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_the_header_says_what_is_asked_for_and_what_is_there(path):
    History(ROWS, WIDTH, path=path)
    for arguments, match in {
        (ROWS + 1, WIDTH, torch.float32): r"expected 1201 rows of 6 channels .*\(got 1200 rows",
        (ROWS, WIDTH, torch.int8): r"in torch\.int8 \(got .* in torch\.float32\)",
    }.items():
        with pytest.raises(HistoryFileError, match=match):
            History(arguments[0], arguments[1], dtype=arguments[2], path=path)
    History(ROWS, WIDTH, path=path)


def test_one_history_at_a_time(path):
    history = History(ROWS, WIDTH, path=path)
    with pytest.raises(HistoryFileError, match="in use by another history"):
        History(ROWS, WIDTH, path=path)
    del history  # by reference counting alone
    History(ROWS, WIDTH, path=path)


def test_processes_that_were_forked_meanwhile_do_not_keep_it(path):
    """As a loader's workers are; and that they end, or forget it, does not take it from the first process."""
    context = torch.multiprocessing.get_context("fork")
    history = History(ROWS, WIDTH, path=path)
    ended = context.Process(target=history.__dict__.clear)  # drops the table
    ended.start()
    ended.join()
    assert ended.exitcode == 0
    with pytest.raises(HistoryFileError, match="in use by another history"):
        History(ROWS, WIDTH, path=path)
    stays = context.Process(target=signal.pause)
    stays.start()
    try:
        del history, ended
        gc.collect()
        History(ROWS, WIDTH, path=path).push(rows())
    finally:
        stays.terminate()
        stays.join()


def test_no_room_leaves_no_file(path):
    with pytest.raises(HistoryFileError, match=r"needs 4398\d+ bytes \(got \d+ bytes of free space\)"):
        History(2**32, 255, path=path)
    assert not path.exists()


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"save_histories": True}], ids=str)
def test_a_file_takes_no_device_and_is_the_state(path, options):
    with pytest.raises(ValueError, match="a history with a path"):
        History(ROWS, WIDTH, path=path, **options)
    assert not path.exists()


def test_there_are_no_copies(path):
    history = History(ROWS, WIDTH, path=path)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            attempt(history)


def descriptors():
    return {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_nothing_stays_open(path):
    history = History(ROWS, WIDTH, path=path)
    assert str(path) in descriptors()
    history.push(rows())
    history.flush()
    del history
    assert str(path) not in descriptors()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_fresh_file_is_not_written_by_a_reset(path):
    history = History(100_000, 64, path=path)
    history.reset_parameters()
    blocks = os.stat(path).st_blocks
    assert history.pull(torch.tensor([99_999])).sum() == 0
    history.push(torch.ones(1, 64), offset=[99_999], count=[1])
    history.reset_parameters()
    assert history.pull(torch.tensor([99_999])).sum() == 0
    assert os.stat(path).st_blocks == blocks  # all room is taken at once


RESIDENT = """
import sys, torch
from recollect.autoscale import History

def resident(name):
    fields = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return int(fields[name].split()[0]) * 1024

rows, width = int(sys.argv[2]), 256
history = History(rows, width, path=sys.argv[1])
x = torch.zeros(2000, width)
n_id = torch.randint(rows, (2000,), generator=torch.Generator().manual_seed(0))
out = history.pull(n_id)
history.push(x, offset=[0], count=[2000])
before = {name: resident(name) for name in ("RssFile", "VmRSS")}
for start in range(0, rows, 2000):
    history.push(x, offset=[start], count=[2000])
most = []
give_back = history.table.records._give_back
history.table.records._give_back = lambda: (most.append(resident("RssFile")), give_back())
for seed in range(3):
    n_id = torch.randint(rows, (2000,), generator=torch.Generator().manual_seed(seed))
    history.pull(n_id)
    history.push(x[: n_id.unique().numel()], n_id.unique())
del history.table.records._give_back
history.age(n_id)
print(resident("RssFile") - before["RssFile"], max(most) - before["RssFile"], resident("VmRSS") - before["VmRSS"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_resident_part_does_not_grow_with_the_file(path):
    """200 MB are written, and read at random; a map without care is resident as a whole after that."""
    result = subprocess.run(
        [sys.executable, "-c", RESIDENT, str(path), "200000"], capture_output=True, text=True, check=True
    )
    after, most, everything = map(int, result.stdout.split())
    assert after < 2**20
    assert most < 16 * 2**20
    assert everything < 8 * 2**20


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(HistoryFileError, match=f"{tmp_path} is a folder; name a file in it"):
        History(ROWS, WIDTH, path=tmp_path)
