"""What stands where a history's file shall be, what its header says, and files that are cut while they are in use."""

import os
import shutil
import socket
import struct

import pytest
import torch
from scalable_zoo import Mean

from recollect.autoscale import AsyncIOPool, History, HistoryFileError

ROWS, WIDTH = 3000, 6
STATE_AT, STAMPS_AT = 64, 4096


@pytest.fixture
def path(tmp_path):
    return tmp_path / "0.history"


def rows(count=ROWS):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))


def make_socket(path, monkeypatch):
    monkeypatch.chdir(path.parent)  # its whole path may be too long for a socket
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


PLACES = {
    "fifo": (lambda path, _: os.mkfifo(path), "is a fifo, but a history needs a file"),
    "dangling link": (lambda path, _: path.symlink_to("nowhere"), "is a link to nowhere, which is not there"),
    "link to a fifo": (
        lambda path, _: (os.mkfifo(path.parent / "f"), path.symlink_to(path.parent / "f")),
        "is a fifo, but a history needs a file",
    ),
    "folder": (lambda path, _: path.mkdir(), "is a folder; name a file in it"),
    "socket": (make_socket, "is a socket, but a history needs a file"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("of", ["history", "model"])
def test_what_is_no_file_is_named_and_left_alone(path, place, of, monkeypatch):
    make, message = PLACES[place]
    path = path if of == "history" else path.with_name("2.history")
    make(path, monkeypatch)
    before = {p.name for p in path.parent.iterdir()}
    with pytest.raises(HistoryFileError, match=message) as caught:
        History(ROWS, WIDTH, path=path) if of == "history" else Mean(history_path=path.parent)
    assert str(path) in str(caught.value)
    assert {p.name for p in path.parent.iterdir()} == before


@pytest.mark.parametrize("place", ["fifo", "dangling link", "socket"])
def test_what_is_no_folder_is_named(path, place, monkeypatch):
    PLACES[place][0](path, monkeypatch)
    kind = "a link to nowhere, which is not there" if place == "dangling link" else "something else"
    with pytest.raises(ValueError, match=f"history_path='.*' is {kind}, but must be a folder"):
        Mean(history_path=path)


def test_a_link_to_a_history_is_one(path):
    History(ROWS, WIDTH, path=path.parent / "other").push(rows())
    path.symlink_to(path.parent / "other")
    assert torch.equal(History(ROWS, WIDTH, path=path).pull(), rows())


@pytest.mark.parametrize(
    ("position", "content", "message"),
    [
        (STATE_AT, struct.pack("<q", -1), "got -1 pushes above 0, and 0 under way"),
        (STATE_AT, struct.pack("<q", 2**62), "pushes above 0"),
        (STATE_AT, struct.pack("<qq", 1, 7), "got 1 pushes above 0, and 7 under way"),
        (STATE_AT, struct.pack("<qqq", 1, 0, -5), "got 1 pushes above -5"),
        (STATE_AT, struct.pack("<qqq", 1, 0, 2), "got 1 pushes above 2"),
        (STATE_AT, b"\xa5" * 24, "a number of pushes, and 0, 1 or 2"),
        (STATE_AT, struct.pack("<q", 0), "the 0 pushes that the header counts .*got a row of push 1"),
        (STAMPS_AT + 4 * 2999, struct.pack("<i", 2), "the 1 pushes that the header counts .*got a row of push 2"),
        (STAMPS_AT, struct.pack("<i", -1), "got a row of push 4294967295"),
    ],
)
def test_a_clock_and_stamps_that_no_history_wrote_are_refused(path, position, content, message):
    History(ROWS, WIDTH, path=path).push(rows())
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)
    before = path.read_bytes()
    with pytest.raises(HistoryFileError, match=message):
        History(ROWS, WIDTH, path=path)
    assert path.read_bytes() == before


CALLS = {
    "rows by number": lambda history: history.pull(torch.arange(0, ROWS, 2)),
    "rows in disorder": lambda history: history.pull(torch.arange(ROWS).flip(0)),
    "all rows": lambda history: history.pull(),
    "ages": lambda history: history.age(),
    "push by number": lambda history: history.push(rows(2), torch.tensor([5, ROWS - 1])),
    "push of a part": lambda history: history.push(rows(2), offset=[ROWS - 2], count=[2]),
    "push of an early part": lambda history: history.push(rows(2), offset=[0], count=[2]),
    "the table": lambda history: history.emb,
    "reset": lambda history: history.reset_parameters(),
    "more rows": lambda history: history.extend(ROWS + 1),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("left", [5000, 20_000])
def test_a_file_that_is_cut_while_in_use_is_an_error(path, call, left):
    """A touched page behind its end would be a signal that ends the process; what is written there, rows of zeros."""
    history = History(ROWS, WIDTH, path=path)
    history.push(rows())
    os.truncate(path, left)
    with pytest.raises(OSError, match="cut while in use"):
        CALLS[call](history)
    assert path.stat().st_size == left


def test_a_file_that_is_cut_is_an_error_in_a_pool_too(path):
    history = History(ROWS, WIDTH, path=path)
    history.push(rows())
    os.truncate(path, 20_000)
    with AsyncIOPool(1, ROWS, WIDTH) as pool:
        pool.async_pull(history, n_id=torch.tensor([ROWS - 1]))
        with pytest.raises(OSError, match="cut while in use"):
            pool.synchronize_pull()


def test_a_copy_with_holes_gets_its_room_when_it_is_opened(path):
    History(ROWS, WIDTH, path=path).push(rows(10), torch.arange(10))
    sparse = path.with_name("sparse")
    with path.open("rb") as source, sparse.open("wb") as target:
        shutil.copyfileobj(source, target, 8192)
        target.truncate(path.stat().st_size)
    content = sparse.read_bytes()
    with sparse.open("r+b") as file:
        file.truncate(36_864)
        file.truncate(len(content))
    if sparse.stat().st_blocks * 512 >= len(content):
        pytest.skip("this file system has no holes")
    history = History(ROWS, WIDTH, path=sparse)
    assert sparse.stat().st_blocks * 512 >= len(content)
    assert torch.equal(history.pull()[:10], rows(10))


def test_no_room_is_said_so_and_leaves_no_file(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HistoryFileError, match="needs 88384 bytes, and there is no room"):
        History(ROWS, WIDTH, path=path)
    assert not path.exists()


# More rows.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("in_file", [False, True], ids=["memory", "file"])
def test_rows_are_appended_and_the_others_stay(path, dtype, in_file):
    history = History(ROWS, WIDTH, dtype=dtype, path=path if in_file else None)
    history.push(rows())
    history.push(rows(7), torch.arange(7))
    before, ages = history.pull(), history.age()
    history.extend(ROWS)
    history.extend(ROWS + 50)
    for _ in range(1 + in_file):
        assert (history.num_embeddings, history.emb.shape) == (ROWS + 50, (ROWS + 50, WIDTH))
        assert torch.equal(history.pull()[:ROWS], before)
        assert torch.equal(history.age()[:ROWS], ages)
        assert not history.pull()[ROWS:].any()
        assert history.never_pushed() == 50
        if in_file:
            assert [p.name for p in path.parent.iterdir()] == ["0.history"]
            del history
            history = History(ROWS + 50, WIDTH, dtype=dtype, path=path)
    history.push(rows(50), offset=[ROWS], count=[50])
    assert history.never_pushed() == 0
    with pytest.raises(ValueError, match=f"num_embeddings must be at least {ROWS + 50}"):
        history.extend(ROWS)


def test_more_rows_that_fail_leave_the_file(path, monkeypatch):
    history = History(ROWS, WIDTH, path=path)
    history.push(rows())
    monkeypatch.setattr(os, "replace", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        history.extend(ROWS + 1)
    assert [p.name for p in path.parent.iterdir()] == ["0.history"]
    assert torch.equal(history.pull(), rows())
    history.push(rows(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("in_file", [False, True], ids=["memory", "file"])
def test_the_table_as_floats(path, dtype, in_file):
    history = History(ROWS, WIDTH, dtype=dtype, path=path if in_file else None)
    history.push(rows())
    assert history.emb.is_floating_point()
    assert torch.equal(history.emb.float(), history.pull())
    with pytest.raises(RuntimeError, match="keep=False"):
        _ = History(ROWS, WIDTH, keep=False).emb
