"""Pairs to be predicted: each is handed to one mini-batch of an epoch, which holds both ends."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from graph_zoo import graph, ptr_of
from hypothesis import given, settings
from hypothesis import strategies as st

from recollect.autoscale import EvalSubgraphLoader, SubgraphLoader, permute

N = 30


def random_graph(seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = graph(N, torch.randint(N, (80, 2), generator=generator).tolist())
    return permute(data, torch.randperm(N, generator=generator), log=False), generator


def epoch_of(loader, key="edge_label"):
    """How often each pair comes with each label, in numbers of the whole graph; local ones are checked on the way."""
    found: Counter = Counter()
    for batch in loader:
        pairs, labels = batch.data.edge_label_index, batch.data[key]
        assert pairs.dtype == torch.int64
        assert bool((pairs >= 0).all())
        assert bool((pairs < batch.batch_size).all())
        assert pairs.size(1) == len(labels) > 0
        for (source, target), label in zip(batch.n_id[pairs].t().tolist(), labels.tolist(), strict=True):
            found[source, target, str(label)] += 1
    return found


def given_pairs(links, labels):
    return Counter(
        (source, target, str(label))
        for (source, target), label in zip(links.t().tolist(), labels.tolist(), strict=True)
    )


OPTIONS = [
    {},
    {"batch_size": 3},
    {"shuffle": True},
    {"batch_size": 2, "shuffle": True, "bipartite": False},
    {"adjacency": "edge_index", "batch_size": 100},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ptr", [ptr_of(30), ptr_of(9, 0, 8, 13), ptr_of(*[1] * 30), ptr_of(0, 15, 15, 0)], ids=len)
def test_an_epoch_has_each_pair_once(options, ptr):
    data, generator = random_graph()
    links, labels = torch.randint(N, (2, 70), generator=generator), torch.arange(70)
    links[:, 50:] = links[:, :20]  # some are there twice, with other labels
    loader = SubgraphLoader(data, ptr, links=links, link_labels=labels, log=False, **options)
    for _ in range(2):
        assert epoch_of(loader) == given_pairs(links, labels)
    assert len(list(loader)) == len(loader)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, N), max_size=6), st.integers(1, 5), st.integers(1, 40), st.integers(0, 5))
def test_an_epoch_has_each_pair_once_whatever_the_parts(cuts, batch_size, count, seed):
    data, generator = random_graph(seed)
    links, labels = torch.randint(N, (2, count), generator=generator), torch.rand(count, 2, generator=generator)
    ptr = torch.tensor([0, *sorted(cuts), N])
    loader = SubgraphLoader(data, ptr, batch_size, links=links, link_labels=labels, shuffle=True, log=False)
    assert epoch_of(loader) == given_pairs(links, labels)


def test_units_are_parts_and_pairs_of_parts():
    data, _ = random_graph()
    links = torch.tensor([[0, 1, 12, 25, 29, 3], [1, 0, 3, 4, 28, 26]])
    loader = SubgraphLoader(data, ptr_of(10, 10, 5, 5), links=links, link_labels=torch.arange(6), log=False)
    assert loader.units == [(0,), (0, 1), (0, 3), (3,)]
    found = [(batch.count.tolist(), batch.data.edge_label.tolist()) for batch in loader]
    assert found == [([10], [0, 1]), ([10, 10], [2]), ([10, 5], [3, 5]), ([5], [4])]
    (batch,) = SubgraphLoader(
        data, ptr_of(10, 10, 5, 5), 2, links=links, link_labels=torch.arange(6), sampler=[2, 1], log=False
    )
    assert batch.offset.tolist() == [0, 25, 10]  # each part once
    assert batch.data.edge_label.tolist() == [3, 5, 2]


def test_a_mini_batch_is_that_of_its_parts():
    data, generator = random_graph()
    links = torch.randint(N, (2, 40), generator=generator)
    ptr = ptr_of(9, 8, 13)
    loader = SubgraphLoader(data, ptr, links=links, log=False)
    for unit, batch in zip(loader.units, loader, strict=True):
        assert "edge_label" not in batch.data
        (plain,) = SubgraphLoader(data, ptr, batch_size=len(unit), sampler=unit, log=False)
        assert torch.equal(batch.n_id, plain.n_id)
        assert torch.equal(batch.data.adj_t.to_dense(), plain.data.adj_t.to_dense())
        assert torch.equal(batch.data.x, plain.data.x)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_hand_out_the_same(context):
    data, generator = random_graph()
    links, labels = torch.randint(N, (2, 50), generator=generator), torch.arange(50)
    workers = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": context, "timeout": 60}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"This process .* is multi-threaded, use of fork")
        loader = SubgraphLoader(data, ptr_of(9, 8, 13), links=links, link_labels=labels, log=False, **workers)
        for _ in range(2):
            assert epoch_of(loader) == given_pairs(links, labels)


def test_labels_of_the_graph_go_with_its_pairs():
    data, generator = random_graph()
    data.edge_label_index = torch.randint(N, (2, 80), generator=generator)  # as many as edges
    data.edge_label, data.edge_label_time = torch.arange(80), torch.arange(80) * 2
    loader = SubgraphLoader(data, ptr_of(9, 8, 13), links=data.edge_label_index, log=False)
    assert epoch_of(loader) == given_pairs(data.edge_label_index, data.edge_label)
    assert epoch_of(loader, "edge_label_time") == given_pairs(data.edge_label_index, data.edge_label_time)
    other = SubgraphLoader(
        data, ptr_of(9, 8, 13), links=data.edge_label_index, link_labels=data.edge_label.neg(), log=False
    )
    assert epoch_of(other) == given_pairs(data.edge_label_index, data.edge_label.neg())
    assert "edge_label_index" in data


def test_labels_without_their_pairs_are_those_of_links():
    data, generator = random_graph()
    links, data.edge_label = torch.randint(N, (2, 20), generator=generator), torch.arange(20)
    loader = SubgraphLoader(data, ptr_of(9, 8, 13), links=links, log=False)
    assert epoch_of(loader) == given_pairs(links, data.edge_label)


def labelled(rows, index=None):
    data, _ = random_graph()
    data.edge_label = torch.arange(rows)
    if index is not None:
        data.edge_label_index = index
    return data


PAIRS = torch.tensor([[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        (
            labelled(80),
            {"links": PAIRS},
            ValueError,
            r"edge_label has shape \(80,\) and goes with .*link_labels=",
        ),
        (labelled(5), {"links": PAIRS}, ValueError, r"edge_label has shape \(5,\) and goes with other edges"),
        (labelled(3, PAIRS.flip(0)), {"links": PAIRS}, ValueError, r"goes with other edges than the 3 links"),
        (None, {"links": PAIRS.t()}, ValueError, r"links has shape \(3, 2\), .* write links.t\(\).contiguous\(\)"),
        (None, {"links": PAIRS.float()}, TypeError, r"links is of torch.float32, .* write links.long\(\)"),
        (None, {"links": PAIRS.numpy()}, TypeError, r"links is a ndarray, .* write torch.as_tensor\(links\)"),
        (None, {"links": "edge_label_index"}, TypeError, "links is a str"),
        (None, {"links": PAIRS + 26}, ValueError, "links has entries from 26 to 31, but the graph's 30 nodes"),
        (None, {"links": PAIRS[:, :0]}, ValueError, "links has no pairs"),
        (None, {"links": PAIRS, "link_labels": [0, 1, 1]}, TypeError, r"link_labels is a list, .*as_tensor"),
        (None, {"links": PAIRS, "link_labels": torch.ones(2)}, ValueError, "a row for each of the 3 links"),
        (None, {"link_labels": torch.ones(2)}, ValueError, "link_labels go with links"),
    ],
)
def test_refused(data, arguments, error, message):
    with pytest.raises(error, match=message):
        SubgraphLoader(random_graph()[0] if data is None else data, ptr_of(15, 15), **arguments)


def test_a_unit_twice_is_refused():
    data, _ = random_graph()
    loader = SubgraphLoader(data, ptr_of(15, 15), 2, links=PAIRS, sampler=[0, 0], log=False)
    with pytest.raises(ValueError, match=r"each unit of links once, but its sampler chose \[0, 0\]"):
        list(loader)


def test_evaluation_takes_no_links():
    data, _ = random_graph()
    with pytest.raises(ValueError, match=r"links lie between parts: evaluate the nodes first, then out\[links\]"):
        EvalSubgraphLoader(data, ptr_of(15, 15), links=PAIRS)


def test_sizes_may_be_numpys():
    data, _ = random_graph()
    (batch,) = SubgraphLoader(data, ptr_of(15, 15), np.int64(5), links=PAIRS, log=False)
    assert batch.data.edge_label_index.shape == (2, 3)
