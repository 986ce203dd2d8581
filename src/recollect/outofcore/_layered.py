"""Networks that are written layer by layer: a table for each layer's input, or for every s-th."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recollect._modules import in_evaluation
from recollect._util._tree import Tree, others_of
from recollect.autoscale import ScalableGNN
from recollect.messages import adjacency_of_edges
from recollect.messages.reach import Probe, kind_of
from recollect.outofcore._checks import check_layered
from recollect.outofcore._layers import Leaf, Look, State, check_others, filled, look_at, watch
from recollect.outofcore._network import Graph, Network
from recollect.outofcore._parts import Part
from recollect.outofcore._step import Run, Space, Step
from recollect.outofcore._tables import Changes, Shape
from recollect.outofcore._writes import Writes

__all__ = ["Layered"]

_WEIGHTS = "edge_weight"
_FEATURES = "features"

Read = tuple[Tensor, State, list[tuple[Leaf, Tensor]]]
"""A layer's input, its state, and the rows of what layers before it left in there."""


class Layered(Network):
    """A ScalableGNN.

    Args:
        model: the network, in float32 or float64.
        graph: which it is for; its edges have weights, and what the layers need beside them.
        keep_every: s: the input of every s-th layer has a table.
    """

    model: ScalableGNN
    further = False

    def __init__(self, model: ScalableGNN, graph: Graph, keep_every: int) -> None:
        check_layered(model)
        self.model, self.keep_every = model, keep_every
        x = graph.data.x
        self.dtype = _dtype_of(model)
        self._features: Shape = x.size(1), x.dtype
        self._probe = Probe(graph.edges, x.size(1), x.dtype)
        with in_evaluation(model):
            self.look = self._looked = look_at(model, self._probe)
        self._looks: dict[Hashable, Look] = {}  # of the last two modes: those of training and evaluation take turns

    def tables(self) -> dict[str, Shape]:
        """See :class:`Network`."""
        found = {_FEATURES: self._features}
        for layer, seen in enumerate(self._looked.layers):
            found[self.input(layer + 1)] = found[self.gradient(layer + 1)] = seen.output
        for leaf in self._looked.leaves:
            found[leaf.name] = found[f"g{leaf.name}"] = leaf.width, leaf.dtype
        return found

    @property
    def moved(self) -> list[str]:
        """See :class:`Network`."""
        layers, leaves = range(1, len(self._looked.layers) + 1), self._looked.leaves
        return [*map(self.gradient, layers), *(f"g{leaf.name}" for leaf in leaves)]

    @property
    def row_bytes(self) -> int:
        """See :class:`Network`."""
        rows = [layer.output for layer in self._looked.layers] + [
            (each.width, each.dtype) for each in self._looked.leaves
        ]
        return max(width * dtype.itemsize for width, dtype in rows)

    def input(self, layer: int) -> str:
        """Return the name of the table of a layer's input; those between two that are kept share theirs."""
        if not layer:
            return _FEATURES
        place = layer % self.keep_every
        return f"between{place}.{self._form(layer)}" if place else f"x{layer}"

    def gradient(self, layer: int) -> str:
        """Return the name of the table of the gradient of a layer's input; there are two of each width and type."""
        return f"g{layer % 2}.{self._form(layer)}"

    def _form(self, layer: int) -> str:
        width, dtype = self._looked.layers[layer - 1].output
        return f"{width}.{str(dtype).removeprefix('torch.')}"

    def places(self, parts: int) -> int:
        """See :class:`Network`."""
        return self.model.num_layers * parts

    def settle(self, space: Space, graph: Graph) -> None:
        """Write the features into a table, where rows of neighbours are found."""
        for number in range(len(space.parts)):
            part = space.parts[number]
            space.tables[_FEATURES].write((part.start, part.stop), part.x)
            space.parts.leave(part)

    def check(self) -> None:
        """See :class:`Network`."""
        check_layered(self.model)
        if _dtype_of(self.model) != self.dtype:
            raise ValueError(
                f"the network is in {_dtype_of(self.model)} now, and was in {self.dtype} when the WholeGraph was made: "
                "make another WholeGraph"
            )
        self.check_norms()
        mode = kind_of(self.model), tuple(p.requires_grad for p in self.model.parameters())
        if mode in self._looks:
            self.look = self._looks[mode]
            return
        look = look_at(self.model, self._probe)
        if _shapes(look) != _shapes(self._looked):
            raise ValueError(
                "the layers return, or leave in their state, tensors of other shapes than when the WholeGraph was "
                "made, in evaluation mode: make another WholeGraph, or leave the same in both modes"
            )
        self.look = self._looks[mode] = look
        while len(self._looks) > 2:
            del self._looks[next(iter(self._looks))]

    def draw(self) -> None:
        """Nothing is drawn for the whole graph: what layers draw, they draw for each part."""

    def watch(self, writes: Writes) -> None:
        """See :class:`Network`."""
        watch(self.model, self._probe, self.look, writes)

    def uses(self) -> Counter[nn.Parameter]:
        """See :class:`Network`."""
        return Counter(p for each in (*self.look.layers, self.look.readout) for p in each.used)

    def settings(self) -> tuple[Any, ...]:
        """See :class:`Network`."""
        return (self.keep_every,)

    def step(self, space: Space, run: Run) -> LayeredStep:
        """See :class:`Network`."""
        return LayeredStep(self, space, run)


