"""How far a block looks: observed, on a small graph that has what graphs can have."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recollect._torch import TorchDispatchMode
from recollect.messages._convolutions import for_targets
from recollect.messages._kind import Look, kind_of, look_of, module_of, settings_of

__all__ = [
    "DRAWING",
    "Constant",
    "Cut",
    "Look",
    "Probe",
    "Reach",
    "Rewound",
    "copied",
    "cut",
    "kind_of",
    "look_of",
    "module_of",
    "move",
    "other_numbers",
    "same",
    "settings_of",
]

_NODES, _EDGES = 160, 300
_PARTS = ((0, 9), (9, 10), (40, 41), (60, 72), (150, _NODES))
_LEAVES, _LAST = 6, _NODES - 1  # the first nodes have a self-loop or one edge, the last one has none
_HUB, _DEGREE = 40, 30
DRAWING = threading.RLock()  # steps of several threads draw from torch's one generator
_SCALES = (1.0, 30.0)
_LARGEST = 1 << 20
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # under autocast results are in half precision


@dataclass(frozen=True)
class Reach:
    """What a block needs.

    Attributes:
        near: the edges into a part's nodes suffice.
        further: with the edges into their neighbours it is right too.
        near_alone: near, and convolutions can be computed for the part's nodes alone.
        further_alone: the same with the edges into their neighbours.
        ordered: what it returns depends on the order of the edges into a node.
        writes: it writes buffers, and the same values for all rows: a power iteration of its weights, say.
        varied: the name of a buffer into which it writes other values for other rows; ``None``: there is none.
    """

    near: bool
    further: bool
    near_alone: bool
    further_alone: bool
    ordered: bool
    writes: bool = False
    varied: str | None = None

    def alone(self, further: bool) -> bool:
        """Return whether convolutions can be computed for the part's nodes alone."""
        return self.further_alone if further else self.near_alone


@dataclass(frozen=True)
class Cut:
    """A part of a small graph.

    Attributes:
        start: its first node.
        stop: behind its last node.
        further: whether edges into its neighbours are there too.
        halo: its neighbours.
        edge_index: in its own numbers.
        edges: what these have, by name.
    """

    start: int
    stop: int
    further: bool
    halo: Tensor
    edge_index: Tensor
    edges: dict[str, Tensor]


