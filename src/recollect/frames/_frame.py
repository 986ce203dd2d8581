"""A region of the forward pass whose saved tensors are dropped and rebuilt when backward asks for them."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from recollect._arguments import Certify
from recollect._storages import is_kept, moment
from recollect._torch import (
    enabled_overrides,
    graph_task_id,
    is_traceable_wrapper_subclass,
    node_sequence,
    overrides_are_enabled,
    sequence,
    shape_of,
)
from recollect._util._tree import tensors_among, tensors_of
from recollect._verdicts import look, outstanding
from recollect.frames._certificate import (
    GROSS,
    Certificate,
    Meta,
    acceptance,
    certificate_of_process,
    differs,
    judge,
    show,
    tolerance_of,
)  # fmt: skip
from recollect.frames._errors import FrameError, GraphFreedError, InPlaceError, RebuildError, describe, naming
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
from recollect.frames._modes import Scope, aside, enclosing, local
from recollect.frames._record import Changed
from recollect.frames._recorder import Noted, Recorder
from recollect.frames._region import Region
from recollect.frames._watch import attributes_of, place_of, version_of
from recollect.frames.sources._source import Arguments, Held, Source, hand_on

__all__ = ["Frame", "run_frame"]


class _Token:
    """What autograd holds instead of a saved tensor."""

    __slots__ = ("__weakref__", "frame", "index")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame = frame
        self.index = index


_Mark = Fingerprint | Part | bytes | None
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


class _Lasting:
    """A parameter or buffer that autograd saves: it lives on anyway, so it is held and not rebuilt."""

    __slots__ = ("region", "tensor", "version")

    def __init__(self, region: Region, tensor: Tensor) -> None:
        self.region = region
        self.tensor = tensor
        self.version = version_of(tensor)


class _Emptied:
    """What the graph of a rebuild holds of a saved tensor: nothing, once the rebuild is over."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class _Before:
    """The nodes before a region, held by a node that the region made, to let go of them one after the other.

    A node that Python has seen is freed by a call within the call that frees the node after it: a chain of some
    thousands would overflow the stack.
    """

    __slots__ = ("_nodes", "passes")

    def __init__(self, nodes: list[Any]) -> None:
        self._nodes = nodes
        self.passes: dict[int, bool] = {}  # the backward pass that is running, and whether the region could be rebuilt

    def __del__(self) -> None:
        waiting = local.freed
        waiting.extend(self._nodes)
        if not local.freeing:
            local.freeing = True
            try:
                self._nodes.clear()
                while waiting:
                    waiting.pop()
            finally:
                local.freeing = False


class _Complete(BaseException):
    """Ends a rebuild in which everything that is needed has been found."""


def _unpack(packed: _Token | _Lasting) -> Tensor:
    for recorder in local.recorders:  # of regions that are running
        recorder.note_gradients()
    if isinstance(packed, _Token):
        return packed.frame.saved(packed.index)
    tensor = packed.tensor
    if version_of(tensor) != packed.version:
        kind = "parameter" if tensor.requires_grad else "buffer or attribute"
        raise InPlaceError(
            f"{packed.region.name}: a {kind} of shape {list(tensor.shape)} was changed in place between the "
            f"forward pass (version {packed.version}) and backward (version {version_of(tensor)}), most often "
            "by an optimizer step; call backward before the step, or run the forward pass again"
        )
    return tensor


def _unpack_rebuilt(packed: _Emptied) -> Tensor:
    if packed.tensor is None:
        raise RebuildError(
            "backward through something that a rebuild left behind (a loss or feature that the region stored while "
            "backward ran): use the one of the forward pass, and store it only if not recollect.in_backward()"
        )
    return packed.tensor


def _bare(tensor: Tensor) -> Tensor:
    """Return a tensor without history; one that has none stays the object that it is: some cache by identity."""
    if not tensor.requires_grad:
        return tensor
    bare = tensor.detach()
    attributes = attributes_of(tensor)
    if attributes:
        bare.__dict__.update(attributes)
    return bare


