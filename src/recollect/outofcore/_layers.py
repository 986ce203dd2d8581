"""What the layers of a network read and leave behind, observed on a small graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recollect._util._tree import Tree, others_of
from recollect.autoscale import ScalableGNN
from recollect.messages import adjacency_of_edges
from recollect.messages.reach import DRAWING, Constant, Cut, Probe, same
from recollect.outofcore._crossing import device_of
from recollect.outofcore._tables import Shape
from recollect.outofcore._writes import Writes

__all__ = ["Layer", "Leaf", "Look", "Readout", "check_others", "filled", "look_at", "watch"]

State = dict[str, Any]
_WEIGHTS = "edge_weight"


@dataclass(frozen=True)
class Leaf:
    """A tensor that a layer leaves in the state for layers after it.

    Attributes:
        name: of its table.
        shape: of a node's entries.
        dtype: of the entries.
        around: whether there are rows of the neighbours too.
        trains: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    around: bool
    trains: bool

    @property
    def width(self) -> int:
        """Entries of a node."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Readout:
    """What the last step of a network needs.

    Attributes:
        state: before it; in the places of its tensors stand leaves, and names of what edges have.
        used: the parameters that it uses.
        writes: whether it writes buffers, which then do not depend on the rows.
    """

    state: Tree
    used: list[nn.Parameter]
    writes: bool


@dataclass(frozen=True)
class Layer(Readout):
    """What a layer needs, and leaves.

    Attributes:
        new: what it leaves in the state.
        output: width and type of its output.
        others: what is in the state behind it beside tensors.
    """

    new: list[Leaf]
    output: Shape
    others: list[Any]


@dataclass(frozen=True)
class Look:
    """What was seen of a network.

    Attributes:
        layers: all of them.
        readout: what comes after them.
    """

    layers: list[Layer]
    readout: Readout

    @property
    def leaves(self) -> list[Leaf]:
        """All that layers leave in the state."""
        return [leaf for layer in self.layers for leaf in layer.new]


class _Runner(nn.Module):
    """Runs a network's layers as a module's forward, in which parameters can be others."""

    def __init__(self, model: ScalableGNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, layer: int | None, x: Tensor, adj_t: Tensor, state: State) -> Tensor:
        return self.model.readout(x, state) if layer is None else self.model.run_layer(layer, x, adj_t, state)


class _Observer:
    """A network with moved parameters, since those that begin at zero hide what they multiply."""

    def __init__(self, model: ScalableGNN, probe: Probe) -> None:
        self.model, self._runner = model, _Runner(model)
        generator = torch.Generator().manual_seed(1)
        own = tuple(f"{name}." for name, child in model.named_children() if child is model.histories)
        self._values: dict[str, Tensor] = {}
        self._buffers: list[str] = []
        self.parameters: dict[str, nn.Parameter] = {}
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.startswith(own):
                continue
            moved = value.detach().cpu().clone()
            if isinstance(value, nn.Parameter):
                if value.is_floating_point():
                    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                    moved.add_(noise.to(moved.dtype) * 0.1)
                moved.requires_grad_(value.requires_grad)
                if value.requires_grad:
                    self.parameters[f"model.{name}"] = value
            else:
                self._buffers.append(f"model.{name}")
            self._values[f"model.{name}"] = moved
        self.probe = probe

    def run(self, layer: int | None, x: Tensor, adj_t: Tensor, state: State) -> tuple[Tensor, bool]:
        """Return what a layer, or the readout, returns; and whether it drew numbers that may name nodes."""
        draws = Constant()
        with DRAWING, torch.random.fork_rng(devices=[]), torch.enable_grad(), draws:
            out: Tensor = torch.func.functional_call(self._runner, self._values, (layer, x, adj_t, state))
        return out, draws.whole_numbers

    def buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers."""
        return {name: self._values[name].clone() for name in self._buffers}

    @torch.no_grad()
    def put(self, buffers: Mapping[str, Tensor]) -> None:
        """Put buffers back."""
        for name, value in buffers.items():
            if not torch.equal(self._values[name], value):  # a graph may hold those that stay
                self._values[name].copy_(value)

    def used(self, outputs: list[Tensor]) -> list[nn.Parameter]:
        """Return the parameters that outputs depend on."""
        outputs = [each for each in outputs if each.requires_grad]
        moved = [self._values[name] for name in self.parameters]
        if not outputs or not moved:
            return []
        found = torch.autograd.grad([each.sum() for each in outputs], moved, allow_unused=True)
        return [p for p, each in zip(self.parameters.values(), found, strict=True) if each is not None]