class Probe:
    """A small graph, on which a block is computed as a whole and part by part.

    It has nodes without edges, with a self-loop alone and with one edge, edges in one direction and edges that are
    there twice, a hub, and parts of one node and of many. So what is seen does not depend on the graph. The block runs
    at two scales, by a copy whose parameters are moved, since those that begin at zero hide what they multiply. Each
    element that it draws is the same constant.

    Args:
        edges: what the graph's edges have; rows are drawn from it.
        width: channels of a block's input.
        dtype: of a block's input.
        nodes: how many the graph has: of a block that does something else for so many rows, the reach is no part.
            ``None``: that is not looked at, nor where the input would have more than a million numbers.

    Attributes:
        rows: of its nodes [n, width].
        edge_index: [2, E'], sorted by target.
        edges: what these edges have, by name.
        cuts: its parts.
    """

    def __init__(self, edges: Mapping[str, Tensor], width: int, dtype: torch.dtype, nodes: int | None = None) -> None:
        self._nodes = None if nodes is None or nodes * width > _LARGEST else nodes
        self._generator = torch.Generator().manual_seed(0)
        number = _EDGES if all(value.size(0) for value in edges.values()) else 0
        self.edge_index = self._drawn_edges(number)
        count = torch.bincount(self.edge_index[1], minlength=_NODES)
        rowptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
        self.edges = {
            name: value[torch.randint(value.size(0), (int(rowptr[-1]),), generator=self._generator)]
            if number
            else value
            for name, value in edges.items()
        }
        backwards = torch.arange(int(rowptr[-1])).flip(0)
        self._turned = backwards[torch.argsort(self.edge_index[1][backwards], stable=True)]  # for each node
        self.rows = torch.randn(_NODES, width, generator=self._generator, dtype=torch.float64).to(dtype)
        place = torch.full((_NODES,), -1, dtype=torch.int64)
        self.cuts = [
            Cut(
                start,
                stop,
                further,
                *cut(rowptr, self.edge_index[0], self.edges, torch.arange(start, stop), further, place),
            )
            for start, stop in _PARTS
            for further in (False, True)
        ]

    def _drawn_edges(self, number: int) -> Tensor:
        if not number:
            return torch.empty(2, 0, dtype=torch.int64)
        found = torch.randint(_LEAVES, _LAST, (2, number), generator=self._generator)
        found = found[:, found[0] != found[1]]
        leaves = torch.tensor([[0, 1, 2, 70, 71, 5, 8, 65, _HUB], [0, 1, 2, 3, 4, 5, 5, 65, 8]])
        hub = torch.stack([torch.arange(100, 100 + _DEGREE), torch.full((_DEGREE,), _HUB)])
        found = torch.cat([found, found[:, :20], leaves, hub], 1)
        return found[:, torch.argsort(found[1] * _NODES + found[0], stable=True)]

    @torch.no_grad()
    def reach(self, block: Any, name: str, brief: bool = False) -> Reach:
        """Return what a block needs, in the mode in which it is.

        Args:
            block: called with rows, an edge index, a mask, and what edges have; it stays as it is.
            name: the block's, for the message.
            brief: look at one scale only, as another block of its kind was looked at.

        Raises:
            ValueError: it can be computed for a whole graph, and not for a part.
        """
        block = Rewound(_moved(block, self._generator))
        right = {False: True, True: True}  # by whether edges into the neighbours are there
        alone = dict(right)
        ordered = False
        for scale in _SCALES[:1] if brief else _SCALES:
            rows, draws = self.rows * scale, Constant()
            true = _run(block, rows, self.edge_index, self.edges, draws)
            again = _run(block, rows, self.edge_index, self.edges, Constant())
            # Whole numbers name other rows in another graph; and what does not repeat itself is an error of the step.
            if draws.whole_numbers or not same(again, true):
                continue
            if not brief and scale == _SCALES[0] and self._nodes is not None and not self._at(self._nodes, block):
                right = {False: False, True: False}
            turned = {key: value[self._turned] for key, value in self.edges.items()}
            other = _run(block, rows, self.edge_index[:, self._turned], turned, Constant())
            ordered |= not same(other, true)
            for part in self.cuts:
                whole, with_further = true[part.start : part.stop], part.further
                own = torch.cat([rows[part.start : part.stop], rows[part.halo]])
                if with_further:
                    own = torch.cat([own, own.new_zeros(1, own.size(1))])
                try:
                    found = _run(block, own, part.edge_index, part.edges, Constant())[: whole.size(0)]
                except Exception as error:
                    raise ValueError(
                        f"{name}: it ran on a small graph, and then not on a part of it ({type(error).__name__}: "
                        f"{error}). A convolution that keeps something of the first graph, as with cached=True, cannot "
                        "be computed part by part: turn that off"
                    ) from error
                right[with_further] &= same(found, whole)
                alone[with_further] = alone[with_further] and _is_alone(block, own, part.edge_index, part.edges, whole)
        near, further = right[False], right[True]
        alone = {False: near and alone[False], True: further and alone[True]}
        return Reach(near, further, alone[False], alone[True], ordered, bool(block.written), block.varied)

    @torch.enable_grad()
    def run(self, block: Any) -> None:
        """Run a block itself on the graph, on its device; what it draws are constants."""
        device = next((parameter.device for parameter in module_of(block).parameters()), self.rows.device)
        edges = {name: value.to(device) for name, value in self.edges.items()}
        _run(block, self.rows.to(device), self.edge_index.to(device), edges, Constant())

    def _at(self, nodes: int, block: Any) -> bool:
        """Return whether a block does for so many nodes what it does for one more, which has no edges."""
        own = min(nodes, _NODES)
        kept = (self.edge_index < own).all(0)
        edges = {key: value[kept] if value.size(0) == kept.numel() else value for key, value in self.edges.items()}
        numbers = torch.arange(nodes + 1) % own
        found = []
        for number in (nodes, nodes + 1):
            try:
                out = _run(block, self.rows[numbers[:number]], self.edge_index[:, kept], edges, Constant())
            except (RuntimeError, IndexError):  # one of the two has rows that the block has none for
                return False
            found.append(out[:own])
        return same(*found)


class Rewound:
    """A block each of whose runs begins with the same buffers.

    Attributes:
        written: what the first run wrote, by name.
        varied: the name of a buffer into which another run wrote something else.
    """

    def __init__(self, block: Any) -> None:
        self._block = block
        self._before = {name: value.clone() for name, value in module_of(block).named_buffers()}
        self.written: dict[str, Tensor] | None = None
        self.varied: str | None = None

    def rewind(self) -> dict[str, Tensor]:
        """Put the buffers back, and return them."""
        buffers = {name: each for name, each in module_of(self._block).named_buffers() if name in self._before}
        for name, value in buffers.items():
            if not _equal(value, self._before[name]):  # a graph that is there already may need the others as they are
                value.copy_(self._before[name])
        return buffers

    def __call__(self, *args: Any) -> Any:
        """Run the block."""
        buffers = self.rewind()
        out = self._block(*args)
        written = {name: each.clone() for name, each in buffers.items() if not _equal(each, self._before[name])}
        if self.written is None:
            self.written = written
        for name in self.written.keys() | written.keys():
            if not _equal(self.written.get(name, self._before[name]), written.get(name, self._before[name])):
                self.varied = name
        return out


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def same(found: Tensor, true: Tensor) -> bool:
    """Return whether two results are the same up to rounding."""
    if found.shape != true.shape:
        return False
    tolerance = _TOLERANCE.get(true.dtype, 1e-2)
    found, true = found.double().nan_to_num(), true.double().nan_to_num()
    return bool((found - true).abs().max() <= tolerance * true.abs().max())


