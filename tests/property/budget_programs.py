"""Random networks under random budgets, beside the same network without a plan.

``run(seed)`` gives a :class:`Verdict`; ``python budget_programs.py SEED`` prints one.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from budget_compare import differences, numbers_of, restore, world_of
from budget_units import UNITS, ZOO, mlp, of_zoo
from torch import Tensor, nn

import recollect
from recollect.budget import BudgetError, _plan, _problem
from recollect.budget._solve import Choice, Problem, Region
from recollect.frames import keep_everything, settle
from recollect.invertible import Measured
from recollect.memory import peak_memory

WIDTH, LENGTH, BATCH = 8, 5, 24
STRATEGIES = ("checkpoint", "link", "selective", "offload", "invert")
FORMS = ("tensor", "tuple", "dict", "dataclass", "input requires grad")
SHAPES = ("sequential", "list", "nested", "dictionary", "skips", "dense", "twice", "pairs")
STEPS = ("backward", "accumulate", "grad", "evaluation", "retain")


@dataclass
class Batch:
    x: Tensor
    scale: float = 1.0
    more: dict[str, Tensor] = field(default_factory=dict)


class Network(nn.Module):
    """Units in a container, and how they are called."""

    def __init__(self, units: list[nn.Module], shape: str, draw: random.Random) -> None:
        super().__init__()
        self.shape = shape
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        half = len(units) // 2
        if shape == "nested":
            self.layers: Any = nn.Sequential(nn.Sequential(*units[:half]), nn.Sequential(*units[half:]))
        elif shape == "dictionary":
            self.layers = nn.ModuleDict({f"layer{i}": unit for i, unit in enumerate(units)})
        else:
            self.layers = nn.Sequential(*units) if shape == "sequential" else nn.ModuleList(units)
        self.order = list(range(len(units)))
        if shape == "twice":
            self.order = [draw.randrange(len(units)) for _ in range(len(units) + 2)]
        self.between = [draw.choice(("", "", "", "sin", "relu_")) for _ in self.order]
        self.outputs = draw.choice(("tensor", "tuple", "dict"))

    def forward(self, x: Any, scale: float = 1.0) -> Any:
        if isinstance(x, Batch):
            x, scale = x.x, x.scale
        h = self.stem(x) * scale
        if self.shape in ("sequential", "nested"):
            h = self.layers(h)
        elif self.shape == "pairs":
            a, b = h.flatten(0, 1), h.flip(-1).flatten(0, 1)
            for layer in self.layers.children():
                a, b = layer(a, b)
            h = (a + 2 * b).view(h.shape)
        else:
            h = self._by_hand(h)
        y = self.head(h)
        return {"tensor": y, "tuple": (y, h * 0.1, None), "dict": {"y": [y], "h": h.mean(0), "name": "network"}}[
            self.outputs
        ]

    def _by_hand(self, h: Tensor) -> Tensor:
        layers = list(self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers)
        early: list[Tensor] = []
        for index, between in zip(self.order, self.between, strict=True):
            early.append(h)
            h = layers[index](h)
            if between == "sin":
                h = h.sin()
            elif between == "relu_":
                h = (h * 1).relu_()
            if self.shape == "skips" and len(early) > 2:
                h = h + early[-3]
            if self.shape == "dense":
                h = torch.stack([*early, h]).mean(0)
        return h


def loss_of(output: Any) -> Tensor:
    found = list(_tensors(output))
    return sum((t.float() if t.dtype is torch.bfloat16 else t).sin().square().mean() for t in found)  # type: ignore[return-value]


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


class Program:
    """A network, its input, a budget and what is done with them; all of it follows from the seed."""

    def __init__(self, seed: int, only: str | None = None) -> None:
        draw = self.draw = random.Random(seed)
        self.autocast = draw.random() < 0.12
        self.dtype = torch.float32 if self.autocast else torch.float64
        self.shape = draw.choice(SHAPES)
        table = {name: of_zoo(name) for name in ZOO} if self.shape == "pairs" else UNITS
        if only is not None:
            self.shape, table = ("pairs", {only: of_zoo(only)}) if only in ZOO else (self.shape, UNITS)
            self.shape = "list" if self.shape == "pairs" and only not in ZOO else self.shape
        self.kinds = [draw.choice(list(table)) for _ in range(draw.randint(2, 7))]
        if draw.random() < 0.5 or only is not None:  # most networks repeat a kind
            kind = only or self.kinds[0]
            self.kinds = [kind if draw.random() < 0.7 or i == 0 else k for i, k in enumerate(self.kinds)]
        if self.autocast:  # oneDNN saves bytes of bfloat16 cells that it never wrote: no rebuild has the same
            self.kinds = ["attention" if kind == "recurrent" else kind for kind in self.kinds]
        torch.manual_seed(seed)
        units = [table[kind](draw, WIDTH) for kind in self.kinds]
        if draw.random() < 0.15 and self.shape != "pairs":  # the same module in two places
            units.append(units[0])
            self.kinds.append("the first again")
        if draw.random() < 0.15 and self.shape != "pairs":
            first, second = mlp(random.Random(0), WIDTH), mlp(random.Random(0), WIDTH)
            second[0].weight = first[0].weight
            units += [first, second]
            self.kinds += ["tied", "tied"]
        self.model = Network(units, self.shape, draw).to(self.dtype)
        self.units = list(dict.fromkeys(units))
        if draw.random() < 0.15:
            self.model.stem.requires_grad_(False)
        if draw.random() < 0.1:
            self.model.eval()
        self.form = draw.choice(FORMS)
        self.step = draw.choice(STEPS)
        self.strategy = draw.choice((None, None, None, *STRATEGIES))
        self.share = draw.choice((1.1, 0.9, 0.75, 0.6, 0.5, 0.4))
        self.selective = draw.random() < 0.8
        self.offload = draw.random() < 0.3 or self.strategy == "offload"
        self.seed = seed

    def __str__(self) -> str:
        flags = [name for name in ("autocast", "selective", "offload") if getattr(self, name)]
        return (
            f"{self.shape}: {', '.join(self.kinds)}; input: {self.form}; output: {self.model.outputs}; {self.step}; "
            f"{self.strategy or 'solved'} at {self.share}; {' '.join(flags)}"
            f"{'' if self.model.training else ' evaluation'}; between: {' '.join(b or '-' for b in self.model.between)}"
        )

    def inputs(self, seed: int = 0) -> tuple[Any, list[Tensor]]:
        """Return an example as a plan takes it, and its leaves."""
        x = torch.randn(BATCH, LENGTH, WIDTH, dtype=self.dtype, generator=torch.Generator().manual_seed(seed))
        leaves = [x.requires_grad_()] if self.form == "input requires grad" else []
        given = {"tuple": (x, 0.9), "dict": {"x": x, "scale": 0.8}, "dataclass": Batch(x, 1.1)}.get(self.form, x)
        return given, leaves

    def in_flight(self) -> int:
        """Bytes of inputs that may wait to be written to a file: longer in one step than in another."""
        return 2 * BATCH * LENGTH * WIDTH * self.dtype.itemsize if self.offload else 0

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()

    def forward(self, model: nn.Module, given: Any) -> Tensor:
        with self.context():
            if isinstance(given, dict):
                return loss_of(model(**given))
            return loss_of(model(*given) if isinstance(given, tuple) else model(given))

    def execute(self, model: nn.Module) -> dict[str, Any]:
        """Run what is done, and return what is compared."""
        seed_all(self.seed)
        model.zero_grad(set_to_none=True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.step == "evaluation":
            training = model.training
            with torch.no_grad():
                self.forward(model.eval(), self.inputs(1)[0])
            model.train(training)
        found: dict[str, Any] = {}
        leaves: list[Tensor] = []
        for number in range(2 if self.step == "accumulate" else 1):
            given, leaves = self.inputs(number)
            loss = self.forward(model, given)
            found[f"loss {number}"] = loss.detach()
            if self.step == "grad":
                wanted = parameters[::2] + leaves
                found["some"] = torch.autograd.grad(loss, wanted, allow_unused=True)
            else:
                loss.backward(retain_graph=self.step == "retain")
                if self.step == "retain":
                    loss.backward()
        settle()
        found["gradients"] = [p.grad for p in [*model.parameters(), *leaves]]
        found["buffers"] = [b.clone() for b in model.buffers()]
        found["random state"] = [torch.get_rng_state()]
        found["numbers"] = [number for _, numbers in numbers_of(model) for number in numbers.values()]
        model.zero_grad(set_to_none=True)
        return found

    def peak(self, model: nn.Module) -> int:
        seed_all(self.seed)
        model.zero_grad(set_to_none=True)
        given, _ = self.inputs()
        with peak_memory("cpu") as memory:
            self.forward(model, given).backward()
        settle()
        model.zero_grad(set_to_none=True)
        return memory.peak_bytes

    def plan(self, budget: int, folder: str) -> recollect.budget.Plan:
        units = self.units
        with self.context():
            return recollect.plan(
                self.model, self.inputs()[0], budget=budget, loss=loss_of, selective=self.selective,
                units=lambda module: any(module is one for one in units), offload=folder if self.offload else False,
            )  # fmt: skip


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 1000)  # noqa: NPY002


@dataclass(frozen=True)
class Verdict:
    """How one program went; ``faults`` is empty where it went well.

    ``kind`` is "planned", "refused" (the budget cannot be met, and the least that is named can) or "void" (plain
    autograd raises).
    """

    seed: int
    kind: str
    faults: list[str]
    program: str
    strategies: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.kind}\n {self.program}\n " + "\n ".join(self.faults)


def run(seed: int, only: str | None = None) -> Verdict:
    """Try the program of a seed; ``only`` is a kind of units that it has."""
    before = torch.get_default_dtype()
    state = random.getstate(), torch.get_rng_state()
    program = None
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            program = Program(seed, only)
            torch.set_default_dtype(program.dtype)
            return _run(program, folder)
    except Exception:
        return Verdict(seed, "crash", [traceback.format_exc()[-4500:]], str(program))
    finally:
        torch.set_default_dtype(before)
        random.setstate(state[0])
        torch.set_rng_state(state[1])


def _run(program: Program, folder: str) -> Verdict:
    model = program.model
    try:
        with keep_everything():
            expected = program.execute(copy.deepcopy(model))
        program.execute(copy.deepcopy(model))  # with the frames that are in it, which bfloat16 may be too coarse for
        peak = program.peak(copy.deepcopy(model))
    except RuntimeError as error:
        return Verdict(program.seed, "void", [], f"{program}: {error}")
    seed_all(program.seed)
    world, faults, kind = world_of(model), list[str](), "planned"
    budget = max(1, int(peak * (1000 if program.strategy else program.share)))
    try:
        if program.strategy is None:
            plan = program.plan(budget, folder)
        else:
            everything = mock.patch.object(_problem, "_undominated", lambda ways: ways)
            with everything, mock.patch.object(_plan, "solve", forced(program.strategy, program.seed)):
                plan = program.plan(budget, folder)
    except BudgetError as error:
        faults += differences(world_of(model), world, 0.0, "after an error,")
        kind, budget = "refused", error.least
        try:
            plan = program.plan(budget, folder)
        except BudgetError as again:
            if again.least <= budget + program.in_flight():
                return Verdict(program.seed, kind, faults, str(program))
            return Verdict(program.seed, kind, [*faults, f"least {budget}, then {again.least}"], str(program))
    faults += differences(world_of(model), world, 0.0, "after planning,")
    strategies = frozenset(row.strategy for row in plan.rows)
    drifts = any(isinstance(module, Measured) for module in model.modules())
    tolerance = 3e-2 if program.autocast else 1e-8 if drifts else 1e-10
    with plan:
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        faults += differences(names, world["names"], 0.0, "applied, names")
        faults += differences(model.state_dict(), world["state"], 0.0, "applied, state")
        clean = copy.deepcopy(model.state_dict())
        numbers = numbers_of(model)
        found = program.execute(model)
        faults += differences(found, expected, tolerance, "with the plan,")
        restore(model, clean, numbers)
        if program.strategy is None:
            measured = program.peak(model)
            if measured > budget + program.in_flight() or plan.peak > budget:
                faults.append(f"peak {measured} (planned {plan.peak}) above the budget {budget}, plain {peak}")
            restore(model, clean, numbers)
    seed_all(program.seed)
    faults += differences(world_of(model), world, 0.0, "removed,")
    faults += differences(program.execute(model), expected, tolerance if drifts else 0.0, "without the plan,")
    return Verdict(program.seed, kind, faults, str(program), strategies)


def forced(strategy: str, seed: int) -> Callable[..., Choice]:
    """Return what takes the place of the solver: every unit that may have it gets one strategy."""

    def choose(problem: Problem, buckets: int = 0) -> Choice:
        draw, at, regions = random.Random(seed), 0, list[tuple[int, Region]]()
        while at < len(problem.alone):
            ways = {region.strategy: region for region in problem.alone[at]}
            length, region = 1, ways.get(strategy, problem.alone[at][0])
            for longer in range(2, draw.randint(2, 6) if strategy == "link" else 0):
                row = problem.row(at, longer) if problem.row and at + longer <= len(problem.alone) else None
                if row is None:
                    break
                length, region = longer, row
            regions.append((length, region))
            at += length
        return Choice(tuple(regions), 1.0, 0)

    return choose


if __name__ == "__main__":
    for number in sys.argv[1:]:
        sys.stdout.write(f"{run(int(number))}\n")
