"""The graph, cut into parts with their neighbours: in memory, or a file for each part."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect._util._tree import Tree
from recollect.autoscale.histories import HistoryFileError
from recollect.frames import bits_of
from recollect.messages import Made, made_of, take_made
from recollect.messages.reach import cut
from recollect.outofcore._tables import unpacked

__all__ = ["Part", "Parts"]


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

    @property
    def n_id(self) -> Tensor:
        """Its nodes and its halo, by number."""
        return torch.cat([torch.arange(self.start, self.stop, device="cpu"), self.halo])


def _bits_of(value: Any) -> Any:
    """Return what tells a value from others: its tensors' shapes, types and bits, and all else as it is."""
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype), bits_of(value)
    if isinstance(value, dict):
        return [(key, _bits_of(each)) for key, each in value.items()]
    return [_bits_of(each) for each in value] if isinstance(value, (list, tuple)) else value


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
        nodes: the first node of those whose parts are wanted, and their end; ``None``: all.

    Attributes:
        bounds: the first node of each part of the graph, and the end of its nodes.
        trained: the places of the parts here that have training nodes.
        trained_first: the places of the parts here, those with training nodes before the others.
    """

    def __init__(
        self,
        data: Any,
        ptr: Tensor,
        inputs: tuple[str, ...],
        further: bool,
        folder: Path | None,
        memory: int,
        nodes: tuple[int, int] | None = None,
    ) -> None:
        self._folder = folder
        self._kept: list[Part] = []
        self._files: list[_File] = []
        self._mapped: dict[int, Part] = {}
        self._made: dict[int, _File] = {}
        self._numbers: dict[int, int] = {}
        bounds = ptr.tolist()
        self.bounds = [(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]
        rowptr, col = data.adj_t.crow_indices().long().cpu(), data.adj_t.col_indices().long().cpu()
        edges = {name: (data.adj_t.values() if name == "edge_weight" else data[name]).cpu() for name in inputs}
        place = torch.full((rowptr.numel() - 1,), -1, dtype=torch.int64)
        low, high = (0, bounds[-1]) if nodes is None else nodes
        wanted = [(number, start, stop) for number, (start, stop) in enumerate(self.bounds) if low <= start < high]
        self._number = len(wanted)
        counts = [int(data.train_mask[start:stop].count_nonzero()) for _, start, stop in wanted]
        self.trained = [number for number, count in enumerate(counts) if count]
        self.trained_first = sorted(range(len(counts)), key=lambda number: not counts[number])
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        for number, start, stop in wanted:
            halo, edge_index, found = cut(rowptr, col, edges, torch.arange(start, stop), further, place)
            train = data.train_mask[start:stop].nonzero().view(-1).cpu()
            y = data.y[start:stop].cpu()[train]
            part = Part(number, start, stop, halo, edge_index, found, further, data.x[start:stop].cpu(), y, train)
            if folder is not None or nodes is not None:
                part = replace(part, x=part.x.clone())  # of a view, all would be written, or stay
            if folder is not None:
                self._files.append(_File(self._path(number), number))
                self._files[-1].write({field.name: getattr(part, field.name) for field in fields(part)})
            memory -= part.nbytes
            if folder is None or (memory >= 0 and len(self._kept) == number):
                self._kept.append(part)

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, number: int) -> Part:
        if number < len(self._kept):
            return self._kept[number]
        if number >= len(self):
            raise IndexError(f"there are {len(self)} parts (got number {number})")
        if not self._files[number].is_as_read() or not (number not in self._made or self._made[number].is_as_read()):
            self._mapped[number] = self._read(number)
        return self._mapped[number]

    def _read(self, number: int) -> Part:
        """Map a part's files."""
        found = self._files[number].read()
        names = {field.name for field in fields(Part)}
        part = Part(**found) if isinstance(found, dict) and set(found) == names else None
        if part is None or part.number != number:
            raise self._files[number].changed()
        if number in self._made:
            take_made(part.edge_index, Made(**self._made[number].read()))
        return part

    def leave(self, part: Part) -> None:
        """Take notice that an operation is done with a part: what was mapped of it need not stay in memory.

        What convolutions made of its edges is written down, if they made more than before.
        """
        number = part.number
        if self._folder is None or number < len(self._kept):
            return
        made = made_of(part.edge_index)
        if made is not None and made.number > self._numbers.get(number, 0):
            file = self._made.setdefault(number, _File(self._path(number, "made"), number))
            file.write({field.name: getattr(made, field.name) for field in fields(Made)})
            self._numbers[number] = made.number
            self._mapped[number] = self._read(number)
        for file in (self._files[number], *([self._made[number]] if number in self._made else [])):
            file.give_back()

    def _path(self, number: int, kind: str = "part") -> Path:
        assert self._folder is not None
        return self._folder / f"{number}.{kind}"


_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _File:
    """A file of tensors, which is read by mapping it: what nobody looks at is not read.

    Its bits are compared with what was written when it is first read, and whenever the system says that it changed.

    Args:
        path: of the file.
        number: of its part.
    """

    def __init__(self, path: Path, number: int) -> None:
        self._path, self._number = path, number
        self._bits: Any = None
        self._seen: tuple[int, ...] | None = None
        self._tensors: list[Tensor] = []

    def write(self, value: dict[str, Any]) -> None:
        """Write it; another file takes the place of one that may be mapped."""
        beside = self._path.with_suffix(".new")
        torch.save(value, beside)
        os.replace(beside, self._path)
        self._bits, self._seen = _bits_of(value), None

    def is_as_read(self) -> bool:
        """Return whether the file is that which was read; if it was cut, to touch it would kill the process."""
        return self._seen is not None and self._look() == self._seen

    def read(self) -> Any:
        """Map the file, and return what was written.

        Raises:
            HistoryFileError: it is something else.
        """
        seen = self._look()
        found = None if seen is None else unpacked(self._path, self._path, mmap=True)
        if seen is None or _bits_of(found) != self._bits:
            raise self.changed()
        self._seen, self._tensors = seen, Tree(found).tensors
        return found

    def give_back(self) -> None:
        """Let the system take what was read of the file out of this process's memory."""
        for tensor in self._tensors:
            start = tensor.data_ptr() & -mmap.PAGESIZE
            if tensor.nbytes:
                _LIBC.madvise(start, tensor.data_ptr() + tensor.nbytes - start, mmap.MADV_DONTNEED)

    def _look(self) -> tuple[int, ...] | None:
        try:
            now = os.stat(self._path)
        except OSError:
            return None
        return now.st_mtime_ns, now.st_ctime_ns, now.st_size, now.st_ino

    def changed(self) -> HistoryFileError:
        """Return the error that it is something else."""
        return HistoryFileError(
            f"{self._path}: expected part {self._number} as it was written (got something else: the file was changed); "
            "make another WholeGraph on this folder"
        )
