"""A step whose process was killed goes on, and gives the numbers of one that was not."""

import functools
import gc
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from whole_graph_zoo import N, a_graph, sum_of_losses, whole_step

from recollect.autoscale.histories import PlainRows
from recollect.models import RevGNN
from recollect.outofcore import WholeGraph
from recollect.outofcore._tables import Tables

PTR = torch.tensor([0, 13, 60, N])  # parts of other sizes than the room that a pass moves rows by


def a_whole(path, groups=2) -> tuple[WholeGraph, object]:
    torch.manual_seed(1)
    data = a_graph(dtype=torch.float32)
    model = RevGNN(7, 8, 4, 3, groups, dropout=0.3, exact=True)
    return WholeGraph(model, data, PTR, path, memory=0), data


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, looks):
    """Returns what a step gives whose process was not killed."""

    @functools.cache
    def step(groups):
        whole, data = a_whole(tmp_path_factory.mktemp("whole"), groups)
        return whole_step(whole, data)

    return step


OPERATIONS = 3 * (1 + 3 * 2 + 1 + 3 * 2 + 1)
"""For each part: the projection, blocks forward, the loss, blocks backward, the projection again."""


@pytest.mark.parametrize("when", ["in the midst of rows", "in the midst of sums", "after the journal", "after all"])
@pytest.mark.parametrize(
    ("at", "groups"),
    [*((at, 2) for at in [1, 2, 8, 20, 22, 23, 24, 25, 30, 43, 44, OPERATIONS]), (20, 4), (50, 4), (53, 4), (60, 4)],
)
def test_after_each_kind_of_operation(at, groups, when, unbroken, tmp_path, monkeypatch):
    expected = unbroken(groups)
    broken, data = a_whole(tmp_path / "broken", groups)
    finished, writes, write, finish = [0], [0], Tables._write, Tables._finish

    def stop(self, rows, cleared):
        finished[0] += 1
        if finished[0] == at and when == "after the journal":
            raise Killed
        finish(self, rows, cleared)
        writes[0] = 0
        if finished[0] == at and when == "after all":
            raise Killed

    def tear(self, rows):
        writes[0] += 1
        if finished[0] == at - 1 and (writes[0], when) in [(1, "in the midst of rows"), (2, "in the midst of sums")]:
            write(self, [(name, where, torch.full_like(values, torch.nan)) for name, where, values in rows])
            raise Killed
        write(self, rows)

    monkeypatch.setattr(Tables, "_finish", stop)
    monkeypatch.setattr(Tables, "_write", tear)
    with pytest.raises(Killed) as caught:
        whole_step(broken, data)
    monkeypatch.undo()
    caught.value.__traceback__ = None  # which holds the files open
    del caught, broken
    gc.collect()

    again, data = a_whole(tmp_path / "broken", groups)
    assert again.unfinished
    torch.manual_seed(99)
    loss = again.resume(sum_of_losses(data))
    gradients = {name: p.grad for name, p in again.model.named_parameters()}
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected[1].items())
    assert torch.equal(torch.rand(1), expected[2])
    assert not again.unfinished


@pytest.mark.parametrize("groups", [2, 4])
def test_files_have_the_rows_of_one_part_beside_those_of_the_tables(groups, tmp_path):
    """8 (N + M) C bytes, whatever the depth: a pass moves the rows that it changes by the M of the largest part."""
    whole, data = a_whole(tmp_path / "whole", groups)
    whole.step(sum_of_losses(data))
    rows = PlainRows(N + 47, 8 // groups, torch.float32, tmp_path / "rows")
    sizes = [path.stat().st_size for path in (tmp_path / "whole").glob("[xg][0-9].table")]
    assert sizes == [(tmp_path / "rows").stat().st_size] * 2 * groups
    del rows


def test_there_is_nothing_to_resume(tmp_path):
    whole, data = a_whole(tmp_path)
    with pytest.raises(RuntimeError, match="no unfinished step"):
        whole.resume(sum_of_losses(data))
    whole.step(sum_of_losses(data))
    with pytest.raises(RuntimeError, match="no unfinished step"):
        whole.resume(sum_of_losses(data))


def test_another_network_does_not_go_on(tmp_path, monkeypatch):
    whole, data = a_whole(tmp_path)
    monkeypatch.setattr(Tables, "_write", lambda self, rows: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        whole.step(sum_of_losses(data))
    monkeypatch.undo()
    bias = whole.model.head.bias.detach().clone()
    with torch.no_grad():
        whole.model.head.bias.add_(1)
    with pytest.raises(RuntimeError, match="parameters of that time"):
        whole.resume(sum_of_losses(data))
    with torch.no_grad():
        whole.model.head.bias.copy_(bias)
    whole.model.layers[0].convs[0].slope = 0.5  # as any setting of a part
    with pytest.raises(RuntimeError, match="settings and parameters of that time"):
        whole.resume(sum_of_losses(data))
    del whole.model.layers[0].convs[0].slope
    whole.resume(sum_of_losses(data))


CODE = """
import sys, torch
sys.path.insert(0, sys.argv[2])
torch.set_num_threads(int(sys.argv[3]))  # sums by more threads have other bits
from test_resume import a_whole
from whole_graph_zoo import sum_of_losses
whole, data = a_whole(sys.argv[1])
torch.manual_seed(5)
print("begun", flush=True)
loss = whole.resume(sum_of_losses(data)) if whole.unfinished else whole.step(sum_of_losses(data))
torch.save([loss, *(p.grad for p in whole.model.parameters()), torch.rand(1)], sys.argv[1] + "/result.pt")
"""


def test_killed_at_any_moment(tmp_path):
    """By SIGKILL; RECOLLECT_KILLS says how often."""
    whole, data = a_whole(tmp_path / "whole")
    loss, gradients, number = whole_step(whole, data)
    store = tmp_path / "killed"
    arguments = [str(store), os.path.dirname(__file__), str(torch.get_num_threads())]
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CODE), *arguments]
    for kill in range(int(os.environ.get("RECOLLECT_KILLS", "2"))):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline().strip() == "begun"
        try:
            process.wait(0.01 + 0.02 * kill)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    found = torch.load(store / "result.pt")
    assert all(torch.equal(a, b) for a, b in zip(found, [loss, *gradients.values(), number], strict=True))
