"""Histories of gradients over ranks, against one process that accumulates the mini-batches of all ranks."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import Wrap, assert_close, registering
from rank_cases import IN, NODES, OUT, PARTS, TOLERANCE, graph, loss_of, shares_of
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from wire_cases import short_group

import recollect
from recollect.autoscale import (
    Combination,
    HistoryOptions,
    ScalableGNN,
    SubgraphLoader,
    add_self_loops,
    normalize,
    own_graph,
    propagate,
)
from recollect.distributed import Shares, SharesError
from recollect.models import GCN, GCN2, GIN, RevGNN

CASES: dict[str, Callable[[Wrap, int, int], None]] = {}
case = registering(CASES)

WIDTH = 8


class Sage(ScalableGNN):
    """GraphSAGE whose mean is a sum with weights of edges, and comes behind the activation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(NODES, WIDTH, 3, **options)
        widths = [IN, WIDTH, WIDTH, OUT]
        pairs = list(itertools.pairwise(widths))
        self.near, self.own = (nn.ModuleList(nn.Linear(*pair) for pair in pairs) for _ in range(2))

    def forward_layer(self, layer: int, x: Tensor, adj_t: Tensor, state: dict[str, Any]) -> Tensor:
        x = x.tanh() if layer else x
        return self.near[layer](propagate(adj_t, x)) + self.own[layer](x[: adj_t.size(0)])


MODELS: dict[str, tuple[Callable[..., Any], str]] = {
    "gcn": (functools.partial(GCN, NODES, IN, WIDTH, OUT, 4), "cut"),
    "gcn2": (functools.partial(GCN2, NODES, IN, WIDTH, OUT, 3), "cut"),
    "sage": (Sage, "cut"),
    "gin": (functools.partial(GIN, NODES, IN, WIDTH, OUT, 3), "complete"),
    "gcn-combined": (functools.partial(GCN, NODES, IN, WIDTH, OUT, 3, combine=Combination(0.7, "x")), "induced"),
    "rev": (
        functools.partial(RevGNN, IN, WIDTH, OUT, 2, conv="graphconv", inputs=("edge_weight",), num_nodes=NODES),
        "cut",
    ),
    "rev-groups": (functools.partial(RevGNN, IN, 12, OUT, 2, 3, "gat", num_nodes=NODES), "complete"),
    "gin-combined": (functools.partial(GIN, NODES, IN, WIDTH, OUT, 3, combine=Combination(0.7, "1")), "complete"),
}


