"""Parts of the same weight, by every method."""

import importlib.util
import itertools
import logging

import numpy as np
import pytest
import torch
from graph_zoo import graph, ring

from recollect.autoscale import SubgraphLoader, part_weights, partition, partition_quality, permute, to_adj_t
from recollect.autoscale.partitioning._methods import write_parhip
from recollect.autoscale.partitioning._undirected import undirected


def needs(package):
    """There are no wheels of the partitioners for some platforms."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


METIS = pytest.param("metis", marks=needs("pymetis"))
KAMINPAR = pytest.param("kaminpar", marks=needs("kaminpar"))
every_method = pytest.mark.parametrize("method", [METIS, KAMINPAR, "random", "contiguous"])


def adj_t_of(data):
    return to_adj_t(data).adj_t


def parts_of(perm, ptr):
    return [set(perm[a:b].tolist()) for a, b in itertools.pairwise(ptr)]


def weights(kind, n):
    generator = torch.Generator().manual_seed(1)
    return {
        "fractions": torch.rand(n, generator=generator) ** 4,
        "a mask": torch.arange(n) < n // 5,
        "integers": torch.randint(10, (n,), generator=generator),
        "large": torch.rand(n, generator=generator, dtype=torch.float64) * 1e12,
    }[kind]


@every_method
@pytest.mark.parametrize("kind", ["fractions", "a mask", "integers", "large"])
def test_parts_get_the_same_weight(method, kind):
    n = 800
    edges = torch.randint(n, (2400, 2), generator=torch.Generator().manual_seed(0))
    adj_t, weight = adj_t_of(graph(n, edges.tolist())), weights(kind, n)
    perm, ptr = partition(adj_t, 5, method, node_weight=weight)
    assert sorted(perm.tolist()) == list(range(n))
    sums = [sum(weight[node].item() for node in part) for part in parts_of(perm, ptr)]
    quality = partition_quality(adj_t, perm, ptr, weight)
    assert quality.heaviest == pytest.approx(max(sums))
    assert quality.weight_balance == pytest.approx(max(sums) / (sum(sums) / 5))
    assert quality[:5] == partition_quality(adj_t, perm, ptr)[:5]
    assert quality.weight_balance < 1.06
    if method == "contiguous":
        assert perm.tolist() == list(range(n))
    if method in ("contiguous", "random"):
        assert max(abs(total - sum(sums) / 5) for total in sums) <= float(weight.max()) * (1 + 1e-6)


@every_method
def test_equal_weights_are_none(method):
    adj_t = adj_t_of(ring())
    options = {"threads": 1} if method == "kaminpar" else {}
    one, other = (
        partition_quality(adj_t, *partition(adj_t, 4, method, node_weight=w, **options)) for w in (None, torch.ones(8))
    )
    assert one.balance == other.balance == 1


@every_method
@pytest.mark.parametrize("num_parts", [8, 11])
def test_with_as_many_parts_as_nodes_weights_do_not_matter(method, num_parts):
    _, ptr = partition(adj_t_of(ring()), num_parts, method, node_weight=torch.arange(8))
    assert sorted(ptr.diff().tolist()) == [0] * (num_parts - 8) + [1] * 8


@needs("kaminpar")
@pytest.mark.parametrize("edges_too", [False, True])
def test_kaminpar_reads_the_weights_of_nodes(edges_too, tmp_path):
    import kaminpar

    found = undirected(adj_t_of(ring()), weighted=edges_too)
    write_parhip(found, tmp_path / "graph", torch.arange(8) * 3 + 1)
    loaded = kaminpar.load_graph(str(tmp_path / "graph"), kaminpar.GraphFileFormat.PARHIP)
    assert [loaded.node_weight(node) for node in range(8)] == [3 * node + 1 for node in range(8)]
    pairs = [pair for node in range(8) for pair in sorted(loaded.neighbors(node))]
    heavy = [1] * 16 if found.weight is None else found.weight.tolist()
    assert pairs == list(zip(found.col.tolist(), heavy, strict=True))


def test_a_cache_tells_weights_apart(tmp_path):
    adj_t = adj_t_of(ring())
    found = [
        partition(adj_t, 2, "contiguous", cache=tmp_path, node_weight=weight).ptr.tolist()
        for weight in (None, torch.arange(8), torch.arange(8).flip(0), torch.arange(8))
    ]
    assert found == [[0, 4, 8], [0, 6, 8], [0, 2, 8], [0, 6, 8]]


def test_the_balance_of_weights_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="recollect"):
        partition(adj_t_of(ring()), 2, "contiguous", node_weight=torch.arange(8) < 2)
    assert "largest part 7 nodes, 1.750 of the mean; the heaviest 1.000 of the mean weight" in caplog.messages[0]


@every_method
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(7), ValueError, r"node_weight has shape \(7,\), but must be \[8\]"),
        (torch.ones(8, 1), ValueError, r"node_weight has shape \(8, 1\), but must be \[8\]"),
        (-torch.ones(8), ValueError, "an entry -1.0, but weights must be finite and not negative"),
        (torch.ones(8) / 0, ValueError, "an entry inf"),
        (torch.full((8,), float("nan")), ValueError, "an entry nan"),
        (torch.zeros(8), ValueError, "0 everywhere: leave it out"),
        (np.ones(8), TypeError, r"a ndarray, but must be a tensor .* torch.as_tensor\(node_weight\)"),
        ("train_mask", TypeError, r"a str, but must be a tensor .* such as data.train_mask"),
        (torch.ones(8, dtype=torch.complex64), TypeError, "is torch.complex64"),
    ],
)
def test_refused_weights(method, weight, error, message, tmp_path):
    with pytest.raises(error, match=message):
        partition(adj_t_of(ring()), 2, method, node_weight=weight, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    perm, ptr = partition(adj_t_of(ring()), 2, "contiguous")
    with pytest.raises(error, match=message):
        partition_quality(adj_t_of(ring()), perm, ptr, weight)


def test_what_a_part_takes_is_what_its_mini_batch_has():
    edges = torch.randint(50, (120, 2), generator=torch.Generator().manual_seed(3))
    data = to_adj_t(graph(50, edges.tolist()))
    perm, ptr = partition(data.adj_t, 7, "random", log=False)
    data = permute(data, perm, log=False)
    sizes = [len(batch.n_id) + batch.data.adj_t.values().numel() for batch in SubgraphLoader(data, ptr, log=False)]
    assert part_weights(data.adj_t, ptr).tolist() == sizes
    for wrong in (ptr[:-1], ptr + 1, ptr.flip(0), ptr[:1]):
        with pytest.raises(ValueError, match="ptr must ascend from 0 to the 50 nodes"):
            part_weights(data.adj_t, wrong)
    with pytest.raises(TypeError):
        part_weights(data, ptr)