def watch(model: ScalableGNN, probe: Probe, look: Look, writes: Writes) -> None:
    """Run all layers once on a small graph, if some of them write buffers, and take notice of what they write."""
    steps: list[Readout] = [*look.layers, look.readout]
    if not any(step.writes for step in steps):
        return
    modules = [child for child in model.children() if child is not model.histories]
    own = [*model.buffers(recurse=False), *(buffer for module in modules for buffer in module.buffers())]
    buffers = list({id(buffer): buffer for buffer in own}.values())
    nodes, device = probe.rows.size(0), device_of(model)
    edges = {name: value.to(device) for name, value in probe.edges.items()}
    adj_t = adjacency_of_edges(probe.edge_index.to(device), edges[_WEIGHTS], nodes, nodes)
    x, state = probe.rows.to(device), {name: value for name, value in edges.items() if name != _WEIGHTS}

    def run(layer: int) -> None:
        nonlocal x
        with DRAWING, torch.random.fork_rng(devices=[]), torch.enable_grad(), Constant():
            last = layer == model.num_layers
            x = (model.readout(x, state) if last else model.run_layer(layer, x, adj_t, state)).detach()

    for layer in range(len(steps)):
        writes.watch(f"layer {layer}", buffers, partial(run, layer))


def look_at(model: ScalableGNN, probe: Probe) -> Look:
    """Return what the layers of a network need, in the mode in which it is; it stays as it is.

    Args:
        model: the network.
        probe: a small graph, whose edges have ``edge_weight`` and what the layers need beside it.

    Raises:
        ValueError: what a layer returns for a node depends on more than the node and the edges into it, or it leaves
            something in the state that has no row for each node.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _looked_at(model, probe)


def _looked_at(model: ScalableGNN, probe: Probe) -> Look:
    observer = _Observer(model, probe)
    parts = [part for part in probe.cuts if not part.further]
    edges = {name: value for name, value in probe.edges.items() if name != _WEIGHTS}
    nodes = probe.rows.size(0)
    adj_t = adjacency_of_edges(probe.edge_index, probe.edges[_WEIGHTS], nodes, nodes)
    x, state, known = probe.rows, dict(edges), dict[int, Leaf | str]()
    known.update((id(value), name) for name, value in edges.items())
    layers: list[Layer] = []
    for index in [*range(model.num_layers), None]:
        name = "readout" if index is None else f"layer {index}"
        before = Tree(state)
        x = x.detach().requires_grad_(bool(layers))
        leaves = [tensor.detach().requires_grad_(_trains(known[id(tensor)])) for tensor in before.tensors]
        names: list[Any] = [known[id(tensor)] for tensor in before.tensors]
        known = {id(leaf): name for leaf, name in zip(leaves, names, strict=True)}
        given = before.build(leaves)
        state = dict(given)
        buffers = observer.buffers()
        out, numbers = observer.run(index, x, adj_t, state)
        written = observer.buffers()
        check = _Check(observer, index, name, x, (before, leaves, names), numbers, (buffers, written))
        after = Tree(state)
        fresh = [tensor for tensor in after.tensors if id(tensor) not in known]
        used = observer.used([out, *fresh])
        around = check.compare(parts, out, fresh, after)
        observer.put(written)
        writes = _other(buffers, written) is not None
        before.tensors = names
        if index is None:
            return Look(layers, Readout(before, used, writes))
        new: list[Leaf] = []
        for tensor, wide in zip(fresh, around, strict=True):
            label = f"s{index}.{len(new)}"
            new.append(Leaf(label, tuple(tensor.shape[1:]), tensor.dtype, wide, tensor.requires_grad))
            known[id(tensor)] = new[-1]
        layers.append(Layer(before, used, writes, new, (out.size(1), out.dtype), list(others_of(state))))
        x = out
    raise AssertionError


def _other(buffers: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> str | None:
    """Return the name of a buffer with other values."""
    for name, value in buffers.items():
        if not bool(((value == others[name]) | (value.isnan() & others[name].isnan())).all()):
            return name.removeprefix("model.")
    return None


def check_others(name: str, left: list[Any], seen: list[Any]) -> None:
    """Check that what a layer leaves in the state beside tensors is what it left on the small graph.

    Raises:
        ValueError: it is something else.
    """
    same = len(left) == len(seen)
    if not same or not all(a is b or (type(a) is type(b) and bool(a == b)) for a, b in zip(left, seen, strict=True)):
        raise ValueError(
            f"{name} leaves {left} in its state beside tensors, and left {seen} on a small graph with other "
            "parameters: only what is always the same may be left there. Compute the rest in each layer that needs it"
        )


def _trains(known: Leaf | str) -> bool:
    return isinstance(known, Leaf) and known.trains


@dataclass(frozen=True)
class _Check:
    """A layer, or the readout, on the small graph as a whole."""

    observer: _Observer
    layer: int | None
    name: str
    x: Tensor
    state: tuple[Tree, list[Tensor], list[Any]]
    whole_numbers: bool
    buffers: tuple[dict[str, Tensor], dict[str, Tensor]]

    def compare(self, parts: list[Cut], out: Tensor, fresh: list[Tensor], after: Tree) -> list[bool]:
        """Compare it with what it is part by part; return which new tensors have rows of the neighbours too."""
        before, leaves, names = self.state
        around: list[set[bool]] = [set() for _ in fresh]
        for part in parts:
            size, n_id = part.stop - part.start, torch.cat([torch.arange(part.start, part.stop), part.halo])
            own = adjacency_of_edges(part.edge_index, part.edges[_WEIGHTS], n_id.numel(), size)
            chosen = [
                part.edges[name] if isinstance(name, str) else leaf[n_id if name.around else n_id[:size]]
                for leaf, name in zip(leaves, names, strict=True)
            ]
            given = {id(each) for each in chosen}
            state = before.build(chosen)
            rows = n_id[:size] if self.layer is None else n_id
            self.observer.put(self.buffers[0])
            found, _ = self.observer.run(self.layer, self.x[rows], own, state)
            written = _other(self.buffers[1], self.observer.buffers())
            if written is not None:
                raise ValueError(
                    f"{self.name} of the {type(self.observer.model).__name__} writes to the buffer {written} what "
                    "depends on its rows: parts have other rows than the graph. Keep such statistics outside of "
                    "layers, or evaluate the network (model.eval())"
                )
            left = [tensor for tensor in Tree(state).tensors if id(tensor) not in given]
            if len(left) != len(fresh):
                raise self._refused(
                    f"leaves {len(fresh)} tensors in its state for a whole graph, and {len(left)} for a part"
                )
            pairs = [(found, out, {size: False})]
            pairs += [(a, b, {size: False, n_id.numel(): True}) for a, b in zip(left, fresh, strict=True)]
            for place, (one, whole, sizes) in enumerate(pairs):
                number = one.size(0) if one.dim() else -1
                if number not in sizes or whole.dim() == 0 or whole.size(0) != self.x.size(0):
                    raise self._refused(
                        f"returns or leaves in its state a tensor of shape {list(one.shape)} for {size} nodes, which "
                        "has no row for each node"
                    )
                if not self.whole_numbers and not same(one.detach(), whole.detach()[n_id[:number]]):
                    raise self._refused(
                        "returns, or leaves in its state, for a node what depends on more than the node and the edges "
                        "into it: it normalises over nodes, or has several convolutions one after the other"
                    )
                if place and part.halo.numel():
                    around[place - 1].add(sizes[number])
        if any(len(each) > 1 for each in around):
            raise self._refused("leaves rows of neighbours in its state for some parts, and none for others")
        return [each == {True} for each in around]

    def _refused(self, what: str) -> ValueError:
        model = type(self.observer.model).__name__
        return ValueError(
            f"{self.name} of the {model} {what}, so that it cannot be computed part by part. Make each convolution a "
            "layer of its own, use norms over channels (LayerNorm), and leave rows of nodes in the state alone"
        )


Edges = Mapping[str, Tensor]
Reads = Callable[[Leaf], Tensor]


def filled(readout: Readout, leaves: Reads, edges: Edges) -> tuple[State, list[tuple[Leaf, Tensor]]]:
    """Return a layer's state, and the leaves in it with their rows.

    Args:
        readout: the layer, or the readout.
        leaves: returns the rows of a leaf.
        edges: what edges have.
    """
    tensors: list[Tensor] = []
    read: list[tuple[Leaf, Tensor]] = []
    for name in readout.state.tensors:
        if isinstance(name, Leaf):
            read.append((name, leaves(name)))
            tensors.append(read[-1][1])
        else:
            tensors.append(edges[name])
    state: State = readout.state.build(tensors)
    return state, read
