"""The user's compiled blocks inside frames, and frames inside a compiled model."""

import shutil

import pytest
import torch
from frames_zoo import WIDTH, assert_same, wanted
from torch import nn
from torch._dynamo.testing import CompileCounter

import recollect
from recollect.frames import couple

# torch.compile itself warns of torch.jit, of a profiler without CUDA, and the like
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Plain(nn.Module):
    """A block that keeps no list of its calls, which would be a graph break."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z):
        return self.last(self.dropout(torch.tanh(self.first(z))))


def run(blocks, x, source, enabled):
    torch.manual_seed(1)
    h = x * 1.0
    for _ in range(3):
        if source == "coupling":
            h = couple(blocks, h, [()] * len(blocks), enabled=enabled)
        else:
            h = torch.cat(
                [recollect.checkpoint(b, c, enabled=enabled) for b, c in zip(blocks, h.chunk(2, -1), strict=True)], -1
            )
    return h


def check(backend, source, dropout, tolerance=1e-10):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Plain(WIDTH // 2, dropout) for _ in range(2)).double()
    x = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    compiled = [torch.compile(block, backend=backend) for block in blocks]
    grads = []
    for enabled in (False, True):
        y = run(compiled, x, source, enabled)
        grads.append(torch.autograd.grad(y.sin().sum(), wanted(blocks, x)))
    assert_same(grads[1], grads[0], tolerance)
    if dropout == 0.0:
        plain = torch.autograd.grad(run(blocks, x, source, False).sin().sum(), wanted(blocks, x))
        assert_same(grads[1], plain, tolerance)


@pytest.mark.parametrize("source", ["checkpoint", "coupling"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_inside_frames(source, dropout, backend):
    check(backend, source, dropout)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_blocks_compiled_by_inductor_inside_frames():
    check("inductor", "coupling", 0.4)


def test_a_compiled_block_under_autocast():
    torch.manual_seed(0)
    blocks = nn.ModuleList(Plain(WIDTH // 2) for _ in range(2))
    compiled = [torch.compile(block, backend="aot_eager") for block in blocks]
    x = torch.randn(7, WIDTH, requires_grad=True)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(compiled, x, "coupling", enabled)
        grads.append(torch.autograd.grad(y.float().sin().sum(), wanted(blocks, x)))
    assert_same(grads[1], grads[0], 0.02)


@pytest.mark.parametrize("source", ["checkpoint", "coupling"])
def test_a_model_of_frames_that_is_compiled_as_a_whole(source):
    torch.manual_seed(0)
    blocks = nn.ModuleList(Plain(WIDTH // 2) for _ in range(2)).double()
    x = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(lambda x: run(blocks, x, source, True), backend="aot_eager")
    expected = torch.autograd.grad(run(blocks, x, source, False).sin().sum(), wanted(blocks, x))
    assert_same(torch.autograd.grad(compiled(x).sin().sum(), wanted(blocks, x)), expected)


def test_compiled_blocks_on_batches_of_all_sizes():
    """Mini-batches differ in their number of rows: a rebuild runs what was compiled for all of them, and no more."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Plain(WIDTH // 2, dropout=0.4) for _ in range(2)).double()
    counter = CompileCounter()
    compiled = [torch.compile(block, backend=counter) for block in blocks]
    for rows in (7, 12, 5, 30, 18):
        x = torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True)
        expected = torch.autograd.grad(run(compiled, x, "coupling", False).sin().sum(), wanted(blocks, x))
        assert_same(torch.autograd.grad(run(compiled, x, "coupling", True).sin().sum(), wanted(blocks, x)), expected)
    assert counter.frame_count <= 2 * len(blocks)  # one for the first size, one for any other


class Broken(Plain):
    """A block of which the graph breaks in the middle."""

    def forward(self, z):
        h = torch.tanh(self.first(z))
        torch._dynamo.graph_break()
        return self.last(h)


def test_a_block_that_breaks_the_graph():
    torch.manual_seed(0)
    blocks = nn.ModuleList(Broken(WIDTH // 2) for _ in range(2)).double()
    compiled = [torch.compile(block, backend="aot_eager") for block in blocks]
    x = torch.randn(7, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(run(blocks, x, "coupling", False).sin().sum(), wanted(blocks, x))
    assert_same(torch.autograd.grad(run(compiled, x, "coupling", True).sin().sum(), wanted(blocks, x)), expected)
