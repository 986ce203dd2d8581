"""A region of the forward pass whose saved tensors are dropped and rebuilt when backward asks for them."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from recollect._arguments import Certify
from recollect._storages import is_kept, moment
from recollect._torch import enabled_overrides, overrides_are_enabled, sequence, shape_of
from recollect._util._tree import tensors_among, tensors_of
from recollect._verdicts import look, outstanding
from recollect.frames._certificate import Certificate, certificate_of_process
from recollect.frames._errors import FrameError, InPlaceError, RebuildError
from recollect.frames._evidence import Evidence
from recollect.frames._fingerprint import Fingerprint
from recollect.frames._given import Given
from recollect.frames._guard import Before, guard
from recollect.frames._modes import Scope, enclosing, local
from recollect.frames._rebuild import Collecting, Leaves, Rebuild
from recollect.frames._record import Changed
from recollect.frames._recorder import Noted, Recorder
from recollect.frames._region import Region
from recollect.frames._watch import place_of, version_of
from recollect.frames.sources._source import Arguments, Held, Source, hand_on

__all__ = ["Frame", "run_frame"]


_FEW = 256  # elements: an operation on so many takes less than an exception that passes through torch


class _Token:
    """What autograd holds instead of a saved tensor."""

    __slots__ = ("__weakref__", "frame", "index")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame = frame
        self.index = index


class _Lasting:
    """A parameter or buffer that autograd saves: it lives on anyway, so it is held and not rebuilt."""

    __slots__ = ("region", "tensor", "version")

    def __init__(self, region: Region, tensor: Tensor) -> None:
        self.region = region
        self.tensor = tensor
        self.version = version_of(tensor)


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
        "_begun", "_changes", "_early_stop", "_evidence", "_final", "_held", "_live", "_lock", "_parent", "_rebuilt",
        "_recorder", "_region", "_saved", "_saving", "_spoiled", "_tokens",
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
        self._evidence = Evidence(region, held, certify, certificate or certificate_of_process)
        self._early_stop = early_stop and not held.whole
        self._parent = enclosing()
        self._begun: int = self._parent._begun if isinstance(self._parent, Frame) else moment()
        self._tokens: list[weakref.ref[_Token] | None] = []  # None: what lasts, and is never rebuilt
        # What autograd saved, while it lives, its version, and its token.
        self._saved: list[tuple[weakref.ref[Tensor], int, int]] = []
        self._saving = -1  # the operation that saved last
        self._final = 0  # the first of what it saved
        self._changes: torch.Size | None = None  # of an argument that the region itself has changed in place
        self._spoiled: dict[int, torch.Size] = {}  # saved, and then changed in place by the region itself
        self._rebuilt: dict[int, Tensor] = {}
        self._live: Arguments | None = None  # the arguments, while the forward runs
        self._recorder: Recorder | Noted | None = None  # while the forward runs

    def run(self, arguments: Arguments) -> Any:
        """Run the region for the first time, on its arguments, and drop what autograd saves in it."""
        if not local.backward and outstanding():
            look()
        self._live = arguments
        self._held.begins(self._region)
        given = tensors_among(*arguments)
        devices: set[torch.device] = set()  # beside the CPU
        versions = []
        for tensor in given:
            versions.append(version_of(tensor))
            if not tensor.is_cpu:
                devices.add(tensor.device)
        evidence = self._evidence
        evidence.begin(given)
        begin = sequence()
        try:
            hooks = saved_tensors_hooks(self._pack, _unpack)
            output = self._region.first(arguments, devices, self, hooks, self._take)
            evidence.end(self._recorder)
        finally:
            self._live = self._recorder = None
            evidence.clear()
        if not self._held.drifts:
            for tensor, version in zip(given, versions, strict=True):
                if version_of(tensor) != version:
                    self._changes = shape_of(tensor)
                    break
        if self._saving != sequence():
            self._final = len(self._tokens)
        outputs = _tensors_in(output)
        returned = {id(tensor) for tensor in outputs}
        kept = []
        for one in self._saved:
            saved_then, version, index = one
            saved = saved_then()
            if saved is not None:
                if version_of(saved) != version:
                    self._spoiled[index] = shape_of(saved)
                # What the region made is its callers' to change: a rebuild makes it anew.
                if id(saved) not in returned:
                    kept.append(one)
        self._saved = kept
        if self.needed:
            before = Before([t.grad_fn for t in given if not t.is_leaf])
            reference = weakref.ref(self)
            for tensor in outputs:
                guard(tensor, begin, before, reference, self._region.function)
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
        tokens, evidence = self._tokens, self._evidence
        index = len(tokens)
        evidence.metas.append((shape_of(tensor), tensor.dtype, tensor.device))
        evidence.marks.append(None)
        operation = sequence()
        if operation != self._saving:
            self._saving = operation
            self._final = index
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
        self._saved.append((weakref.ref(tensor), version_of(tensor), index))
        token = _Token(self, index)
        tokens.append(weakref.ref(token))
        evidence.take(index, tensor, self._recorder)
        return token

    def _is_lasting(self, tensor: Tensor) -> bool:
        """Whether a tensor lives on anyway: a buffer, or what was kept when the outermost region began."""
        recorder = self._recorder
        if recorder is not None and recorder.is_lasting(tensor):
            return True
        return self._begun > 0 and is_kept(place_of(tensor), self._begun)

    def expect(self, tensor: Tensor, mark: Fingerprint | None) -> None:
        """Take notice of the fingerprint of a sample of the region's first argument, which it is about to get."""
        self._evidence.expect(tensor, mark)

    def _is_released(self, tensor: Tensor) -> bool:
        """Whether a leaf may lose its values after the forward, so that it cannot be held in place of a rebuild."""
        return self._live is not None and any(tensor is a for a in tensors_of(self._live))

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
        given = Given(tensors_among(*arguments)) if running is None else self._evidence.given
        leaves = Leaves(given.tensors) if given is not None and running is None and self._held.makes_leaves else None
        last = max(needed, default=-1) if (self._early_stop and not whole) or running is not None else -1
        self._evidence.begin_again(arguments[0][0] if running is None and arguments[0] else None)
        rebuild = Rebuild(self._evidence, needed, last, self._ends_by_itself(last), given, self._spoiled)
        output, is_whole, returned = None, False, list[Tensor]()
        try:
            output = self._region.again(arguments, self, Collecting(rebuild), changed=changed)
            is_whole = True
            returned = [tensor.detach() for tensor in _tensors_in(output)] if whole else []
        except BaseException as error:
            if isinstance(error, FrameError) or not rebuild.is_complete:
                if not isinstance(error, FrameError) and hasattr(error, "add_note"):
                    error.add_note(f"This happened while {self._region.name} ran again for backward.")
                raise
        finally:
            rebuild.empty()
        if rebuild.changed is not None:
            raise InPlaceError(
                f"{self._region.name}: it changes in place a tensor of shape {list(rebuild.changed.shape)} that "
                "backward needs as it was (autograd alone raises too); use the out-of-place form of that operation"
            )
        rebuild.end()
        if is_whole and running is None:
            saved = len(self._tokens)
            if rebuild.count != saved:
                raise self._evidence.differs(f"it saved {rebuild.count} tensors, and {saved} in the forward pass")
            self._held.compared(rebuild.error)
            self._held.evaluated(output)
        # else: a gradient taken inside the region itself, the rest of which has not run yet
        del arguments, output
        given = None
        found = rebuild.found
        if leaves is not None:
            leaves.empty(found.values())
        self._rebuilt = found
        return found, returned

    def _ends_by_itself(self, last: int) -> bool:
        """Whether to run to the region's end takes less than an exception before it.

        That is known where torch's own modules ran, and the last operation saves the last tensor that is needed.
        """
        return 0 <= last >= self._final and self._region.is_plain and math.prod(self._evidence.metas[last][0]) <= _FEW

    def _inputs(self) -> Arguments:
        try:
            return self._held.inputs()
        except FrameError as error:
            name = self._region.name
            if name in str(error):
                raise
            raise type(error)(f"{name}: {error}") from error

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
