"""Memory budgets under DistributedDataParallel and fully_shard: the numbers of one plain network on all shares."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ddp_cases import WAYS, Wrapped
from networks import WIDTH, Net, Reversible, check
from processes import Wrap
from sharded_cases import blocks_of, shard
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import recollect
from recollect.budget import BudgetError, Plan

CASES: dict[str, Callable[[Wrap, int, int], None]] = {}
UNITS = {Net: "blocks.*", Reversible: "layers.*"}
STRATEGIES = ("checkpoint", "link", "selective", "mixed")
SHARDS = {"reshard": {"reshard_after_forward": True}, "stay": {"reshard_after_forward": False}}


def planned(net: nn.Module, strategy: str) -> Plan:
    """Return a plan in which every unit has one strategy, or each another one."""
    plan = recollect.plan(net, torch.randn(6, WIDTH, dtype=torch.float64), budget="1 GB", units=UNITS[type(net)])
    each = ("store", "link", "link", "selective") if strategy == "mixed" else (strategy,) * len(plan.rows)
    plan.rows = tuple(replace(row, strategy=one) for row, one in zip(plan.rows, each, strict=True))
    return plan


def under_ddp(name: str, make: Callable[[], nn.Module], strategy: str, ddp: dict[str, Any], **settings: Any) -> None:
    def run(wrap: Wrap, rank: int, world: int) -> None:
        def prepare(wrapped: nn.Module) -> None:
            planned(wrapped.net, strategy).apply()
            wrapped.data_parallel = [DistributedDataParallel(wrapped.net, **ddp)]

        check(lambda: Wrapped(make()), prepare, rank, world, averaged=False, **settings)

    CASES[name] = run


def sharded(name: str, make: Callable[[], nn.Module], units: Any, strategy: str, before: bool, **settings: Any) -> None:
    options = settings.pop("shard")

    def run(wrap: Wrap, rank: int, world: int) -> None:
        def prepare(net: nn.Module) -> None:
            plan = planned(net, strategy)
            if before:
                plan.apply()
            shard(net, units, root=True, **options)
            plan.apply()

        check(make, prepare, rank, world, **settings)

    CASES[name] = run


for strategy in STRATEGIES:
    for way in ("default", "static_graph", "find_unused"):
        under_ddp(f"ddp-{strategy}-{way}", Net, strategy, WAYS[way])
    under_ddp(f"ddp-{strategy}-accumulate", Net, strategy, {}, mode="accumulate", number=3)
    under_ddp(f"ddp-{strategy}-dropout", functools.partial(Net, dropout=0.3), strategy, {})
    for how, options in SHARDS.items():
        sharded(f"shard-{strategy}-{how}", Net, blocks_of, strategy, False, shard=options)
    sharded(f"shard-{strategy}-before", Net, blocks_of, strategy, True, shard=SHARDS["reshard"])
    sharded(f"shard-{strategy}-accumulate", Net, blocks_of, strategy, False, shard=SHARDS["reshard"], mode="accumulate",
            number=3)  # fmt: skip
    sharded(f"shard-{strategy}-adam", Net, blocks_of, strategy, False, shard=SHARDS["reshard"], number=3,
            optimizer=torch.optim.Adam)  # fmt: skip
for strategy in ("invert", "link"):
    under_ddp(f"ddp-reversible-{strategy}", Reversible, strategy, {}, tolerance=1e-9)
    sharded(f"shard-reversible-{strategy}", Reversible, blocks_of, strategy, False, shard=SHARDS["reshard"],
            tolerance=1e-9)  # fmt: skip


def agreed(wrap: Wrap, rank: int, world: int) -> None:
    """Ranks take one choice, within the budget on each, and train sharded with it."""

    def prepare(net: nn.Module) -> None:
        example, group = torch.randn(60 + 30 * rank, WIDTH, dtype=torch.float64), torch.distributed.group.WORLD
        plain = recollect.plan(net, example, budget="1 GB", units="blocks.*", group=group).peak
        budgets: list[int] = [0] * world
        torch.distributed.all_gather_object(budgets, int(plain * 0.7))
        plan = recollect.plan(net, example, budget=max(budgets), units="blocks.*", group=group)
        rows: list[Any] = [None] * world
        torch.distributed.all_gather_object(rows, plan.rows)
        assert rows == [plan.rows] * world
        assert plan.peak <= plan.budget
        assert {row.strategy for row in plan.rows} > {"store"} or world == 1
        shard(net, blocks_of, root=True)
        plan.apply()

    check(Net, prepare, rank, world, mode="accumulate", number=2)


def too_little_for_one(wrap: Wrap, rank: int, world: int) -> None:
    net, group = Net().double(), torch.distributed.group.WORLD
    example = torch.randn(60 + 3000 * rank, WIDTH, dtype=torch.float64)
    budget = 1_000_000 if rank == 0 else 20_000
    if world == 1:
        recollect.plan(net, example, budget=budget, units="blocks.*", group=group)
        return
    with pytest.raises(BudgetError, match="on every rank") as caught:
        recollect.plan(net, example, budget=budget, units="blocks.*", group=group)
    least: list[int] = [0] * world
    torch.distributed.all_gather_object(least, caught.value.least)
    assert least == [caught.value.least] * world


def what_needs_others_is_refused(wrap: Wrap, rank: int, world: int) -> None:
    net, example = Net().double(), torch.randn(6, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match="under DistributedDataParallel"):
        recollect.plan(DistributedDataParallel(net), example, budget="1 GB")
    shard(net, blocks_of, root=True)
    with pytest.raises(ValueError, match="before it is sharded"):
        recollect.plan(net, example, budget="1 GB")


CASES |= {case.__name__: case for case in (agreed, too_little_for_one, what_needs_others_is_refused)}
