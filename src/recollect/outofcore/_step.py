"""One step over a whole graph: its operations in their order, each for one part."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect.autoscale.histories import PlainRows, Worker
from recollect.distributed import Shares
from recollect.frames import RandomState, RebuildError, bits_of
from recollect.messages.reach import DRAWING
from recollect.outofcore._crossing import Crossing, Late
from recollect.outofcore._journal import Sums
from recollect.outofcore._leaves import leaves_of
from recollect.outofcore._objectives import Objectives, Pulled
from recollect.outofcore._parts import Part, Parts
from recollect.outofcore._tables import Changes, Tables
from recollect.outofcore._writes import Writes

__all__ = ["Run", "Space", "Step", "trained"]

_FOREIGN = -1  # in place of the number of a parameter that is not the network's


@dataclass(frozen=True)
class Space:
    """Where a step's numbers lie.

    Attributes:
        tables: of activations and gradients.
        parts: of the graph.
        worker: reads ahead and writes behind.
        folder: of the files; ``None``: in memory.
        marks: a row of bytes for each computation of the forward pass, to be compared in backward.
        crossing: to the device that computes, and back.
        shares: which parts of the graph are here; ``None``: all.
    """

    tables: Tables
    parts: Parts
    worker: Worker
    folder: Path | None
    marks: PlainRows
    crossing: Crossing
    shares: Shares | None = None


@dataclass(frozen=True)
class Run:
    """Which step it is.

    Attributes:
        objectives: what gradients are of; ``None``: evaluation.
        seed: of what is drawn for a part.
        name: a number that no other step has; ``None``: it is not written down, and cannot go on in another process.
        journal: the state after the last operation that was done by an earlier process.
        writes: what the forward pass writes into buffers.
    """

    objectives: Objectives | None
    seed: int = 0
    name: int | None = None
    journal: dict[str, Any] | None = None
    writes: Writes = field(default_factory=Writes)


class Step(ABC):
    """The operations in their order, each for one part; a kind of network says which.

    Args:
        model: the network.
        space: where the numbers lie.
        run: which step it is.

    Attributes:
        gradients: of parameters, so far.
        drift: how far what was brought back is from what it was, relative; after :meth:`backward`.
    """

    drift = 0.0

    def __init__(self, model: nn.Module, space: Space, run: Run) -> None:
        self.space = space
        self._crossing, self._late = space.crossing, list[Late]()
        self._objectives, self._writes = run.objectives, run.writes
        self._seed = run.seed
        self._operation = 0
        self._done = -1 if run.journal is None else int(run.journal["operation"])
        self.gradients: dict[nn.Parameter, Tensor] = {}
        parameters = list(model.parameters())
        self._numbers = {parameter: number for number, parameter in enumerate(parameters)}
        self._loss: Tensor | None = None
        self._outside: dict[nn.Parameter, None] = {}  # reached by what has no such parameter of its own
        self._touched: dict[nn.Parameter, None] = {}  # by the pass that is under way
        self._changed: list[tuple[int, Tensor]] = []
        self._sums: Sums | None = None
        if space.folder is not None and run.name is not None:
            self._sums = Sums(space.folder / "gradients.table", parameters, run.name)
        if run.journal is not None and self._sums is not None:
            if _FOREIGN in run.journal["known"]:
                raise RuntimeError(
                    "the unfinished step has gradients of parameters that are not the network's, such as a criterion's "
                    "own, which are not written down: remove step.pt from the store, and begin the step anew"
                )
            device, loss = self._crossing.device, run.journal["loss"]
            self._loss = None if loss is None else loss.to(device)
            changed = dict(run.journal["gradients"])
            found = self._sums.read(set(run.journal["known"]) - changed.keys()) | changed
            self.gradients = {parameters[number]: value.to(device) for number, value in found.items()}
            for number, value in run.journal["gradients"]:
                self._sums.write(number, value)
                self._touched[parameters[number]] = None

    def run(self) -> Tensor:
        """Do all, and return the losses."""
        self.forward()
        loss = self.turn()
        self.backward()
        self.objectives.close(self.gradients)
        return loss

    @abstractmethod
    def forward(self) -> None:
        """Fill the tables with the last layer's output."""

    @abstractmethod
    def turn(self) -> Tensor:
        """Compute the losses, and the gradients of the last layer's output."""

    @abstractmethod
    def backward(self) -> None:
        """Take the gradients back to the first layer's input."""

    @abstractmethod
    def logits(self, part: Part) -> Tensor:
        """Return the logits of a part's nodes, after :meth:`forward` in evaluation mode."""

    @property
    def training(self) -> bool:
        """Whether gradients are computed."""
        return self._objectives is not None

    @property
    def objectives(self) -> Objectives:
        """What gradients are of."""
        assert self._objectives is not None
        return self._objectives

    @property
    def journaled(self) -> bool:
        """Whether another process can go on behind each operation."""
        return self._sums is not None

    # Reading, computing and writing side by side.

    def _pass(
        self,
        read: Callable[[Part], Any],
        compute: Callable[[Part, Any], Changes],
        parameters: Sequence[nn.Parameter] = (),
        order: Sequence[int] | None = None,
    ) -> None:
        """Do an operation for each part: the next one is read while one is computed, and writes go behind.

        Args:
            read: what the operation reads of a part.
            compute: what it does.
            parameters: those whose gradients it brings.
            order: of the parts.
        """
        parts, worker = self.space.parts, self.space.worker
        order = range(len(parts)) if order is None else order
        first, number = self._operation, len(parts)
        self._operation += number
        begin = max(0, self._done + 1 - first)
        if begin >= number:
            return

        def load(index: int) -> tuple[Part, Any]:
            part = parts[order[index]]
            return part, read(part)

        # The first is read here, and the last written: the other thread would have to be waited for.
        part, rows = load(begin)
        behind = None
        for index in range(begin, number):
            last = index + 1 == number
            ahead = None if last else worker.submit(load, index + 1)
            there, moved = self._crossing.there(part, rows)
            changes = compute(there, moved)
            if self._sums is not None:
                known = [self._numbers.get(parameter, _FOREIGN) for parameter in self.gradients]
                state = {"operation": first + index, "loss": self._loss, "gradients": self._changed, "known": known}
                changes.state = state
            changes = self._back(changes)
            self._crossing.leave(part, there)
            parts.leave(part)
            if behind is not None:
                behind.result()
            if ahead is None:
                self._apply(changes, last)
            else:
                behind = worker.submit(self._apply, changes, last)
                part, rows = ahead.result()
        self._changed, self._touched = [], {}
        if self._objectives is not None:
            self._objectives.hold(self._outside)
            self._objectives.finish(parameters, self.gradients)

    def _back(self, changes: Changes) -> Changes:
        """Return what an operation does, on the host, behind a look at the numbers that are late."""
        late, self._late = self._late, []
        return self._crossing.back(changes, late)

    def _look(self, numbers: Tensor, look: Callable[[Tensor], object]) -> None:
        """Look at numbers; those of a device come to the host with what the operation changes."""
        if self._crossing.moves:
            self._late.append((numbers, look))
        else:
            look(numbers)

    def _apply(self, changes: Changes, last: bool) -> None:
        """Do what an operation does; the last one of a pass says what its gradients are."""
        self.space.tables.apply(changes, self.journaled)
        if last and self._sums is not None:
            for number, value in changes.state["gradients"]:
                self._sums.write(number, value)

    def _add(self, parameters: Sequence[nn.Parameter], pulled: Pulled, block: range) -> None:
        """Add a block of losses' gradients of parameters up over parts."""
        for parameter, gradient in zip(parameters, pulled.parameters, strict=True):
            if gradient is None:
                continue
            self.objectives.add(self.gradients, parameter, gradient, block)
            self._touched[parameter] = None
        # Of the pass over the parts that is under way; they are not changed in place.
        self._changed = [(self._numbers[p], self.gradients[p]) for p in self._touched if p in self._numbers]

    def _by_blocks(self, first: Changes, rest: Iterator[Changes]) -> Changes:
        """Do at once what blocks of losses change, but for the last one, so that one of them is held at a time.

        Args:
            first: what else the operation does.
            rest: what it does for each block, which is computed when it is asked for.

        Returns:
            What is left to be done.
        """
        for number, changes in enumerate(rest):
            if (
                number < len(self.objectives.blocks) - 1
            ):  # by the thread that reads and writes, in whose order ranks exchange rows
                self.space.worker.submit(self.space.tables.apply, self._back(changes), False).result()
                continue
            first.rows += changes.rows
            first.added += changes.added
            first.cleared += changes.cleared
        return first

    def _reached(
        self, outputs: Sequence[Tensor], rows: Sequence[Tensor], parameters: Sequence[nn.Parameter]
    ) -> list[nn.Parameter]:
        """Return parameters, and what else outputs reach: parameters in a closure, or a criterion's own."""
        outside = leaves_of(outputs, (*rows, *parameters))
        self._outside.update(dict.fromkeys(outside))
        return [*parameters, *outside]

    # What kinds of networks have in common.

    def _lose(
        self, part: Part, logits: Callable[[], Tensor], rows: Sequence[Tensor], parameters: Sequence[nn.Parameter]
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """Add a part's losses up, and yield their gradients for rows [rows, ..., width], for each block of losses."""
        losses: Tensor | None = None
        if (
            not part.train.numel() and self._loss is None and self.space.shares is None
        ):  # those with training nodes come first
            raise ValueError("no node is for training: data.train_mask has none")
        if part.train.numel():
            with torch.enable_grad():
                losses = self.objectives.losses_of(logits(), part.y)
            parameters = self._reached([losses], rows, parameters)
            self._loss = losses.detach() if self._loss is None else self._loss + losses.detach()
        for block in self.objectives.blocks:
            found: list[Tensor | None] = [None] * len(rows)
            if losses is not None:
                pulled = self.objectives.start(losses, rows, parameters, block)
                self._add(parameters, pulled, block)
                found = pulled.rows
            yield (
                block,
                [
                    each.new_zeros(each.size(0), self.objectives.width(each[:1].numel(), block), requires_grad=False)
                    if one is None
                    else one.flatten(1)
                    for one, each in zip(found, rows, strict=True)
                ],
            )

    def _lost(self) -> Tensor:
        """Return the losses, summed up over all parts."""
        if self._loss is None:  # only of nodes of other ranks
            return torch.zeros((), device=self._crossing.device)
        return self._loss

    def _drawn(self, *place: int) -> contextlib.AbstractContextManager[None]:
        """Let what is drawn within depend on the step and a place alone."""
        return _seeded(hash((self._seed, *place)) & (2**62 - 1), self._crossing.device)

    def _mark(self, place: int, output: Tensor) -> None:
        """Note the bits of what was computed."""
        self._note(place, _sum_of(output))

    def _note(self, place: int, numbers: Tensor) -> None:
        def write(numbers: Tensor) -> None:
            self.space.marks.write((place, place + 1), numbers.view(1, -1).view(torch.uint8))

        self._look(numbers, write)

    def _noted(self, place: int, dtype: torch.dtype) -> Tensor:
        return self.space.marks.read((place, place + 1)).view(dtype).flatten()

    def _compare(self, place: int, output: Tensor, name: str, or_else: str) -> None:
        """Compare what was computed again with what was noted.

        Args:
            place: of the note.
            output: what was computed.
            name: of what computed it, for the error.
            or_else: what else can be done, for the error.

        Raises:
            RebuildError: it is something else.
        """

        def judge(found: Tensor) -> None:
            if not torch.equal(self._noted(place, torch.int64), found):
                raise RebuildError(
                    f"{name}: running it again for backward gave other bits than the forward pass. Draw random numbers "
                    f"from torch's generators alone, and use deterministic operations{or_else}"
                )

        self._look(_sum_of(output), judge)


def trained(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of modules that require a gradient, each once."""
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


def _sum_of(tensor: Tensor) -> Tensor:
    """Return a sum of all bits [1] int64."""
    bits = bits_of(tensor)
    return bits.view(1) if isinstance(bits, Tensor) else torch.tensor([bits or 0], dtype=torch.int64, device="cpu")


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let torch's generators, of the CPU and of a device, draw from a seed, and put them back afterwards."""
    generator = torch.default_generator  # torch.manual_seed also looks for CUDA, each time
    with DRAWING, contextlib.ExitStack() as stack:
        if device.type != "cpu":
            module = torch.get_device_module(device)
            stack.enter_context(RandomState([device]).replayed())
            with getattr(module, "device", contextlib.nullcontext)(device):
                module.manual_seed(seed)
        before = generator.get_state()
        generator.manual_seed(seed)
        try:
            yield
        finally:
            generator.set_state(before)
