import importlib.util
import itertools
import logging
import sys
import warnings

import numpy as np
import pytest
import torch
from graph_zoo import directed, every_graph, graph, ring
from torch_geometric import EdgeIndex

from recollect.autoscale import metis, partition, partition_quality, permute, to_adj_t


def needs(package):
    """There are no wheels of the partitioners for some platforms."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


METIS = pytest.param("metis", marks=needs("pymetis"))
KAMINPAR = pytest.param("kaminpar", marks=needs("kaminpar"))
both_optimising = pytest.mark.parametrize("method", [METIS, KAMINPAR])
every_method = pytest.mark.parametrize("method", [METIS, KAMINPAR, "random", "contiguous"])


def adj_t_of(data):
    return to_adj_t(data).adj_t


def cliques(count, size, bridge=1.0, inside=1.0):
    """Cliques in a row, each joined to the next by one edge; nodes are numbered across them."""
    edges, weights = [], []
    for c in range(count):
        nodes = [c + count * k for k in range(size)]
        edges += [(i, j) for i in nodes for j in nodes if i != j]
        weights += [inside] * (size * (size - 1))
        if c + 1 < count:
            edges += [(nodes[-1], nodes[-1] + 1), (nodes[-1] + 1, nodes[-1])]
            weights += [bridge] * 2
    data = graph(count * size, edges)
    data.edge_weight = torch.tensor(weights, dtype=torch.float64)
    return data


def one_direction(data):
    keep = data.edge_index[0] < data.edge_index[1]
    for key in ("edge_index", "edge_weight", "edge_attr"):
        data[key] = data[key][..., keep] if key == "edge_index" else data[key][keep]
    return data


def csr(dense):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return dense.to_sparse_csr()


def parts_of(perm, ptr):
    return [set(perm[a:b].tolist()) for a, b in itertools.pairwise(ptr)]


@every_graph
@every_method
@pytest.mark.parametrize("num_parts", [1, 2, 3, 50])
def test_every_node_is_in_one_part(make, method, num_parts):
    data = make()
    perm, ptr = partition(adj_t_of(data), num_parts, method)
    assert perm.dtype == ptr.dtype == torch.int64
    assert ptr.shape == (num_parts + 1,)
    assert ptr[0] == 0
    assert ptr[-1] == data.num_nodes
    assert (ptr.diff() >= 0).all()
    assert sorted(perm.tolist()) == list(range(data.num_nodes))
    permute(data, perm)


@every_method
def test_more_parts_than_nodes_leave_parts_empty(method):
    _, ptr = partition(adj_t_of(ring()), 11, method)
    assert sorted(ptr.diff().tolist()) == [0] * 3 + [1] * 8


@every_method
def test_a_graph_without_nodes(method):
    perm, ptr = partition(adj_t_of(graph(0, [])), 3, method)
    assert perm.tolist() == []
    assert ptr.tolist() == [0, 0, 0, 0]


@both_optimising
@pytest.mark.parametrize("one_way", [False, True], ids=["undirected", "directed"])
@pytest.mark.parametrize("loops", [False, True], ids=["without loops", "with loops"])
def test_cliques_are_found(method, one_way, loops):
    data = cliques(4, 6)
    if one_way:
        data = one_direction(data)
    if loops:
        data.edge_index = torch.cat([data.edge_index, torch.arange(24).repeat(2, 1)], dim=1)
        data.edge_weight = torch.ones(data.edge_index.size(1))
        del data.edge_attr
    adj_t = adj_t_of(data)
    perm, ptr = partition(adj_t, 4, method)
    assert sorted(map(sorted, parts_of(perm, ptr))) == [[c + 4 * k for k in range(6)] for c in range(4)]
    quality = partition_quality(adj_t, perm, ptr)
    assert quality.edge_cut == (3 if one_way else 6)
    assert quality.balance == 1


@both_optimising
@pytest.mark.parametrize("scale", [1, 0.001], ids=["whole weights", "fractions"])
@pytest.mark.parametrize("first", [0, 1])
def test_heavy_edges_stay_whole(method, scale, first):
    """A ring of pairs: without weights all cuts into halves are as good, and half of them would cut pairs."""
    data = graph(8, [(i, (i + d) % 8) for i in range(8) for d in (1, 7)])
    pairs = [{i % 8, (i + 1) % 8} for i in range(first, 8 + first, 2)]
    weights = [50.0 if set(edge) in pairs else 1.0 for edge in data.edge_index.t().tolist()]
    data.edge_weight = torch.tensor(weights, dtype=torch.float64) * scale
    for seed in range(5):
        for part in parts_of(*partition(adj_t_of(data), 2, method, weighted=True, seed=seed)):
            assert all(len(part & pair) != 1 for pair in pairs)


@needs("kaminpar")
def test_kaminpar_keeps_to_the_imbalance():
    """Cliques of 7 and 5: to part them needs one part 1/6 above the mean."""
    cliques_of = [range(7), range(7, 12)]
    edges = [(i, j) for nodes in cliques_of for i in nodes for j in nodes if i != j] + [(6, 7), (7, 6)]
    adj_t = adj_t_of(graph(12, edges))
    found = [partition_quality(adj_t, *partition(adj_t, 2, "kaminpar", imbalance=share)) for share in (0.01, 0.2)]
    assert [quality.largest for quality in found] == [6, 7]
    assert found[0].edge_cut > found[1].edge_cut == 2


@needs("kaminpar")
def test_kaminpar_gets_the_preset(monkeypatch):
    import kaminpar

    names, by_name = [], kaminpar.context_by_name
    monkeypatch.setattr(kaminpar, "context_by_name", lambda name: names.append(name) or by_name(name))
    partition(adj_t_of(ring()), 2, "kaminpar", preset="largek")
    assert names == ["largek"]


@needs("pymetis")
def test_recursive_bisection_is_another_method():
    generator = torch.Generator().manual_seed(0)
    adj_t = adj_t_of(graph(200, torch.randint(200, (800, 2), generator=generator).tolist()))
    one, other = (metis(adj_t, 9, recursive, log=False).perm for recursive in (False, True))
    assert not torch.equal(one, other)


@every_graph
@every_method
def test_quality_counts_what_loops_count(make, method):
    adj_t = adj_t_of(make())
    perm, ptr = partition(adj_t, 3, method)
    quality = partition_quality(adj_t, perm, ptr)
    part_of = {node: p for p, part in enumerate(parts_of(perm, ptr)) for node in part}
    rowptr, cols = adj_t.crow_indices().tolist(), adj_t.col_indices().tolist()
    pairs = [(r, c) for r in range(len(rowptr) - 1) for c in cols[rowptr[r] : rowptr[r + 1]]]
    assert quality.edge_cut == sum(part_of[r] != part_of[c] for r, c in pairs)
    assert quality.num_edges == len(pairs)
    assert quality.largest == max(map(len, parts_of(perm, ptr)))
    assert quality.balance == pytest.approx(quality.largest / (perm.numel() / 3))
    assert quality.cut_share == pytest.approx(quality.edge_cut / max(len(pairs), 1))


@pytest.mark.parametrize("method", [METIS, KAMINPAR, "random"])
def test_the_seed_decides(method):
    generator = torch.Generator().manual_seed(0)
    adj_t = adj_t_of(graph(200, torch.randint(200, (800, 2), generator=generator).tolist()))
    options = {"threads": 1} if method == "kaminpar" else {}
    results = [partition(adj_t, 5, method, seed=seed, **options).perm.tolist() for seed in (0, 1, 0)]
    assert results[0] == results[2] != results[1]


def test_random_numbers_of_others_are_not_drawn():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    partition(adj_t_of(ring()), 2, "random")
    assert torch.equal(torch.get_rng_state(), state)


@needs("kaminpar")
def test_kaminpar_gets_its_seed_back():
    import kaminpar

    kaminpar.reseed(17)
    partition(adj_t_of(ring()), 2, "kaminpar", seed=3)
    assert kaminpar.seed() == 17


@needs("pymetis")
def test_metis_under_its_own_name():
    adj_t = adj_t_of(cliques(4, 6))
    for recursive in (False, True):
        one = metis(adj_t, 4, recursive, log=False)
        other = partition(adj_t, 4, "metis", recursive=recursive)
        assert torch.equal(one.perm, other.perm)
        assert torch.equal(one.ptr, other.ptr)


def test_an_edge_index_is_a_graph_too():
    data = directed()
    edges = EdgeIndex(data.edge_index, sparse_size=(9, 9)).sort_by("col").values
    one, other = partition(edges, 3, "random"), partition(adj_t_of(data), 3, "random")
    assert torch.equal(one.perm, other.perm)
    assert partition_quality(edges, *one) == partition_quality(adj_t_of(data), *other)


def test_contiguous_keeps_the_order():
    perm, ptr = partition(adj_t_of(directed()), 2, "contiguous")
    assert perm.tolist() == list(range(9))
    assert ptr.tolist() == [0, 5, 9]


@needs("pymetis")
@needs("kaminpar")
def test_figures_are_logged_and_nothing_is_printed(caplog, capfd):
    adj_t = adj_t_of(cliques(4, 6))
    with caplog.at_level(logging.INFO, logger="recollect"):
        partition(adj_t, 4, "metis", log=False)
        assert caplog.messages == []
        partition(adj_t, 4, "kaminpar")
    assert "6 of 126 edges cut (4.8 %), largest part 6 nodes, 1.000 of the mean" in caplog.messages[0]
    assert capfd.readouterr() == ("", "")


@needs("pymetis")
def test_a_cache_saves_the_work(tmp_path, monkeypatch):
    adj_t = adj_t_of(ring())
    first = partition(adj_t, 2, "metis", cache=tmp_path / "parts")
    (file,) = (tmp_path / "parts").iterdir()
    monkeypatch.setitem(sys.modules, "pymetis", None)  # METIS itself is out of reach now
    second = partition(adj_t, 2, "metis", cache=tmp_path / "parts")
    assert torch.equal(first.perm, second.perm)
    for other in ({"num_parts": 3}, {"num_parts": 2, "seed": 1}, {"num_parts": 2, "recursive": True}):
        with pytest.raises(ImportError):
            partition(adj_t, method="metis", cache=tmp_path / "parts", **other)
    with pytest.raises(ImportError):
        partition(adj_t_of(directed()), 2, "metis", cache=tmp_path / "parts")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cannot be read as a partition .* delete it"):
        partition(adj_t, 2, "metis", cache=tmp_path / "parts")
    torch.save(torch.zeros(3, dtype=torch.int64), file)
    with pytest.raises(ValueError, match=r"holds 3 nodes, but the graph has \d+; delete it"):
        partition(adj_t, 2, "metis", cache=tmp_path / "parts")
    parts = torch.arange(adj_t.size(0)) % 2
    for wrong in ([1, 2], {"a": parts}, parts.float(), parts.to_sparse()):
        torch.save(wrong, file)
        with pytest.raises(ValueError, match=r"holds no partition, which is a tensor of int64; delete it"):
            partition(adj_t, 2, "metis", cache=tmp_path / "parts")
    for wrong in (parts - 1, parts + 1):
        torch.save(wrong, file)
        with pytest.raises(ValueError, match=r"names parts beyond the 2 of the graph; delete it"):
            partition(adj_t, 2, "metis", cache=tmp_path / "parts")


@pytest.mark.parametrize(("method", "package"), [("metis", "pymetis"), ("kaminpar", "kaminpar")])
def test_a_missing_package_is_named(method, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = f'method="{method}" needs the package {package}: pip install {package}; or choose method="random"'
    with pytest.raises(ImportError, match=message):
        partition(adj_t_of(ring()), 2, method)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_parts": 0}, ValueError, r"num_parts must be at least 1 \(got 0\)"),
        ({"num_parts": 2.5}, ValueError, r"num_parts must be an integer of at least 1 \(got 2.5\)"),
        ({"method": "louvain"}, ValueError, "method is 'louvain', but must be one of metis, kaminpar, random"),
        ({"method": "random", "recursive": True}, ValueError, "random takes no recursive"),
        pytest.param(
            {"method": "kaminpar", "preset": "none"},
            ValueError,
            "preset is 'none', but must be one of .*default",
            marks=needs("kaminpar"),
        ),
        pytest.param({"method": "kaminpar", "threads": 0}, ValueError, "threads is 0", marks=needs("kaminpar")),
        pytest.param({"method": "kaminpar", "imbalance": 0.0}, ValueError, "imbalance 0.0", marks=needs("kaminpar")),
        ({"adj_t": torch.eye(3)}, TypeError, "layout torch.strided, but must be a torch.sparse_csr tensor"),
        ({"adj_t": csr(torch.ones(2, 3))}, ValueError, r"shape \(2, 3\), but must be \[N, N\]"),
        pytest.param(
            {"weighted": True, "adj_t": csr(-torch.eye(3))},
            ValueError,
            "finite and not negative",
            marks=needs("pymetis"),
        ),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        partition(**{"adj_t": adj_t_of(ring()), "num_parts": 2, **arguments})


@every_method
def test_numbers_may_be_numpys(method):
    adj_t = adj_t_of(cliques(3, 4))
    one, other = partition(adj_t, 3, method, seed=1), partition(adj_t, np.int64(3), method, seed=np.int64(1))
    assert torch.equal(one.perm, other.perm)
    assert torch.equal(one.ptr, other.ptr)
