"""Histories over ranks, against one process that accumulates the mini-batches of all ranks."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from processes import Wrap, assert_close
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from recollect.autoscale import (
    History,
    HistoryOptions,
    SubgraphLoader,
    add_self_loops,
    history_errors,
    history_parts,
    load_history_parts,
    normalize,
    own_graph,
    partition,
    permute,
    to_adj_t,
)
from recollect.autoscale.histories._ranks import RankTable
from recollect.data._foreign import require
from recollect.distributed import Shares, SharesError
from recollect.messages import rows_of
from recollect.models import APPNP, GAT, GCN, GCN2

Data = require("torch_geometric.data", extra="graph").Data

NODES, PARTS, IN, OUT = 60, 8, 5, 3
TOLERANCE = 1e-10

CASES: dict[str, Callable[[Wrap, int, int], None]] = {}


def case(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CASES[function.__name__] = lambda wrap, rank, world: function(rank, world)
    return function


def graph(prepare: Callable[[Tensor], Tensor] = normalize) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(1)
    data = Data(
        x=torch.randn(NODES, IN, dtype=torch.float64, generator=generator),
        edge_index=torch.randint(NODES, (2, 150), generator=generator),
        y=torch.randint(OUT, (NODES,), generator=generator),
        train_mask=torch.rand(NODES, generator=generator) < 0.6,
    )
    data = to_adj_t(data)
    data.adj_t = prepare(data.adj_t.to(torch.float64))
    perm, ptr, *_ = partition(data.adj_t, num_parts=PARTS, method="random", log=False)
    return permute(data, perm, log=False), ptr


def loss_of(out: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """The sum over training nodes, and how many there are."""
    train = batch.data.train_mask[: batch.batch_size]
    return F.cross_entropy(out[train], batch.data.y[: batch.batch_size][train], reduction="sum"), train.sum()


def forward(model: Any, batch: Any) -> Tensor:
    out: Tensor = model(batch.data.x, batch.data.adj_t, *batch[1:])
    return out


class Reference:
    """One process: all ranks' mini-batches of a step read what was there before it, and their gradients add up."""

    def __init__(self, model: Any, loader: SubgraphLoader, steps: list[list[list[int]]]) -> None:
        self.model, self.loader, self.steps = model, loader, steps
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        self.gradients: list[dict[str, Tensor]] = []

    def tables(self) -> list[Tensor]:
        return [history.table.records.tensor for history in self.model.tables]

    def run(self) -> None:
        for ranks in self.steps:
            before, after = [table.clone() for table in self.tables()], [table.clone() for table in self.tables()]
            self.optimizer.zero_grad()
            batches = [self.loader.collate_fn(parts) for parts in ranks]
            total = sum(int(batch.data.train_mask[: batch.batch_size].sum()) for batch in batches)
            for batch in batches:
                for table, old in zip(self.tables(), before, strict=True):
                    table.copy_(old)
                loss, _ = loss_of(forward(self.model, batch), batch)
                (loss / total).backward()
                own = batch.n_id[: batch.batch_size]
                for table, new in zip(self.tables(), after, strict=True):
                    new[own] = table[own]
            for table, new in zip(self.tables(), after, strict=True):
                table.copy_(new)
            self.gradients.append({name: p.grad.clone() for name, p in self.model.named_parameters()})
            self.optimizer.step()


