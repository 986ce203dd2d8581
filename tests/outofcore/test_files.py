"""What lies in a store may have been changed: that is an error with a name, and never code that runs."""

import errno
import gc
import os

import pytest
import torch
from torch.testing import assert_close
from whole_graph_zoo import N, a_graph, plain_step, sum_of_losses, whole_step

from recollect.autoscale.histories import HistoryFileError
from recollect.models import RevGNN
from recollect.outofcore import WholeGraph
from recollect.outofcore._tables import Tables

PTR = torch.tensor([0, 30, 60, N])


class Runs:
    def __reduce__(self):
        return os.mkdir, (os.environ["RECOLLECT_RAN"],)


def stopped(path, at=2):
    """A step whose criterion failed."""
    data = a_graph()
    model = RevGNN(7, 8, 4, 3, dropout=0.3, exact=True).double()
    whole = WholeGraph(model, data, PTR, path, memory=0)
    calls = []

    def criterion(logits, y):
        calls.append(0)
        if len(calls) == at:
            raise KeyError("stopped")
        return sum_of_losses(data)(logits, y)

    torch.manual_seed(5)
    with pytest.raises(KeyError):
        whole.step(criterion)
    return whole, model, data


def flip(path):
    content = bytearray(path.read_bytes())
    places = range(len(content) // 3, 2 * len(content) // 3) if path.suffix == ".part" else [len(content) // 2]
    for place in places:
        content[place] ^= 255
    path.write_bytes(content)


CHANGES = {
    "code": lambda path: torch.save({"number": Runs()}, path),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "something else": lambda path: torch.save({"a": 1}, path),
    "other bits": flip,
    "gone": os.remove,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["step.pt", "parts/1.part"])
def test_files_that_were_changed(name, change, tmp_path, monkeypatch):
    monkeypatch.setenv("RECOLLECT_RAN", str(tmp_path / "ran"))
    whole, model, data = stopped(tmp_path / "store")
    CHANGES[change](tmp_path / "store" / name)
    with pytest.raises((HistoryFileError, RuntimeError), match=r"step\.pt|1\.part|no unfinished"):
        whole.resume(sum_of_losses(data))
    assert not (tmp_path / "ran").exists()
    assert all(p.grad is None for p in model.parameters())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("change", ["cut", "empty", "other bits", "gone"])
def test_gradients_of_parameters_that_were_changed(change, tmp_path, monkeypatch):
    data = a_graph()
    model = RevGNN(7, 8, 4, 3, exact=True).double()
    whole = WholeGraph(model, data, PTR, tmp_path)
    finished, finish = [0], Tables._finish

    def stop(self, *args):
        finished[0] += 1
        if finished[0] == 3 * (1 + 3 * 2 + 1 + 4):  # in backward
            raise Killed
        finish(self, *args)

    monkeypatch.setattr(Tables, "_finish", stop)
    with pytest.raises(Killed):
        whole.step(sum_of_losses(data))
    monkeypatch.undo()
    path = tmp_path / "gradients.table"
    if change == "other bits":  # of the head, whose gradients came first
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        CHANGES[change](path)
    with pytest.raises(HistoryFileError, match=r"gradients\.table: expected the gradients that a step wrote"):
        whole.resume(sum_of_losses(data))
    assert all(p.grad is None for p in model.parameters())


def test_a_value_of_a_part_that_was_changed(tmp_path):
    whole, _, data = stopped(tmp_path)
    path = tmp_path / "parts" / "1.part"
    found = torch.load(path)
    found["x"][3, 2] += 1e-3
    torch.save(found, path)
    with pytest.raises(HistoryFileError, match=r"1\.part: expected part 1 as it was written"):
        whole.resume(sum_of_losses(data))


def test_another_that_opens_the_store_does_not_write_into_it(tmp_path):
    data = a_graph()
    model = RevGNN(7, 8, 4, 3, exact=True).double()
    whole = WholeGraph(model, data, PTR, tmp_path, memory=0)
    other = a_graph()
    with pytest.raises(HistoryFileError, match="in use"):
        WholeGraph(model, other, torch.tensor([0, 10, N]), tmp_path)
    found, expected = whole_step(whole, data), plain_step(model, data)
    assert_close(found[:2], expected[:2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("at", [1, 5, 30, 31, 60])
def test_a_disk_that_is_full(at, tmp_path, monkeypatch):
    data = a_graph()
    model = RevGNN(7, 8, 4, 3, dropout=0.3, exact=True).double()
    whole = WholeGraph(model, data, PTR, tmp_path)
    write, calls = os.pwrite, []

    def full(descriptor, content, position):
        calls.append(0)
        if len(calls) < at:
            return write(descriptor, content, position)
        write(descriptor, content[: len(content) // 2], position)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    torch.manual_seed(5)
    with pytest.raises(OSError, match="No space"):
        whole.step(sum_of_losses(data))
    assert all(p.grad is None for p in model.parameters())
    monkeypatch.undo()
    expected = plain_step(model, data)
    if whole.unfinished:
        del whole
        gc.collect()
        whole = WholeGraph(model, data, PTR, tmp_path)
        loss = whole.resume(sum_of_losses(data))
        assert_close((loss, {n: p.grad for n, p in model.named_parameters()}), expected[:2], rtol=1e-10, atol=1e-10)
    assert_close(whole_step(whole, data)[:2], expected[:2], rtol=1e-10, atol=1e-10)