def other_numbers(value: Tensor, seed: int) -> Tensor:
    """What edges have, with other numbers for 0 and 1: those of this mini-batch's edges may be others in the next."""
    if not value.is_floating_point():
        return value
    drawn = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2 + 0.25
    return torch.where((value == 0) | (value == 1), drawn.to(value.dtype), value)


def copied(block: Any, shared: Iterable[nn.Module] = ()) -> Any:
    """Return a copy of a block, in which some modules are those of the block itself."""
    # A weight that a hook computes before each call (pruning, weight_norm) has a history, and torch does not copy it.
    computed = (value for module in module_of(block).modules() for value in vars(module).values())
    memo: dict[int, Any] = {id(module): module for module in shared}
    for value in computed:
        if isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
        elif not isinstance(value, Tensor | dict):
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # a lock, a file: it is shared
                memo[id(value)] = value
    return copy.deepcopy(block, memo)


def _moved(block: Any, generator: torch.Generator) -> Any:
    """Return a copy of a block with other parameters, on the CPU."""
    block = copied(block)
    move(module_of(block).cpu().parameters(), generator)
    return block


@torch.no_grad()
def move(parameters: Iterable[Tensor], generator: torch.Generator) -> None:
    """Move parameters a little: those that begin at zero hide what they multiply."""
    for parameter in parameters:
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter) * 0.1)


def _is_alone(block: Any, rows: Tensor, edge_index: Tensor, edges: Mapping[str, Tensor], true: Tensor) -> bool:
    """Return whether a block is right when its convolutions are computed for the first nodes alone."""
    try:
        with for_targets(true.size(0)):
            found = _run(block, rows, edge_index, edges, Constant())[: true.size(0)]
    except Exception:  # it needs all rows of what a convolution returns, or has one that takes no pair
        return False
    return same(found, true)


def _run(block: Any, rows: Tensor, edge_index: Tensor, edges: Mapping[str, Tensor], draws: Constant) -> Tensor:
    with DRAWING, _random_state(), draws:
        out: Tensor = block(rows.clone(), edge_index.clone(), torch.ones_like(rows), *edges.values())
    return out


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


_DRAWN = getattr(torch.ops.aten.random_, "from")
_KEPT = 0x7FFF7FFF7FFF7FFF  # the largest number in each 16 bits: a mask that is made of it drops nothing


class Constant(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers that are drawn are 1 where they are masks, and else 1/2; bits that are drawn are ones.

    Attributes:
        whole_numbers: whether some were drawn, such as a permutation, which stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole_numbers = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(out, Tensor):
            if out.is_floating_point():
                out.fill_(1.0 if "bernoulli" in str(func) else 0.5)
            elif func is _DRAWN and args[1] == -(2**63):  # of all numbers: these are bits
                out.fill_(_KEPT)
            else:
                self.whole_numbers = True
        return out


def cut(
    rowptr: Tensor, col: Tensor, edges: Mapping[str, Tensor], nodes: Tensor, further: bool, place: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the neighbours of nodes, and the edges into these, in their own numbers.

    Args:
        rowptr: of the graph's CSR adjacency [N + 1].
        col: the source of each edge [E].
        edges: what each edge has.
        nodes: by number, each once.
        further: take the edges into the neighbours too.
        place: scratch [N] int64, -1 before and after.

    Returns:
        The halo, the edge index, and what its edges have.
    """
    taken = _edges_into(rowptr, nodes)
    place[nodes] = torch.arange(nodes.numel())
    sources = col[taken]
    halo = torch.unique(sources[place[sources] < 0])
    place[halo] = torch.arange(nodes.numel(), nodes.numel() + halo.numel())
    targets = nodes
    if further:
        targets = torch.cat([nodes, halo])
        taken = _edges_into(rowptr, targets)
        sources = col[taken]
    own = place[sources]
    own[own < 0] = nodes.numel() + halo.numel()
    target = torch.repeat_interleave(torch.arange(targets.numel()), rowptr[targets + 1] - rowptr[targets])
    place[nodes] = -1
    place[halo] = -1
    found = {name: value[taken] for name, value in edges.items()}
    return halo, torch.stack([own, target]), found


def _edges_into(rowptr: Tensor, nodes: Tensor) -> Tensor:
    """Return the numbers of the edges into nodes, in the nodes' order."""
    count = rowptr[nodes + 1] - rowptr[nodes]
    first = torch.repeat_interleave(rowptr[nodes] - (count.cumsum(0) - count), count)
    return first + torch.arange(first.numel())