def made(make: Callable[..., Any], shares: Shares | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    histories = HistoryOptions(**{"dtype": torch.float64, "process_group": shares, **options})
    return make(histories=histories, compensate=True).double()


def ready(world: int, kind: str = "") -> tuple[Any, Tensor, Shares]:
    data, ptr = graph(add_self_loops if kind == "rev-groups" else normalize)
    return data, ptr, Shares(ptr, process_group=short_group(world))


def forward(model: Any, batch: Any) -> Tensor:
    out: Tensor = model(batch.data.x, batch.data.adj_t, *batch[1:], outward=batch.data.outward)
    return out


def mean_loss(data: Any) -> Callable[[Tensor, Any], Tensor]:
    """The mean over all training nodes, of which a mini-batch has some."""
    number = int(data.train_mask.sum())
    return lambda out, batch: loss_of(out, batch)[0] / number


def gradients_of(model: Any) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def added_up(model: Any) -> dict[str, Tensor]:
    """The gradients of all ranks."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
    return gradients_of(model)


def steps_of(shares: Shares, epochs: int) -> list[list[list[int]]]:
    """The parts of each rank, in each step."""
    sampler = shares.batches(2, seed=3)
    own: list[Any] = [None] * shares.world_size
    dist.all_gather_object(own, [list(sampler) for _ in range(epochs)])
    return [list(step) for epoch in range(epochs) for step in zip(*(ranks[epoch] for ranks in own), strict=True)]


class Reference:
    """One process: all mini-batches of a step read what was there before it, and their gradients add up."""

    def __init__(self, model: Any, loader: SubgraphLoader) -> None:
        self.model, self.loader = model, loader
        if not isinstance(model, RevGNN):  # whose widths are known
            model.gradients.table(model.num_layers - 1, OUT if isinstance(model, (GCN, Sage)) else WIDTH)
        self.tables = [*model.tables, *model.gradients.tables]

    def step(self, batches: list[list[int]], loss: Callable[[Tensor, Any], Tensor]) -> None:
        rows = [history.table.records.tensor for history in self.tables]
        before, after = [table.clone() for table in rows], [table.clone() for table in rows]
        clocks = [history.table.clock.pushes for history in self.tables]
        sums, found = self.model.gradients._sums.clone(), []
        for parts in batches:
            for table, old in zip(rows, before, strict=True):
                table.copy_(old)
            for history, pushes in zip(self.tables, clocks, strict=True):
                history.table.clock.note(pushes, 0)
            self.model.gradients._sums.copy_(sums)
            batch = self.loader.collate_fn(parts)
            loss(forward(self.model, batch), batch).backward()
            found.append(self.model.gradients._sums - 0.5 * sums)  # what this one has compared
            own = batch.n_id[: batch.batch_size]
            for table, new in zip(rows, after, strict=True):
                new[own] = table[own]
        for table, new in zip(rows, after, strict=True):
            table.copy_(new)
        if clocks[-1]:
            self.model.gradients._sums.copy_(0.5 * sums + torch.stack(found).sum(0))


def training(rank: int, world: int, kind: str, **options: Any) -> None:
    make, edges = MODELS[kind]
    data, ptr, shares = ready(world, kind)
    plain = {"disable": True} if kind.startswith("rev") else {}  # with all kept, as the reference sets clocks back
    model, whole = made(make, shares, **options), made(functools.partial(make, **plain))
    loader: Any = SubgraphLoader(data, ptr, log=False, outward=edges)
    own = loader
    if edges == "cut":  # of others a rank needs more of the graph
        own = SubgraphLoader(own_graph(data, shares, outward=True), ptr, log=False, outward=edges)
    model(loader=SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(shuffle=False)))
    whole(loader=SubgraphLoader(data, ptr, log=False))
    reference, loss = Reference(whole, loader), mean_loss(data)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.03) for each in (model, whole)]
    trusted = []
    for number, ranks in enumerate(steps_of(shares, epochs=2 + (world > 1))):
        for optimizer in optimizers:
            optimizer.zero_grad()
        reference.step(ranks, loss)
        batch = own.collate_fn(ranks[rank])
        loss(forward(model, batch), batch).backward()
        assert_close(added_up(model), gradients_of(whole), TOLERANCE, f"gradient of step {number}")
        for optimizer in optimizers:
            optimizer.step()
        trusted.append(float(whole.gradients.trust(1)))
    assert any(0.1 < trust < 0.95 for trust in trusted), trusted  # what ranks compare with one another matters
    start, stop = shares.nodes
    for ours, theirs in zip([*model.tables, *model.gradients.tables], reference.tables, strict=True):
        assert_close(ours.emb, theirs.emb[start:stop], TOLERANCE, "rows")
        assert_close(ours.pull(), theirs.pull(), TOLERANCE, "all rows")


for _name in MODELS:
    case(training, f"training of {_name}", kind=_name)


def true_histories(rank: int, world: int, kind: str) -> None:
    """Histories of both kinds made exact over ranks: an epoch gives the gradient of the whole graph."""
    make, edges = MODELS[kind]
    data, ptr, shares = ready(world, kind)
    model, whole, loss = made(make, shares), made(make), mean_loss(data)
    whole.refresh(SubgraphLoader(data, ptr, log=False), loss)
    own = SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(shuffle=False))
    start, stop = shares.nodes
    for _ in range(2):  # the second takes the place of what steps have written
        out = model.refresh(own, loss)
        for ours, theirs in zip(
            [*model.tables, *model.gradients.tables], [*whole.tables, *whole.gradients.tables], strict=True
        ):
            assert_close(ours.emb, theirs.emb[start:stop], TOLERANCE, "rows")
        for batch in SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(2), outward=edges):
            loss(forward(model, batch), batch).backward()
        found = added_up(model)
        whole.zero_grad()
        logits = whole.train()(data.x, data.adj_t)
        assert_close(out, logits.detach()[start:stop], TOLERANCE, "output")
        (F.cross_entropy(logits[data.train_mask], data.y[data.train_mask])).backward()
        assert_close(found, gradients_of(whole), TOLERANCE, "gradient")
        model.zero_grad()


for _name in ("gcn", "gcn2", "sage", "gin", "rev", "rev-groups"):
    case(true_histories, f"true histories of {_name}", kind=_name)


@case
def gradients_in_files(rank: int, world: int) -> None:
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    training(rank, world, "gcn", path=folder[0])


def bytes_on_the_wire(rank: int, world: int, kind: str, rows_of: list[int], gradients_of: list[int]) -> None:
    """A step sends rows of each halo and of each out-neighbour, which other ranks own, once for each layer or block."""
    data, ptr, shares = ready(world)
    model: Any = made(MODELS[kind][0], shares, dtype=torch.float32)
    known = len(model.gradients.tables)
    loader: Any = SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(2, shuffle=False), outward=True)
    for step, batch in enumerate(loader):
        number, before = shares._wire.number, shares.wire_bytes
        forward(model, batch).square().sum().backward()
        halo, near = batch.n_id[batch.batch_size :], batch.data.outward.n_id[: batch.data.outward.num_targets]
        away = [int((shares.owners(nodes) != rank).sum()) for nodes in (halo, near)]
        rows = torch.tensor([shares.wire_bytes - before, *away], dtype=torch.float64)
        dist.all_reduce(rows)
        assert rows[0] == 4 * (rows[1] * sum(rows_of) + rows[2] * sum(gradients_of[:known]))
        exchanges = shares._wire.number - number
        # Two lists of row numbers, and rows; at first the graph is compared, and a last layer's history made.
        first = 0 if step else len(rows_of) + len(gradients_of) - known
        assert exchanges == 2 + len(rows_of) + known + first
        known = len(gradients_of)


case(bytes_on_the_wire, "bytes of gcn", kind="gcn", rows_of=[WIDTH] * 3, gradients_of=[WIDTH, WIDTH, OUT])
case(bytes_on_the_wire, "bytes of rev", kind="rev", rows_of=[WIDTH] * 2, gradients_of=[WIDTH // 2] * 3)


@case
def a_whole_network_in_a_frame(rank: int, world: int) -> None:
    """Its rebuild exchanges nothing, and corrects nothing once more."""
    data, ptr, shares = ready(world)
    loader: Any = SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(2, shuffle=False), outward=True)
    for kind in ("gcn", "rev"):
        found = []
        for wrap in (recollect.checkpoint, lambda model, *args, **inputs: model(*args, **inputs)):
            model = made(MODELS[kind][0], shares)
            model(loader=SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(shuffle=False)))
            for batch in (*loader, *loader):
                out = wrap(model, batch.data.x, batch.data.adj_t, *batch[1:], outward=batch.data.outward)
                number = shares._wire.number
                out.square().sum().backward()
                assert shares._wire.number == number
            found.append((gradients_of(model), {str(k): table.emb for k, table in enumerate(model.gradients.tables)}))
        for expected, other in zip(*found, strict=True):
            assert_close(other, expected, TOLERANCE)


@case
def ranks_that_differ(rank: int, world: int) -> None:
    if world == 1:
        return
    data, ptr, shares = ready(world)
    model = made(MODELS["gcn"][0], shares)
    loader: Any = SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(2), outward=True)
    batch = next(iter(loader))
    forward(model, batch).sum().backward()
    model.train(rank > 0)
    told = r"rank 0 at .*halo rows of a mini.*rank [1-3] at .*numbers of gradients of layer"
    with torch.set_grad_enabled(rank > 0), pytest.raises(SharesError, match=told):
        forward(model, batch)


@case
def a_refresh_in_other_mini_batches(rank: int, world: int) -> None:
    """Rows of one layer are not taken for those of another, as wide as it is."""
    if world == 1:
        return
    data, ptr, shares = ready(world)
    model = made(MODELS["gcn"][0], shares)
    loader = SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(1 + (rank == 0), shuffle=False))
    told = (
        r"rank 0 at .*rows pulled by number, history 2: 8 x 8.*rank [1-3] at .*rows pulled by number, history 1: 8 x 8"
    )
    with pytest.raises(SharesError, match=told):
        model.refresh(loader, mean_loss(data))


@case
def a_step_without_a_backward_pass(rank: int, world: int) -> None:
    """What a rank did not ask for comes all the same, and the next step is as ever; copies wait for nothing."""
    data, ptr, shares = ready(world)
    model = made(MODELS["gcn"][0], shares)
    loader: Any = SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(2), outward=True)
    for number, batch in enumerate(loader):
        out = forward(model, batch)
        if number or rank:
            out.sum().backward()
    sums = model.gradients._sums.clone()
    everyones: list[Any] = [None] * world
    dist.all_gather_object(everyones, sums)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.gradients.table(1).emb, model.gradients.table(1).emb)
    assert not twin.gradients._told
    assert all(torch.equal(each, sums) for each in everyones)
    assert PARTS // (2 * world) == number + 1
    assert shares_of(model.gradients.table(1)) is shares
