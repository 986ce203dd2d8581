"""The graph, cut into parts with their neighbours: in memory, or a file for each part."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect.autoscale.histories import HistoryFileError
from recollect.frames import bits_of
from recollect.outofcore._tables import unpacked

__all__ = ["Part", "Parts", "cut"]


@dataclass(frozen=True)
class Part:
    """Some nodes in a row, and the edges into them.

    Attributes:
        number: of the part.
        start: its first node.
        stop: behind its last node.
        halo: sources outside of it [halo] int64, ascending.
        edge_index: [2, E'] int64, sources and targets in the part's own numbers: its nodes, its halo, and, if edges
            into the halo are there too, one number for all that is further away. Sorted by target; the edges into each
            are in the graph's order.
        edges: what each edge has, by name, [E', ...].
        further: whether there is that one number.
        x: features of its nodes.
        y: labels of its training nodes.
        train: which of its nodes are for training [T] int64.
    """

    number: int
    start: int
    stop: int
    halo: Tensor
    edge_index: Tensor
    edges: dict[str, Tensor]
    further: bool
    x: Tensor
    y: Tensor
    train: Tensor

    @property
    def size(self) -> int:
        """Number of its nodes."""
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        """What it takes, with the adjacencies that convolutions make of its edges."""
        own = [self.halo, self.edge_index, self.x, self.y, self.train, *self.edges.values()]
        return sum(tensor.nbytes for tensor in own) + 32 * self.edge_index.size(1)

    @cached_property
    def n_id(self) -> Tensor:
        """Its nodes and its halo, by number."""
        return torch.cat([torch.arange(self.start, self.stop, device="cpu"), self.halo])


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


def _bits_of(part: Part) -> list[Any]:
    values = [getattr(part, field.name) for field in fields(part)]
    values = [*values, *part.edges.keys(), *part.edges.values()] if isinstance(part.edges, dict) else values
    return [
        (tuple(value.shape), str(value.dtype), bits_of(value)) if isinstance(value, Tensor) else value
        for value in values
        if not isinstance(value, dict)
    ]


class Parts:
    """All parts of a graph.

    Args:
        data: a graph in the order of its parts, with ``adj_t``, ``x``, ``y`` and ``train_mask``.
        ptr: [P + 1]: part p has the nodes from ``ptr[p]`` to ``ptr[p + 1]``.
        inputs: names of what blocks need of each edge.
        further: see :class:`Part`.
        folder: where each part has a file; ``None``: in memory.
        memory: bytes that parts may take of those that stay in memory beside their files: the first ones, since in each
            pass all come in turn.
    """

    def __init__(
        self, data: Any, ptr: Tensor, inputs: tuple[str, ...], further: bool, folder: Path | None, memory: int
    ) -> None:
        self._folder = folder
        self._kept: list[Part] = []
        self._written: list[Any] = []
        bounds = ptr.tolist()
        self.bounds = [(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]
        rowptr, col = data.adj_t.crow_indices().long().cpu(), data.adj_t.col_indices().long().cpu()
        edges = {name: (data.adj_t.values() if name == "edge_weight" else data[name]).cpu() for name in inputs}
        place = torch.full((rowptr.numel() - 1,), -1, dtype=torch.int64)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        for number, (start, stop) in enumerate(self.bounds):
            halo, edge_index, found = cut(rowptr, col, edges, torch.arange(start, stop), further, place)
            train = data.train_mask[start:stop].nonzero().view(-1).cpu()
            y = data.y[start:stop].cpu()[train]
            part = Part(number, start, stop, halo, edge_index, found, further, data.x[start:stop].cpu(), y, train)
            if folder is not None:
                part = replace(part, x=part.x.clone())  # of a view, all would be written
                torch.save({field.name: getattr(part, field.name) for field in fields(part)}, self._file(number))
                self._written.append(_bits_of(part))
            memory -= part.nbytes
            if folder is None or (memory >= 0 and len(self._kept) == number):
                self._kept.append(part)

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, number: int) -> Part:
        if number < len(self._kept):
            return self._kept[number]
        if number >= len(self):
            raise IndexError(f"there are {len(self)} parts (got number {number})")
        path = self._file(number)
        found = unpacked(path, path)
        names = {field.name for field in fields(Part)}
        part = Part(**found) if isinstance(found, dict) and set(found) == names else None
        if part is None or _bits_of(part) != self._written[number]:
            raise HistoryFileError(
                f"{path}: expected part {number} as it was written (got something else: the file was changed); make "
                "another WholeGraph on this folder"
            )
        return part

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number}.part"