def compare(
    make: Callable[..., Any],
    prepare: Callable[[Tensor], Tensor],
    rank: int,
    world: int,
    plain: Callable[..., Any] | None = None,
    **options: Any,
) -> None:
    """Train over ranks, and in one process: the same network, or ``plain``, which has the same parameters."""
    data, ptr = graph(prepare)
    shares = Shares(ptr, process_group=dist.new_group(list(range(world))))
    torch.manual_seed(0)
    model = make(histories=HistoryOptions(dtype=torch.float64, process_group=shares, **options)).double()
    torch.manual_seed(0)
    whole = (plain or make)(histories=HistoryOptions(dtype=torch.float64)).double()

    samplers = shares.batches(2, seed=3)
    epochs = [list(samplers) for _ in range(2)]
    everyones: list[Any] = [None] * world
    dist.all_gather_object(everyones, epochs)
    steps = [list(step) for epoch in range(2) for step in zip(*(ranks[epoch] for ranks in everyones), strict=True)]
    assert len({len(epoch) for ranks in everyones for epoch in ranks}) == 1
    assert sorted(part for ranks in everyones for group in ranks[0] for part in group) == list(range(PARTS))
    loader, own = SubgraphLoader(data, ptr, log=False), own_graph(data, shares)
    mine_of = SubgraphLoader(own, ptr, log=False)
    evaluated = whole(loader=SubgraphLoader(data, ptr, log=False))
    mine = model(loader=SubgraphLoader(own, ptr, log=False, batch_sampler=shares.batches(shuffle=False)))
    start, stop = shares.nodes
    assert_close(mine, evaluated[start:stop], TOLERANCE, "layer-wise inference")

    reference = Reference(whole, loader, steps)
    reference.run()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for number, ranks in enumerate(steps):
        optimizer.zero_grad()
        batch = mine_of.collate_fn(ranks[rank])
        loss, count = loss_of(forward(parallel, batch), batch)
        (loss / count.clamp_min(1) * shares.scale(count)).backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        assert_close(found, reference.gradients[number], TOLERANCE, f"gradient of step {number}")
        optimizer.step()
    for ours, theirs in zip(model.tables, whole.tables, strict=True):
        assert_close(ours.emb, theirs.emb[start:stop], TOLERANCE, "rows")
        assert_close(ours.pull(), theirs.pull(), TOLERANCE, "all rows")
    mine_of = SubgraphLoader(own, ptr, log=False, batch_sampler=shares.batches(shuffle=False))
    errors = torch.tensor([history_errors(model, mine_of), history_errors(model, data)])
    assert_close(errors, torch.tensor([history_errors(whole, loader)] * 2), 1e-6, "errors of histories")
    assert float(errors.min()) > 1e-4


MODELS: dict[str, tuple[Callable[..., Any], Callable[[Tensor], Tensor]]] = {
    "gcn": (functools.partial(GCN, NODES, IN, 8, OUT, 3), normalize),
    "gat": (functools.partial(GAT, NODES, IN, 4, 2, OUT, num_layers=3), add_self_loops),
    "gcn2": (functools.partial(GCN2, NODES, IN, 8, OUT, 4), normalize),
    "appnp": (functools.partial(APPNP, NODES, IN, 8, OUT, 3), normalize),
}
for _name, (_make, _prepare) in MODELS.items():

    def _run(wrap: Wrap, rank: int, world: int, make: Any = _make, prepare: Any = _prepare) -> None:
        compare(make, prepare, rank, world)

    CASES[f"training of {_name}"] = _run


def shares_of(history: History) -> Shares:
    """Of a history over ranks."""
    return cast(RankTable, history.table).shares


