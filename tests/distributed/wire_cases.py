"""Ranks that do not call the same: the error on each names both sides, and no process ends by a signal."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from processes import Wrap
from rank_cases import IN, NODES, OUT, forward, graph
from torch import distributed as dist

from recollect.autoscale import History, HistoryFileError, HistoryOptions, SubgraphLoader
from recollect.distributed import Shares, SharesError
from recollect.models import GCN

BESIDE = r"rank 0 at .*nodes of an evaluation's mini-batches.*rank 1 at .*halo rows of a mini-batch"

CASES: dict[str, Callable[[Wrap, int, int], None]] = {}


def case(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CASES[function.__name__] = lambda wrap, rank, world: function(rank, world)
    return function


def short_group(world: int) -> Any:
    """A group that waits for 3 seconds."""
    return dist.new_group(list(range(world)), timeout=timedelta(seconds=3))


class Training:
    """A network with histories over ranks, of which one step and one evaluation are taken already."""

    def __init__(self, world: int) -> None:
        self.data, ptr = graph()
        self.shares = Shares(ptr, process_group=short_group(world))
        torch.manual_seed(0)
        self.model = self.make(3)
        self.loader = SubgraphLoader(self.data, ptr, log=False, batch_sampler=self.shares.batches(shuffle=False))
        self.evaluate()
        self.step()

    def make(self, layers: int) -> Any:
        options = HistoryOptions(dtype=torch.float64, process_group=self.shares)
        return GCN(NODES, IN, 8, OUT, layers, histories=options).double()

    def step(self) -> None:
        forward(self.model, next(iter(self.loader))).square().sum().backward()

    def evaluate(self) -> None:
        self.model(loader=self.loader)


def histories(world: int) -> tuple[Shares, History, History]:
    """Two of one group, of 2 and of 3 channels, with 8 rows of each rank; rows and channels count up."""
    shares = Shares(8 * torch.arange(world + 1), process_group=short_group(world))
    few, many = (History(8 * world, channels, process_group=shares) for channels in (2, 3))
    start, stop = shares.nodes
    for history in (few, many):
        own = rows_of(history)[start:stop]
        history.push(own, offset=[start], count=[stop - start])
    return shares, few, many


def rows_of(history: History) -> torch.Tensor:
    size = history.num_embeddings, history.embedding_dim
    return torch.arange(size[0] * size[1], dtype=torch.float32).view(size)


@case
def a_model_with_another_number_of_layers(rank: int, world: int) -> None:
    training = Training(world)
    batch = next(iter(training.loader))
    with pytest.raises(SharesError, match=r"rank 0 at .*numbers of halo rows.*rank 1 at .*comparing a history"):
        forward(training.make(3 + rank), batch)


@case
def a_rank_that_makes_fewer_layers_and_ends(rank: int, world: int) -> None:
    training = Training(world)
    if rank == 0:
        training.make(3)
        return
    with pytest.raises(SharesError, match=r"waited in vain for rank 0 at .*comparing a history.*fewer exchanges"):
        training.make(4)


@case
def a_rank_that_takes_one_step_more(rank: int, world: int) -> None:
    training = Training(world)
    if rank == 1:
        with pytest.raises(SharesError, match=r"in vain for rank 0 at .*numbers of halo rows.*rank 0 made fewer") as e:
            training.step()
        assert isinstance(e.value.__cause__, RuntimeError)  # what gloo says
        with pytest.raises(SharesError, match="failed before: rank 1 waited in vain"):
            training.step()
    dist.barrier()  # of another group: the first rank has not ended


@case
def one_step_more_and_then_an_evaluation(rank: int, world: int) -> None:
    training = Training(world)
    training.step()
    call = training.step if rank else training.evaluate
    with pytest.raises(SharesError, match=BESIDE):
        call()


@case
def an_evaluation_beside_a_training_step(rank: int, world: int) -> None:
    training = Training(world)
    call = training.step if rank else training.evaluate
    with pytest.raises(SharesError, match=BESIDE):
        call()


@case
def mini_batches_that_leave_nodes_out(rank: int, world: int) -> None:
    """One rank sees that its own do, and all are told."""
    training = Training(world)
    parts = [[part] for part in training.shares.parts]
    loader = SubgraphLoader(training.data, training.shares.ptr, log=False, batch_sampler=parts[rank == 1 :])
    told = "" if rank == 1 else "rank 1 could not go on, and so no other could: ValueError: "
    with pytest.raises(ValueError if rank == 1 else SharesError, match=f"^{told}the loader's mini-batches have"):
        training.model(loader=loader)
    training.evaluate()  # and all goes on


@case
def files_of_another_number_of_ranks(rank: int, world: int) -> None:
    training, folder = Training(world), [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    if rank == 1:
        History(5, 8, path=f"{folder[0]}/0.rank1.history")
    dist.barrier()
    options = HistoryOptions(path=folder[0], process_group=training.shares)
    told = "" if rank == 1 else "rank 1 could not go on, and so no other could: HistoryFileError: "
    with pytest.raises(HistoryFileError if rank == 1 else SharesError, match=f"^{told}.*0.rank1.history"):
        GCN(NODES, IN, 8, OUT, 3, histories=options)
    training.step()  # and all goes on


@case
def an_error_in_the_middle_of_a_step(rank: int, world: int) -> None:
    training = Training(world)

    def fail(*_: Any) -> None:
        raise ArithmeticError("of this rank")

    if rank == 0:
        hook = training.model.convs[0].register_forward_hook(fail)
        with pytest.raises(ArithmeticError):
            training.step()
        hook.remove()
    with pytest.raises(SharesError, match=r"rank 0 at exchange \d+ \(.*, rank 1 at exchange \d+ \("):
        training.step()


@case
def rows_of_another_width_that_were_begun_ahead(rank: int, world: int) -> None:
    """The smaller buffer would end its process by a signal."""
    _, few, many = histories(world)
    rows = torch.arange(8 * world)
    few.pull(rows)
    take = (many if rank == world - 1 else few).begin_pull(rows)
    last = world - 1
    # Each rank names the first other one that differs from it.
    found = rf"rank {0 if rank == last else rank} at .*: 2 x 4 bytes.*rank {last} at .*: 3 x 4 bytes"
    with pytest.raises(SharesError, match=found):
        take()
    with pytest.raises(SharesError, match="failed before: ranks are at different exchanges"):
        few.pull(rows)


@case
def rows_by_another_list(rank: int, world: int) -> None:
    _, few, _ = histories(world)
    one, other = torch.arange(8 * world), torch.arange(8 * world).flip(0)
    for rows in (one, other):
        assert torch.equal(few.begin_pull(rows)(), rows_of(few)[rows])
    take = few.begin_pull(other if rank else one)
    with pytest.raises(SharesError, match=r"wants 8 rows of the other, sends it 8, by the list of exchange \d+"):
        take()


@case
def a_loss_is_scaled_on_one_rank_alone(rank: int, world: int) -> None:
    shares, few, _ = histories(world)
    assert float(shares.scale(2 * rank)) == 2 * rank * world / sum(range(0, 2 * world, 2))
    with pytest.raises(SharesError, match=r"rank 0 at .*\(scale of a loss\), rank 1 at .*\(numbers of rows pulled"):
        few.pull(torch.arange(8 * world)) if rank else shares.scale(1)


@case
def rows_that_nobody_takes(rank: int, world: int) -> None:
    """They are on their way all the same, and do not come for those of a later exchange."""
    shares, few, many = histories(world)
    rows = torch.arange(8 * world)
    for _ in range(3):
        few.begin_pull(rows)
        assert torch.equal(many.pull(rows), rows_of(many))
    first, second = few.begin_pull(rows), many.begin_pull(rows)
    assert torch.equal(second(), rows_of(many))
    assert torch.equal(first(), rows_of(few))
    assert not shares._wire._begun
