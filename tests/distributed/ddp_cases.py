"""DistributedDataParallel over frames, against the same network on all shares under plain autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from networks import Block, Coupled, Net, Reversible, check
from processes import Wrap
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import recollect
import recollect.invertible as inn
from recollect.frames import RebuildError
from recollect.reversible import BDIA, GroupAddRev, Midpoint


class Spare(Net):
    """Some parameters are reached by no loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spare = Block()


class Routed(Net):
    """Which blocks run depends on the batch, as in a mixture of experts."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks[:: 2 if x[0, 0] > 0 else 1]:
            h = self.around(block, h)
        return h


class Wrapped(nn.Module):
    """A network under DDP; its parameters are named as in the network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.data_parallel: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (self.data_parallel[0] if self.data_parallel else self.net)(x)
        return y


def around(wrap: Wrap, net: nn.Module) -> None:
    net.around = wrap


def inside(wrap: Wrap, net: nn.Module) -> None:
    for block in net.blocks:
        block.inside = wrap


def nothing(wrap: Wrap, net: nn.Module) -> None:
    """The frames are in the layers themselves."""


CASES: dict[str, Callable[[Wrap, int, int], None]] = {}


def case(
    name: str,
    make: Callable[[], nn.Module],
    place: Callable[[Wrap, nn.Module], None],
    ddp: dict[str, Any],
    **settings: Any,
) -> None:
    def run(wrap: Wrap, rank: int, world: int) -> None:
        def prepare(wrapped: nn.Module) -> None:
            place(wrap, wrapped.net)
            wrapped.data_parallel = [DistributedDataParallel(wrapped.net, **ddp)]

        check(lambda: Wrapped(make()), prepare, rank, world, averaged=False, **settings)

    CASES[name] = run


WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "static_graph": {"static_graph": True},
    "find_unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
    "small_buckets": {"bucket_cap_mb": 0.0005},
}
for way, ddp in WAYS.items():
    case(f"around-{way}", Net, around, ddp)
    case(f"inside-{way}", Net, inside, ddp)
    case(f"rev-{way}", Reversible, nothing, ddp, tolerance=1e-9)
    case(f"coupled-{way}", functools.partial(Coupled, inn.AffineCoupling, 2), nothing, ddp)
case("around-spare", Spare, around, {"find_unused_parameters": True}, none_is_zero=True)
case("around-spare-static", Spare, around, {"static_graph": True}, none_is_zero=True)
case("routed", Routed, around, {"find_unused_parameters": True}, none_is_zero=True)
case("dropout", functools.partial(Net, dropout=0.3), around, {"static_graph": True})
case("accumulate", Net, around, {}, mode="accumulate", number=3)
case("adam-float32", Net, around, {}, number=3, optimizer=torch.optim.Adam, dtype=torch.float32, tolerance=1e-4)


class Unsteady(nn.Module):
    """Multiplies by a number that nobody sees, and that is another one in each call."""

    calls: ClassVar[list[int]] = []

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        self.calls.append(1)
        y: Tensor = self.inside(x, *args) * float(len(self.calls))
        return y


def certified(
    make: Callable[[], nn.Module], prepare: Callable[[Wrap, nn.Module], nn.Module]
) -> Callable[[Wrap, int, int], None]:
    """What is rebuilt is certified on each rank, and what is not what it was is an error there."""

    def figures(net: nn.Module) -> list[Any]:
        own = {id(module.certificate): module.certificate for module in net.modules() if hasattr(module, "certificate")}
        return list(own.values()) or [recollect.frames.certificate_of_process]

    def run(wrap: Wrap, rank: int, world: int) -> None:
        net = make().double()
        model = prepare(wrap, net)
        for certificate in figures(net):
            certificate.reset()
        model(torch.randn(6, 8, dtype=torch.float64)).sum().backward()
        for certificate in figures(net):
            assert certificate.equal + certificate.rounded > 0
            assert certificate.largest < 1e-10
        net = make().double()
        blocks = [module for module in net.modules() if isinstance(module, Block)]
        blocks[1].first = Unsteady(blocks[1].first)
        model = prepare(wrap, net)
        with pytest.raises(RebuildError):
            model(torch.randn(6, 8, dtype=torch.float64)).sum().backward()

    return run


def data_parallel(wrap: Wrap, net: nn.Module) -> nn.Module:
    if isinstance(net, Net):
        around(wrap, net)
    return DistributedDataParallel(net)


CASES["certified-around"] = certified(Net, data_parallel)
CASES["certified-rev"] = certified(Reversible, data_parallel)


def exact_case(make: Callable[[], nn.Module], ddp: dict[str, Any]) -> Callable[[Wrap, int, int], None]:
    """Gradients of all ranks, bit for bit those of the same network under DDP with everything kept."""

    def run(wrap: Wrap, rank: int, world: int) -> None:
        found: list[list[Tensor]] = []
        for disable in (False, True):
            torch.manual_seed(0)
            net = make()
            for module in net.modules():
                if hasattr(module, "disable"):
                    module.disable = disable
            parallel = DistributedDataParallel(net, **ddp)
            torch.manual_seed(1 + rank)
            for _ in range(2):  # static graphs are known in the second step
                net.zero_grad()
                parallel(torch.randn(6, 8)).sin().sum().backward()
            found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        assert len(found[0]) == len(list(net.parameters()))
        assert all(map(torch.equal, *found))

    return run


def exact_layers() -> nn.Module:
    block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout(0.2), nn.Tanh())
    return nn.Sequential(
        nn.Linear(8, 8), *(OfRows(GroupAddRev(Rows(block), num_groups=2, exact=True)) for _ in range(5))
    )


class Rows(nn.Module):
    """A block that needs no graph."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, graph: None) -> Tensor:
        y: Tensor = self.block(x)
        return y


class OfRows(nn.Module):
    """A layer that is called without a graph."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, None)
        return y


def exact_stack(kind: Callable[..., nn.Module]) -> nn.Module:
    blocks = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh()) for _ in range(5)]
    return nn.Sequential(nn.Linear(8, 8), kind(blocks))


for way in ("default", "static_graph", "small_buckets"):
    CASES[f"exact-{way}"] = exact_case(exact_layers, WAYS[way])
    CASES[f"midpoint-{way}"] = exact_case(functools.partial(exact_stack, Midpoint), WAYS[way])
    CASES[f"bdia-{way}"] = exact_case(functools.partial(exact_stack, BDIA), WAYS[way])
