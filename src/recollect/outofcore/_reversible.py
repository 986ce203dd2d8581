"""Reversible networks: two tables for each group of channels, whatever the depth."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recollect._modules import in_evaluation
from recollect._torch import has_global_hooks
from recollect.frames import Lattice, check_exact, check_noted, digits_of, noted
from recollect.messages import for_targets
from recollect.messages.reach import DRAWING, Constant, kind_of
from recollect.models import RevGNN
from recollect.outofcore._blocks import Blocks, dtype_of, place_of
from recollect.outofcore._checks import check_network
from recollect.outofcore._crossing import device_of
from recollect.outofcore._masks import Masks, width_of
from recollect.outofcore._network import Graph, Network
from recollect.outofcore._parts import Part
from recollect.outofcore._step import Run, Space, Step, trained
from recollect.outofcore._tables import Changes, Shape, Table
from recollect.outofcore._writes import Writes

__all__ = ["Reversible"]

_FEATURES = 64  # rows of features that are kept to see what is done with them

Read = tuple[Tensor, Tensor, Tensor | None]
"""Rows of a group, the block's input, and the factors of its dropout."""


class Reversible(Network):
    """A RevGNN.

    Args:
        model: the network, in float32 or float64.
        graph: which it is for.
        exact: whether the stream is on a lattice; see :class:`~recollect.outofcore.WholeGraph`.
    """

    model: RevGNN

    def __init__(self, model: RevGNN, graph: Graph, exact: bool | int) -> None:
        check_network(model)
        self.model = model
        own = model.layer(0).exact
        self.exact = check_exact(own if own is not False and exact is True else exact)
        self.dtype = dtype_of(model)
        digits = digits_of(self.exact, self.dtype)
        self.lattice = None if digits is None else Lattice(digits)
        self.mark = 8 if digits is not None else 64  # bytes of a sum of bits, or of a note of eight numbers
        self.hidden = model.project.out_features
        self.blocks = Blocks(model, graph)
        self.further = self.blocks.further
        self._features = graph.data.x[:_FEATURES].cpu().clone()
        self._forms: deque[Hashable] = deque(maxlen=4)  # of networks whose first and last functions go by rows
        with in_evaluation(model):
            self._check_rows()
        self.masks: dict[str, Masks] = {}

    @property
    def shape(self) -> Shape:
        """A group's."""
        return self.hidden // self.model.num_groups, self.dtype

    @property
    def moved(self) -> list[str]:
        """See :class:`Network`."""
        return [f"{kind}{group}" for kind in "xg" for group in range(self.model.num_groups)]

    @property
    def row_bytes(self) -> int:
        """See :class:`Network`."""
        return self.hidden * self.dtype.itemsize

    def tables(self) -> dict[str, Shape]:
        """See :class:`Network`."""
        found = dict.fromkeys(self.moved, self.shape)
        for mask in ("mask", "last_mask") if self.model.dropout > 0 else ():
            found[mask] = width_of(self.hidden), torch.uint8
        return found

    def places(self, parts: int) -> int:
        """See :class:`Network`."""
        return self.model.num_layers * self.model.num_groups * parts

    def settle(self, space: Space, graph: Graph) -> None:
        """See :class:`Network`."""
        self.bounds = space.parts.bounds
        self.masks = {name: Masks(space.tables[name], self.hidden) for name in self.tables() if name.endswith("mask")}

    def check(self) -> None:
        """See :class:`Network`."""
        model = self.model
        check_network(model)
        if model.training and model.dropout > 0 and not self.masks:
            raise ValueError(
                f"dropout={model.dropout} was set after the WholeGraph was made, which has no room for masks: make "
                "another WholeGraph"
            )
        if dtype_of(model) != self.dtype:
            raise ValueError(
                f"the network is in {dtype_of(model)} now, and was in {self.dtype} when the WholeGraph was "
                "made: make another WholeGraph"
            )
        self.check_norms()
        self.blocks.check()
        self._check_rows()

    def _check_rows(self) -> None:
        """Look whether what is before and behind the layers goes row by row, if that is not known of its form.

        Where it reads buffers, whose values are no part of a form, that is never known.
        """
        model = self.model
        if model.goes_by_rows():
            return
        device = device_of(model)
        steady = not has_global_hooks(beside_engines=True) and not model.buffers_around()
        form = (kind_of(model), device, torch.is_autocast_enabled(device.type)) if steady else None
        if form is None or form not in self._forms:
            model.check_rows(self._features.to(device))
            self._forms.append(form)

    def draw(self) -> None:
        """Draw the masks: the same numbers in the same order as the network itself draws for the whole graph."""
        model = self.model
        if not (model.training and model.dropout > 0):
            return
        for masks in self.masks.values():
            masks.p = model.dropout
        if model.shared_dropout:
            self.masks["mask"].draw(self.bounds)
        self.masks["last_mask"].draw(self.bounds)

    def watch(self, writes: Writes) -> None:
        """See :class:`Network`."""
        model, device = self.model, device_of(self.model)
        buffers = model.buffers_around()

        def run(what: Callable[[Tensor], Tensor], rows: Tensor) -> None:
            with DRAWING, torch.random.fork_rng(devices=[]), Constant():
                what(rows)

        if buffers:
            writes.watch("embed", buffers, partial(run, model.embed, self._features.to(device)))
        self.blocks.watch(writes)
        if buffers:
            rows = torch.ones(1, self.hidden, dtype=self.dtype, device=device)
            writes.watch("classify", buffers, partial(run, model.classify, rows))

    def uses(self) -> Counter[nn.Parameter]:
        """See :class:`Network`."""
        found = Counter(2 * self.around())
        for layer in range(self.model.num_layers):
            for group in range(self.model.num_groups):
                found.update(self.inside(layer, group))
        return found

    def around(self) -> list[nn.Parameter]:
        """Return what is trained before and behind the layers."""
        named = self.model.named_parameters(remove_duplicate=False)
        found = {id(p): p for name, p in named if p.requires_grad and not name.startswith("layers.")}
        return list(found.values())

    def inside(self, layer: int, group: int) -> list[nn.Parameter]:
        """Return what is trained of a block."""
        block = self.block(layer, group)
        return trained([getattr(block, "module", block)])

    def block(self, layer: int, group: int) -> Any:
        """Return a block of a layer."""
        return self.model.layer(layer)._blocks()[group]

    def settings(self) -> tuple[Any, ...]:
        """See :class:`Network`."""
        return self.exact, self.model.dropout, self.model.shared_dropout

    def step(self, space: Space, run: Run) -> ReversibleStep:
        """See :class:`Network`."""
        return ReversibleStep(self, space, run)


