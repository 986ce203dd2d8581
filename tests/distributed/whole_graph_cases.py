"""Steps over a whole graph by several processes, against one process and against plain autograd."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import Wrap, assert_close, registering
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch_geometric.data import Data

from recollect.distributed import Shares, SharesError
from recollect.models import GCN, GCN2, RevGNN
from recollect.outofcore import WholeGraph

CASES: dict[str, Callable[[Wrap, int, int], None]] = {}
case = registering(CASES)


def a_graph(world: int, trained: Callable[[Tensor], Tensor] = lambda nodes: nodes % 3 > 0) -> tuple[Data, Tensor]:
    """A graph of two parts for each rank, of other sizes, with nodes that have no edges."""
    sizes = torch.tensor([5 + 2 * (part % 3) for part in range(2 * world)])
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    nodes = int(ptr[-1])
    generator = torch.Generator().manual_seed(0)
    edge_index = torch.randint(nodes - 1, (2, 4 * nodes), generator=generator)
    x = torch.randn(nodes, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (nodes,), generator=generator)
    return Data(x=x, edge_index=edge_index, y=y, train_mask=trained(torch.arange(nodes))), ptr


def a_model(**options: Any) -> RevGNN:
    torch.manual_seed(1)
    settings: dict[str, Any] = {"hidden_channels": 12, "num_layers": 3, "num_groups": 2, **options}
    return RevGNN(in_channels=5, out_channels=3, **settings).double()


def criterion_of(data: Data) -> Callable[[Tensor, Tensor], Tensor]:
    number = int(data.train_mask.sum())
    return lambda logits, y: F.cross_entropy(logits, y, reduction="sum") / number


def stepped(whole: WholeGraph, data: Data) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Loss, gradients, and the next random number; of a second step, which adds to the first's gradients."""
    torch.manual_seed(3)
    whole.step(criterion_of(data))
    loss = whole.step(criterion_of(data))
    return loss, {name: p.grad for name, p in whole.model.named_parameters()}, torch.rand(1)


def same_numbers(rank: int, world: int, exact: bool | int = True, **options: Any) -> None:
    data, ptr = a_graph(world)
    shares = Shares(ptr, weights=torch.ones(len(ptr) - 1))
    found = stepped(whole := WholeGraph(a_model(**options), data, ptr, exact=exact, shares=shares), data)
    expected = stepped(one := WholeGraph(a_model(**options), data, ptr, exact=exact), data)
    for name, mine, theirs in zip(("loss", "gradient", "next"), found, expected, strict=True):
        assert_close(mine, theirs, 1e-10, name)
    start, stop = shares.nodes
    assert_close(whole.evaluate(), one.evaluate()[start:stop], 1e-10)
    assert whole.last_drift is not None
    assert whole.last_drift < 1e-10


case(same_numbers, "gcn-dropout", conv="gcn", dropout=0.3)
case(same_numbers, "sage-groups", conv="sage", num_groups=3, num_layers=2)
case(same_numbers, "gat-floats", conv="gat", exact=False, num_layers=2)
case(same_numbers, "tied-dropout_of_each", conv="gcn", dropout=0.3, shared_dropout=False, tied=True)


def tables_for_each_layer(rank: int, world: int, make: Callable[[int], nn.Module], keep_every: int) -> None:
    """A network that is not reversible."""
    data, ptr = a_graph(world)
    data.edge_weight = torch.rand(data.num_edges, generator=torch.Generator().manual_seed(1)).double()
    shares = Shares(ptr, weights=torch.ones(len(ptr) - 1))

    def made(**options: Any) -> WholeGraph:
        torch.manual_seed(1)
        return WholeGraph(make(data.num_nodes).double(), data, ptr, keep_every=keep_every, **options)

    found, expected = stepped(whole := made(shares=shares), data), stepped(one := made(), data)
    for name, mine, theirs in zip(("loss", "gradient", "next"), found, expected, strict=True):
        assert_close(mine, theirs, 1e-10, name)
    start, stop = shares.nodes
    assert_close(whole.evaluate(), one.evaluate()[start:stop], 1e-10)


case(tables_for_each_layer, "layers-gcn", make=lambda n: GCN(n, 5, 6, 3, 4, dropout=0.2), keep_every=1)
case(tables_for_each_layer, "layers-gcn2", make=lambda n: GCN2(n, 5, 6, 3, 4, 0.1, 0.5), keep_every=2)