class Frame(Scope):
    """One region: run once by :meth:`run`, and again whenever autograd asks for something that it saved there.

    Args:
        region: what is run.
        held: brings the region's arguments back.
        certify: what is accepted of a rebuild.
        certificate: where it is counted.
        early_stop: whether a rebuild may end before the region does.
    """

    __slots__ = (
        "_begun", "_certificate", "_certify", "_changes", "_drifts", "_early_stop", "_expected", "_given", "_held",
        "_largest", "_live", "_lock", "_marks", "_metas", "_parent", "_read", "_rebuilt", "_recorder", "_region",
        "_saved", "_spoiled", "_tokens", "_unmarked",
    )  # fmt: skip

    def __init__(
        self,
        region: Region,
        held: Held,
        *,
        certify: Certify = True,
        certificate: Certificate | None = None,
        early_stop: bool = True,
    ) -> None:
        super().__init__()
        self._region = region
        self._held = held
        self._lock = held.lock if held.lock is not None else threading.RLock()
        self._certify = certify
        self._certificate = certificate if certificate is not None else certificate_of_process
        self._drifts = held.drifts
        self._early_stop = early_stop and not held.whole
        self._parent = enclosing()
        self._begun: int = self._parent._begun if isinstance(self._parent, Frame) else moment()
        self._metas: list[Meta] = []
        self._marks: list[_Mark] = []
        self._tokens: list[weakref.ref[_Token] | None] = []  # None: what lasts, and is never rebuilt
        # What autograd saved, while it lives, its version, and its token.
        self._saved: list[tuple[weakref.ref[Tensor], int, int]] = []
        self._unmarked: list[tuple[int, Tensor, int]] = []  # saved by the running operation
        # What was read in this run, with the error found: autograd may save a tensor for several operations.
        self._read: dict[tuple[Any, ...], tuple[_Memory, Fingerprint | None, float]] = {}
        self._expected: Fingerprint | None = None  # of the first argument, if its source compares it
        self._largest: float | None = None  # norm of what autograd saved, when somebody has asked for it
        self._changes: torch.Size | None = None  # of an argument that the region itself has changed in place
        self._spoiled: dict[int, torch.Size] = {}  # saved, and then changed in place by the region itself
        self._rebuilt: dict[int, Tensor] = {}
        self._live: Arguments | None = None  # the arguments, while the forward runs
        self._given: Given | None = None  # the arguments' tensors, while the forward runs
        self._recorder: Recorder | Noted | None = None  # while the forward runs

    def run(self, arguments: Arguments) -> Any:
        """Run the region for the first time, on its arguments, and drop what autograd saves in it."""
        if not local.backward and outstanding():
            look()
        self._live = arguments
        self._held.begins(self._region)
        given = tensors_among(*arguments)
        devices: set[torch.device] = set()  # beside the CPU
        marks = self._certify and not self._drifts
        versions = []
        for tensor in given:
            versions.append(version_of(tensor))
            if not tensor.is_cpu:
                devices.add(tensor.device)
        if marks:
            self._given = Given(given)
        begin = sequence()
        try:
            hooks = saved_tensors_hooks(self._pack, _unpack)
            output = self._region.first(arguments, devices, self, hooks, self._take)
            if self._unmarked:
                self._mark_earlier(end=True)
        finally:
            self._live = self._recorder = self._given = None
            self._unmarked.clear()
            self._read.clear()
        if not self._drifts:
            for tensor, version in zip(given, versions, strict=True):
                if version_of(tensor) != version:
                    self._changes = shape_of(tensor)
                    break
        outputs = _tensors_in(output)
        returned = {id(tensor) for tensor in outputs}
        kept = []
        for one in self._saved:
            reference, version, index = one
            saved = reference()
            if saved is not None:
                if version_of(saved) != version:
                    self._spoiled[index] = shape_of(saved)
                # What the region made is its callers' to change: a rebuild makes it anew.
                if id(saved) not in returned:
                    kept.append(one)
        self._saved = kept
        if self.needed:
            before = _Before([t.grad_fn for t in given if not t.is_leaf])
            for tensor in outputs:
                self._guard(tensor, begin, before)
        del given  # the source may drop them now
        self._held.returned(output)
        if self._held.hands_on:
            hand_on(self, outputs)
        return output

    def _take(self, recorder: Recorder | Noted) -> None:
        self._recorder = recorder

    @property
    def needed(self) -> bool:
        """Whether autograd still holds something that only a rebuild can bring back."""
        for token in self._tokens:  # noqa: SIM110  (any() takes twice as long, and this is asked at each step)
            if token is not None and token() is not None:
                return True
        return False

    def saved(self, index: int) -> Tensor:
        """Return what autograd saved ``index``-th, rebuilding the region if it is not at hand."""
        with self._lock:
            rebuilt = self._rebuilt
            if index not in rebuilt:  # held here: a rebuild in another thread may make this frame forget
                rebuilt, _ = self._rebuild()
            return rebuilt.pop(index)

    def output(self, arrived: list[Tensor] | None) -> list[Tensor]:
        """Run the region again to its end, and return the tensors that it returned, without history.

        What autograd saved is at hand then, until this frame's turn comes in backward.

        Args:
            arrived: what the frame before has returned so.
        """
        with self._lock:
            self._held.arrives(arrived)
            return self._rebuild(whole=True)[1]

    @property
    def held(self) -> Held:
        """What brings the arguments back."""
        return self._held

    @property
    def parent(self) -> Scope:
        """The frame whose region this one's is a part of, or the thread's outermost scope."""
        return self._parent

    def forget(self) -> None:
        """Drop what the last rebuild left over."""
        self._rebuilt = {}

    def _pack(self, tensor: Tensor) -> _Token | _Lasting:
        tokens = self._tokens
        index = len(tokens)
        self._metas.append((shape_of(tensor), tensor.dtype, tensor.device))
        self._marks.append(None)
        # Of a view (a Linear saves its transposed weight), the tensor that it is a view of.
        base = tensor if tensor.is_leaf else tensor._base
        if (
            base is not None
            and base.is_leaf
            and base.requires_grad
            and (local.policy is None or not self._is_released(base))
        ) or self._is_lasting(tensor):
            tokens.append(None)
            return _Lasting(self._region, tensor)
        version = version_of(tensor)
        self._saved.append((weakref.ref(tensor), version, index))
        token = _Token(self, index)
        tokens.append(weakref.ref(token))
        if self._certify:
            if self._unmarked:
                self._mark_earlier()
            part = None if self._given is None else self._given.part_of(tensor)
            if part is not None:  # it comes back with the arguments
                self._marks[index] = part
                return token
            at_once = tensor.requires_grad or local.keeping
            if at_once:
                self._marks[index] = self._mark(tensor)
            else:
                self._unmarked.append((index, tensor, sequence()))
        return token

    def _is_lasting(self, tensor: Tensor) -> bool:
        """Whether a tensor lives on anyway: a buffer, or what was kept when the outermost region began."""
        recorder = self._recorder
        if recorder is not None and recorder.is_lasting(tensor):
            return True
        return self._begun > 0 and is_kept(place_of(tensor), self._begun)

    def _mark_earlier(self, end: bool = False) -> None:
        """Take the fingerprints of constants that were saved before the running operation.

        Not at once: operations may fill what they save (the noise of rrelu).
        """
        unmarked = self._unmarked
        if unmarked and (end or unmarked[-1][2] != sequence()):
            filled = self._recorder.unsettled if self._recorder is not None else ()
            for index, tensor, _ in unmarked:
                if filled and not filled.isdisjoint(place_of(tensor)):
                    continue  # noise that an operation fills, or in evaluation leaves as it was
                self._marks[index] = self._mark(tensor)
            unmarked.clear()

    def _mark(self, tensor: Tensor) -> _Mark:
        if not self._drifts and (few := few_bytes_of(tensor)) is not None:
            return few
        with aside():
            return self._fingerprint(tensor)

    def _fingerprint(self, tensor: Tensor) -> Fingerprint | None:
        if not self._drifts and tensor.numel() <= _SMALL:
            return fingerprint(tensor, exact=self._certify == "exact", apart=True)
        memory = _Memory.of(tensor)
        if (known := self._known(memory)) is not None:
            return known[0]
        mark = fingerprint(tensor, exact=self._certify == "exact", sample=self._drifts, apart=not self._drifts)
        self._note(memory, mark)
        return mark

    def expect(self, tensor: Tensor, mark: Fingerprint | None) -> None:
        """Take notice of the fingerprint of a sample of the region's first argument, which it is about to get.

        What comes back in its place is for the source to judge: it is compared here where bits have to be equal.
        """
        self._note(_Memory.of(tensor), mark)
        if self._certify != "exact":
            self._expected = mark

    def _known(self, memory: _Memory | None) -> tuple[Fingerprint | None, float] | None:
        """Return the fingerprint of what was read already, and its error."""
        if memory is None or (known := self._read.get(memory.place)) is None or not known[0].is_same(memory):
            return None
        return known[1:]

    def _note(self, memory: _Memory | None, mark: Fingerprint | None, error: float = 0.0) -> None:
        if memory is not None:
            self._read[memory.place] = (memory, mark, error)

    def _is_released(self, tensor: Tensor) -> bool:
        """Whether a leaf may lose its values after the forward, so that it cannot be held in place of a rebuild."""
        return self._live is not None and any(tensor is a for a in tensors_of(self._live))

    def _guard(self, output: Tensor, begin: int, before: _Before) -> None:
        """Make a second backward through freed saved tensors an error that names the module.

        Nodes that the region did not make belong to others, who may go backward through them as often as they like.
        """
        node = output.grad_fn
        if node is None or not begin <= node_sequence(node) < sequence():
            return
        # The node must not hold the frame: then the frame's tokens would never be known to be freed.
        reference, function, passes = weakref.ref(self), self._region.function, before.passes
        passed = False

        def refuse_if_freed(_: tuple[Tensor, ...]) -> None:
            nonlocal passed
            task = graph_task_id()
            if task not in passes:  # the first of the outputs that this backward pass comes through
                frame = reference()
                passes.clear()
                passes[task] = frame is not None and frame.needed
            if passed and not passes[task]:
                raise GraphFreedError(
                    f"{describe(function)}: backward through this part of the graph a second time, but its saved "
                    "tensors were freed by the first; pass retain_graph=True to the first backward, or run the "
                    "forward pass again"
                )
            passed = True

        refuse_if_freed.before = before  # type: ignore[attr-defined]
        node.register_prehook(refuse_if_freed)

    def _rebuild(self, whole: bool = False) -> tuple[dict[int, Tensor], list[Tensor]]:
        if not overrides_are_enabled():
            with enabled_overrides():
                return self._rebuild(whole)
        try:
            return self._run_again(whole)
        except RebuildError as error:
            if self._region.watched and not self._region.rewatched and not self._held.whole:
                self._region.rewatched = True  # some operations save other tensors under a dispatch mode
                try:
                    return self._run_again(whole)
                except RebuildError:
                    self._region.rewatched = False
            suspects = self._suspects()
            if not suspects:
                raise
            raise RebuildError(f"{error}. Found: {', '.join(suspects)}") from error

    def _suspects(self) -> list[str]:
        """Find out what differs, after a rebuild that did."""
        if self._live is not None or self._held.whole:
            return []
        try:
            return self._region.suspects(self._held.inputs(), self)
        except FrameError:
            return []

    def _run_again(self, whole: bool) -> tuple[dict[int, Tensor], list[Tensor]]:
        running = self._live
        if running is None and self._changes is not None:
            raise InPlaceError(
                f"{self._region.name}: its input of shape {list(self._changes)} was changed in place by itself, so "
                "that it cannot run again from it; change a copy instead (x = x + 1, not x += 1)"
            )
        arguments = self._inputs() if running is None else running
        needed = {i for i, token in enumerate(self._tokens) if token is not None and token() is not None}
        changed = [] if running is not None else self._held.changed()
        self._check_saved(needed, changed)
        self._parent.now_rebuilds(self, together=self._held.followed)
        # Before the region may change what containers hold.
        given = Given(tensors_among(*arguments)) if running is None else self._given
        leaves = (
            _leaves_among(given.tensors) if given is not None and running is None and self._held.makes_leaves else []
        )
        collected: dict[int, Tensor] = {}
        versions: dict[int, int] = {}
        graph: list[weakref.ref[_Emptied]] = []
        waiting: list[tuple[int, Tensor, int]] = []  # saved by the running operation; see _mark_earlier
        gross, figures = 0.0, self._certificate.figures
        early = (self._early_stop and not whole) or running is not None
        last = max(needed, default=-1) if early else -1
        count = 0
        if running is None:
            self._read.clear()
            if self._expected is not None:
                self._note(_Memory.of(arguments[0][0]), self._expected)
        filling = (
            done
        ) = -1  # numbers of operations: what it saved may be filled later; it saved the last that is needed

        def compare() -> None:
            nonlocal gross
            for index, tensor, _ in waiting:
                gross = max(gross, self._certify_one(index, tensor))
            waiting.clear()

        def collect(tensor: Tensor) -> _Emptied:
            nonlocal count, filling, done, gross
            if done >= 0 and done != sequence():
                raise _Complete
            held = tensor  # until the rebuild is over
            if count < len(self._metas):
                meta = (shape_of(tensor), tensor.dtype, tensor.device)
                if meta != self._metas[count]:
                    raise self._differs(f"saved tensor {count} is {show(meta)}, and was {show(self._metas[count])}")
                if count in needed:
                    held = bare = _bare(tensor)
                    if waiting and waiting[-1][2] != sequence():
                        compare()
                    at_once = tensor.requires_grad or local.keeping > 0
                    mark = self._marks[count]
                    if type(mark) is Part:
                        if given is None or not given.is_at(mark, tensor):
                            gross = max(gross, self._certify_one(count, bare, given))
                    elif mark is None:
                        pass
                    elif at_once and type(mark) is bytes and few_bytes_of(bare) == mark:  # what comes most often
                        figures.note(0.0)
                    elif at_once:
                        error = self._certify_one(count, bare)
                        if error > gross:
                            gross = error
                    else:
                        waiting.append((count, bare, sequence()))
                    collected[count] = bare
                    versions[count] = version_of(bare)
                    if not at_once:
                        filling = sequence()
            kept = _Emptied(held)
            graph.append(weakref.ref(kept))
            count += 1
            if count == last + 1:
                if filling != sequence():
                    raise _Complete
                done = filling  # it fills the noise of rrelu after it has saved it
            return kept

        output, is_whole, returned = None, False, list[Tensor]()
        try:
            output = self._region.again(arguments, self, saved_tensors_hooks(collect, _unpack_rebuilt), changed=changed)
            is_whole = True
            returned = [tensor.detach() for tensor in _tensors_in(output)] if whole else []
        except BaseException as error:
            # What passes through an interpreter (TorchScript's) comes out as another exception.
            if isinstance(error, FrameError) or not 0 < last + 1 <= count:
                if not isinstance(error, FrameError) and hasattr(error, "add_note"):
                    error.add_note(f"This happened while {self._region.name} ran again for backward.")
                raise
        finally:
            for reference in graph:
                kept = reference()
                if kept is not None:
                    kept.tensor = None
        for index, bare in collected.items():
            if version_of(bare) != versions[index] or index in self._spoiled:
                raise InPlaceError(
                    f"{self._region.name}: it changes in place a tensor of shape {list(bare.shape)} that backward "
                    "needs as it was (autograd alone raises too); use the out-of-place form of that operation"
                )
        if waiting:
            compare()
        self._read.clear()
        if is_whole and running is None:
            if count != len(self._metas):
                raise self._differs(f"it saved {count} tensors, and {len(self._metas)} in the forward pass")
            self._held.compared(gross)
            self._held.evaluated(output)
        # else: a gradient taken inside the region itself, the rest of which has not run yet
        del arguments, output
        given = None
        for leaf in leaves:
            _empty(leaf, collected.values())
        self._rebuilt = collected
        return collected, returned

    def _inputs(self) -> Arguments:
        try:
            return self._held.inputs()
        except FrameError as error:
            name = self._region.name
            if name in str(error):
                raise
            raise type(error)(f"{name}: {error}") from error

    def _certify_one(self, index: int, tensor: Tensor, given: Given | None = None) -> float:
        """Compare what is handed out with what autograd saved; return the relative error."""
        then = self._marks[index]
        if isinstance(then, Part):  # of the arguments, and not at its place in them
            then = None if given is None else self._mark_of(then, index, given)
        if then is None:
            return 0.0
        if isinstance(then, bytes):
            error = self._error_of_few(then, tensor)
        else:
            with aside():
                if is_late(then):
                    self._certify_late(index, then, tensor)
                    return 0.0
                error = self._error_of(then, tensor)
        if self._held.drifts and not isinstance(then, bytes):  # for the source to judge
            # What is next to nothing beside the rest may be mere rounding, and of flags and indices some may turn.
            counts = error > 0.0 and (tensor.is_floating_point() or error > GROSS) and self._counts(then)
            return error if counts else 0.0
        if error > 0.0:
            self._acceptance(index)(error)
        else:
            self._certificate.figures.note(error)
        return error

    def _mark_of(self, part: Part, index: int, given: Given) -> Fingerprint | None:
        """Return the fingerprint of what a part of the arguments holds."""
        with aside():
            value = given.value_of(part, *self._metas[index][:2])
            if value is None:
                raise self._differs("its arguments came back in another number or form")
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

    def _certify_late(self, index: int, then: Fingerprint, tensor: Tensor) -> None:
        """Compare on a device that is not waited for; of what drifts, the source compares what blocks return alone."""
        if not self._held.drifts:
            now = fingerprint(tensor, exact=self._certify == "exact", sample=self._drifts, like=then)
            accept = self._acceptance(index)  # does not hold the frame, or what it keeps would live until then
            judge([(then, now)], lambda errors: accept(errors[0]))

    def _acceptance(self, index: int) -> Callable[[float], None]:
        """Return what judges a relative error of a saved tensor."""
        meta = self._metas[index]
        return acceptance(
            naming(self._region.function),
            f"saved tensor {index}, {show(meta)},",
            max(tolerance_of(meta[1]), self._region.tolerance),
            self._certify,
            self._certificate.figures,
        )

    def _counts(self, mark: Fingerprint) -> bool:
        """Whether a saved tensor's values are at all large, beside those of the others."""
        norm = norm_of(mark)
        if norm == math.inf:
            return True
        if self._largest is None:
            norms = [norm_of(mark) for mark in self._marks if not isinstance(mark, (bytes, Part))]
            self._largest = max(one for one in norms if one != math.inf)
        return norm >= 1e-2 * self._largest

    def _check_saved(self, needed: set[int], changed: list[Changed]) -> None:
        """Raise if a tensor that autograd saved, and somebody still holds, was changed since: as autograd does."""
        for reference, version, index in self._saved:
            tensor = reference()
            if index in needed and tensor is not None and version_of(tensor) != version:
                is_input = any(place_of(tensor) == place_of(other) for _, other, _ in changed)
                what = "its input" if is_input else "a tensor that it reads,"
                raise InPlaceError(
                    f"{self._region.name}: {what} of shape {list(tensor.shape)} was changed in place "
                    f"between the forward pass (version {version}) and backward (version {version_of(tensor)}); change "
                    "a copy instead (x = x + 1, not x += 1)"
                )

    def _differs(self, what: str) -> RebuildError:
        return differs(self._region.name, what)


