"""A region of the forward pass whose saved tensors are dropped and rebuilt when backward asks for them."""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from recollect._arguments import pack
from recollect.frames._describe import describe
from recollect.frames._errors import GraphFreedError, InPlaceError, RebuildError
from recollect.frames._modes import Scope, enclosing, local
from recollect.frames._modules import version_of
from recollect.frames._region import Region

__all__ = ["Frame", "Source"]

Meta = tuple[torch.Size, torch.dtype, torch.device]


class Source(Protocol):
    """Where the inputs of frames come from when they are rebuilt.

    A source may serve several frames, which it tells apart by ``index``. Frames hold their source; a source must not
    hold its frames, or the graph could only be freed by the garbage collector.
    """

    def inputs(self, index: int) -> tuple[Any, ...]:
        """Return the region's arguments: tensors without history, with the forward's flags and strides."""

    def evaluated(self, index: int, output: Any) -> None:
        """Take notice of the region's output in a rebuild; an inverse may be made of it."""


class _Token:
    """What autograd holds instead of a saved tensor."""

    __slots__ = ("__weakref__", "frame", "index")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame = frame
        self.index = index


class _Leaf:
    """A parameter that autograd saves: it lives on anyway, so it is held and not rebuilt."""

    __slots__ = ("region", "tensor", "version")

    def __init__(self, region: Region, tensor: Tensor) -> None:
        self.region = region
        self.tensor = tensor
        self.version = version_of(tensor)