@case
def plain(rank: int, world: int) -> None:
    """The numbers are those of the whole graph under autograd, with dropout."""
    data, ptr = a_graph(world)
    model = a_model(dropout=0.2)
    whole = WholeGraph(model, data, ptr, exact=False, shares=Shares(ptr, weights=torch.ones(len(ptr) - 1)))
    torch.manual_seed(2)
    loss = whole.step(criterion_of(data))
    other = a_model(dropout=0.2, disable=True)
    torch.manual_seed(2)
    logits = other(data.x, data.edge_index)
    expected = criterion_of(data)(logits[data.train_mask], data.y[data.train_mask])
    expected.backward()
    assert_close(loss, expected.detach(), 1e-10)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, 1e-10, name)


def several_losses(rank: int, world: int, make: Callable[[int], nn.Module]) -> None:
    """A loss for each class over all nodes, and weights that are drawn at random in each process."""
    data, ptr = a_graph(world)
    data.edge_weight = torch.rand(data.num_edges, generator=torch.Generator().manual_seed(1)).double()

    def criterion(logits: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(logits, y, reduction="none")
        return torch.stack([each[y == c].sum() / 9 for c in range(3)])

    def made(**options: Any) -> WholeGraph:
        torch.manual_seed(1)
        return WholeGraph(make(data.num_nodes).double(), data, ptr, **options)

    whole, one = made(shares=Shares(ptr, weights=torch.ones(len(ptr) - 1))), made()
    for each in (whole, one):
        torch.manual_seed(2)
        assert each.compute_gramian(criterion).shape == (3, 3)
    assert_close(whole.last_gramian, one.last_gramian, 1e-10)
    torch.manual_seed(2)
    losses = whole.step(criterion, lambda gramian: torch.arange(3) + rank + gramian.diagonal())
    torch.manual_seed(2)
    expected = one.step(criterion, lambda gramian: torch.arange(3) + gramian.diagonal())  # as on rank 0
    assert_close(losses, expected, 1e-10)
    assert_close(whole.last_weights, one.last_weights, 1e-10)
    assert_close(gradients_of(whole), gradients_of(one), 1e-10)
    assert whole.certificate.checks == 1


def gradients_of(whole: WholeGraph) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in whole.model.named_parameters()}


case(several_losses, "several-rev", make=lambda n: a_model(dropout=0.2))
case(several_losses, "several-layers", make=lambda n: GCN(n, 5, 6, 3, 3))


@case
def ranks_without_training_nodes(rank: int, world: int) -> None:
    data, ptr = a_graph(world, lambda nodes: nodes < 4)
    shares = Shares(ptr, weights=torch.ones(len(ptr) - 1))
    found = stepped(WholeGraph(a_model(), data, ptr, shares=shares), data)
    expected = stepped(WholeGraph(a_model(), data, ptr), data)
    assert_close(found[0], expected[0], 1e-10)
    assert_close(found[1], expected[1], 1e-10)
    if world > 1:
        with pytest.raises(SharesError, match="a rank has no node for training"):
            WholeGraph(a_model(), data, ptr, shares=shares).compute_gramian(criterion_of(data))
    data.train_mask[:] = False
    with pytest.raises(ValueError, match="no node is for training"):
        WholeGraph(a_model(), data, ptr, shares=shares)