def run_frame(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    source: Source,
    *,
    seed: bool = True,
    certify: Certify = True,
    certificate: Certificate | None = None,
    early_stop: bool = True,
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] | None = None,
) -> Any:
    """Run ``function(*args, **kwargs)`` in a frame whose inputs come from ``source``.

    Args:
        function: any callable; it runs again in backward.
        args: its arguments.
        kwargs: its arguments by name.
        source: what keeps these, and brings them back.
        seed: replay random state.
        certify: what is accepted of a rebuild; see :func:`recollect.checkpoint`.
        certificate: where it is counted; ``None``: in that of the process.
        early_stop: a rebuild ends with the last tensor that autograd saved.
        contexts: entered for the first run, and for the runs in backward.

    Returns:
        What the function returns.

    Example:
        >>> import torch
        >>> from recollect.frames import Kept, run_frame
        >>> x = torch.ones(3, requires_grad=True)
        >>> y = run_frame(torch.exp, (x,), {}, Kept())
        >>> y.sum().backward()
        >>> torch.equal(x.grad, torch.ones(3).exp())
        True
    """
    region = Region(function, seed, contexts, certify, certificate)
    held = source.keep(args, kwargs)
    frame = Frame(region, held, certify=certify, certificate=certificate, early_stop=early_stop)
    return frame.run((args, kwargs))