def _unpack(packed: _Token | _Leaf) -> Tensor:
    if isinstance(packed, _Token):
        return packed.frame.saved(packed.index)
    if version_of(packed.tensor) != packed.version:
        raise InPlaceError(
            f"{packed.region.name}: a parameter of shape {list(packed.tensor.shape)} was changed in place between the "
            f"forward pass (version {packed.version}) and backward (version {version_of(packed.tensor)}), most often "
            "by an optimizer step; call backward before the step, or run the forward pass again"
        )
    return packed.tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Frame(Scope):
    """One region: run once by :meth:`run`, and again whenever autograd asks for something that it saved there.

    Args:
        region: what is run.
        source: brings the region's arguments back.
        index: which of the source's frames this is.
        lock: held in a rebuild; frames of one source share it.
    """

    __slots__ = ("_index", "_live", "_lock", "_metas", "_parent", "_rebuilt", "_region", "_saved", "_source", "_tokens")

    def __init__(
        self, region: Region, source: Source, index: int = 0, lock: AbstractContextManager[Any] | None = None
    ) -> None:
        super().__init__()
        self._region = region
        self._source = source
        self._index = index
        self._lock = lock if lock is not None else threading.RLock()
        self._parent = enclosing()
        self._metas: list[Meta] = []
        self._tokens: list[weakref.ref[_Token] | None] = []  # None: a leaf, which is never rebuilt
        self._saved: list[tuple[weakref.ref[Tensor], int]] = []  # what autograd saved, while it lives, and its version
        self._rebuilt: dict[int, Tensor] = {}
        self._live: tuple[Any, ...] | None = None  # the arguments, while the forward runs

    def run(self, args: tuple[Any, ...], devices: set[torch.device]) -> Any:
        """Run the region for the first time and drop what autograd saves in it.

        Args:
            args: the region's arguments.
            devices: the devices whose random state and autocast count.
        """
        self._live = args
        try:
            output = self._region.first(args, devices, self, saved_tensors_hooks(self._pack, _unpack))
        finally:
            self._live = None
        outputs = pack(output)
        # What the region made is its callers' to change: a rebuild makes it anew.
        self._saved = [(saved, version) for saved, version in self._saved if not any(saved() is o for o in outputs)]
        for tensor in outputs:
            if isinstance(tensor, Tensor) and not any(tensor is a for a in args):
                self._guard(tensor)
        return output

    @property
    def needed(self) -> bool:
        """Whether autograd still holds something that only a rebuild can bring back."""
        return any(token is not None and token() is not None for token in self._tokens)

    def saved(self, index: int) -> Tensor:
        """Return what autograd saved ``index``-th, rebuilding the region if it is not at hand."""
        with self._lock:
            rebuilt = self._rebuilt
            if index not in rebuilt:
                rebuilt = self._rebuild()  # held here: a rebuild in another thread may make this frame forget
            return rebuilt.pop(index)

    def forget(self) -> None:
        """Drop what the last rebuild left over."""
        self._rebuilt = {}

    def _pack(self, tensor: Tensor) -> _Token | _Leaf:
        self._metas.append((tensor.shape, tensor.dtype, tensor.device))
        if tensor.requires_grad and tensor.is_leaf and not self._is_released(tensor):
            self._tokens.append(None)
            return _Leaf(self._region, tensor)
        self._saved.append((weakref.ref(tensor), version_of(tensor)))
        token = _Token(self, len(self._tokens))
        self._tokens.append(weakref.ref(token))
        return token

    def _is_released(self, tensor: Tensor) -> bool:
        """Whether a leaf may lose its values after the forward, so that it cannot be held in place of a rebuild."""
        return local.eager and self._live is not None and any(tensor is a for a in self._live)

    def _guard(self, output: Tensor) -> None:
        """Make a second backward through freed saved tensors an error that names the module."""
        if output.grad_fn is None or not self.needed:
            return
        # The node must not hold the frame: then the frame's tokens would never be known to be freed.
        reference, function = weakref.ref(self), self._region.function
        passed = False

        def refuse_if_freed(_: tuple[Tensor, ...]) -> None:
            nonlocal passed
            frame = reference()
            if passed and (frame is None or not frame.needed):
                raise GraphFreedError(
                    f"{describe(function)}: backward through this part of the graph a second time, but its saved "
                    "tensors were freed by the first; pass retain_graph=True to the first backward, or run the "
                    "forward pass again"
                )
            passed = True

        output.grad_fn.register_prehook(refuse_if_freed)

    def _rebuild(self) -> dict[int, Tensor]:
        running = self._live
        args = self._source.inputs(self._index) if running is None else running
        self._check_saved()
        self._parent.now_rebuilds(self)
        collected: dict[int, Tensor] = {}
        versions: dict[int, int] = {}
        count = 0

        def collect(tensor: Tensor) -> Tensor:
            nonlocal count
            bare = tensor.detach() if tensor.requires_grad else tensor  # some cache by identity
            if count < len(self._metas):
                meta = (tensor.shape, tensor.dtype, tensor.device)
                if meta != self._metas[count]:
                    raise self._differs(f"saved tensor {count} is {_show(meta)}, and was {_show(self._metas[count])}")
                token = self._tokens[count]
                if token is not None and token() is not None:
                    collected[count] = bare
                    versions[count] = version_of(bare)
            count += 1
            return bare

        output = self._region.again(args, self, saved_tensors_hooks(collect, _same))
        for index, bare in collected.items():
            if version_of(bare) != versions[index]:
                raise InPlaceError(
                    f"{self._region.name}: it changes in place a tensor of shape {list(bare.shape)} that backward "
                    "needs as it was (autograd alone raises too); use the out-of-place form of that operation"
                )
        if running is None:
            if count != len(self._metas):
                raise self._differs(f"it saved {count} tensors, and {len(self._metas)} in the forward pass")
            self._source.evaluated(self._index, output)
        # else: a gradient taken inside the region itself, the rest of which has not run yet
        self._rebuilt = collected
        return collected

    def _check_saved(self) -> None:
        """Raise if a tensor that autograd saved, and somebody still holds, was changed since: as autograd does."""
        for reference, version in self._saved:
            tensor = reference()
            if tensor is not None and version_of(tensor) != version:
                raise InPlaceError(
                    f"{self._region.name}: a tensor of shape {list(tensor.shape)} that it reads was changed in place "
                    f"between the forward pass (version {version}) and backward (version {version_of(tensor)}); change "
                    "a copy instead (x = x + 1, not x += 1)"
                )

    def _differs(self, what: str) -> RebuildError:
        return RebuildError(
            f"{self._region.name}: running it again for backward differs from the forward pass: {what}. It must "
            "compute the same again. Most often it draws random numbers from somewhere other than torch's default "
            "generators, or was called with seed=False, or reads something that was changed in between, or branches "
            "on recollect.in_backward()"
        )


def _show(meta: Meta) -> str:
    shape, dtype, device = meta
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"