@case
def bytes_on_the_wire(rank: int, world: int) -> None:
    """A step reads a halo for each layer and group, forward and backward, and gives gradients back for each."""
    data, ptr = a_graph(world)
    shares = Shares(ptr, weights=torch.ones(len(ptr) - 1))
    whole = WholeGraph(a_model(conv="gcn"), data, ptr, shares=shares)
    halos = [whole.parts[number].halo for number in range(len(whole.parts))]
    away = sum(int((shares.owners(halo) != rank).sum()) for halo in halos)
    whole.step(criterion_of(data))
    sent = torch.tensor([float(shares.wire_bytes), float(away)], dtype=torch.float64)
    dist.all_reduce(sent)
    rows = 3 * 3 * 2 * sent[1]  # times, layers, groups
    assert sent[0] == rows * (12 // 2) * 8


@case
def tables_of_own_rows(rank: int, world: int) -> None:
    data, ptr = a_graph(world)
    shares = Shares(ptr, weights=torch.ones(len(ptr) - 1))
    whole = WholeGraph(a_model(dropout=0.2), data, ptr, shares=shares)
    start, stop = shares.nodes
    tables = whole._space.tables
    for name in ("x0", "x1", "g0", "g1"):
        assert tables[name].read((start, stop)).shape == (stop - start, 6)
        assert len(tables._tables[name].read((0, stop - start))) == stop - start
        assert tables._number == stop - start
    assert [part.number for part in (whole.parts[k] for k in range(len(whole.parts)))] == list(shares.parts)


@case
def what_a_rank_holds_of_the_graph(rank: int, world: int) -> None:
    """Its parts' edges, features, labels and halos: the graph that was given may be deleted."""
    data, ptr = a_graph(world)
    shares, number = Shares(ptr, weights=torch.ones(len(ptr) - 1)), criterion_of(data)
    (start, stop), mask, edges = shares.nodes, data.train_mask, data.edge_index
    into = (edges[1] >= start) & (edges[1] < stop)
    trained, model = int(mask[start:stop].sum()), GCN(data.num_nodes, 5, 6, 3, 3).double()
    whole = WholeGraph(model, data, ptr, shares=shares)
    held = [weakref.ref(each) for each in (data.x, data.y, data.edge_index)]
    del data, edges
    gc.collect()
    assert [each() for each in held] == [None] * 3
    parts = [whole.parts[k] for k in range(len(whole.parts))]
    tensors = [t for p in parts for t in (p.halo, p.edge_index, p.x, p.y, p.train, *p.edges.values())]
    halos = sum(p.halo.numel() for p in parts)
    assert sum(t.untyped_storage().nbytes() for t in tensors) == (
        8 * halos + (2 * 8 + 4) * int(into.sum()) + 5 * 8 * (stop - start) + 2 * 8 * trained
    )
    assert whole.step(number).isfinite()


@case
def what_is_refused(rank: int, world: int) -> None:
    data, ptr = a_graph(world)
    shares = Shares(ptr, weights=torch.ones(len(ptr) - 1))
    with pytest.raises(ValueError, match="leave store out"):
        WholeGraph(a_model(), data, ptr, "somewhere", shares=shares)
    with pytest.raises(SharesError, match="ptr is another"):
        WholeGraph(a_model(), data, torch.tensor([0, int(ptr[-1])]), shares=shares)
    whole = WholeGraph(a_model(), data, ptr, shares=shares)
    if world == 1:
        return
    weights = torch.ones(len(ptr) - 1)
    weights[0] = 100
    with pytest.raises(SharesError, match="a step over the whole graph takes as many on each"):
        WholeGraph(a_model(), data, ptr, shares=Shares(ptr, weights=weights))
    torch.manual_seed(rank)
    with pytest.raises(SharesError, match="torch's random state of rank 1"):
        whole.step(criterion_of(data))
    torch.manual_seed(0)
    if rank == 1:
        nn.init.ones_(whole.model.head.bias)
    with pytest.raises(SharesError, match="the network or its modes of rank"):
        whole.step(criterion_of(data))
    assert all(p.grad is None for p in whole.model.parameters())


class Tempered(nn.Module):
    """A criterion with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(logits * self.temperature, y, reduction="none")
        return torch.stack([each[y == c].sum() / 9 for c in range(3)])


@case
def parameters_of_a_criterion(rank: int, world: int) -> None:
    data, ptr = a_graph(world)
    shares = Shares(ptr, weights=torch.ones(len(ptr) - 1))
    gradients, gramians = [], []
    for options in ({"shares": shares}, {}):
        criterion, whole = Tempered(), WholeGraph(a_model(), data, ptr, **options)
        whole.step(criterion, lambda gramian: torch.arange(3))
        whole.step(lambda logits, y, each=criterion: each(logits, y).sum())
        gradients.append({"temperature": criterion.temperature.grad, **gradients_of(whole)})
        gramians.append(whole.last_gramian)
    assert_close(*gradients, 1e-10)
    assert_close(*gramians, 1e-10)
    if world > 1:
        data, ptr = a_graph(world, lambda nodes: nodes < 4)
        criterion, model = Tempered(), a_model()
        with pytest.raises(SharesError, match="parameters that are not the network's"):
            WholeGraph(model, data, ptr, shares=shares).step(lambda logits, y: criterion(logits, y).sum())
        assert all(p.grad is None for p in (*model.parameters(), *criterion.parameters()))
