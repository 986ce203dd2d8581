"""Engines over ranks, against an explicit Jacobian of all losses in one process."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from networks import Block
from processes import Wrap, assert_close, full, registering
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from recollect.aggregation import GaussNewton, RandomWeighting, UPGradWeighting
from recollect.autogram import Engine, _exchange
from recollect.distributed import SharesError
from recollect.frames import keep_everything
from recollect.reversible import GroupAddRev

CASES: dict[str, Callable[[Wrap, int, int], None]] = {}
case = registering(CASES)


class Net(nn.Module):
    """A network, and the losses [m] of samples."""

    def losses(self, samples: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def samples(number: int) -> Tensor:
        return torch.randn(number, 6, dtype=torch.float64)

    def forward(self, samples: Tensor) -> Tensor:
        return self.losses(samples)


class Mlp(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def losses(self, samples: Tensor) -> Tensor:
        return self.last(self.first(samples).tanh()).square().sum(1)


class Tasks(Mlp):
    """Two losses for each sample, the samples in the last dimension."""

    def losses(self, samples: Tensor) -> Tensor:
        y = self.last(self.first(samples).tanh())
        return torch.stack([y[:, 0] * y[:, 1], y.square().sum(1)])


class Mixed(Net):
    """A norm over the batch in training would mix ranks: over groups of two samples it does not, but mixes losses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(6, 8),
            nn.BatchNorm1d(8, track_running_stats=False),
            nn.Linear(8, 3),
        )

    def losses(self, samples: Tensor) -> Tensor:
        return self.last(self.norm(self.first(samples)).tanh()).square().sum(1)


class Cnn(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, stride=2)
        self.norm, self.last = nn.GroupNorm(2, 8), nn.Linear(8, 3)

    @staticmethod
    def samples(number: int) -> Tensor:
        return torch.randn(number, 2, 7, 7, dtype=torch.float64)

    def losses(self, samples: Tensor) -> Tensor:
        y = self.norm(self.second(self.first(samples).tanh())).tanh().mean((2, 3))
        return self.last(y).square().sum(1)


class Gpt(Net):
    """Tied embeddings, positions, one block of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.attend, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)
        self.mlp, self.head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    @staticmethod
    def samples(number: int) -> Tensor:
        return torch.randint(11, (number, 5))

    def losses(self, samples: Tensor) -> Tensor:
        h = self.tokens(samples) + self.places(torch.arange(5))
        q, k, v = self.attend(self.norm(h)).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        logits = self.head(h + self.mlp(h))
        flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), samples[:, 1:].flatten(), reduction="none")
        return flat.view(len(samples), 4).mean(1)


class Gnn(Net):
    """A loss for each graph, of four nodes, all graphs in one adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    @staticmethod
    def samples(number: int) -> Tensor:
        return torch.randn(number, 4, 3, dtype=torch.float64)

    def losses(self, samples: Tensor) -> Tensor:
        number = len(samples)
        ring = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])
        edges = (ring[:, None] + 4 * torch.arange(number)[:, None]).flatten(1)
        mean = torch.zeros(4 * number, 4 * number, dtype=torch.float64).index_put(
            (edges[1], edges[0]), torch.tensor(1.0, dtype=torch.float64), accumulate=True
        )
        h = (mean @ self.first(samples.flatten(0, 1))).tanh()
        return self.last(mean @ h).view(number, 8).square().sum(1)


class Rev(Net):
    """Layers whose inputs are rebuilt."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(
            GroupAddRev(nn.ModuleList(Block(4) for _ in range(2)), fuse=False) for _ in range(3)
        )

    def losses(self, samples: Tensor) -> Tensor:
        h = self.first(samples)
        for layer in self.layers:
            h = layer(h, None)
        return self.last(h).square().sum(1)


NETS: dict[str, type[Net]] = {
    "rev": Rev,
    "mlp": Mlp,
    "tasks": Tasks,
    "mixed": Mixed,
    "cnn": Cnn,
    "gpt": Gpt,
    "gnn": Gnn,
}


def cut(number: int, world: int, how: str) -> list[int]:
    """How many samples each rank has."""
    if how == "equal":
        return [number // world] * world
    counts = [2 + rank % 3 for rank in range(world)]
    if how == "one_without" and world > 1:
        counts[world // 2] = 0
    return counts


def jacobian(net: Net, parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the rows of all losses, those of each part computed from it alone, and the losses."""
    parameters = list(net.parameters())
    rows, values = [], []
    for part in parts:
        losses = net.losses(part).flatten() if len(part) else torch.zeros(0, dtype=torch.float64)
        values.append(losses.detach())
        for loss in losses:
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros_like(p).flatten() if g is None else g.flatten()
                        for g, p in zip(grads, parameters, strict=True)
                    ]
                )
            )
    return torch.stack(rows), values


