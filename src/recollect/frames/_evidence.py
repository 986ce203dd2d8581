"""What is kept of the tensors that autograd saves in a region, to compare with what a rebuild hands out for them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recollect._arguments import Certify
from recollect._torch import sequence
from recollect.frames._certificate import (
    GROSS,
    Certificate,
    Figures,
    Meta,
    acceptance,
    differs,
    judge,
    show,
    tolerance_of,
)
from recollect.frames._errors import RebuildError, naming
from recollect.frames._fingerprint import (
    Fingerprint,
    difference,
    difference_of_few,
    few_bytes_of,
    fingerprint,
    is_late,
    norm_of,
)
from recollect.frames._given import Given, Part
from recollect.frames._modes import aside, local
from recollect.frames._recorder import Noted, Recorder
from recollect.frames._region import Region
from recollect.frames._watch import place_of, version_of
from recollect.frames.sources._source import Held

__all__ = ["Evidence"]

Mark = Fingerprint | Part | bytes | None
_SMALL = 4096  # elements; to look whether so few were read costs as much as to read them


class _Memory:
    """Which memory a tensor has, and which version of its contents."""

    __slots__ = ("_storage", "place")

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storage = weakref.ref(storage)
        self.place = (
            storage._cdata, version_of(tensor), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride(),
        )  # fmt: skip

    @classmethod
    def of(cls, tensor: Tensor) -> _Memory | None:
        """Return that of a plain tensor; of others nothing is known."""
        return cls(tensor) if type(tensor) is Tensor and tensor.layout is torch.strided else None

    def is_same(self, later: _Memory) -> bool:
        """Whether a tensor that is looked at later has the same contents."""
        return self.place == later.place and self._storage() is later._storage() is not None


class Evidence:
    """Forms and marks of what autograd saves in a region's first run.

    Args:
        region: whose it is.
        held: brings the region's arguments back.
        certify: what is accepted of a rebuild.
        certificate: where it is counted.

    Attributes:
        metas: shape, dtype and device of each saved tensor.
        marks: what each is compared by; ``None``: it is not, or not held by anything.
    """

    __slots__ = (
        "_certificate", "_certify", "_drifts", "_expected", "_given", "_held", "_largest", "_read", "_region",
        "_unmarked", "marks", "metas",
    )  # fmt: skip

    def __init__(self, region: Region, held: Held, certify: Certify, certificate: Certificate) -> None:
        self._region = region
        self._held = held
        self._certify = certify
        self._certificate = certificate
        self._drifts = held.drifts
        self.metas: list[Meta] = []
        self.marks: list[Mark] = []
        self._given: Given | None = None  # the arguments' tensors, while the forward runs
        self._unmarked: list[tuple[int, Tensor, int]] = []  # saved by the running operation
        # What was read in this run, with the error found: autograd may save a tensor for several operations.
        self._read: dict[tuple[Any, ...], tuple[_Memory, Fingerprint | None, float]] = {}
        self._expected: Fingerprint | None = None  # of the first argument, if its source compares it
        self._largest: float | None = None  # norm of what autograd saved, when somebody has asked for it

    @property
    def figures(self) -> Figures:
        """Where it is counted."""
        return self._certificate.figures

    @property
    def given(self) -> Given | None:
        """The arguments' tensors, while the first run lasts, if they are compared."""
        return self._given

    # The first run.

    def begin(self, given: list[Tensor]) -> None:
        """Take notice of the tensors among the arguments."""
        if self._certify and not self._drifts:
            self._given = Given(given)

    def take(self, index: int, tensor: Tensor, recorder: Recorder | Noted | None) -> None:
        """Take what a saved tensor will be compared by.

        Args:
            index: of the tensor, among those that the region saves.
            tensor: it.
            recorder: of the run.
        """
        if not self._certify:
            return
        if self._unmarked and self._unmarked[-1][2] != sequence():
            self._take_waiting(recorder)
        part = None if self._given is None else self._given.part_of(tensor)
        if part is not None:  # it comes back with the arguments
            self.marks[index] = part
        elif tensor.requires_grad or local.keeping:
            self._mark(index, tensor)
        else:  # operations may fill what they save (the noise of rrelu)
            self._unmarked.append((index, tensor, sequence()))

    def end(self, recorder: Recorder | Noted | None) -> None:
        """Take the rest, when the region has run."""
        if self._unmarked:
            self._take_waiting(recorder)

    def clear(self) -> None:
        """Let go of what belongs to a run."""
        self._given = None
        self._unmarked.clear()
        self._read.clear()

    def _take_waiting(self, recorder: Recorder | Noted | None) -> None:
        filled = recorder.unsettled if recorder is not None else ()
        for index, tensor, _ in self._unmarked:
            # Noise that an operation fills, or in evaluation leaves as it was, has no mark.
            if not filled or filled.isdisjoint(place_of(tensor)):
                self._mark(index, tensor)
        self._unmarked.clear()

    def _mark(self, index: int, tensor: Tensor) -> None:
        if not self._drifts and (few := few_bytes_of(tensor)) is not None:
            self.marks[index] = few
            return
        with aside():
            if not self._drifts and tensor.numel() <= _SMALL:
                self.marks[index] = fingerprint(tensor, exact=self._certify == "exact", apart=True)
                return
            memory = _Memory.of(tensor)
            known = self._known(memory)
            if known is not None:
                self.marks[index] = known[0]
                return
            mark = fingerprint(tensor, exact=self._certify == "exact", sample=self._drifts, apart=not self._drifts)
            self._note(memory, mark)
            self.marks[index] = mark

    def expect(self, tensor: Tensor, mark: Fingerprint | None) -> None:
        """Take notice of the fingerprint of a sample of the region's first argument, which it is about to get.

        What comes back in its place is for the source to judge: it is compared here where bits have to be equal.
        """
        self._note(_Memory.of(tensor), mark)
        if self._certify != "exact":
            self._expected = mark

    def _known(self, memory: _Memory | None) -> tuple[Fingerprint | None, float] | None:
        """Return the mark of what was read already, and its error."""
        if memory is None or (known := self._read.get(memory.place)) is None or not known[0].is_same(memory):
            return None
        return known[1:]

    def _note(self, memory: _Memory | None, mark: Fingerprint | None, error: float = 0.0) -> None:
        if memory is not None:
            self._read[memory.place] = (memory, mark, error)

    # A rebuild.

    def begin_again(self, first: Tensor | None) -> None:
        """Let the region begin to run once more.

        Args:
            first: its first argument; ``None`` within its first run, for a gradient that is taken there.
        """
        self._read.clear()
        if self._expected is not None and first is not None:
            self._note(_Memory.of(first), self._expected)

    def compare(self, index: int, tensor: Tensor, given: Given | None = None) -> float:
        """Compare what is handed out with what autograd saved; return the relative error.

        Args:
            index: of the tensor, among those that the region saves.
            tensor: what is handed out.
            given: the tensors among the arguments.

        Raises:
            RebuildError: it has other values.
        """
        then = self.marks[index]
        if isinstance(then, Part):  # of the arguments, and not at its place in them
            then = None if given is None else self._mark_of(then, index, given)
        if then is None:
            return 0.0
        if isinstance(then, bytes):
            error = self._error_of_few(then, tensor)
        else:
            with aside():
                if is_late(then):
                    self._compare_late(index, then, tensor)
                    return 0.0
                error = self._error_of(then, tensor)
            if self._held.drifts:  # for the source to judge
                if error <= tolerance_of(tensor.dtype):
                    return error
                # What is next to nothing beside the rest may be mere rounding, and of flags and indices some may turn.
                counts = (tensor.is_floating_point() or error > GROSS) and self._is_large(then)
                return error if counts else 0.0
        if error > 0.0:
            self._acceptance(index)(error)
        else:
            self.figures.note(error)
        return error

    def end_again(self) -> None:
        """Let go of what belongs to a rebuild."""
        self._read.clear()

    def _mark_of(self, part: Part, index: int, given: Given) -> Fingerprint | None:
        """Return the fingerprint of what a part of the arguments holds."""
        with aside():
            value = given.value_of(part, *self.metas[index][:2])
            if value is None:
                raise self.differs("its arguments came back in another number or form")
            return fingerprint(value, exact=self._certify == "exact", apart=True)

    def _error_of_few(self, then: bytes, tensor: Tensor) -> float:
        with aside():
            return difference_of_few(then, tensor, exact=self._certify == "exact")

    def _error_of(self, then: Fingerprint, tensor: Tensor) -> float:
        exact, drifts = self._certify == "exact", self._drifts
        if not drifts and tensor.numel() <= _SMALL:
            return difference(then, tensor, exact=exact, apart=True)
        memory = _Memory.of(tensor)
        known = self._known(memory)
        if known is not None and known[0] is then:
            return known[1]
        error = difference(then, tensor, exact=exact, sample=drifts, apart=not drifts)
        self._note(memory, then, error)
        return error

    def _compare_late(self, index: int, then: Fingerprint, tensor: Tensor) -> None:
        """Compare on a device that is not waited for; of what drifts, the source compares what blocks return alone."""
        if not self._held.drifts:
            now = fingerprint(tensor, exact=self._certify == "exact", sample=self._drifts, like=then)
            accept = self._acceptance(index)  # does not hold the frame, or what it keeps would live until then
            judge([(then, now)], lambda errors: accept(errors[0]))

    def _acceptance(self, index: int) -> Callable[[float], None]:
        """Return what judges a relative error of a saved tensor."""
        meta = self.metas[index]
        return acceptance(
            naming(self._region.function),
            f"saved tensor {index}, {show(meta)},",
            max(tolerance_of(meta[1]), self._region.tolerance),
            self._certify,
            self.figures,
        )

    def _is_large(self, mark: Fingerprint) -> bool:
        """Whether a saved tensor's values are at all large, beside those of the others."""
        norm = norm_of(mark)
        if norm == math.inf:
            return True
        if self._largest is None:
            norms = [norm_of(mark) for mark in self.marks if not isinstance(mark, (bytes, Part))]
            self._largest = max(one for one in norms if one != math.inf)
        return norm >= 1e-2 * self._largest

    def differs(self, what: str) -> RebuildError:
        """Return the error of a region that is not what it was."""
        return differs(self._region.name, what)
