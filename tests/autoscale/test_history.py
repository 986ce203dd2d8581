"""A history against a table of Python lists, in every place and type; and what it refuses."""

import copy
import pickle
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import recollect
from recollect.autoscale import History, history_bytes
from recollect.frames import backward_mode, dry_mode

ROWS, WIDTH = 23, 5
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
DTYPES = [*FLOATS, torch.int8]


@pytest.fixture(params=["memory", "file", "cuda"])
def make(request, tmp_path):
    """A function that makes a history in one of the places."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    place = {"memory": {}, "file": {"path": tmp_path / "sub" / "h"}, "cuda": {"device": "cuda"}}[request.param]
    return lambda dtype=torch.float32, rows=ROWS, width=WIDTH: History(rows, width, dtype=dtype, **place)


def rows_of(history: History) -> torch.Tensor:
    """The tensor of a table in memory."""
    records: Any = history.table.records
    return records.tensor


def kept(x, dtype):
    """What is left of float64 rows [rows, channels] after they were kept in a type, row by row."""
    if dtype != torch.int8:
        return x.to(dtype).double()
    rows = []
    for row in x.float():
        scale = row.abs().max() * (1 / 127)
        rows.append((torch.round(row / scale) * scale if scale > 0 else row * 0).double())
    return torch.stack(rows) if rows else x


class Oracle:
    """Rows and the times of their pushes, one at a time."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.rows = {node: torch.zeros(WIDTH, dtype=torch.float64) for node in range(ROWS)}
        self.last = dict.fromkeys(range(ROWS), 0)
        self.time = 0

    def push(self, x, nodes):
        self.time += 1
        for node, row in zip(nodes, kept(x.double(), self.dtype), strict=True):
            self.rows[node], self.last[node] = row, self.time

    def check(self, history, tolerance=1e-7):
        everything = torch.stack([self.rows[node] for node in range(ROWS)])
        found = history.pull()
        assert found.dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double().cpu(), everything, rtol=tolerance, atol=0)
        nodes = torch.tensor([5, 0, 22, 5, 13, 1])
        torch.testing.assert_close(history.pull(nodes), found[nodes], rtol=0, atol=0)
        torch.testing.assert_close(history.pull(nodes.sort().values.int()), found[nodes.sort().values], rtol=0, atol=0)
        assert history.age().tolist() == [self.time - self.last[node] for node in range(ROWS)]
        assert history.age(nodes).tolist() == [self.time - self.last[node] for node in nodes.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pushes_and_pulls_are_those_of_the_oracle(make, dtype):
    torch.manual_seed(0)
    history, oracle = make(dtype), Oracle(dtype)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    history.push(x)
    oracle.push(x, range(ROWS))
    oracle.check(history)
    x = 3 * torch.randn(9, WIDTH, dtype=torch.float64)  # two rows more than the parts have: a halo
    history.push(x, offset=torch.tensor([20, 4, 7, 0]), count=torch.tensor([2, 3, 2, 0]))
    oracle.push(x[:7], [20, 21, 4, 5, 6, 7, 8])
    oracle.check(history)
    x = torch.randn(4, 2 * WIDTH)[:, ::2]  # not contiguous
    history.push(x, torch.tensor([22, 1, 9, 3]))
    oracle.push(x, [22, 1, 9, 3])
    oracle.check(history)
    x = torch.randn(5, WIDTH, dtype=torch.bfloat16)
    history.push(x, torch.tensor([2, 3, 10, 11, 12, 0, 22]), offset=[2, 10], count=[2, 3])
    oracle.push(x, [2, 3, 10, 11, 12])
    oracle.check(history)
    history.reset_parameters()
    Oracle(dtype).check(history)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pushes_of_nothing_count_and_write_nothing(make, dtype):
    history = make(dtype)
    history.push(torch.empty(0, WIDTH), torch.empty(0, dtype=torch.int64))
    history.push(torch.ones(3, WIDTH), offset=[], count=[])
    assert history.pull(torch.empty(0, dtype=torch.int64)).shape == (0, WIDTH)
    assert history.pull().abs().sum() == 0
    assert history.age().tolist() == [2] * ROWS


def test_a_history_that_is_larger_than_its_pieces(tmp_path, monkeypatch):
    from recollect.autoscale.histories import _file

    for name in ("_REGION_BYTES", "_COPY_BYTES"):
        monkeypatch.setattr(_file, name, 64)
    monkeypatch.setattr(_file, "_RESIDENT_BYTES", 200)
    torch.manual_seed(0)
    x = torch.randn(500, 3)
    memory, file = History(500, 3), History(500, 3, path=tmp_path / "h")
    n_id = torch.randperm(500)[:300]
    for history in (memory, file):
        history.push(x[:400], offset=[100], count=[400])
        history.push(x[:300], n_id)
    for chosen in (None, n_id, n_id.sort().values, torch.randint(500, (900,))):
        assert torch.equal(memory.pull(chosen), file.pull(chosen))
        assert torch.equal(memory.age(chosen), file.age(chosen))
    file.reset_parameters()
    assert file.pull().abs().sum() == 0
    assert file.age().sum() == 0


def test_int8_is_off_by_half_a_scale_at_most():
    torch.manual_seed(0)
    x = torch.randn(64, 33) * 10.0 ** torch.randint(-20, 20, (64, 1))
    x[3] = 0
    history = History(64, 33, dtype=torch.int8)
    history.push(x)
    scale = x.abs().amax(1, keepdim=True).double() / 127
    assert ((history.pull().double() - x.double()).abs() <= scale * (0.5 + 1e-5)).all()
    assert torch.equal(history.pull()[3], x[3])
    assert torch.equal(history.pull().abs().argmax(1)[:3], x.abs().argmax(1)[:3])


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_int8_of_a_single_row(make, width):
    """It is contiguous with any stride, and a stride that is no multiple of 4 cannot be read as scales."""
    x = torch.linspace(1, 2, width).expand(ROWS, width)
    history = make(torch.int8, width=width)
    history.push(x)
    history.push(x[:1] * 3, torch.tensor([2]))
    for node in (1, 2):
        found = history.pull(torch.tensor([node])).cpu()
        torch.testing.assert_close(found, x[:1] * (3 if node == 2 else 1), rtol=0.02, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int8_shows_a_row_that_is_not_finite(value):
    history = History(3, 4, dtype=torch.int8)
    x = torch.ones(3, 4)
    x[1, 2] = value
    history.push(x)
    assert history.pull()[1].isnan().all()
    torch.testing.assert_close(history.pull()[[0, 2]], torch.ones(2, 4))


def test_int8_of_the_smallest_numbers():
    history = History(2, 2, dtype=torch.int8)
    history.push(torch.tensor([[1e-45, -1e-45], [1e-38, 5e-39]]))
    found = history.pull()
    assert found.isfinite().all()
    torch.testing.assert_close(found[1], torch.tensor([1e-38, 5e-39]), rtol=0.02, atol=0)


def test_int8_keeps_the_signs_of_numbers_smaller_than_any_scale():
    """Of 190 times the smallest number the scale is that number itself, and 190 is beyond int8."""
    x = torch.arange(1, 600).unsqueeze(1) * 2.0**-149 * torch.tensor([1.0, -1.0])
    history = History(599, 2, dtype=torch.int8)
    history.push(x)
    found = history.pull()
    assert bool((found[:, 0] >= 0).all())
    assert torch.equal(found[:, 0], -found[:, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_known_before_they_are_taken(dtype, tmp_path):
    expected = history_bytes(1000, 7, dtype)
    memory = History(1000, 7, dtype=dtype)
    memory.save_histories = True
    state = memory.state_dict()
    assert state["table"].nbytes + state["stamps"].nbytes == expected
    file = History(1000, 7, dtype=dtype, path=tmp_path / "h")
    assert expected <= (tmp_path / "h").stat().st_size <= expected + 8192
    assert file.pull().shape == (1000, 7)
    assert history_bytes(10**9, 256, torch.float32) == 10**9 * (1024 + 4)


BAD = {
    "rows beyond the end": (lambda x: {"x": x[:2], "n_id": torch.tensor([0, ROWS])}, IndexError, "got 0 to 23"),
    "negative rows": (lambda x: {"x": x[:2], "n_id": torch.tensor([0, -1])}, IndexError, "got -1 to 0"),
    "a mask": (lambda x: {"x": x, "n_id": torch.ones(ROWS, dtype=torch.bool)}, TypeError, r"got torch\.bool"),
    "float rows": (lambda x: {"x": x[:1], "n_id": torch.ones(1)}, TypeError, r"got torch\.float32"),
    "a list of rows": (lambda x: {"x": x[:1], "n_id": [1]}, TypeError, "got list"),
    "rows twice": (lambda x: {"x": x[:3], "n_id": torch.tensor([4, 1, 4])}, ValueError, "got 1 repetitions"),
    "2-D rows": (lambda x: {"x": x[:1], "n_id": torch.tensor([[1]])}, ValueError, r"got \[1, 1\]"),
    "more features than rows": (
        lambda x: {"x": x[:3], "n_id": torch.tensor([4, 1])},
        ValueError,
        "2 rows .*got 3 rows",
    ),
    "fewer features": (lambda x: {"x": x[:3], "offset": [0], "count": [4]}, ValueError, "4 rows .*got 3 rows"),
    "fewer than all": (lambda x: {"x": x[:3]}, ValueError, "23 rows .*got 3 rows"),
    "another width": (lambda x: {"x": x[:, :4]}, ValueError, r"\[rows, 5\] \(got \[23, 4\]\)"),
    "1-D features": (lambda x: {"x": x[0]}, ValueError, r"got \[5\]"),
    "integers": (lambda x: {"x": x.long()}, TypeError, r"got torch\.int64"),
    "parts that overlap": (lambda x: {"x": x, "offset": [8, 0], "count": [4, 9]}, ValueError, "got 0:9 and 8:12"),
    "a part inside another": (lambda x: {"x": x, "offset": [0, 3], "count": [9, 1]}, ValueError, "got 0:9 and 3:4"),
    "a part beyond the end": (lambda x: {"x": x, "offset": [0, 20], "count": [2, 4]}, IndexError, "got 20:24"),
    "a part before the start": (lambda x: {"x": x, "offset": [-1], "count": [2]}, IndexError, "got -1:1"),
    "a negative count": (lambda x: {"x": x, "offset": [4], "count": [-2]}, ValueError, "got -2"),
    "counts missing": (lambda x: {"x": x, "offset": [0, 1], "count": [1]}, ValueError, "got 2 and 1"),
    "no counts": (lambda x: {"x": x, "offset": [0]}, ValueError, "got offset alone"),
    "no offsets": (lambda x: {"x": x, "count": [1]}, ValueError, "got count alone"),
    "float offsets": (lambda x: {"x": x, "offset": torch.zeros(1), "count": [1]}, ValueError, r"got torch\.float32"),
    "a list of floats": (lambda x: {"x": x, "offset": [0.5], "count": [1]}, ValueError, r"offset: .*got \[0\.5\]"),
    "nodes not permuted": (
        lambda x: {"x": x[:2], "n_id": torch.tensor([3, 2]), "offset": [2], "count": [2]},
        ValueError,
        "permute the data",
    ),
    "fewer nodes than the parts": (
        lambda x: {"x": x[:2], "n_id": torch.tensor([2]), "offset": [2], "count": [2]},
        ValueError,
        "got 1 nodes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pushes_are_refused_and_write_nothing(make, case):
    arguments, error, match = BAD[case]
    history = make()
    history.push(torch.ones(ROWS, WIDTH))
    with pytest.raises(error, match=match):
        history.push(**arguments(torch.full((ROWS, WIDTH), 2.0)))
    assert torch.equal(history.pull(), torch.ones_like(history.pull()))
    assert history.age().tolist() == [0] * ROWS


@pytest.mark.parametrize("name", ["pull", "age"])
@pytest.mark.parametrize(
    ("n_id", "error"),
    [
        (torch.tensor([0, ROWS]), IndexError),
        (torch.tensor([-1]), IndexError),
        (torch.ones(ROWS, dtype=torch.bool), TypeError),
        (torch.tensor(3), ValueError),
    ],
    ids=str,
)
def test_bad_pulls(make, name, n_id, error):
    with pytest.raises(error, match="n_id"):
        getattr(make(), name)(n_id)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 4), r"num_embeddings must be at least 1 \(got 0\)"),
        ((4, 0), r"embedding_dim must be at least 1 \(got 0\)"),
        (("5", 4), r"num_embeddings must be an integer of at least 1 \(got '5'\)"),
        ((4, 2.5), r"embedding_dim must be an integer of at least 1 \(got 2.5\)"),
        ((4, 4, torch.int32), r"the dtype of a history must be one of .*got torch\.int32"),
        ((4, 4, "float16"), r"the dtype of a history must be one of .*got 'float16'"),
    ],
)
def test_bad_sizes_and_types(arguments, match):
    rows, width, *dtype = arguments
    for call in (lambda: history_bytes(*arguments), lambda: History(rows, width, None, *dtype)):
        with pytest.raises(ValueError, match=match):
            call()


def test_sizes_may_be_numpys():
    assert history_bytes(numpy.int64(5), numpy.int32(2)) == history_bytes(5, 2) == 60
    history = History(numpy.int64(5), numpy.int32(2))
    assert type(history.num_embeddings) is type(history.embedding_dim) is int


def test_rows_that_were_never_pushed_are_counted(make):
    history = make()
    assert history.never_pushed() == ROWS
    history.push(torch.ones(3, WIDTH), torch.tensor([4, 0, 7]))
    history.push(torch.zeros(2, WIDTH), torch.tensor([4, 5]))
    assert history.never_pushed() == ROWS - 4
    history.push(torch.ones(ROWS, WIDTH))
    assert history.never_pushed() == 0
    history.reset_parameters()
    assert history.never_pushed() == ROWS


def test_rebuilds_push_nothing_and_first_calls_do(make):
    history = make()
    with backward_mode():
        history.push(torch.ones(ROWS, WIDTH))
    assert history.age().tolist() == [0] * ROWS
    with dry_mode():
        history.push(torch.ones(ROWS, WIDTH))
    assert history.age().tolist() == [0] * ROWS
    assert history.pull().sum() == ROWS * WIDTH


def test_a_frame_pushes_once(make):
    history = make()
    linear = nn.Linear(WIDTH, WIDTH)
    n_id = torch.tensor([3, 4])
    pushed = []

    def layer(x):
        y = linear(x)
        history.push(y, offset=[0], count=[3])
        pushed.append(y)
        return y.sin() + history.pull(n_id).sum()

    x = torch.randn(3, WIDTH, requires_grad=True)
    recollect.checkpoint(layer, x).sum().backward()
    assert len(pushed) == 2  # the forward pass and the rebuild
    assert history.age(torch.tensor([0, 5])).tolist() == [0, 1]
    torch.testing.assert_close(history.pull(torch.arange(3)), pushed[0].detach())


def test_what_is_pulled_is_a_constant_of_its_own(make):
    history = make()
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    history.push(x * 2)
    for pulled in (history.pull(), history.pull(torch.tensor([1]))):
        assert not pulled.requires_grad
        pulled.zero_()
    assert history.pull().sum() == 2 * ROWS * WIDTH


def test_a_history_made_in_inference_mode_can_be_trained(make):
    with torch.inference_mode():
        history = make()
        history.push(torch.ones(ROWS, WIDTH))
    history.push(torch.ones(1, WIDTH), offset=[4], count=[1])
    weight = torch.ones(WIDTH, requires_grad=True)
    (history.pull() * weight).sum().backward()
    assert weight.grad.tolist() == [ROWS] * WIDTH


def test_moving_the_module_moves_the_result_and_not_the_table():
    model = nn.Sequential(History(ROWS, WIDTH))
    history = model[0]
    table = rows_of(history)
    assert history.pull().dtype == torch.float32
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        assert history.pull().dtype == dtype
    model.to("meta")
    assert history.out_device == torch.device("meta")
    assert history.age().device == torch.device("meta")
    assert rows_of(history) is table
    assert table.device == torch.device("cpu")
    assert table.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_results_follow_the_module_to_cuda(tmp_path):
    for history in (History(ROWS, WIDTH), History(ROWS, WIDTH, path=tmp_path / "h")):
        history.cuda()
        x = torch.randn(ROWS, WIDTH, device="cuda")
        history.push(x)
        assert torch.equal(history.pull(torch.tensor([3, 1], device="cuda")), x[[3, 1]])
        assert history.table.records.device.type == "cpu"
    assert rows_of(History(ROWS, WIDTH)).is_pinned()


def test_the_state_holds_the_table_if_asked_to():
    torch.manual_seed(0)
    history = History(ROWS, WIDTH, dtype=torch.int8)
    history.push(torch.randn(ROWS, WIDTH))
    history.push(torch.randn(2, WIDTH), offset=[4], count=[2])
    assert history.state_dict() == {}
    history.save_histories = True
    state = copy.deepcopy(nn.Sequential(history).state_dict())
    assert set(state) == {"0.table", "0.stamps", "0.pushes"}
    for other in (History(ROWS, WIDTH, dtype=torch.int8, save_histories=keep) for keep in (True, False)):
        nn.Sequential(other).load_state_dict(state)
        assert torch.equal(other.pull(), history.pull())
        assert torch.equal(other.age(), history.age())


def test_a_state_loads_into_a_file(tmp_path):
    history = History(ROWS, WIDTH, save_histories=True)
    history.push(torch.randn(3, WIDTH), offset=[4], count=[3])
    file = History(ROWS, WIDTH, path=tmp_path / "h")
    file.load_state_dict(history.state_dict())
    assert torch.equal(file.pull(), history.pull())
    assert torch.equal(file.age(), history.age())


def test_states_that_do_not_fit():
    history = History(ROWS, WIDTH, save_histories=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*table.*stamps.*pushes"):
        history.load_state_dict({})
    history.load_state_dict({}, strict=False)
    history.push(torch.ones(ROWS, WIDTH))
    for other in (History(ROWS + 1, WIDTH), History(ROWS, WIDTH, dtype=torch.float16)):
        other.save_histories = True
        with pytest.raises(RuntimeError, match="cannot load"):
            history.load_state_dict(other.state_dict())
    empty = History(ROWS, WIDTH, save_histories=True).state_dict()
    for pushes in (torch.tensor(-1), torch.tensor([1, 2]), torch.tensor(0.5)):
        with pytest.raises(RuntimeError, match="the number of pushes is expected"):
            history.load_state_dict(empty | {"pushes": pushes})
    assert history.pull().sum() == ROWS * WIDTH


def test_copies_are_independent():
    history = History(ROWS, WIDTH)
    history.push(torch.ones(ROWS, WIDTH))
    other = copy.deepcopy(history)
    other.push(torch.zeros(1, WIDTH), offset=[0], count=[1])
    assert history.pull().sum() == ROWS * WIDTH
    assert other.pull().sum() == (ROWS - 1) * WIDTH
    assert history.age().sum() == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda history: pickle.loads(pickle.dumps(history))])
def test_copies_are_pinned_where_there_is_cuda(again, monkeypatch):
    history, pinned = History(ROWS, WIDTH), []
    history.push(torch.ones(ROWS, WIDTH))
    if not torch.cuda.is_available():  # a machine that has it, as far as copying is concerned
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: any(tensor is one for one in pinned))
    other = again(history)
    assert rows_of(other).is_pinned()
    assert not other.table.stamps.tensor.is_pinned()
    assert rows_of(other) is not rows_of(history)
    assert torch.equal(other.pull(), torch.ones(ROWS, WIDTH))


def test_parts_are_copied_and_not_indexed(make, monkeypatch):
    """Neighbouring parts are one copy, however many they are; no operation takes row numbers."""
    history = make()
    x = torch.randn(20, WIDTH)
    operations = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func.__name__.split(".")[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        history.push(x, offset=torch.arange(20), count=torch.ones(20, dtype=torch.int64))
    assert not {"index_copy_", "index_put_", "scatter_", "index"} & set(operations)
    assert operations.count("copy_") <= 2  # rows, stamps
    assert len(operations) < 20
    assert torch.equal(history.pull(torch.arange(20)).cpu(), x)