def flat_grads(net: nn.Module) -> Tensor:
    return torch.cat(
        [torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else full(p.grad).flatten() for p in net.parameters()]
    )


def own_losses(net: nn.Module, part: Tensor) -> Tensor:
    return net(part) if len(part) else torch.zeros(0, dtype=torch.float64)


def start(kind: str, world: int, how: str) -> tuple[Net, list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    net = NETS[kind]().double()
    counts = cut(3 * world, world, how)
    parts = list(net.samples(sum(counts)).split(counts))
    with keep_everything():
        rows, values = jacobian(net, parts)
    return net, parts, rows, torch.cat(values)


def same_numbers(rank: int, world: int, kind: str, how: str, **options: Any) -> None:
    net, parts, rows, _ = start(kind, world, how)
    engine = Engine(net, process_group=dist.group.WORLD, **options)
    gramian = engine.compute_gramian(own_losses(net, parts[rank]))
    assert_close(gramian, rows @ rows.T, 1e-10, "Gramian")
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = flat_grads(net)
    weights = engine.backward(own_losses(net, parts[rank]), UPGradWeighting())
    assert_close(weights, UPGradWeighting()(rows @ rows.T), 1e-8, "weights")
    assert_close(flat_grads(net) - before, weights @ rows, 1e-10, "gradient")
    assert engine.certificate.checks == 2
    assert engine.certificate.largest < 1e-12


for kind in NETS:
    for how in ("equal", "unequal", "one_without"):
        case(same_numbers, f"{kind}-{how}", kind=kind, how=how)
for kind in ("mlp", "mixed", "cnn", "tasks"):
    case(same_numbers, f"{kind}-little_memory", kind=kind, how="unequal", row_bytes=1)


@case
def pieces(rank: int, world: int) -> None:
    """Rows that go in many parts."""
    room, _exchange._PART = _exchange._PART, 64
    try:
        for kind in ("cnn", "mixed", "mlp"):
            same_numbers(rank, world, kind, "unequal")
    finally:
        _exchange._PART = room


@case
def other_order(rank: int, world: int) -> None:
    """Ranks come by the same layers in different orders."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(4)).double()
    x = torch.randn(2 * world, 4, dtype=torch.float64)

    def losses(part: Tensor, order: Any) -> Tensor:
        outputs = {k: layers[k](part).tanh() for k in order}
        return torch.stack([outputs[k] for k in range(4)]).sum((0, 2))

    parameters = list(layers.parameters())
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
            for loss in losses(x, range(4))
        ]
    )
    engine = Engine(layers, process_group=dist.group.WORLD)
    order = [range(4), range(3, -1, -1), (2, 0, 3, 1)][rank % 3]
    gramian = engine.compute_gramian(losses(x[2 * rank : 2 * rank + 2], order))
    assert_close(gramian, rows @ rows.T, 1e-10)


@case
def other_layers(rank: int, world: int) -> None:
    """Which layers a rank's losses depend on is its own affair; those of none get no gradient."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(world + 1)).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    rows = torch.zeros(2 * world, (world + 1) * 15, dtype=torch.float64)
    for r in range(world):
        for k, loss in enumerate(layers[r](x).square().sum(1) + layers[0](x).sum(1)):
            grads = torch.autograd.grad(loss, list(layers.parameters()), retain_graph=True, allow_unused=True)
            rows[2 * r + k] = torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for g, p in zip(grads, layers.parameters(), strict=True)
                ]
            )
    engine = Engine(layers, process_group=dist.group.WORLD)
    weights = engine.backward(layers[rank](x).square().sum(1) + layers[0](x).sum(1), UPGradWeighting())
    assert_close(flat_grads(layers), weights @ rows, 1e-10)
    assert layers[world].weight.grad is None


@case
def held_no_longer_than_a_layer(rank: int, world: int) -> None:
    """Where all ranks have the same order, no factor waits for the next layer."""
    held = []
    step = _exchange.Exchange._step

    def watched(self: Any, parcel: Any) -> Any:
        seen = step(self, parcel)
        held.append((len(self._mine), len(self._theirs)))
        return seen

    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(8))).double()
    engine = Engine(net, process_group=dist.group.WORLD)
    _exchange.Exchange._step = watched  # type: ignore[method-assign]
    try:
        engine.compute_gramian(net(torch.randn(3, 6).double()).square().sum(1))
    finally:
        _exchange.Exchange._step = step  # type: ignore[method-assign]
    assert len(held) == 9
    assert set(held) == {(0, 0)}