class ReversibleStep(Step):
    """A step of a RevGNN.

    Args:
        of: the network.
        space: where its numbers lie.
        run: which step it is.
    """

    def __init__(self, of: Reversible, space: Space, run: Run) -> None:
        super().__init__(of.model, space, run)
        self._of, self._model = of, of.model
        self._places = space.tables.places(self.journaled)

    # Forward.

    def forward(self) -> None:
        """See :class:`Step`."""
        self._pass(lambda part: None, self._embed)
        for layer in range(self._model.num_layers):
            for group in range(self._model.num_groups):
                self._pass(partial(self._rows, group), partial(self._forward, layer, group))
                self._places.turn([f"x{group}"])

    def _embed(self, part: Part, _: None) -> Changes:
        with torch.set_grad_enabled(self.training), self._writes.again("embed"):
            h = self._model.embed(part.x)
        if self.training:
            self._reached([h], [], self._of.around())
        rows = self._entered(h.detach())
        where = (part.start, part.stop)
        return Changes([(self._x(i), where, chunk) for i, chunk in enumerate(self._chunks(rows))])

    def _entered(self, rows: Tensor) -> Tensor:
        lattice = self._of.lattice
        return rows if lattice is None else lattice.enter(rows)

    def _chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.chunk(rows, self._model.num_groups, -1)

    def _rows(self, group: int, part: Part) -> Read:
        """Read a group of a part, the block's input, and the factors of its dropout."""
        model, tables, where = self._model, self.space.tables, (part.start, part.stop)
        first, *others = self._inputs(group)
        z = tables.read(self._x(first), where, part.halo)
        for other in others:
            z += tables.read(self._x(other), where, part.halo)
        mask = None
        if model.training and model.shared_dropout and model.dropout > 0:
            mask = self._chunks(self._of.masks["mask"].read(part.n_id, self._of.dtype))[group]
        return tables.at(self._x(group)).read(where), z, mask

    def _inputs(self, group: int) -> list[int]:
        """Return the groups whose sum is the input of a group's block."""
        return [group - 1] if group else list(range(1, self._model.num_groups))

    def _forward(self, layer: int, group: int, part: Part, rows: Read) -> Changes:
        lattice = self._of.lattice
        own, z, mask = rows
        with torch.enable_grad() if self.training else contextlib.nullcontext():
            y = self._evaluate(layer, group, part, z.requires_grad_(self.training), mask)
        if self.training:
            self._reached([y], [z], self._of.inside(layer, group))
        y = y.detach()
        if lattice is None:
            if self.training:
                self._note(self._place(layer, group, part), noted(z, y))
            own = own + y
        else:
            (own,) = lattice(own, y)
            lattice.check(own, [own], [self._of.block(layer, group)], f"{place_of(layer, group)}: {{}}")
            if self.training:
                self._mark(self._place(layer, group, part), y)
        return Changes([(self._places.there(f"x{group}"), (part.start, part.stop), own)])

    def _x(self, group: int) -> Table:
        """Return the table of a group's activations, before the pass that is under way."""
        return self._places.here(f"x{group}")

    def _place(self, layer: int, group: int, part: Part) -> int:
        return (layer * self._model.num_groups + group) * len(self.space.parts) + part.number

    def _evaluate(self, layer: int, group: int, part: Part, z: Tensor, mask: Tensor | None) -> Tensor:
        """Return the block's output for a part's nodes."""
        of = self._of
        if part.further:  # the one row for all that is further away, which is there to be counted
            z = torch.cat([z, z.new_zeros(1, z.size(1))])
            mask = None if mask is None else torch.cat([mask, mask.new_ones(1, mask.size(1))])
        own = for_targets(part.size) if of.blocks.computed_alone(layer, group, z.device) else contextlib.nullcontext()
        with own, self._drawn(layer, group, part.number), self._writes.again(place_of(layer, group)):
            y: Tensor = of.block(layer, group)(z, part.edge_index, mask, *part.edges.values())
        return y[: part.size]

    def groups_of(self, part: Part) -> Tensor:
        """Return the activations of a part's nodes [n, hidden_channels]."""
        tables, where = self.space.tables, (part.start, part.stop)
        return torch.cat([tables.at(self._x(i)).read(where) for i in range(self._model.num_groups)], 1)

    def logits(self, part: Part) -> Tensor:
        """See :class:`Step`."""
        _, groups = self._crossing.there(part, self.groups_of(part))
        with self._writes.again("classify"):
            return self._model.classify(groups)

    # The loss.

    def turn(self) -> Tensor:
        """See :class:`Step`."""
        model, parameters = self._model, self._of.around()

        def read(part: Part) -> tuple[Tensor, Tensor | None]:
            mask = None
            if model.training and model.dropout > 0:
                mask = self._of.masks["last_mask"].read((part.start, part.stop), self._of.dtype)
            return self.groups_of(part), mask

        def compute(part: Part, rows: tuple[Tensor, Tensor | None]) -> Changes:
            h, mask = rows[0].requires_grad_(), rows[1]

            def logits() -> Tensor:
                with self._writes.again("classify"):
                    return model.classify(h[part.train], None if mask is None else mask[part.train])

            def changes() -> Iterator[Changes]:
                for block, (gradient,) in self._lose(part, logits, [h], parameters):
                    chunks = self._chunks(gradient.view(part.size, -1, self._of.hidden))
                    yield Changes([(self._made(i, block), where, chunk.flatten(1)) for i, chunk in enumerate(chunks)])

            where = (part.start, part.stop)
            return self._by_blocks(Changes(), changes())

        self._pass(read, compute, parameters, self.space.parts.trained_first)
        return self._lost()

    def _gradient(self, group: int, block: range) -> Table:
        """Return the table of a group's gradient, before the pass that is under way."""
        return self._places.here(self._name(group, block))

    def _made(self, group: int, block: range) -> Table:
        """Return it, and make it if there is none."""
        (width, dtype), table = self._of.shape, self._gradient(group, block)
        self.space.tables.make(table[0], (self.objectives.width(width, block), dtype))
        return table

    def _name(self, group: int, block: range) -> str:
        return self.objectives.table(f"g{group}", block)

    # Backward.

    def backward(self) -> None:
        """See :class:`Step`."""
        for layer in reversed(range(self._model.num_layers)):
            for group in reversed(range(self._model.num_groups)):
                parameters = self._of.inside(layer, group)
                compute = partial(self._backward, layer, group, parameters)
                self._pass(partial(self._rows_and_gradient, group), compute, parameters)
                inputs = [self._name(i, block) for i in self._inputs(group) for block in self.objectives.blocks]
                self._places.turn([f"x{group}", *inputs])
        self._squares = torch.zeros(2, dtype=torch.float64, device="cpu")  # of the error, and of what is true
        self._pass(self.groups_of, self._leave, self._of.around())
        errors, norms = self._squares.tolist()
        self.drift = (errors / norms) ** 0.5 if norms else 0.0

    def _backward(
        self, layer: int, group: int, parameters: list[nn.Parameter], part: Part, rows: tuple[Read, Tensor]
    ) -> Changes:
        lattice = self._of.lattice
        (own, z, mask), first = rows
        with torch.enable_grad():
            y = self._evaluate(layer, group, part, z.requires_grad_(), mask)
        place, name = self._place(layer, group, part), place_of(layer, group)
        if lattice is not None:
            self._compare(place, y.detach(), name, ", or exact=False")
        else:
            again = partial(self._again, layer, group, part, mask)
            check_noted(name, self._noted(place, torch.float64), z, y, again)
        parameters = self._reached([y], [z], parameters)
        where = (part.start, part.stop)
        own = own - y.detach() if lattice is None else lattice.inverse(own, y.detach())[0]

        def changes() -> Iterator[Changes]:
            for block in self.objectives.blocks:
                gradient = self._crossing.rows(self._read_gradient(group, block, part)) if block.start else first
                pulled = self.objectives.pull([y], [gradient], [z], parameters, block)
                self._add(parameters, pulled, block)
                if pulled.rows[0] is not None:
                    found = pulled.rows[0].flatten(1)
                else:
                    found = z.new_zeros(z.size(0), self.objectives.width(z.size(1), block), requires_grad=False)
                names = [self._name(other, block) for other in self._inputs(group)]
                yield Changes(
                    added=[each for name in names for each in self._places.sums(name, where, part.halo, found)]
                )

        return self._by_blocks(Changes([(self._places.there(f"x{group}"), where, own)]), changes())

    def _again(self, layer: int, group: int, part: Part, mask: Tensor | None, z: Tensor) -> Tensor:
        with torch.enable_grad():
            return self._evaluate(layer, group, part, z.requires_grad_(), mask).detach()

    def _rows_and_gradient(self, group: int, part: Part) -> tuple[Read, Tensor]:
        return self._rows(group, part), self._read_gradient(group, self.objectives.blocks[0], part)

    def _read_gradient(self, group: int, block: range, part: Part) -> Tensor:
        return self.space.tables.at(self._gradient(group, block)).read((part.start, part.stop))

    def _leave(self, part: Part, found: Tensor) -> Changes:
        parameters = self._of.around()
        with torch.enable_grad(), self._writes.again("embed"):
            h = self._model.embed(part.x)
        true = self._entered(h).detach()
        self._look(torch.stack([(found - true).square().sum(), true.square().sum()]), self._squares.add_)
        parameters = self._reached([h], [], parameters)
        for block in self.objectives.blocks if parameters else ():
            groups = [self._read_gradient(i, block, part) for i in range(self._model.num_groups)]
            groups = self._crossing.rows(groups)
            gradient = torch.cat([rows.view(part.size, -1, self._of.shape[0]) for rows in groups], -1).flatten(1)
            self._add(parameters, self.objectives.pull([h], [gradient], [], parameters, block), block)
        return Changes()
