"""One more run of a region, for what autograd saved in it: found, compared with the first run, and kept for a while."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from recollect._torch import is_traceable_wrapper_subclass, sequence, shape_of
from recollect.frames._certificate import show
from recollect.frames._errors import RebuildError
from recollect.frames._evidence import Evidence
from recollect.frames._fingerprint import few_bytes_of
from recollect.frames._given import Given, Part
from recollect.frames._modes import local
from recollect.frames._watch import attributes_of, version_of

__all__ = ["Collecting", "Leaves", "Rebuild"]


class _Emptied:
    """What the graph of a rebuild holds of a saved tensor: nothing, once the rebuild is over."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


def _unpack(packed: _Emptied) -> Tensor:
    if packed.tensor is None:
        raise RebuildError(
            "backward through something that a rebuild left behind (a loss or feature that the region stored while "
            "backward ran): use the one of the forward pass, and store it only if not recollect.in_backward()"
        )
    return packed.tensor


class _Complete(BaseException):
    """Ends a rebuild in which everything that is needed has been found."""


class Rebuild:
    """Finds the saved tensors of a region that runs again within :class:`Collecting`.

    Args:
        evidence: of the first run.
        needed: which tensors backward still needs.
        last: the run may end with this one; -1: it goes on to the end.
        ends_by_itself: nothing comes after the last one that takes longer than to end the run.
        given: the tensors among the arguments.
        spoiled: the tensors that the region changed in place in its first run after they were saved.

    Attributes:
        found: the tensors that are needed, without history.
        count: how many tensors were saved so far.
        error: the largest relative error of them, of what drifts.
        changed: one that the region has changed in place after it was saved.
    """

    __slots__ = (
        "_ends_by_itself", "_evidence", "_filling", "_final", "_given", "_graph", "_last", "_needed", "_spoiled",
        "_versions", "_waiting", "changed", "count", "error", "found",
    )  # fmt: skip

    def __init__(
        self,
        evidence: Evidence,
        needed: set[int],
        last: int,
        ends_by_itself: bool,
        given: Given | None,
        spoiled: Container[int],
    ) -> None:
        self._evidence = evidence
        self._needed = needed
        self._last = last
        self._ends_by_itself = ends_by_itself
        self._given = given
        self.found: dict[int, Tensor] = {}
        self.count = 0
        self.error = 0.0
        self.changed: Tensor | None = None
        self._spoiled = spoiled
        self._versions: dict[int, int] = {}
        self._graph: list[weakref.ref[_Emptied]] = []
        self._waiting: list[tuple[int, Tensor, int]] = []  # saved by the running operation, which may fill them later
        self._filling = self._final = -1  # operations: that fills what it saved; that saved the last that is needed

    def collect(self, tensor: Tensor) -> _Emptied:
        """Take notice of the next tensor that autograd saves.

        Raises:
            RebuildError: it is another one than in the first run.
        """
        if self._final >= 0 and self._final != sequence():
            raise _Complete
        count, evidence = self.count, self._evidence
        held = tensor  # until the rebuild is over
        if count < len(evidence.metas):
            meta = (shape_of(tensor), tensor.dtype, tensor.device)
            if meta != evidence.metas[count]:
                then = evidence.metas[count]
                raise evidence.differs(f"saved tensor {count} is {show(meta)}, and was {show(then)}")
            if count in self._needed:
                held = self._find(count, tensor)
        kept = _Emptied(held)
        self._graph.append(weakref.ref(kept))
        self.count = count = count + 1
        if count == self._last + 1 and not self._ends_by_itself:
            if self._filling != sequence():
                raise _Complete
            self._final = self._filling  # it fills the noise of rrelu after it has saved it
        return kept

    def _find(self, index: int, tensor: Tensor) -> Tensor:
        bare = _bare(tensor)
        if self._waiting and self._waiting[-1][2] != sequence():
            self._compare_waiting()
        at_once = tensor.requires_grad or local.keeping > 0
        evidence, given = self._evidence, self._given
        mark = evidence.marks[index]
        if type(mark) is Part:
            if given is None or not given.is_at(mark, tensor):
                self._compare(index, bare)
        elif mark is None:
            pass
        elif at_once and type(mark) is bytes and few_bytes_of(bare) == mark:  # what comes most often
            evidence.figures.note(0.0)
        elif at_once:
            self._compare(index, bare)
        else:
            self._waiting.append((index, bare, sequence()))
        self.found[index] = bare
        self._versions[index] = version_of(bare)
        if not at_once:
            self._filling = sequence()
        return bare

    def _compare(self, index: int, tensor: Tensor) -> None:
        error = self._evidence.compare(index, tensor, self._given)
        if error > self.error:
            self.error = error

    def _compare_waiting(self) -> None:
        for index, tensor, _ in self._waiting:
            self._compare(index, tensor)
        self._waiting.clear()

    @property
    def is_complete(self) -> bool:
        """Whether an exception has ended the run because all was found.

        What passes through an interpreter (TorchScript's) comes out as another one, so that the kind does not tell.
        """
        return 0 < self._last + 1 <= self.count and not self._ends_by_itself

    def empty(self) -> None:
        """Take from the run's graph what it holds; to be called when the run is over, however it ended."""
        for reference in self._graph:
            kept = reference()
            if kept is not None:
                kept.tensor = None

    def look(self) -> None:
        """Find what was changed, before what was written to gets its old version back with its old contents."""
        for index, bare in self.found.items():
            if version_of(bare) != self._versions[index] or index in self._spoiled:
                self.changed = bare

    def end(self) -> None:
        """Compare the rest."""
        if self._waiting:
            self._compare_waiting()
        self._evidence.end_again()


class Collecting(saved_tensors_hooks):
    """Lets a rebuild take notice of what autograd saves in the body."""

    def __init__(self, rebuild: Rebuild) -> None:
        super().__init__(rebuild.collect, _unpack)
        self._rebuild = rebuild

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._rebuild.look()


def _bare(tensor: Tensor) -> Tensor:
    """Return a tensor without history; one that has none stays the object that it is: some cache by identity."""
    if not tensor.requires_grad:
        return tensor
    bare = tensor.detach()
    attributes = attributes_of(tensor)
    if attributes:
        bare.__dict__.update(attributes)
    return bare


class Leaves:
    """The leaves that a rebuild begins with, and that can be emptied behind it.

    Args:
        arguments: the tensors among the region's arguments.
    """

    __slots__ = ("_leaves",)

    def __init__(self, arguments: list[Tensor]) -> None:
        self._leaves = [
            weakref.ref(tensor)
            for tensor in arguments
            if type(tensor) is Tensor and tensor.requires_grad and tensor.is_leaf and not tensor.is_nested
        ]

    def empty(self, saved: Iterable[Tensor]) -> None:
        """Take the memory of the leaves that are still there: a graph that the region has left behind holds them.

        Not of one that is within what autograd ``saved``: a nested tensor holds the tensor of its values itself.
        """
        for leaf in self._leaves:
            tensor = leaf()
            if tensor is None or any(part is tensor for each in saved for part in _parts_of(each)):
                continue
            if tensor.layout is torch.strided and tensor.device.type != "meta":
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _parts_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a subclass wraps."""
    if type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):
                yield part
                yield from _parts_of(part)