@case
def what_a_rank_holds_of_a_graph(rank: int, world: int) -> None:
    """Its nodes' edges and rows, and those of their neighbours; its mini-batches are those of the whole graph."""
    data, ptr = graph()
    shares = Shares(ptr)
    edges = data.adj_t.values().numel()
    data.edge_attr = torch.randn(edges, 2, generator=torch.Generator().manual_seed(0))
    data.anything = torch.rand(1, NODES) if rank else torch.rand(1, 3)
    start, stop = shares.nodes
    target, source = rows_of(data.adj_t), data.adj_t.col_indices()
    into, out = (((nodes >= start) & (nodes < stop)) for nodes in (target, source))
    for outward, kept in ((False, into), (True, into | out)):
        own = own_graph(data, shares, outward=outward)
        near = torch.cat([target[kept], source[kept], torch.arange(start, stop)]).unique()
        assert torch.equal(own.nodes, near)
        each_node = 8 * IN + 8 + 1 + 8 + 8 + 8  # x, y, train_mask, node_order, its number, where its edges begin
        each_edge = 8 + 8 + 2 * 4  # source, weight, edge_attr
        expected = near.numel() * each_node + 8 + int(kept.sum()) * each_edge + 8 * (PARTS + 1) + data.anything.nbytes
        assert own.nbytes == expected
        mine, whole = (SubgraphLoader(each, ptr, log=False, outward=outward) for each in (own, data))
        assert list(mine.sampler) == list(range(len(shares.parts)))
        for parts in shares.batches(2):
            found, batch = mine.collate_fn(parts), whole.collate_fn(parts)
            assert found.batch_size.graph == batch.batch_size.graph
            for one, other in zip(found[1:], batch[1:], strict=True):
                assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
            for name in ("x", "y", "train_mask", "edge_attr", "node_order"):
                assert (name in found.data) == (name in batch.data)
                assert name not in batch.data or torch.equal(found.data[name], batch.data[name])
            assert torch.equal(found.data.adj_t.to_dense(), batch.data.adj_t.to_dense())
            if outward:
                for one, other in zip(found.data.outward, batch.data.outward, strict=True):
                    assert str(one) == str(other)
    kept_x = weakref.ref(data.x)
    del data, whole, batch
    gc.collect()
    assert kept_x() is None
    if world > 1:
        with pytest.raises(ValueError, match="this rank's graph has the parts"):
            mine.collate_fn([(shares.parts[-1] + 1) % PARTS])
    with pytest.raises(ValueError, match="an own_graph of a rank has the edges to nodes outside with"):
        SubgraphLoader(own, ptr, log=False, outward="complete")
    with pytest.raises(ValueError, match="links may lie between parts of two ranks"):
        SubgraphLoader(own, ptr, log=False, links=torch.zeros(2, 1, dtype=torch.int64))
    data, _ = graph()
    data.edge_label_index = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"data\.edge_label_index holds nodes by number"):
        own_graph(data, shares)
    del data.edge_label_index, data.node_order
    with pytest.raises(ValueError, match="call permute"):
        own_graph(data, shares)


@case
def a_rank_holds_its_part_of_a_ring(rank: int, world: int) -> None:
    number, ring = 100 * world, torch.arange(100 * world)
    data = to_adj_t(Data(x=torch.randn(number, 4), edge_index=torch.stack([ring, ring.roll(1)]), node_order=ring))
    shares = Shares(torch.arange(0, number + 1, 50))
    own = own_graph(data, shares)
    assert own.data.adj_t.values().numel() == 100
    assert own.nodes.numel() == (101 if world > 1 else 100)
    assert own.data.x.untyped_storage().nbytes() == own.nodes.numel() * 4 * 4


@case
def histories_in_files(rank: int, world: int) -> None:
    import tempfile

    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    compare(*MODELS["gcn"], rank, world, path=folder[0])


@case
def rows_come_from_their_ranks_and_bytes_are_counted(rank: int, world: int) -> None:
    for dtype, width in ((torch.float32, 4 * 6), (torch.float16, 2 * 6), (torch.bfloat16, 2 * 6), (torch.int8, 6 + 4)):
        shares = Shares(torch.arange(0, 41, 4))
        generator = torch.Generator().manual_seed(5)
        rows = torch.randn(40, 6, generator=generator)
        history, plain = History(40, 6, dtype=dtype, process_group=shares), History(40, 6, dtype=dtype)
        start, stop = shares.nodes
        history.push(rows[start:stop], offset=[start], count=[stop - start])
        plain.push(rows)
        wanted = torch.randint(40, (rank * 7,), generator=torch.Generator().manual_seed(rank))  # rank 0 wants none
        assert torch.equal(history.pull(wanted), plain.pull(wanted))
        assert torch.equal(history.pull(torch.arange(start, stop)), plain.pull(torch.arange(start, stop)))
        asked: list[Any] = [None] * world
        dist.all_gather_object(asked, wanted)
        sent = sum(int((shares.owners(ids) == rank).sum()) for other, ids in enumerate(asked) if other != rank)
        assert shares.wire_bytes == sent * width
        assert history.age().tolist() == [0] * (stop - start)
        assert history.never_pushed() == 0


