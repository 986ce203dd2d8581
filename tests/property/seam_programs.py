"""Random programs over the seam, run plainly and with frames from the same seed, and compared.

``run(seed)`` gives a :class:`Verdict`; ``python seam_programs.py SEED`` prints one program, and
``python seam_programs.py --each N`` tries each hazard alone.
"""

from __future__ import annotations

import contextlib
import random
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import seam_between
import seam_inside
import seam_passing
import seam_state
import torch
from seam_calls import CALLS, WIDTH, Call, reach
from seam_compare import difference, snapshot, state_of
from seam_world import GLOBALS, HAZARDS, Hazard, Piece, World
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import recollect
from recollect.frames import FrameError, couple

ROWS = 6
TABLES = (seam_state, seam_between, seam_inside, seam_passing)  # each adds its hazards to the table when it is imported
SOURCES = ("checkpoint", "inverse", "coupling")
STEPS = ("backward", "twice", "subset", "double", "many", "accumulate", "evaluation")


class Plain:
    """The oracle: the regions' functions, called."""

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    def inverse(self, function: Piece, inverse: Piece, h: Tensor) -> Tensor:
        return function(h)

    def couple(self, blocks: list[Any], x: Tensor, args: list[tuple[Any, ...]]) -> Tensor:
        if x.dtype is torch.bfloat16:  # a coupling under autocast keeps its stream in float32
            x = x.float()
        groups = list(x.chunk(len(blocks), -1))
        z = groups[1].clone() if len(groups) == 2 else sum(groups[2:], groups[1])
        for i, (block, arg) in enumerate(zip(blocks, args, strict=True)):
            groups[i] = z = groups[i] + block(z, *arg)
        return torch.cat(groups, -1)


class Framed:
    """The same with frames; checkpoints have their inputs from ``source``."""

    def __init__(self, source: Any = None) -> None:
        self.source = source

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return recollect.checkpoint(function, *args, source=self.source, **kwargs)

    def inverse(self, function: Piece, inverse: Piece, h: Tensor) -> Tensor:
        return recollect.checkpoint(function, h, inverse=inverse)

    def couple(self, blocks: list[Any], x: Tensor, args: list[tuple[Any, ...]]) -> Tensor:
        return couple(blocks, x, args)


# The program.


def _swapping(run: Piece) -> tuple[Piece, Piece]:
    """Return (a, b) -> (b + run(a), a), and its inverse."""

    def swap(h: Tensor) -> Tensor:
        a, b = h.chunk(2, -1)
        return torch.cat([b + run(a), a], -1)

    def unswap(y: Tensor) -> Tensor:
        b, a = y.chunk(2, -1)
        return torch.cat([a, b - run(a)], -1)

    return swap, unswap


