"""One step over a whole graph: its operations in their order, each for one part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recollect.frames import RebuildError, bits_of
from recollect.messages import for_targets
from recollect.messages.reach import DRAWING
from recollect.outofcore._journal import Sums
from recollect.outofcore._parts import Part
from recollect.outofcore._tables import Changes

if TYPE_CHECKING:
    from recollect.outofcore._whole_graph import WholeGraph

__all__ = ["Criterion", "Step"]

Criterion = Callable[[Tensor, Tensor], Tensor]
Read = tuple[Tensor, Tensor, Tensor | None]
"""Rows of a group, the block's input, and the factors of its dropout."""


class Step:
    """One step: the operations in their order, each for one part.

    Args:
        of: whose step it is.
        criterion: the loss of a part; ``None`` in evaluation.
        journal: the state after the last operation that was done by an earlier process.
        seed: of what blocks draw.
        name: a number that no other step has.
    """

    def __init__(
        self, of: WholeGraph, criterion: Criterion | None, journal: dict[str, Any] | None, seed: int, name: int = 0
    ) -> None:
        self._of = of
        self._criterion = criterion
        self._seed = seed
        self._operation = 0
        self._done = -1 if journal is None else int(journal["operation"])
        self.gradients: dict[nn.Parameter, Tensor] = {}
        parameters = list(of.model.parameters())
        self._numbers = {parameter: number for number, parameter in enumerate(parameters)}
        self._loss: Tensor | None = None
        self._changed: list[tuple[int, Tensor]] = []
        self._sums: Sums | None = None
        if of._folder is not None and criterion is not None:
            self._sums = Sums(of._folder / "gradients.table", parameters, name)
        if journal is not None and self._sums is not None:
            self._loss = journal["loss"]
            found = self._sums.read(dict(journal["gradients"]))
            self.gradients = {parameters[number]: value for number, value in found.items()}
            for number, value in journal["gradients"]:
                self._sums.write(number, value)

    # Reading, computing and writing side by side.

    def _pass(self, read: Callable[[Part], Any], compute: Callable[[Part, Any], Changes]) -> None:
        """Do an operation for each part: the next one is read while one is computed, and writes go behind."""
        of = self._of
        first, number = self._operation, len(of.parts)
        self._operation += number
        begin = max(0, self._done + 1 - first)
        if begin >= number:
            return

        def load(index: int) -> tuple[Part, Any]:
            part = of.parts[index]
            return part, read(part)

        ahead = of._worker.submit(load, begin)
        behind = None
        for index in range(begin, number):
            part, rows = ahead.result()
            if index + 1 < number:
                ahead = of._worker.submit(load, index + 1)
            changes = compute(part, rows)
            of.parts.leave(part)
            if self._sums is not None:
                changes.state = {"operation": first + index, "loss": self._loss, "gradients": self._changed}
            if behind is not None:
                behind.result()
            behind = of._worker.submit(self._apply, changes, index == number - 1)
        if behind is not None:
            behind.result()
        self._changed = []

    def _apply(self, changes: Changes, last: bool) -> None:
        """Do what an operation does; the last one of a pass says what its gradients are."""
        self._of._tables.apply(changes)
        if last and self._sums is not None:
            for number, value in changes.state["gradients"]:
                self._sums.write(number, value)

    def _add(self, parameters: list[nn.Parameter], gradients: tuple[Tensor | None, ...]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            known = self.gradients.get(parameter)
            self.gradients[parameter] = gradient.clone() if known is None else known + gradient
        # Of the pass over the parts that is under way; they are not changed in place.
        self._changed = [(self._numbers[each], self.gradients[each]) for each in parameters if each in self.gradients]

    def groups_of(self, part: Part) -> Tensor:
        """Return the activations of a part's nodes [n, hidden_channels]."""
        tables, where = self._of._tables, (part.start, part.stop)
        return torch.cat([tables[f"x{i}"].read(where) for i in range(self._of.num_groups)], 1)

    # Forward.

    def forward(self) -> None:
        """Fill the tables with the last layer's output."""
        of = self._of
        self._pass(lambda part: None, self._embed)
        for layer in range(of.num_layers):
            for group in range(of.num_groups):
                self._pass(partial(self._rows, group), partial(self._forward, layer, group))

    def _embed(self, part: Part, _: None) -> Changes:
        with torch.no_grad():
            rows = self._entered(self._of.model.embed(part.x))
        where = (part.start, part.stop)
        return Changes([(f"x{i}", where, chunk) for i, chunk in enumerate(self._chunks(rows))])

    def _entered(self, rows: Tensor) -> Tensor:
        lattice = self._of._lattice
        return rows if lattice is None else lattice.enter(rows)

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.chunk(rows, self._of.num_groups, 1)

    def _rows(self, group: int, part: Part) -> Read:
        """Read a group of a part, the block's input, and the factors of its dropout."""
        of, where = self._of, (part.start, part.stop)
        first, *others = self._inputs(group)
        z = of._tables.read(f"x{first}", where, part.halo)
        for other in others:
            z += of._tables.read(f"x{other}", where, part.halo)
        mask = None
        if of.model.training and of.model.shared_dropout and of.model.dropout > 0:
            mask = self._chunks(of._masks["mask"].read(part.n_id, of._dtype))[group]
        return of._tables[f"x{group}"].read(where), z, mask

    def _inputs(self, group: int) -> list[int]:
        """Return the groups whose sum is the input of a group's block."""
        return [group - 1] if group else list(range(1, self._of.num_groups))

    def _forward(self, layer: int, group: int, part: Part, rows: Read) -> Changes:
        of = self._of
        own, z, mask = rows
        training = self._criterion is not None
        with torch.enable_grad() if training else contextlib.nullcontext():
            y = self._evaluate(layer, group, part, z.requires_grad_(training), mask).detach()
        where = (part.start, part.stop)
        if of._lattice is None:
            own = own + y
        else:
            (own,) = of._lattice(own, y)
            block = of.model.layer(layer)._blocks()[group]
            of._lattice.check(own, [own], [block], f"layer {layer}, block {group}: {{}}")
        if training and of._lattice is not None:
            of._marks.write(self._place(layer, group, part), _bytes_of(y))
        return Changes([(f"x{group}", where, own)])

    def _place(self, layer: int, group: int, part: Part) -> tuple[int, int]:
        of = self._of
        place = (layer * of.num_groups + group) * len(of.parts) + part.number
        return place, place + 1

    def _evaluate(self, layer: int, group: int, part: Part, z: Tensor, mask: Tensor | None) -> Tensor:
        """Return the block's output for a part's nodes."""
        of = self._of
        if part.further:  # the one row for all that is further away, which is there to be counted
            z = torch.cat([z, z.new_zeros(1, z.size(1))])
            mask = None if mask is None else torch.cat([mask, mask.new_ones(1, mask.size(1))])
        block = of.model.layer(layer)._blocks()[group]
        own = for_targets(part.size) if of.computed_alone(layer, group) else contextlib.nullcontext()
        with own, DRAWING, _seeded(hash((self._seed, layer, group, part.number)) & (2**62 - 1)):
            y: Tensor = block(z, part.edge_index, mask, *part.edges.values())
        return y[: part.size]

    # The loss.

    def turn(self) -> Tensor:
        """Compute the loss, and the gradients of the last layer's output."""
        of = self._of
        parameters = _trained([of.model.norm, of.model.head])

        def read(part: Part) -> tuple[Tensor, Tensor | None]:
            mask = None
            if of.model.training and of.model.dropout > 0:
                mask = of._masks["last_mask"].read((part.start, part.stop), of._dtype)
            return self.groups_of(part), mask

        def compute(part: Part, rows: tuple[Tensor, Tensor | None]) -> Changes:
            h, mask = rows[0].requires_grad_(), rows[1]
            gradient = torch.zeros_like(h)
            if part.train.numel():
                with torch.enable_grad():
                    chosen = None if mask is None else mask[part.train]
                    loss = self._loss_of(of.model.classify(h[part.train], chosen), part)
                    found = torch.autograd.grad(loss, [h, *parameters], allow_unused=True)
                self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
                self._add(parameters, found[1:])
                if found[0] is not None:
                    gradient = found[0]
            where = (part.start, part.stop)
            chunks = self._chunks(gradient)
            return Changes([(f"g{i}", where, chunk) for i, chunk in enumerate(chunks)])

        self._pass(read, compute)
        if self._loss is None:
            raise ValueError("no node is for training: data.train_mask has none")
        return self._loss

    def _loss_of(self, logits: Tensor, part: Part) -> Tensor:
        assert self._criterion is not None
        loss = self._criterion(logits, part.y)
        if not isinstance(loss, Tensor) or loss.dim():
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"criterion(logits, y) must return a scalar, the sum over a part's nodes (got {found})")
        return loss

    # Backward.

    def backward(self) -> None:
        """Take the tables back to the first layer's input, and its gradients."""
        of = self._of
        for layer in reversed(range(of.num_layers)):
            for group in reversed(range(of.num_groups)):
                self._pass(partial(self._rows_and_gradient, group), partial(self._backward, layer, group))
        self._errors = self._norms = 0.0
        self._pass(self._read_first, self._leave)
        of.last_drift = (self._errors / self._norms) ** 0.5 if self._norms else 0.0

    def _backward(self, layer: int, group: int, part: Part, rows: tuple[Read, Tensor]) -> Changes:
        of = self._of
        (own, z, mask), gradient = rows
        block = of.model.layer(layer)._blocks()[group]
        parameters = _trained([getattr(block, "module", block)])
        with torch.enable_grad():
            y = self._evaluate(layer, group, part, z.requires_grad_(), mask)
        if of._lattice is not None and not torch.equal(
            of._marks.read(self._place(layer, group, part)), _bytes_of(y.detach())
        ):
            raise RebuildError(
                f"layer {layer}, block {group}: running it again for backward gave other bits than the forward pass. "
                "Draw random numbers from torch's generators alone, use deterministic operations, or exact=False"
            )
        found = torch.autograd.grad(y, [z, *parameters], gradient.to(y.dtype), allow_unused=True)
        self._add(parameters, found[1:])
        where = (part.start, part.stop)
        own = own - y.detach() if of._lattice is None else of._lattice.inverse(own, y.detach())[0]
        changes = Changes([(f"x{group}", where, own)])
        if found[0] is not None:
            for other in self._inputs(group):
                changes.added += [
                    (f"g{other}", where, found[0][: part.size]),
                    (f"g{other}", part.halo, found[0][part.size :]),
                ]
        return changes

    def _rows_and_gradient(self, group: int, part: Part) -> tuple[Read, Tensor]:
        return self._rows(group, part), self._of._tables[f"g{group}"].read((part.start, part.stop))

    def _read_first(self, part: Part) -> tuple[Tensor, Tensor]:
        tables, where = self._of._tables, (part.start, part.stop)
        return self.groups_of(part), torch.cat([tables[f"g{i}"].read(where) for i in range(self._of.num_groups)], 1)

    def _leave(self, part: Part, rows: tuple[Tensor, Tensor]) -> Changes:
        of = self._of
        found, gradient = rows
        parameters = _trained([of.model.project])
        with torch.enable_grad():
            h = of.model.embed(part.x)
            true = self._entered(h).detach()
            self._errors += float((found - true).square().sum())
            self._norms += float(true.square().sum())
            if parameters:
                self._add(parameters, torch.autograd.grad(h, parameters, gradient, allow_unused=True))
        return Changes()


def _trained(modules: list[nn.Module]) -> list[nn.Parameter]:
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a sum of all bits as a row of bytes."""
    bits = bits_of(tensor)
    return torch.tensor([int(bits or 0)], dtype=torch.int64).view(torch.uint8).view(1, 8)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let torch's generator draw from a seed, and put it back afterwards."""
    generator = torch.default_generator  # torch.manual_seed also looks for CUDA, each time
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)