@case
def what_is_others_is_refused(rank: int, world: int) -> None:
    history = History(8 * world, 2, process_group=dist.group.WORLD)
    other = (8 * rank + 8) % (8 * world)
    if world > 1:
        for push in ({"n_id": torch.tensor([other])}, {"offset": [other], "count": [1]}):
            with pytest.raises(IndexError, match=f"rank {rank} owns the rows from {8 * rank} to {8 * rank + 7}"):
                history.push(torch.ones(1, 2), **push)
        with pytest.raises(IndexError, match="knows the age of that alone"):
            history.age(torch.tensor([other]))
    history.push(torch.full((8, 2), float(rank)), offset=[8 * rank], count=[8])
    assert torch.equal(history.pull(), torch.arange(world).repeat_interleave(8)[:, None].expand(-1, 2).float())
    with pytest.raises(NotImplementedError, match="other Shares"):
        history.extend(100)


@case
def what_differs_between_ranks_is_named_on_each(rank: int, world: int) -> None:
    if world == 1:
        return
    with pytest.raises(SharesError, match="ptr of rank 1 is another than that of rank 0"):
        Shares(torch.arange(0, 9 + rank))
    shares = Shares(torch.arange(0, 9))
    with pytest.raises(SharesError, match="a history of rank 1 is another"):
        History(8, 2 + rank, process_group=shares)
    with pytest.raises(SharesError, match="a part at least for each of the"):
        Shares(torch.arange(0, world))
    data, ptr = graph()
    other = data.clone()
    other.adj_t = normalize(to_adj_t(Data(x=data.x, edge_index=torch.zeros(2, 1, dtype=torch.int64))).adj_t).double()
    model = GCN(NODES, IN, 8, OUT, 2, histories=HistoryOptions(process_group=Shares(ptr))).double()
    loader = SubgraphLoader(other if rank else data, ptr, log=False)
    with pytest.raises(SharesError, match="the graph of the mini-batches of rank 1"):
        forward(model, loader.collate_fn([shares_of(model.tables[0]).parts[0]]))


@case
def options_that_do_not_go_with_ranks(rank: int, world: int) -> None:
    options = HistoryOptions(process_group=dist.group.WORLD)
    model: Any = GCN(NODES, IN, 8, OUT, 3, histories=options, compensate=True)
    assert shares_of(model.gradients.table(1)) is shares_of(model.tables[0])
    with pytest.raises(ValueError, match="need no pool"):
        HistoryOptions(process_group=dist.group.WORLD, pool_size=2, buffer_size=10)
    with pytest.raises(ValueError, match="in host memory or files"):
        History(8, 2, device="meta", process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="Shares are of 8 nodes"):
        History(9, 2, process_group=Shares(torch.arange(0, 9)))