class _Builder:
    """Draws a program's choices, and makes its modules."""

    def __init__(self, world: World, only: Collection[str], sources: Collection[str]) -> None:
        self.world = world
        self.rng = world.rng
        self.used: set[str] = set()
        # Most programs have no hazard that may be refused, or an error without a ground would pass.
        self.strict = self.rng.random() < 0.7 and not only
        self.only = set(only)
        self.sources = sources

    def _pick(self, table: dict[str, Hazard]) -> str:
        names = [name for name in table if name in self.only]
        if not names:
            fits = [n for n, h in table.items() if not (self.world.autocast and not h.autocast)]
            names = [n for n in fits if not (self.strict and table[n].refusable)]
            if self.only:
                names = ["plain_layers" if table is HAZARDS else "tensor"]
        name = self.rng.choices(names, [table[n].weight for n in names])[0]
        self.world.log.append(name)
        self.used.add(name)
        if table[name].refusable:
            self.world.refusable.append(name)
        return name

    def piece(self, width: int, depth: int) -> Piece:
        """Return a hazard, by itself or inside something."""
        world, draw = self.world, self.rng.random()
        if draw < 0.1 and depth < 2:
            source = world.choose(*self.sources) if width % 2 == 0 else "checkpoint"
            world.log.append("nested(")
            part = width if source == "checkpoint" else width // 2
            inner = reach(world, [self.piece(part, depth + 1)], parts=False)
            world.log.append(")")
            if source == "coupling":
                return lambda h: world.wrap.couple([inner, torch.tanh], h, [(), ()])
            if source == "inverse":
                swap, unswap = _swapping(inner)
                return lambda h: world.wrap.inverse(swap, unswap, h)
            return lambda h: world.wrap.checkpoint(inner, h)
        if draw < 0.2:
            world.log.append("hidden by zeros:")
            last = world.add(nn.Linear(width, width))
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            inner = self.piece(width, depth + 1)
            return lambda h: h + last(inner(h))
        piece = HAZARDS[self._pick(HAZARDS)].make(world, width)
        if draw < 0.3:
            world.log.append("twice")
            return lambda h: piece(piece(h))
        if draw < 0.35:
            world.log.append("without grad")

            def gated(h: Tensor) -> Tensor:
                with torch.no_grad():
                    gate = piece(h)
                return h * gate.tanh()

            return gated
        return piece

    def pieces(self, width: int) -> list[Piece]:
        return [self.piece(width, 0) for _ in range(self.rng.choice((1, 1, 2)))]

    def region(self) -> Call:
        """Return one region of any source."""
        world = self.world
        source = world.choose(*self.sources)
        if source == "checkpoint":
            run = reach(world, self.pieces(WIDTH))
            return CALLS[self._pick(CALLS)].make(world, run)
        if source == "inverse":
            run = reach(world, self.pieces(WIDTH // 2))
            swap, unswap = _swapping(run)
            return lambda h: (world.wrap.inverse(swap, unswap, h), [])
        groups = world.choose(2, 3)
        blocks = [reach(world, self.pieces(WIDTH // groups)) for _ in range(groups)]
        if world.choose("shared block", "", ""):
            blocks[1] = blocks[0]
        if world.choose("weighted", ""):
            args = [(world.leaf(WIDTH // groups),) for _ in blocks]
            weighted = [lambda z, w, block=block: block(z) * w for block in blocks]
            return lambda h: (world.wrap.couple(weighted, h, args), [])
        return lambda h: (world.wrap.couple(blocks, h, [()] * groups), [])

    def network(self) -> Call:
        """Return a chain of regions, some of them used twice, with plain steps between some."""
        depth = self.rng.choice((1, 1, 2, 2, 3, 4, 5)) if not self.only else self.rng.choice((1, 2))
        parts: list[tuple[Call, str]] = []
        for _ in range(depth):
            self.world.log.append("\n  ")
            again = len(parts) > 0 and self.rng.random() < 0.1
            if again:
                self.world.log.append("the same region again")
            call = parts[-1][0] if again else self.region()
            parts.append((call, self.world.choose("", "", "", "then sin", "then branch")))
        self.world.log.append("\n ")

        def forward(h: Tensor) -> tuple[Tensor, list[Any]]:
            more: list[Any] = []
            for call, then in parts:
                h, extra = call(h)
                more += extra
                if then == "then sin":
                    h = h.sin()
                elif then == "then branch":
                    more.append(h.cos())
            return h, more

        return forward


# A run.


def _loss(y: Tensor, more: list[Any]) -> Tensor:
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)
    loss = (y * weight).sum() + y.square().sum()
    for tensor in _tensors(more):
        if tensor.requires_grad:
            loss = loss + tensor.sin().sum()
    return loss


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


class _Execution:
    """One run of a program; ``record`` is what is compared."""

    def __init__(
        self, seed: int, wrap: Any, only: Collection[str], sources: Collection[str], finer: bool = False
    ) -> None:
        self.finer = finer  # without the autocast that is drawn
        rng = random.Random(seed)
        autocast = rng.random() < 0.08 and not only
        self.dtype = torch.float32 if autocast else torch.float64
        torch.set_default_dtype(self.dtype)
        torch.manual_seed(seed)
        np.random.seed(seed % 1000)  # noqa: NPY002
        random.seed(seed)
        GLOBALS.clear()
        self.world = World(rng, wrap, autocast)
        self.builder = _Builder(self.world, only, sources)
        if autocast:
            self.world.log.append("autocast")
        self.input = self.world.choose("leaf", "not a leaf", "no grad")
        self.network = self.builder.network()
        self.step = self.world.choose(*STEPS)
        self.order = rng.random()
        self.rng = rng
        self.record: dict[str, Any] = {}
        self.x: list[Tensor] = []

    @property
    def names(self) -> set[str]:
        """Words of which an error must contain one, to name the module or the function."""
        return {type(m).__name__ for top in self.world.modules for m in top.modules()} | {
            "region", "run", "run_global", "swap", "block", "lambda", "Holder", "Linear", "Cell", "Region",
        }  # fmt: skip

    def note(self, name: str, value: Any) -> None:
        self.record[f"{len(self.record)} {name}"] = snapshot(value)

    def forward(self) -> Tensor:
        x = torch.randn(ROWS, WIDTH, dtype=self.dtype)
        if self.input != "no grad":
            x.requires_grad_()
            self.x.append(x)
        with contextlib.ExitStack() as stack:
            for context in self.world.contexts:
                stack.enter_context(context())
            if self.world.autocast and not self.finer:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            y, more = self.network(x * 1.0 if self.input == "not a leaf" else x)
            loss = _loss(y, more)
        for left in self.world.left:
            tensor = left()
            if tensor is not None and tensor.requires_grad:
                loss = loss + 0.5 * tensor.square().sum()
        self.note("outputs", [y, list(_tensors(more))])
        self.note("stream after forward", torch.get_rng_state())
        return loss

    def leaves(self) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        modules = [p for m in self.world.modules for p in m.parameters()]
        for tensor in [*self.x, *self.world.leaves, *modules]:
            if tensor.requires_grad and not is_lazy(tensor):
                found.setdefault(id(tensor), tensor)
        return list(found.values())

    def meanwhile(self) -> None:
        for act in self.world.between:
            act()

    def done(self) -> None:
        for act in self.world.after:
            act()
        self.note("stream after backward", torch.get_rng_state())

    def execute(self) -> None:
        if self.step in ("many", "accumulate"):
            self._several()
        else:
            self._one()
        self.note("gradients", [t.grad for t in self.leaves()])
        self.note("default dtype", torch.get_default_dtype())
        for watch in self.world.watched:
            self.note("watched", watch())
        for top in self.world.modules:
            for name, module in top.named_modules():
                self.record[f"{len(self.record)} module {name} {type(module).__name__}"] = state_of(module)

    def _one(self) -> None:
        loss = self.forward()
        self.meanwhile()
        leaves = self.leaves()
        if self.step == "evaluation":
            modes = [m for top in self.world.modules for m in top.modules()]
            training = [m.training for m in modes]
            for m in modes:
                m.training = False
            with torch.inference_mode() if self.order < 0.3 else torch.no_grad():
                self.network(torch.randn(ROWS, WIDTH, dtype=self.dtype))
            for m, flag in zip(modes, training, strict=True):
                m.training = flag
        if self.step == "twice":
            loss.backward(retain_graph=True)
            self.note("between the backwards", [t.grad for t in leaves])
            loss.backward()
        elif self.step == "subset":
            some = [t for i, t in enumerate(leaves) if (i + int(self.order * 3)) % 3 == 0] or leaves[:1]
            self.note("some gradients", torch.autograd.grad(loss, some, allow_unused=True))
        elif self.step == "double":
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            self.note("first gradients", grads)
            penalty = [g.square().sum() for g in grads if g is not None and g.requires_grad]
            if penalty:
                sum(penalty[1:], penalty[0]).backward()
        else:
            loss.backward()
        self.done()

    def _several(self) -> None:
        number = 2 if self.order < 0.7 else 3
        if self.step == "accumulate":
            for _ in range(number):
                loss = self.forward()
                self.meanwhile()
                loss.backward()
                self.done()
            return
        losses = [self.forward()]
        self.meanwhile()
        losses += [self.forward() for _ in range(number - 1)]
        random.Random(int(self.order * 1e6)).shuffle(losses)
        for loss in losses:
            loss.backward()
        self.done()


@dataclass(frozen=True)
class Verdict:
    """How frames fared in one program.

    ``kind`` is "right", "refused" (an error that is an answer), "void" (plain autograd raises too), or a failure:
    "wrong", "unfounded" (an error that is none), "crash" (another error), "lax" (plain autograd raises, frames do
    not), "mute" (an error that does not name the module).
    """

    seed: int
    kind: str
    text: str
    program: str
    used: frozenset[str]

    @property
    def fails(self) -> bool:
        return self.kind not in ("right", "refused", "void")

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.kind}: {self.text}\n {self.program}"


def _attempt(
    seed: int, wrap: Any, only: Collection[str], sources: Collection[str], finer: bool = False
) -> tuple[_Execution, Exception | None]:
    before = torch.get_default_dtype()
    execution = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            execution = _Execution(seed, wrap, only, sources, finer)
            try:
                execution.execute()
            except Exception as error:
                # Tracebacks hold the graph, and with it the modules.
                return execution, error.with_traceback(None)
        return execution, None
    finally:
        torch.set_default_dtype(before)


def run(
    seed: int, only: Collection[str] = (), sources: Collection[str] = SOURCES, wrap: Any = None, verbose: bool = False
) -> Verdict:
    """Run program ``seed`` plainly and with frames, and compare.

    Args:
        seed: of every choice and number.
        only: names of hazards and of ways of calling; the program then has no others.
        sources: of the regions.
        wrap: runs the regions instead of frames (``Plain()`` tries the generator itself).
        verbose: raise what the run with frames raises.
    """
    only = frozenset(only)
    plain, expected = _attempt(seed, Plain(), only, sources)
    framed, error = _attempt(seed, wrap or Framed(), only, sources)
    if verbose and error is not None:
        raise error
    program = " ".join(plain.world.log)

    def verdict(kind: str, text: str) -> Verdict:
        refusable = f" (refusable: {', '.join(plain.world.refusable)})" if plain.world.refusable else ""
        return Verdict(seed, kind, text, program + refusable, frozenset(plain.builder.used))

    if expected is not None:
        if error is None:
            return verdict("lax", f"plain autograd raises {type(expected).__name__}: {str(expected)[:150]}")
        return verdict("void", f"{expected} | {error}")
    if error is not None:
        told = f"{type(error).__name__}: {error}"
        if not isinstance(error, FrameError):
            return verdict("crash", told)
        if not plain.world.refusable:
            return verdict("unfounded", told)
        words = set(re.findall(r"\w+", str(error)))
        if len(words) < 12 or not words & plain.names:
            return verdict("mute", told)
        return verdict("refused", told)
    where = difference(plain.record, framed.record, 1e-1 if plain.world.autocast else 1e-6, "")
    if where is not None and plain.world.autocast:
        finer, _ = _attempt(seed, Plain(), only, sources, finer=True)
        where = difference(plain.record, framed.record, 1e-1, "", finer.record)
    return verdict("right", "") if where is None else verdict("wrong", where.lstrip(". "))


def each(number: int, wrap: Any = None) -> None:
    """Print how every hazard fares alone, over every source."""
    for table in (HAZARDS, CALLS):
        for name, entry in table.items():
            for source in SOURCES if table is HAZARDS else SOURCES[:1]:
                verdicts = [run(seed, {name}, (source,), wrap) for seed in range(number if entry.weight >= 0.5 else 6)]
                verdicts = [v for v in verdicts if name in v.used]
                counts: dict[str, int] = {}
                for one in verdicts:
                    counts[one.kind] = counts.get(one.kind, 0) + 1
                first = next((f"{v.seed}: {v.text[:150]}" for v in verdicts if v.fails), "")
                mark = "refusable" if entry.refusable else ""
                sys.stdout.write(f"{name:38}{source:11}{mark:10}{counts} {first}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "--each":
        each(int(sys.argv[2]))
    else:
        sys.stdout.write(f"{run(int(sys.argv[1]))}\n")