@case
def bytes_on_the_wire(rank: int, world: int) -> None:
    """Of each layer the smaller of its factor and its rows goes to half of the other ranks."""
    exchanges, finish = [], _exchange.Exchange.finish
    noted = lambda self, declined: exchanges.append(self) or finish(self, declined)  # noqa: E731
    _exchange.Exchange.finish = noted  # type: ignore[method-assign]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Tanh(), nn.Linear(30, 2, bias=False)).double()
    engine = Engine(net, process_group=dist.group.WORLD)
    try:
        engine.compute_gramian(net(torch.randn(3, 7, 20).double()).square().sum((1, 2)))
    finally:
        _exchange.Exchange.finish = finish  # type: ignore[method-assign]
    layers = sum(3 * min(7 * (a + b), a * b) for a, b in ((20, 30), (30, 2)))
    assert min(7 * (30 + 2), 30 * 2) == 30 * 2  # the second goes as rows
    receivers = world // 2 - (world % 2 == 0 and rank >= world // 2)
    assert exchanges[-1].sent == 8 * layers * max(receivers, 0)


@case
def weights_of_rank_0(rank: int, world: int) -> None:
    """Weights that are drawn at random are the same everywhere; residuals are those of all ranks."""
    net, parts, rows, values = start("mlp", world, "unequal")
    engine = Engine(net, process_group=dist.group.WORLD)
    torch.manual_seed(rank)
    weights = engine.backward(net(parts[rank]), RandomWeighting())
    assert_close(flat_grads(net), weights @ rows, 1e-10)
    net.zero_grad()
    weights = engine.backward(net(parts[rank]), GaussNewton(damping=0.1))
    assert_close(weights, GaussNewton(damping=0.1)(rows @ rows.T, values), 1e-8)
    assert_close(flat_grads(net), weights @ rows, 1e-10)


def counted_ddp(net: nn.Module, world: int) -> tuple[DistributedDataParallel, list[int]]:
    """The network in DDP, and the buckets that its reducer is asked for."""
    parallel, calls = DistributedDataParallel(net), []

    def count(state: None, bucket: Any) -> Any:
        calls.append(bucket.index())
        work = dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future()
        return work.then(lambda done: done.value()[0])

    count.__annotations__ = {
        "bucket": dist.GradBucket,  # type: ignore[attr-defined]
        "return": torch.futures.Future[Tensor],
    }
    parallel.register_comm_hook(None, count)
    return parallel, calls


@contextmanager
def sums() -> Iterator[list[int]]:
    """Notes the number of elements of each sum over ranks that the engine asks for."""
    found, usual = list[int](), dist.all_reduce
    dist.all_reduce = lambda tensor, *rest, **named: found.append(tensor.numel()) or usual(tensor, *rest, **named)
    try:
        yield found
    finally:
        dist.all_reduce = usual


@case
def a_gradient_is_summed_up_in_one_tensor(rank: int, world: int) -> None:
    net, parts, rows, _ = start("mlp", world, "unequal")
    engine = Engine(net, process_group=dist.group.WORLD, certify_every=0)
    with sums() as found:
        weights = engine.backward(net(parts[rank]), UPGradWeighting())
    used = [p.numel() for layer in (net.first, net.last) for p in layer.parameters()]
    assert found == [len(rows) ** 2, sum(used)]  # the Gramian, and the gradient
    assert_close(flat_grads(net), weights @ rows, 1e-10)


@case
def under_ddp_without_a_second_sum(rank: int, world: int) -> None:
    """A forward pass in no_sync leaves the one sum to the engine; those behind it are DDP's own again."""
    net, parts, rows, _ = start("gnn", world, "unequal")
    parallel, calls = counted_ddp(net, world)
    engine = Engine(parallel, process_group=dist.group.WORLD, certify_every=0)
    for synced in (False, True, False, False):
        net.zero_grad()
        calls.clear()
        with nullcontext() if synced else parallel.no_sync():
            losses = parallel(parts[rank])
        with sums() as found:
            weights = engine.backward(losses, UPGradWeighting())
        number = sum(p.numel() for p in net.parameters() if p.grad is not None)
        assert calls == ([0] if synced else [])
        assert found == [len(rows) ** 2, number, *([number] if synced else [])], (found, synced)
        assert_close(flat_grads(net), weights @ rows, 1e-10)


