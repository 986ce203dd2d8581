"""Numbering by marks against plain sets, and what it costs."""

import itertools
import pickle
import threading

import pytest
import torch
from graph_zoo import ptr_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recollect.autoscale.loader import _subgraph
from recollect.autoscale.loader._subgraph import OneHop, Ranges

CPU = torch.device("cpu")


def random_graph(num_nodes, num_edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_nodes, (num_edges,), generator=generator).sort().values
    rowptr = torch.searchsorted(target, torch.arange(num_nodes + 1))
    return rowptr, torch.randint(num_nodes, (num_edges,), generator=generator)


def cut(one_hop, rowptr, pairs):
    start, stop = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return one_hop(Ranges(start, stop, CPU), Ranges(rowptr[start], rowptr[stop], CPU))


def by_sets(rowptr, col, pairs):
    """n_id, rowptr and col of the nodes in ``pairs``, one by one."""
    inside = [node for start, stop in pairs for node in range(start, stop)]
    rows = [col[rowptr[node] : rowptr[node + 1]].tolist() for node in inside]
    n_id = inside + sorted({source for row in rows for source in row} - set(inside))
    number = {node: k for k, node in enumerate(n_id)}
    return n_id, ptr_of(*map(len, rows)).tolist(), [number[source] for row in rows for source in row]


@st.composite
def graphs_and_ranges(draw):
    num_nodes = draw(st.integers(1, 30))
    graph = random_graph(num_nodes, draw(st.integers(0, 80)), draw(st.integers(0, 5)))
    bounds = sorted(draw(st.lists(st.integers(0, num_nodes), min_size=1, max_size=8)))
    pairs = draw(st.permutations(list(itertools.pairwise(bounds))))
    return graph, pairs


@settings(max_examples=200, deadline=None)
@given(graphs_and_ranges(), st.booleans())
def test_numbers_are_those_of_sets(graph_and_pairs, sliced):
    (rowptr, col), pairs = graph_and_pairs
    one_hop = OneHop(rowptr, col)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recollect.autoscale.loader._subgraph._FEW", 32 if sliced else 0)
        for _ in range(2):  # the second finds the table that the first left
            found = cut(one_hop, rowptr, pairs)
            assert tuple(part.tolist() for part in found) == by_sets(rowptr, col, pairs)


@pytest.mark.parametrize("limits", [(32, 512), (0, 512), (0, 1)], ids=["few", "many short", "many long"])
def test_ranges_take_rows_one_after_the_other(limits, monkeypatch):
    monkeypatch.setattr("recollect.autoscale.loader._subgraph._FEW", limits[0])
    monkeypatch.setattr("recollect.autoscale.loader._subgraph._LONG", limits[1])
    pairs = [(3, 6), (6, 6), (0, 1), (9, 9), (8, 10)]
    ranges = Ranges(torch.tensor(pairs)[:, 0], torch.tensor(pairs)[:, 1], CPU)
    rows = torch.randn(10, 2)
    wanted = [k for start, stop in pairs for k in range(start, stop)]
    assert ranges.total == len(wanted)
    assert ranges.positions.tolist() == wanted
    assert torch.equal(ranges.take(rows), rows[wanted])


def test_no_ranges():
    ranges = Ranges(torch.tensor([4]), torch.tensor([4]), CPU)
    assert ranges.total == 0
    assert ranges.positions.tolist() == []
    assert ranges.take(torch.randn(10, 2)).shape == (0, 2)


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that is made anew."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {tensor.data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.found += [tensor.numel() for tensor in made if tensor.data_ptr() not in given]
        return result


def test_nothing_as_large_as_the_graph_is_made_after_the_first_mini_batch():
    rowptr, col = random_graph(100_000, 200_000)
    one_hop = OneHop(rowptr, col)
    pairs = [(100, 150), (70_000, 70_050)]
    with Sizes() as first:
        cut(one_hop, rowptr, pairs)
    with Sizes() as second:
        found = cut(one_hop, rowptr, pairs)
    assert max(first.found) == 100_000
    assert max(second.found) <= max(found.n_id.numel(), found.col.numel())


def test_an_error_leaves_no_marks_behind(monkeypatch):
    rowptr, col = random_graph(40, 100)
    one_hop = OneHop(rowptr, col)
    wanted = by_sets(rowptr, col, [(5, 20)])
    cut(one_hop, rowptr, [(0, 9)])
    with monkeypatch.context() as patch:
        patch.setattr(_subgraph, "_distinct", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cut(one_hop, rowptr, [(0, 40)])
    assert tuple(part.tolist() for part in cut(one_hop, rowptr, [(5, 20)])) == wanted


def interrupt(*_):
    raise KeyboardInterrupt


def test_threads_do_not_share_marks():
    rowptr, col = random_graph(3000, 20_000)
    one_hop = OneHop(rowptr, col)
    pairs = [[(k * 100, k * 100 + 100)] for k in range(30)]
    wanted = [by_sets(rowptr, col, pair) for pair in pairs]
    wrong = []

    def work():
        for pair, right in list(zip(pairs, wanted, strict=True)) * 3:
            if tuple(part.tolist() for part in cut(one_hop, rowptr, pair)) != right:
                wrong.append(pair)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_marks_are_not_pickled():
    rowptr, col = random_graph(10_000, 10)
    one_hop = OneHop(rowptr, col)
    before = len(pickle.dumps(one_hop))
    cut(one_hop, rowptr, [(0, 10)])
    assert len(pickle.dumps(one_hop)) == before