class LayeredStep(Step):
    """A step of a ScalableGNN.

    Args:
        of: the network.
        space: where its numbers lie.
        run: which step it is.
    """

    def __init__(self, of: Layered, space: Space, run: Run) -> None:
        super().__init__(of.model, space, run)
        self._of, self._model = of, of.model
        self._layers = of.look.layers
        self._parameters = [p for p in of.model.parameters() if p.requires_grad]
        self._places = space.tables.places(self.journaled)

    # Forward.

    def forward(self) -> None:
        """See :class:`Step`."""
        for layer in range(len(self._layers)):
            self._pass(partial(self._rows, layer), partial(self._forward, layer, False))

    def _rows(self, layer: int, part: Part) -> Read:
        """Read a layer's input for a part and its neighbours."""
        tables, where = self.space.tables, (part.start, part.stop)
        x = tables.read((self._of.input(layer), 0), where, part.halo)
        return x, *filled(self._layers[layer], partial(self._leaf, part), part.edges)

    def _leaf(self, part: Part, leaf: Leaf) -> Tensor:
        halo = part.halo if leaf.around else part.halo[:0]
        rows = self.space.tables.read((leaf.name, 0), (part.start, part.stop), halo)
        return rows.view(-1, *leaf.shape)

    def _run(self, layer: int, part: Part, read: Read) -> tuple[Tensor, list[Tensor]]:
        """Return a layer's output, and what it leaves in the state, with their graph."""
        x, state, known = read
        if self.training:
            x.requires_grad_(layer > 0)
            for leaf, rows in known:
                rows.requires_grad_(leaf.trains)
        given = {id(tensor) for tensor in Tree(state).tensors}
        after = dict(state)
        adj_t = adjacency_of_edges(part.edge_index, part.edges[_WEIGHTS], x.size(0), part.size)
        again = self._writes.again(f"layer {layer}")
        with self._drawn(layer, part.number), torch.set_grad_enabled(self.training), again:
            out = self._model.run_layer(layer, x, adj_t, after)
        check_others(f"layer {layer}", list(others_of(after)), self._layers[layer].others)
        new = [tensor for tensor in Tree(after).tensors if id(tensor) not in given]
        expected = self._layers[layer].new
        if len(new) != len(expected) or any(
            tuple(tensor.shape[1:]) != leaf.shape for tensor, leaf in zip(new, expected, strict=True)
        ):
            raise RuntimeError(
                f"layer {layer} left tensors of the shapes {[list(each.shape) for each in new]} in its state, and on a "
                f"small graph others: {[['nodes', *leaf.shape] for leaf in expected]}"
            )
        return out, new

    def _forward(self, layer: int, again: bool, part: Part, read: Read) -> Changes:
        out, new = self._run(layer, part, read)
        if again:
            self._compare(self._place(layer, part), out.detach(), f"layer {layer}", "")
        elif self.training:
            # With several losses, what this layer alone was seen to use is squared when it is done.
            self._reached([out, *new], [read[0], *(each for _, each in read[2])], self._layers[layer].used)
            self._mark(self._place(layer, part), out.detach())
        where = (part.start, part.stop)
        changes = Changes([((self._of.input(layer + 1), 0), where, out.detach())])
        if not again:
            changes.rows += [
                ((leaf.name, 0), where, tensor.detach()[: part.size].reshape(part.size, -1))
                for leaf, tensor in zip(self._layers[layer].new, new, strict=True)
            ]
        return changes

    def _place(self, layer: int, part: Part) -> int:
        return layer * len(self.space.parts) + part.number

    def _last(self, part: Part) -> Read:
        x = self.space.tables[self._of.input(len(self._layers))].read((part.start, part.stop))
        return x, *filled(self._of.look.readout, partial(self._leaf, part), part.edges)

    def logits(self, part: Part) -> Tensor:
        """See :class:`Step`."""
        part, (x, state, _) = self._crossing.there(part, self._last(part))
        with self._writes.again(f"layer {len(self._layers)}"):
            return self._model.readout(x, state)

    # The loss.

    def turn(self) -> Tensor:
        """See :class:`Step`."""
        self._pass(self._last, self._turn, self._of.look.readout.used, self.space.parts.trained_first)
        return self._lost()

    def _turn(self, part: Part, read: Read) -> Changes:
        x, state, known = read
        trained = [(leaf, rows.requires_grad_()) for leaf, rows in known if leaf.trains]
        last = len(self._layers)
        with self._drawn(last, part.number), torch.enable_grad(), self._writes.again(f"layer {last}"):
            logits = self._model.readout(x.requires_grad_(), state)
        flat = [x, *(rows for _, rows in trained)]
        self._reached([logits], flat, self._of.look.readout.used)
        where = (part.start, part.stop)

        def changes() -> Iterator[Changes]:
            for block, (first, *others) in self._lose(part, lambda: logits[part.train], flat, self._parameters):
                found = {leaf.name: gradient for (leaf, _), gradient in zip(trained, others, strict=True)}
                rows = [(self._gradient(len(self._layers), block), first)]
                for leaf in self._leaves():
                    gradient = found.get(leaf.name)
                    if gradient is not None and gradient.size(0) > part.size:
                        self._look(gradient[part.size :].any(), _check_unused)
                    own = self._zeros(part, leaf.width, block) if gradient is None else gradient[: part.size]
                    rows.append((self._leaf_gradient(leaf, block), own))
                each = Changes([(self._places.here(name), where, values) for name, values in rows])
                yield self._cleared(each, len(self._layers) - 1, part, block)

        return self._by_blocks(Changes(), changes())

    def _gradient(self, layer: int, block: range) -> str:
        """Return the name of the table of the gradient of a layer's input, which there is."""
        return self._made(self._of.gradient(layer), self._layers[layer - 1].output, block)

    def _leaf_gradient(self, leaf: Leaf, block: range) -> str:
        return self._made(f"g{leaf.name}", (leaf.width, leaf.dtype), block)

    def _made(self, name: str, shape: Shape, block: range) -> str:
        name, (width, dtype) = self.objectives.table(name, block), shape
        self.space.tables.make(name, (self.objectives.width(width, block), dtype))
        return name

    def _leaves(self) -> list[Leaf]:
        return [leaf for leaf in self._of.look.leaves if leaf.trains]

    def _zeros(self, part: Part, width: int, block: range) -> Tensor:
        return torch.zeros(
            part.size, self.objectives.width(width, block), dtype=self._of.dtype, device=self._crossing.device
        )

    def _cleared(self, changes: Changes, layer: int, part: Part, block: range) -> Changes:
        """Let the gradient of a layer's input, to which the next pass adds, begin with zeros."""
        if layer > 0:
            changes.cleared.append((self._places.here(self._gradient(layer, block)), (part.start, part.stop)))
        return changes

    # Backward.

    def backward(self) -> None:
        """See :class:`Step`."""
        number, every = len(self._layers), self._of.keep_every
        for layer in reversed(range(number)):
            first = layer - layer % every
            if layer == first + every - 1 and layer + 1 < number:  # what lies between is of layers behind these
                for each in range(first, layer):
                    self._pass(partial(self._rows, each), partial(self._forward, each, True))
            read = partial(self._rows_and_gradients, layer)
            self._pass(read, partial(self._backward, layer), self._layers[layer].used)
            self._places.turn(name for block in self.objectives.blocks for name in self._changed_by(layer, block))

    def _changed_by(self, layer: int, block: range) -> list[str]:
        """Return the names of the tables to which a layer's backward adds."""
        leaves = [leaf for leaf in self._layers[layer].state.tensors if isinstance(leaf, Leaf) and leaf.trains]
        first = [self._gradient(layer, block)] if layer else []
        return [*first, *(self._leaf_gradient(leaf, block) for leaf in leaves)]

    def _rows_and_gradients(self, layer: int, part: Part) -> tuple[Read, list[Tensor]]:
        return self._rows(layer, part), self._read_gradients(layer, part, self.objectives.blocks[0])

    def _read_gradients(self, layer: int, part: Part, block: range) -> list[Tensor]:
        names = [self._gradient(layer + 1, block)]
        names += [self._leaf_gradient(leaf, block) for leaf in self._layers[layer].new if leaf.trains]
        return [self.space.tables.at(self._places.here(name)).read((part.start, part.stop)) for name in names]

    def _backward(self, layer: int, part: Part, rows: tuple[Read, list[Tensor]]) -> Changes:
        read, gradients = rows
        out, new = self._run(layer, part, read)
        self._compare(self._place(layer, part), out.detach(), f"layer {layer}", "")
        outputs = [out]
        for leaf, tensor in zip(self._layers[layer].new, new, strict=True):
            if leaf.trains:
                outputs.append(tensor[: part.size])
        known = [(leaf, each) for leaf, each in read[2] if leaf.trains]
        inputs = ([read[0]] if layer else []) + [each for _, each in known]
        parameters = self._reached(outputs, [read[0], *(each for _, each in read[2])], self._parameters)

        def changes() -> Iterator[Changes]:
            for block in self.objectives.blocks:
                each = gradients
                if block.start:
                    each = self._crossing.rows(self._read_gradients(layer, part, block))
                pulled = self.objectives.pull(outputs, each, inputs, parameters, block)
                self._add(parameters, pulled, block)
                yield self._cleared(self._added(layer, part, block, inputs, pulled.rows), layer - 1, part, block)

        return self._by_blocks(Changes(), changes())

    def _added(
        self, layer: int, part: Part, block: range, inputs: list[Tensor], gradients: list[Tensor | None]
    ) -> Changes:
        """Return what is added to the gradients of a layer's inputs."""
        found: dict[str, Tensor] = {}
        for name, value, gradient in zip(self._changed_by(layer, block), inputs, gradients, strict=True):
            if gradient is None:  # rows move all the same
                width = self.objectives.width(value[:1].numel(), block)
                gradient = value.new_zeros(value.size(0), width, requires_grad=False)
            found[name] = found[name] + _flat(gradient) if name in found else _flat(gradient)
        where, places = (part.start, part.stop), self._places
        return Changes(added=[each for name in found for each in places.sums(name, where, part.halo, found[name])])


def _check_unused(found: Tensor) -> None:
    if bool(found):
        raise ValueError("the readout takes rows of neighbours out of the state, which are for layers alone")


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(rows.size(0), -1)


def _dtype_of(model: ScalableGNN) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _shapes(look: Look) -> tuple[Any, ...]:
    leaves = [(leaf.name, leaf.shape, leaf.dtype, leaf.around) for leaf in look.leaves]
    return [layer.output for layer in look.layers], leaves