@case
def under_ddp(rank: int, world: int) -> None:
    """The reducer is asked once for each bucket, and the gradient is that of the sum."""
    net, parts, rows, _ = start("gnn", world, "unequal")
    parallel, calls = counted_ddp(net, world)
    for engine in (Engine(parallel, process_group=dist.group.WORLD), Engine(net, process_group=dist.group.WORLD)):
        for step in range(3):
            net.zero_grad()
            calls.clear()
            assert_close(engine.compute_gramian(losses := parallel(parts[rank])), rows @ rows.T, 1e-10)
            assert calls == []
            weights = engine.backward(losses, UPGradWeighting())
            assert calls == [0], (step, calls)
            assert_close(flat_grads(net), weights @ rows, 1e-10)


@case
def ddp_that_follows_graphs(rank: int, world: int) -> None:
    for option in ("find_unused_parameters", "static_graph"):
        net, parts, *_ = start("gnn", world, "unequal")
        parallel = DistributedDataParallel(net, **{option: True})
        with pytest.raises(ValueError, match="by itself, so call the module"):
            Engine(net, process_group=dist.group.WORLD).compute_gramian(parallel(parts[rank]))


def sharded(rank: int, world: int, kind: str, how: str, units: Callable[[Net], list[Any]], **options: Any) -> None:
    net, parts, rows, _ = start(kind, world, how)
    for unit in units(net):
        fully_shard(unit, **options)
    fully_shard(net, **options)
    engine = Engine(net, process_group=dist.group.WORLD)
    assert_close(engine.compute_gramian(net(parts[rank])), rows @ rows.T, 1e-10, "Gramian")
    for step in (1, 2):  # the second adds to the first
        weights = engine.backward(net(parts[rank]), UPGradWeighting())
        assert_close(flat_grads(net), step * (weights @ rows), 1e-10, "gradient")
    assert engine.certificate.largest < 1e-12
    assert engine.certificate.checks == 3
    assert_close(
        engine.compute_norms(losses := net(parts[rank])), rows.norm(dim=1).split([len(p) for p in parts])[rank], 1e-10
    )
    losses.sum().backward()  # ends the step of fully_shard
    net.zero_grad()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    engine.backward(net(parts[rank]), UPGradWeighting())
    before = torch.cat([full(p).flatten() for p in net.parameters()])
    optimizer.step()
    assert_close(torch.cat([full(p).flatten() for p in net.parameters()]), before - 0.1 * weights @ rows, 1e-10)


@case
def parameters_that_nobody_shards_are_summed_up_in_one_tensor(rank: int, world: int) -> None:
    net, parts, rows, _ = start("mlp", world, "unequal")
    ignored = {*net.last.parameters(), *net.unused.parameters()}
    fully_shard(net, ignored_params=ignored)
    engine = Engine(net, process_group=dist.group.WORLD, certify_every=0)
    for step in (1, 2):  # the second adds to the first
        with sums() as found:
            weights = engine.backward(net(parts[rank]), UPGradWeighting())
        flags, number = len(ignored), sum(p.numel() for p in net.last.parameters())
        assert found == [len(rows) ** 2, flags, number, 1], found  # and the size of the sharded gradient
        assert_close(flat_grads(net), step * (weights @ rows), 1e-10)
        assert all(parameter.grad is None for parameter in net.unused.parameters())
    assert engine.certificate.largest < 1e-12


def linears(net: Net) -> list[Any]:
    return [
        m
        for m in [*net.children(), *getattr(net, "layers", ())]
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.Sequential, GroupAddRev))
    ]


KEEP, RESHARD = {"reshard_after_forward": False}, {"reshard_after_forward": True}
for kind in ("mixed", "cnn", "gnn", "rev"):
    for name, options in (("keep", KEEP), ("reshard", RESHARD), ("default", {})):
        case(sharded, f"sharded-{kind}-{name}", kind=kind, how="unequal", units=linears, **options)
case(sharded, "sharded-gnn-one_without", kind="gnn", how="one_without", units=linears)
case(sharded, "sharded-gpt", kind="gpt", how="unequal", units=lambda net: [[net.tokens, net.head], net.mlp, net.attend])


@case
def sharded_without_a_group(rank: int, world: int) -> None:
    """The graph has the gathered parameters, and not these."""
    net, parts, *_ = start("gnn", world, "unequal")
    fully_shard(net.first, reshard_after_forward=True)
    fully_shard(net)
    engine = Engine(net)
    for ask in (
        engine.compute_gramian,
        engine.compute_norms,
        engine.explain,
        lambda y: engine.backward(y, UPGradWeighting()),
    ):
        with pytest.raises(TypeError, match=r"'first\.weight' is a DTensor"):
            ask(net(parts[rank]))


