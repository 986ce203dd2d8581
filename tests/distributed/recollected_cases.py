"""Layers whose backward pass needs halo rows again, over ranks, against one process that keeps them."""

from __future__ import annotations

import functools
import gc
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import Wrap, assert_close, registering
from rank_cases import IN, NODES, OUT, compare, forward, graph, shares_of
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import recollect
from recollect.autoscale import HistoryOptions, Rows, SubgraphLoader, history_parts, load_history_parts, normalize
from recollect.distributed import Coming, Shares
from recollect.frames import InPlaceError
from recollect.models import GAT, GCN, GCN2, RevGNN

CASES: dict[str, Callable[[Wrap, int, int], None]] = {}
case = registering(CASES)


def rev(channels: int = 8, **options: Any) -> Callable[..., RevGNN]:
    return functools.partial(RevGNN, IN, channels, OUT, 3, num_nodes=NODES, **options)


def as_it_is(adj_t: Tensor) -> Tensor:
    return adj_t


WEIGHED = {"conv": "graphconv", "inputs": ("edge_weight",)}
REVERSIBLE: dict[str, tuple[Callable[..., RevGNN], Callable[[Tensor], Tensor]]] = {
    "sage": (rev(), as_it_is),
    "groups": (rev(12, num_groups=3, conv="gat"), as_it_is),
    "exact": (rev(exact=True, **WEIGHED), normalize),
    "anchors": (rev(anchor_every=2, tied=True, **WEIGHED), normalize),
}
LAYERED: dict[str, Callable[..., Any]] = {
    "gcn": functools.partial(GCN, NODES, IN, 8, OUT, 4),
    "gat": functools.partial(GAT, NODES, IN, 4, 2, OUT, num_layers=3),
    "gcn2": functools.partial(GCN2, NODES, IN, 8, OUT, 4),
}


def reversible(rank: int, world: int, kind: str, **options: Any) -> None:
    """RevGNN with histories, against the same network with everything kept."""
    make, prepare = REVERSIBLE[kind]
    compare(make, prepare, rank, world, plain=functools.partial(make, disable=True), **options)


def recomputed(rank: int, world: int, kind: str, **options: Any) -> None:
    """Layers in frames, against layers that keep what they read."""
    make = LAYERED[kind]
    compare(functools.partial(make, recompute=True), normalize, rank, world, plain=make, **options)


for _name in REVERSIBLE:
    case(reversible, f"reversible {_name}", kind=_name)
for _name in LAYERED:
    case(recomputed, f"recomputed {_name}", kind=_name)


@case
def histories_in_files(rank: int, world: int) -> None:
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    reversible(rank, world, "sage", path=f"{folder[0]}/rev")
    recomputed(rank, world, "gcn", path=f"{folder[0]}/gcn")


def training(make: Callable[..., Any], world: int, prepare: Any = as_it_is, **options: Any) -> tuple[Any, Any, Shares]:
    """A network over ranks whose histories are filled, and its loader."""
    data, ptr = graph(prepare)
    shares = Shares(ptr, process_group=dist.new_group(list(range(world))))
    torch.manual_seed(0)
    model = make(histories=HistoryOptions(**{"dtype": torch.float64, "process_group": shares, **options})).double()
    model(loader=SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(shuffle=False)))
    return model, SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(2, shuffle=False)), shares


def what_is_kept(rank: int, world: int, make: Callable[..., Any], layers: int, dtype: torch.dtype, width: int) -> None:
    """Others' rows, as they came and until backward; which exchanges nothing, and is sent them once."""
    model, loader, shares = training(make, world, dtype=dtype)
    made: list[weakref.ref[Coming]] = []
    init = Coming.__init__

    def noted(self: Coming, *args: Any) -> None:
        init(self, *args)
        made.append(weakref.ref(self))

    for batch in loader:
        halo, before, number = batch.n_id[batch.batch_size :], shares.wire_bytes, shares._wire.number
        away = int((shares.owners(halo) != rank).sum())
        made.clear()
        Coming.__init__ = noted  # type: ignore[method-assign]
        try:
            loss = forward(model, batch).square().sum()
        finally:
            Coming.__init__ = init  # type: ignore[method-assign]
        assert shares._wire.number - number == 1 + layers  # numbers of rows, and those of each history
        gc.collect()
        kept = [coming for coming in (reference() for reference in made) if coming is not None]
        assert sum(coming.came.nbytes for coming in kept) == layers * away * width
        sent = torch.tensor([shares.wire_bytes - before, away], dtype=torch.float64)
        dist.all_reduce(sent)
        assert sent[0] == layers * sent[1] * width
        del kept
        number = shares._wire.number
        loss.backward()
        del loss
        gc.collect()
        assert shares._wire.number == number
        assert not any(reference() for reference in made)


