"""Ranks that call something else, or cannot go on, in engines and steps over whole graphs: all raise, and say why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import failing
from processes import Wrap, assert_close, registering
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from whole_graph_cases import a_graph, a_model, criterion_of, gradients_of

from recollect.aggregation import UPGradWeighting
from recollect.autogram import Engine
from recollect.distributed import Ranks, Shares, SharesError
from recollect.models import GCN
from recollect.outofcore import WholeGraph

CASES: dict[str, Callable[[Wrap, int, int], None]] = {}
case = registering(CASES)

NO_WEIGHTS = r"rank 1 could not go on, and so no other could: ArithmeticError: no weights today"


def whole_graph(world: int, change: Callable[[Any], None] | None = None) -> tuple[WholeGraph, Any]:
    data, ptr = a_graph(world)
    if change is not None:
        change(data)
    return WholeGraph(a_model(num_layers=1), data, ptr, shares=Shares(ptr, weights=torch.ones(len(ptr) - 1))), data


def per_class(logits: Tensor, y: Tensor, classes: int = 3) -> Tensor:
    each = F.cross_entropy(logits, y, reduction="none")
    return torch.stack([each[y == c].sum() / 9 for c in range(classes)])


def error_of(rank: int, who: int, own: type[Exception]) -> type[Exception]:
    """The rank that fails has its own error, and the others one that names it."""
    return own if rank == who else SharesError


@case
def operations_of_ranks(rank: int, world: int) -> None:
    ranks, one = Ranks(), torch.ones(3)
    assert ranks.gather({"rank": rank}) == [{"rank": other} for other in range(world)]
    assert torch.equal(ranks.add_up(one.clone()), one * world)
    assert torch.equal(ranks.spread(one * rank), one * 0)
    own = torch.full((rank, 2), float(rank))
    rows = ranks.gather_rows(own, list(range(world)))
    assert [part.tolist() for part in rows] == [[[float(other)] * 2] * other for other in range(world)]
    found = dict(ranks.add_up_all({0: one} if rank else {}, [0, 2], [one, one, one[:2]]))
    assert torch.equal(found[0], one * (world - 1))
    assert torch.equal(found[2], torch.zeros(2))
    last = world - 1
    calls: list[tuple[Callable[[Ranks], Any], Callable[[Ranks], Any], str]] = [
        (lambda r: r.gather(1), lambda r: r.add_up(one), r"values of ranks.*a sum over ranks, float32: 3 x 4 bytes"),
        (lambda r: r.add_up(one), lambda r: r.add_up(one[:2]), r"3 x 4 bytes.*2 x 4 bytes"),
        (lambda r: r.add_up(one), lambda r: r.add_up(one.int()), r"float32.*int32"),
        (lambda r: r.spread(one), lambda r: r.spread(one.double()), r"float32.*float64"),
        (lambda r: r.spread(one), lambda r: r.add_up(one), r"a tensor of rank 0.*a sum over ranks"),
        (
            lambda r: r.gather_rows(one.view(1, 3), [1] * world),
            lambda r: r.gather_rows(one.view(3, 1), [3] * world),
            r"3 x 4 bytes.*1 x 4 bytes",
        ),
        (
            lambda r: dict(r.add_up_all({}, [0], [one])),
            lambda r: dict(r.add_up_all({}, [0, 0], [one])),
            r"1 tensors: 3 x.*2 tensors: 6 x",
        ),
    ]
    for many, few, said in calls:
        ranks = Ranks()
        with pytest.raises(SharesError, match=rf"rank \d at exchange 1 .*rank {last} at exchange 1.*"):
            (few if rank == last else many)(ranks)
        with pytest.raises(SharesError, match=said):
            ranks.gather(1)  # it says why there is none


@case
def errors_are_told(rank: int, world: int) -> None:
    ranks = Ranks()

    def gather(error: Exception, everywhere: bool = False) -> list[int]:
        with ranks.wire.telling():
            if rank == 1 or everywhere:
                raise error
        return ranks.gather(rank)

    for error in (KeyError("nothing of that name"), ValueError("long " * 100), KeyError("again")):
        told = "" if rank == 1 else rf"rank 1 could not go on, and so no other could: {type(error).__name__}: .*"
        with pytest.raises(error_of(rank, 1, type(error)), match=f"{told}{error.args[0].split()[0]}"):
            gather(error)
    with pytest.raises(ZeroDivisionError):  # of all at once
        gather(ZeroDivisionError(), everywhere=True)
    assert ranks.gather(rank) == list(range(world))


@case
def an_engine_beside_a_whole_graph(rank: int, world: int) -> None:
    whole, data = whole_graph(world)
    model = nn.Linear(4, 2).double()
    engine = Engine(model, process_group=dist.group.WORLD)
    losses = model(torch.ones(3, 4, dtype=torch.float64)).sum(1)
    with pytest.raises(
        SharesError, match=r"rank 0 at exchange 1 \(losses of an engine\), rank \d at .*a step of a Who"
    ):
        whole.step(criterion_of(data)) if rank else engine.compute_gramian(losses)


@case
def another_call_of_a_whole_graph(rank: int, world: int) -> None:
    calls: list[tuple[Callable[[WholeGraph], Any], str]] = [
        (lambda whole: whole.step(per_class, UPGradWeighting()), "a step of a WholeGraph"),
        (lambda whole: whole.compute_gramian(per_class), "a Gramian of a WholeGraph"),
        (lambda whole: whole.evaluate(), "an evaluation of a WholeGraph"),
    ]
    for k in range(3):
        whole, _ = whole_graph(world)
        (mine, first), (others, second) = calls[k], calls[(k + 1) % 3]
        with pytest.raises(SharesError, match=rf"rank 0 at .*\({first}\), rank \d at .*\({second}\)"):
            (others if rank else mine)(whole)
        assert all(p.grad is None for p in whole.model.parameters())


@case
def another_graph(rank: int, world: int) -> None:
    def edges(data: Any) -> None:
        data.edge_index = data.edge_index.flip(1).clone()
        data.edge_index[0, 0] = (data.edge_index[0, 0] + 1) % 5

    def features(data: Any) -> None:
        data.x[0, 0] += 1

    def types(data: Any) -> None:
        data.y = data.y.int()

    def nodes(data: Any) -> None:
        data.train_mask[1] = ~data.train_mask[1]

    for change, name in ((edges, "edges"), (features, "x"), (types, "y"), (nodes, "train_mask")):
        whole, data = whole_graph(world, change if rank == 1 else None)
        for call in (WholeGraph.evaluate, functools.partial(WholeGraph.step, criterion=criterion_of(data))):
            with pytest.raises(SharesError, match=f"the graph's (rows of )?{name} of rank 1 is another"):
                call(whole)


@case
def another_number_of_losses(rank: int, world: int) -> None:
    whole, _ = whole_graph(world)
    with pytest.raises(SharesError, match=r"the criterion returned 3, 4.* losses, by rank: it must return as many"):
        whole.compute_gramian(lambda logits, y: per_class(logits, y, 4 if rank == 1 else 3))
    assert whole.compute_gramian(per_class).shape == (3, 3)  # and all goes on
    with pytest.raises(SharesError, match="the number of losses, one or several, of rank 1 is another"):
        whole.step(criterion_of(a_graph(world)[0])) if rank == 1 else whole.step(per_class, UPGradWeighting())


@case
def a_weighting_that_fails_on_one_rank(rank: int, world: int) -> None:
    whole, data = whole_graph(world)
    for weighting, message in (
        (failing, "ArithmeticError: no weights"),
        (lambda gramian: gramian, "ValueError: the w"),
    ):
        torch.manual_seed(5)
        told = "" if rank == 1 else "rank 1 could not go on.*"
        with pytest.raises(error_of(rank, 1, Exception), match=f"{told}{message.split()[1]}") as raised:
            whole.step(per_class, weighting if rank == 1 else UPGradWeighting())
        assert rank == 1 or message in str(raised.value)
        assert all(p.grad is None for p in whole.model.parameters())
    torch.manual_seed(5)
    found = whole.step(per_class, UPGradWeighting())  # and all goes on
    one = WholeGraph(a_model(num_layers=1), data, whole._ptr)
    torch.manual_seed(5)
    assert_close(found, one.step(per_class, UPGradWeighting()), 1e-10)
    assert_close(gradients_of(whole), gradients_of(one), 1e-10)


@case
def a_criterion_that_fails_on_one_rank(rank: int, world: int) -> None:
    """Rows are under way then, so that there are no exchanges behind it."""
    data, ptr = a_graph(world)
    shares = Shares(ptr, weights=torch.ones(len(ptr) - 1))
    whole = WholeGraph(GCN(data.num_nodes, 5, 6, 3, 3).double(), data, ptr, shares=shares)
    calls = []

    def criterion(logits: Tensor, y: Tensor) -> Tensor:
        calls.append(len(y))
        if rank == 1 and len(calls) == 2:
            raise ArithmeticError("no loss today")
        return criterion_of(data)(logits, y)

    with pytest.raises(
        error_of(rank, 1, ArithmeticError), match=f"{'' if rank == 1 else 'rank 1 could not go on.*'}no loss today"
    ):
        whole.step(criterion)
    assert all(p.grad is None for p in whole.model.parameters())


@case
def a_gradient_that_fails_on_one_rank(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2).double(), torch.randn(3, 4, dtype=torch.float64)
    engine = Engine(model, process_group=dist.group.WORLD, certify_every=0)
    calls: list[int] = []

    class Second(torch.autograd.Function):
        """Its second backward pass fails."""

        independent_axes = "all"

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise ArithmeticError("no gradient today")
            return grad

    y = model(x)
    losses = (Second.apply(y) if rank == 1 else y).square().sum(1)
    with pytest.raises(
        error_of(rank, 1, ArithmeticError), match=f"{'' if rank == 1 else 'rank 1 could not go on.*'}no gradient today"
    ):
        engine.backward(losses, UPGradWeighting())
    assert model.weight.grad is None
    weights = engine.backward(model(x).square().sum(1), UPGradWeighting())  # and all goes on
    assert weights.shape == (3 * world,)
    with pytest.raises(error_of(rank, 1, ArithmeticError), match=f"{'no weights today' if rank == 1 else NO_WEIGHTS}"):
        engine.backward(model(x).square().sum(1), failing if rank == 1 else UPGradWeighting())