def _tensors_in(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(tensors_of(output))


def _leaves_among(arguments: list[Tensor]) -> list[weakref.ref[Tensor]]:
    """Return the leaves that a rebuild begins with, and that can be emptied."""
    return [
        weakref.ref(tensor)
        for tensor in arguments
        if type(tensor) is Tensor and tensor.requires_grad and tensor.is_leaf and not tensor.is_nested
    ]


def _empty(leaf: weakref.ref[Tensor], saved: Iterable[Tensor]) -> None:
    """Take the memory of a leaf that is still there: a graph that the region has left behind holds it.

    Not of one that is within what autograd ``saved``: a nested tensor holds the tensor of its values itself.
    """
    tensor = leaf()
    if tensor is None or any(part is tensor for each in saved for part in _parts_of(each)):
        return
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


def devices_of(arguments: Any) -> set[torch.device]:
    """Return the devices of all tensors among the arguments.

    Args:
        arguments: any container, nested.

    Example:
        >>> import torch
        >>> from recollect.frames import devices_of
        >>> devices_of({"x": torch.ones(3), "more": [torch.ones(2, device="meta")]}) == {
        ...     torch.device("cpu"),
        ...     torch.device("meta"),
        ... }
        True
    """
    return {tensor.device for tensor in tensors_of(arguments)}