for _dtype, _width in ((torch.float64, 8 * 8), (torch.float16, 8 * 2), (torch.int8, 8 + 4)):
    case(what_is_kept, f"bytes of reversible layers, {_dtype}", make=rev(), layers=3, dtype=_dtype, width=_width)
_RECOMPUTED = functools.partial(LAYERED["gcn"], recompute=True)
case(what_is_kept, "bytes of layers in frames", make=_RECOMPUTED, layers=3, dtype=torch.int8, width=8 + 4)


@case
def a_whole_network_in_a_frame(rank: int, world: int) -> None:
    """Halo rows that were pulled in a frame's first run come again in its rebuild, with and without frames inside."""
    for make in (LAYERED["gcn"], _RECOMPUTED, rev()):
        gradients = []
        for wrap in (recollect.checkpoint, lambda model, *args: model(*args)):
            model, loader, shares = training(make, world)
            for batch in loader:
                out = wrap(model, batch.data.x, batch.data.adj_t, *batch[1:])
                number = shares._wire.number
                out.square().sum().backward()
                assert shares._wire.number == number
            gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert_close(*gradients, 1e-10, "gradient")


@case
def own_rows_that_were_pushed_again_are_noticed(rank: int, world: int) -> None:
    """As by another mini-batch's forward pass; those of other ranks are kept."""
    for make in (_RECOMPUTED, rev()):
        model, _, shares = training(make, world)
        data, ptr = graph(as_it_is)
        batches = SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(shuffle=False))
        first, second, *_ = list(batches)
        loss = forward(model, first).sum()
        pushed = second.n_id[: second.batch_size]
        assert bool(torch.isin(first.n_id[first.batch_size :], pushed).any())
        forward(model, second)
        with pytest.raises(InPlaceError, match=r"pushed again .* backward before the next forward pass"):
            loss.backward()


@case
def a_source_of_ones_own_is_refused(rank: int, world: int) -> None:
    model, loader, _ = training(LAYERED["gcn"], world)
    history, rows = model.tables[0], next(iter(loader)).n_id
    found, weight = history.pull(rows), torch.ones(8, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"rows of .* are with several ranks"):
        recollect.checkpoint(torch.mm, found, weight, source=Rows(history, rows))
    recollect.checkpoint(torch.mm, found, weight).sum().backward()
    assert_close(weight.grad, found.sum(0)[:, None].expand(-1, 2), 1e-10)
    assert shares_of(history).world_size == world


@case
def a_run_goes_on_with_another_number_of_ranks(rank: int, world: int) -> None:
    """Parameters, optimizer, histories and random state: saved by half of the ranks, and loaded by all."""
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    few = dist.new_group(list(range(max(1, world // 2))))
    data, ptr = graph(as_it_is)

    def made(group: Any, seed: int) -> tuple[dict[str, Any], Any, Any]:
        torch.manual_seed(seed)
        shares = Shares(ptr, process_group=group)
        model = rev()(histories=HistoryOptions(dtype=torch.float64, process_group=shares)).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        loader = SubgraphLoader(data, ptr, log=False, batch_sampler=shares.batches(shuffle=False))
        model(loader=loader)
        forward(model, next(iter(loader))).square().sum().backward()
        optimizer.step()
        parameters, states = get_state_dict(model, optimizer)
        state = {"model": parameters, "optimizer": states, "histories": history_parts(model)}
        return state | {"random": torch.get_rng_state()}, model, optimizer

    before: list[Any] = [None]
    if rank < max(1, world // 2):
        state, model, optimizer = made(few, seed=1)
        for parameter in model.parameters():  # the ranks' gradients were not summed up: those of rank 0 count
            dist.broadcast(parameter.data, 0, group=few)
        save(state, checkpoint_id=folder[0], process_group=few)
        rows = [history.pull() for history in model.tables]
        before = [(rows, model.state_dict(), optimizer.state_dict(), torch.get_rng_state())]
    dist.broadcast_object_list(before)
    state, model, optimizer = made(dist.group.WORLD, seed=2)
    load(state, checkpoint_id=folder[0])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    load_history_parts(model, state["histories"])
    torch.set_rng_state(state["random"])
    rows, parameters, states, random = before[0]
    for history, expected in zip(model.tables, rows, strict=True):
        assert torch.equal(history.pull(), expected)
    assert_close(model.state_dict(), parameters, 0.0, "parameter")
    for number, values in states["state"].items():
        assert_close(optimizer.state_dict()["state"][number], values, 0.0, "optimizer")
    assert torch.equal(torch.get_rng_state(), random)