@case
def ranks_that_differ(rank: int, world: int) -> None:
    if world == 1:
        return
    group, x = dist.group.WORLD, torch.randn(3, 4).double()

    def net(*sizes: int) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))).double()

    def ask(net: nn.Module, x: Tensor = x) -> None:
        Engine(net, process_group=group).compute_gramian(net(x).square().sum(1))

    with pytest.raises(SharesError, match=r"'0.weight' of shape \[6, 4\].*of rank 1 '0.weight' of shape \[5, 4\]"):
        ask(net(4, 6) if rank != 1 else net(4, 5))
    with pytest.raises(SharesError, match=r"number of parameters of rank 1 is another than that of rank 0 \(4 and 2"):
        ask(net(4, 6) if rank != 1 else net(4, 6, 5))
    with pytest.raises(SharesError, match=r"float64, and of rank 1 .*float32"):
        ask(*((net(4, 6), x) if rank != 1 else (net(4, 6).float(), x.float())))
    other = net(4, 6)
    if rank == 1:
        other[0].bias.data += 1e-12
    with pytest.raises(SharesError, match="has other values on rank"):
        Engine(other, process_group=group).backward(other(x).square().sum(1), UPGradWeighting())
    with pytest.raises(SharesError, match="has other values on rank"):
        ask(other)
    engine = Engine(model := net(4, 6), process_group=group)
    asks = [engine.compute_gramian, lambda losses: engine.backward(losses, UPGradWeighting())]
    with pytest.raises(SharesError, match=r"what is asked of rank 1 is another than that of rank 0 \(backward and"):
        asks[rank == 1](model(x).sum(1))
    with pytest.raises((SharesError, TypeError), match="output must be a tensor of a floating-point type"):
        engine.compute_gramian(model(x).sum(1) if rank != 1 else "losses")
    with pytest.raises((SharesError, ArithmeticError), match="no weights today"):
        engine.backward(model(x).sum(1), failing if rank == 1 else UPGradWeighting())
    y = Failing.apply(model(x)) if rank == 1 else model(x)
    with pytest.raises((SharesError, ArithmeticError), match="no gradient today"):
        engine.compute_gramian((y * 2).sum(1))
    assert engine.compute_gramian(model(x).square().sum(1)).shape == (3 * world, 3 * world)  # and all goes on


def failing(gramian: Tensor) -> Tensor:
    raise ArithmeticError("no weights today")


class Failing(torch.autograd.Function):
    independent_axes = "all"

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("no gradient today")


@case
def what_is_refused(rank: int, world: int) -> None:
    net, parts, *_ = start("mlp", world, "equal")
    engine = Engine(net, process_group=dist.group.WORLD)
    losses = net(parts[rank])
    with pytest.raises(ValueError, match="two lists of losses"):
        engine.compute_gramian(losses, losses)
    with pytest.raises(ValueError, match="mtl_backward is not there"):
        engine.mtl_backward(losses, [], UPGradWeighting())
    with pytest.raises(ValueError, match="not to features"):
        Engine(features=losses, process_group=dist.group.WORLD)
    handle = net.first.weight.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match=r"'first\.weight' has a hook"):
        engine.compute_gramian(net(parts[rank]))
    handle.remove()
    norms = engine.compute_norms(net(parts[rank]))
    assert norms.shape == (len(parts[rank]),)
    twin, its_engine = copy.deepcopy((net, engine))
    assert torch.equal(its_engine.compute_gramian(twin(parts[rank])), engine.compute_gramian(net(parts[rank])))
    with pytest.raises(TypeError, match="group of this engine cannot be pickled"):
        pickle.dumps(engine)


@case
def hooks_behind(rank: int, world: int) -> None:
    """Those that run behind an accumulation see the sum, once."""
    net, parts, rows, _ = start("mlp", world, "unequal")
    seen: list[Tensor] = []
    net.last.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    weights = Engine(net, process_group=dist.group.WORLD).backward(net(parts[rank]), UPGradWeighting())
    assert len(seen) == 1
    names = [name for name, _ in net.named_parameters()]
    sizes = [p.numel() for p in net.parameters()]
    assert_close(seen[0], (weights @ rows).split(sizes)[names.index("last.bias")], 1e-10)


@case
def nobody_has_losses(rank: int, world: int) -> None:
    net = Mlp().double()
    engine = Engine(net, process_group=dist.group.WORLD)
    assert engine.compute_gramian(torch.zeros(0, dtype=torch.float64)).shape == (0, 0)
    weights = engine.backward(torch.zeros(0, dtype=torch.float64), lambda gramian: gramian.new_zeros(0))
    assert weights.shape == (0,)
    assert all(p.grad is None for p in net.parameters())