@case
def a_checkpoint_is_loaded_by_another_number_of_ranks(rank: int, world: int) -> None:
    import tempfile

    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    _, ptr = graph()
    half = dist.new_group(list(range(max(1, world // 2))))
    for dtype in (torch.float64, torch.int8):

        def make(group: Any, dtype: torch.dtype = dtype) -> Any:
            options = HistoryOptions(dtype=dtype, process_group=Shares(ptr, process_group=group))
            return GCN(NODES, IN, 8, OUT, 3, histories=options).double()

        path = f"{folder[0]}/{dtype}"
        rows = torch.randn(2, NODES, 8, generator=torch.Generator().manual_seed(0))
        if rank < max(1, world // 2):
            few = make(half)
            for history, values in zip(few.tables, rows, strict=True):
                start, stop = shares_of(history).nodes
                history.push(values[start:stop], offset=[start], count=[stop - start])
            save({"histories": history_parts(few)}, checkpoint_id=path, process_group=half)
        dist.barrier()
        all_of = make(dist.group.WORLD)
        state = {"histories": history_parts(all_of)}
        load(state, checkpoint_id=path)
        load_history_parts(all_of, state["histories"])
        for history, values in zip(all_of.tables, rows, strict=True):
            plain = History(NODES, 8, dtype=dtype)
            plain.push(values)
            assert torch.equal(history.pull(), plain.pull().to(history.out_dtype))
            assert history.never_pushed() == 0
        missing = dict(state["histories"])
        del missing[f"1.part.{all_of.tables[0].table.shares.parts[0]}"]
        before = all_of.tables[0].emb.clone()
        with pytest.raises(KeyError, match="rows of that layer and part"):
            load_history_parts(all_of, missing)
        assert torch.equal(all_of.tables[0].emb, before) or dtype == torch.int8
        with pytest.raises(ValueError, match="with the same parts, channels and options"):
            load_history_parts(all_of, {name: value[:, 1:] for name, value in state["histories"].items()})
    with pytest.raises(ValueError, match="are not over ranks"):
        history_parts(GCN(NODES, IN, 8, OUT, 3))


@case
def rows_of_another_step_are_not_taken(rank: int, world: int) -> None:
    """A rank leaves a step in the middle, and goes on as if nothing had been."""
    if world == 1:
        return
    history = History(8 * world, 2, process_group=dist.new_group(list(range(world))))
    rows = torch.arange(8 * world)
    history.pull(rows)
    if rank == 0:
        shares_of(history)._wire.number += 1  # as by an exchange that the others did not take
    with pytest.raises(
        SharesError, match=rf"rank 0 at exchange 7 .*, rank {max(rank, 1)} at exchange 6 .*left a step in the middle"
    ):
        history.pull(rows)


@case
def a_group_is_not_kept(rank: int, world: int) -> None:
    """One that outlives its end ends the process by a signal when the interpreter ends."""
    group = dist.new_group(list(range(world)))
    model = GCN(8 * world, IN, 8, OUT, 3, histories=HistoryOptions(process_group=group))
    history, rows, kept = model.tables[0], torch.arange(8 * world), weakref.ref(group)
    history.pull(rows)
    shares_of(history).route(rows)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert kept() is None
    with pytest.raises(RuntimeError, match="was destroyed: make others"):
        history.pull(rows)


@case
def pulls_without_gradients(rank: int, world: int) -> None:
    history = History(8 * world, 2, process_group=dist.group.WORLD)
    history.push(torch.full((8, 2), float(rank)), offset=[8 * rank], count=[8])
    with torch.inference_mode():
        rows = torch.arange(8 * world)
        assert torch.equal(history.pull(rows), torch.arange(world).repeat_interleave(8)[:, None].expand(-1, 2).float())


@case
def one_exchange_a_layer(rank: int, world: int) -> None:
    """Beside one for the row numbers of the mini-batch's halo, which all layers share."""
    data, ptr = graph()
    model = GCN(NODES, IN, 8, OUT, 4, histories=HistoryOptions(process_group=Shares(ptr))).double()
    batch = SubgraphLoader(data, ptr, log=False).collate_fn([shares_of(model.tables[0]).parts[0]])
    forward(model, batch)
    events: list[str] = []
    headers, rows = dist.all_to_all_single, dist.isend

    class Told:
        """The work of a header, which notes that it is waited for."""

        def __init__(self, work: Any, number: int) -> None:
            self.work, self.number = work, number

        def wait(self) -> None:
            events.append(f"wait {self.number}")
            self.work.wait()

    def announced(*args: Any, **kwargs: Any) -> Any:
        number = sum(event.startswith("header") for event in events)
        events.append(f"header {number}")
        return Told(headers(*args, **kwargs), number)

    def sent(*args: Any, **kwargs: Any) -> Any:
        events.append("rows")
        return rows(*args, **kwargs)

    dist.all_to_all_single, dist.isend = announced, sent
    try:
        forward(model, batch)
    finally:
        dist.all_to_all_single, dist.isend = headers, rows
    assert [event for event in events if event != "rows"] == [
        *("header 0", "wait 0"),  # of the row numbers
        *("header 1", "header 2", "wait 1", "header 3", "wait 2", "wait 3"),  # a layer ahead, and no other wait
    ]
    assert events.count("rows") <= 4 * (world - 1)
