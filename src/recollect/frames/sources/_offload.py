"""Inputs that are copied to host memory or to files, and fetched ahead."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recollect._util._tree import Tree
from recollect.frames._modes import local
from recollect.frames.sources._file_store import OffloadError, file_store
from recollect.frames.sources._host_store import host_store
from recollect.frames.sources._kept import KeptTensor
from recollect.frames.sources._source import Arguments, Held, Source
from recollect.frames.sources._stores import Fetch, Store, Stored

__all__ = ["Offload", "OffloadError"]

_LARGE = 1 << 16
"""Bytes from which tensors that are neither floating-point nor complex are offloaded too."""


class Offload(Source):
    """Copies a frame's inputs to host memory, or to a file, and brings them back in backward.

    ``Offload()`` is for networks on an accelerator: inputs are copied to pinned host memory on a stream of their own.
    Tensors that are on the CPU already are kept there by reference, and may not be changed in place before backward.
    ``Offload(path=folder)`` is for what exceeds host memory: the inputs of each call are written to a file.

    In backward the inputs of the frame before are fetched while a frame computes. They come back with the same values
    bit for bit, and with the forward's strides. A tensor that several calls share is stored once.

    Offloaded are tensors in any container among the arguments: those of floating-point and complex types, and others
    from 64 KiB on. By reference stay leaves that require a gradient (such as parameters) and views of them, which live
    on anyway (inside of another frame they are offloaded too), and sparse, quantised and nested tensors and tensor
    subclasses.

    The files lie in a folder of this process within ``path``. One is deleted when the graph that needs it is freed, all
    of them when the process ends; what a killed process left is removed by the next one that uses the same path. One
    call's tensors at a time are on their way to the disk, as a copy in host memory. Give a path on a disk: many
    systems keep ``/tmp`` in memory.

    Args:
        device: where the copies lie: ``"cpu"``, host memory. The default without a path.
        path: a folder for the files; made if there is none. Not together with ``device``.
        pin_memory: whether host memory is pinned; ``None``: where the device has streams. Not together with ``path``.

    Raises:
        ValueError: device and path are both given, the device is not ``"cpu"``, or the path is no folder in which files
            can be written.
        OffloadError: in forward or backward, a file cannot be written (the disk is full) or read back (it was deleted);
            names the file.
        InPlaceError: in backward, when an input that is kept by reference was changed in place.

    Example:
        >>> import tempfile, torch, recollect
        >>> from recollect.frames import Offload
        >>> x = torch.randn(4, requires_grad=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     source, h = Offload(path=folder), x
        ...     for _ in range(3):
        ...         h = recollect.checkpoint(torch.sin, h, source=source)
        ...     h.sum().backward()
        >>> x.grad.shape
        torch.Size([4])
    """

    def __init__(
        self,
        device: str | torch.device | None = None,
        path: str | os.PathLike[str] | None = None,
        *,
        pin_memory: bool | None = None,
    ) -> None:
        if path is not None and (device is not None or pin_memory is not None):
            other = f"device={device!r}" if device is not None else f"pin_memory={pin_memory!r}"
            raise ValueError(
                f"tensors are offloaded to host memory or to files (got {other} and path={os.fspath(path)!r}); leave "
                "out the path or the other"
            )
        self._device = None if path is not None else _host(device)
        self._path = None if path is None else Path(path).absolute()
        self._pin_memory = pin_memory
        self._store = host_store(pin_memory is not False) if self._path is None else self._open(self._path)

    @staticmethod
    def _open(path: Path) -> Store:
        try:
            return file_store(path)
        except OSError as error:
            raise ValueError(
                f"path={str(path)!r}: a folder in which files can be written is expected ({error.strerror})"
            ) from error

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Held:
        """See :class:`~recollect.frames.Source`."""
        if self._path is not None:
            self._store = file_store(self._path)  # another one in a forked child
        return _Call(self, self._store, args, kwargs)

    def __repr__(self) -> str:
        where = f"device={str(self._device)!r}" if self._path is None else f"path={str(self._path)!r}"
        return f"Offload({where})" if self._pin_memory is None else f"Offload({where}, pin_memory={self._pin_memory})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _offload, (self._device, self._path, self._pin_memory)


def _offload(device: torch.device | None, path: Path | None, pin_memory: bool | None) -> Offload:
    return Offload(device, path, pin_memory=pin_memory)


def _host(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is unknown: 'cpu', host memory, is where tensors are offloaded") from error
    if found.type != "cpu":
        raise ValueError(f"device={device!r}: tensors are offloaded to host memory, 'cpu', or to files (path=...)")
    return found


def _goes(tensor: Tensor) -> bool:
    """Whether a copy elsewhere can stand for the tensor, and saves memory."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or not tensor.numel():
        return False
    if tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return False
    base = tensor if tensor._base is None else tensor._base
    # In a rebuild of a surrounding region its inputs are leaves that were none in the forward.
    if local.scope is None and base.requires_grad and base.is_leaf:
        return False
    return tensor.is_floating_point() or tensor.is_complex() or tensor.nbytes >= _LARGE


class _Line:
    """The calls of one thread, in the order of the forward pass."""

    def __init__(self) -> None:
        self.calls: list[weakref.ref[_Call]] = []
        self.ahead: weakref.ref[_Call] | None = None  # the one whose tensors were fetched and not yet used

    def join(self, call: _Call) -> int:
        """Add a call; return its place."""
        while self.calls and self.calls[-1]() is None:
            self.calls.pop()
        self.calls.append(weakref.ref(call))
        return len(self.calls) - 1

    def before(self, place: int) -> _Call | None:
        """Return the call before, if its graph is still there."""
        while place > 0:
            place -= 1
            call = self.calls[place]()
            if call is not None:
                return call
        return None


class _Call(Held):
    """One call's arguments, some of them in a store."""

    __slots__ = ("__weakref__", "_fetch", "_line", "_place", "_source", "_store", "_stored", "_tree")

    def __init__(self, source: Offload, store: Store, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._source = source
        self._store = store
        self._tree = tree = Tree((args, kwargs))
        going = [_goes(tensor) and store.takes(tensor) for tensor in tree.tensors]
        self._stored = store.put([tensor for tensor, goes in zip(tree.tensors, going, strict=True) if goes])
        stored = iter(self._stored)
        # Of each tensor, what brings it back, and whether it requires a gradient.
        tree.tensors = [
            (next(stored) if goes else KeptTensor(tensor), tensor.requires_grad)
            for tensor, goes in zip(tree.tensors, going, strict=True)
        ]
        self._fetch: Fetch | None = None
        line = getattr(store.local, "line", None)
        if line is None:
            line = store.local.line = _Line()
        self._line: _Line = line
        self._place = line.join(self)

    def returned(self, output: Any) -> None:
        """See :class:`~recollect.frames.Held`."""
        self._store.returned(self._stored)

    def inputs(self) -> Arguments:
        """See :class:`~recollect.frames.Held`."""
        with self._store.lock:
            fetch, self._fetch = self._fetch, None
        if fetch is None and self._stored:
            fetch = self._store.fetch(self._stored)
        before = self._line.before(self._place)
        if before is not None:
            before.fetch_ahead()
        fetched = iter(fetch() if fetch is not None else ())
        tensors = []
        for one, requires_grad in self._tree.tensors:
            if isinstance(one, Stored):
                tensors.append(next(fetched).requires_grad_(requires_grad))
            else:
                tensors.append(one.get(None, "input"))
        arguments: Arguments = self._tree.build(tensors)
        return arguments

    def fetch_ahead(self) -> None:
        """Begin to fetch what :meth:`inputs` will return; what was fetched ahead of another call is dropped."""
        with self._store.lock:
            if self._fetch is None and self._stored:
                other = self._line.ahead() if self._line.ahead is not None else None
                if other is not None:
                    other._fetch = None
                self._fetch = self._store.fetch(self._stored)
                self._line.ahead = weakref.ref(self)
