"""Offloaded tensors in files."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect._transfer import sent
from recollect.frames._errors import FrameError
from recollect.frames.sources._stores import Extent, Fetch, Store, Stored

__all__ = ["FileStore", "OffloadError", "file_store"]

_ALIGNMENT = 64


class OffloadError(FrameError):
    """A file of offloaded tensors could not be written, or not be read back.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from recollect.frames import Offload, OffloadError
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     held = Offload(path=folder).keep((torch.randn(100),), {})
        ...     _ = held.inputs()  # all is written
        ...     for file in pathlib.Path(folder).rglob("*.frame"):
        ...         file.unlink()
        ...     try:
        ...         held.inputs()
        ...     except OffloadError as error:
        ...         print("cannot be read back" in str(error))
        True
    """


class _File:
    """The file of one call; it is deleted when this dies, and at the latest when the process ends."""

    __slots__ = ("__weakref__", "folder", "path", "written")

    def __init__(self, folder: _Folder, path: Path) -> None:
        self.folder = folder
        self.path = path
        self.written: Future[str | None]  # what went wrong
        weakref.finalize(self, _delete, str(path), os.getpid())


def _wrong(path: Path, what: str, error: OSError) -> str:
    return (
        f"{path}: the inputs of a frame that are offloaded here cannot be {what} ({error.strerror or error}); make "
        "sure that there is room on the disk, and that nobody else cleans up the folder, or name another one as "
        "Offload(path=...)"
    )


def _delete(path: str, process: int) -> None:
    if os.getpid() == process:  # a forked child leaves its parent's files alone
        with suppress(OSError):  # that somebody else did it is an error only for who reads it
            os.unlink(path)


class _Folder:
    """A folder of this process within the user's, locked as long as the process lives.

    What a killed process left behind is removed when the next one begins.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        made = Path(tempfile.mkdtemp(prefix=".recollect-", dir=parent))
        lock = os.open(made / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        _lock(lock)
        self.path = made.rename(parent / made.name.removeprefix("."))  # only now others may find it
        self._count = 0
        weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def next(self) -> Path:
        """Return the path of a new file."""
        self._count += 1
        return self.path / f"{self._count}.frame"


def _remove(path: Path, lock: int, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _lock(descriptor: int) -> bool:
    """Lock a file for this process and its children; ``False`` where another one has, or there are no locks."""
    try:
        import fcntl  # there is none on Windows

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _sweep(parent: Path) -> None:
    for left in parent.glob("recollect-*/lock"):
        try:
            descriptor = os.open(left, os.O_RDWR)
        except OSError:
            continue
        try:
            if _lock(descriptor):
                shutil.rmtree(left.parent, ignore_errors=True)
        finally:
            os.close(descriptor)


class FileStore(Store):
    """Files in a folder, one for each call. One thread writes and reads them beside the computation.

    One call's tensors at a time are on their way to the disk, as a copy: the tensors themselves may be changed at once.

    Args:
        parent: where the folder is made.
    """

    def __init__(self, parent: Path) -> None:
        super().__init__()
        self.process = os.getpid()
        self._folder = _Folder(parent)
        self._writing = threading.RLock()
        self._executor: ThreadPoolExecutor | None = None
        self._latest: tuple[Future[str | None], weakref.ref[_File]] | None = None
        self._last: Future[str | None] | None = None  # what the thread was given last
        _stores.add(self)

    def takes(self, tensor: Tensor) -> bool:
        """See :class:`Store`."""
        return True

    def _put(self, tensors: list[Tensor]) -> list[Stored]:
        extents, places, end = [], [], 0
        for tensor in tensors:
            extents.append(Extent(tensor))
            places.append(end)
            end += -(-extents[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
        with self._writing:
            self._finish_latest()
            staged = torch.empty(end, dtype=torch.uint8, device="cpu")
            for tensor, extent, at in zip(tensors, extents, places, strict=True):
                staged[at : at + extent.nbytes].view(extent.dtype).copy_(extent.flat(tensor))
            path = self._folder.next()
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError as error:
                raise OffloadError(_wrong(path, "written", error)) from error
            file = _File(self._folder, path)
            file.written = self._submit(_write, path, descriptor, [staged])
            self._latest = file.written, weakref.ref(file)
        return [Stored(tensor, extent, (file, at)) for tensor, extent, at in zip(tensors, extents, places, strict=True)]

    def _finish_latest(self) -> None:
        """Wait for the call before; raise if it failed and anybody still needs it."""
        if self._latest is not None:
            written, file = self._latest
            wrong = written.result()
            if wrong is not None and file() is not None:
                raise OffloadError(wrong)

    def fetch(self, stored: Sequence[Stored]) -> Fetch:
        """See :class:`Store`."""
        with torch.inference_mode(False), torch.no_grad():
            flats = [one.extent.empty("cpu") for one in stored]
        wanted = [(flat, *one.place) for flat, one in zip(flats, stored, strict=True)]
        # The thread does not live on in a forked child; what it had to do was done before.
        read = self._submit(_read, wanted) if os.getpid() == self.process else None
        extents = [one.extent for one in stored]

        def wait() -> list[Tensor]:
            wrong = _read(wanted) if read is None else read.result()
            if wrong is not None:
                raise OffloadError(wrong)
            with torch.inference_mode(False), torch.no_grad():
                return [extent.restored(sent(flat, extent.device)) for flat, extent in zip(flats, extents, strict=True)]

        return wait

    def _submit(self, function: Callable[..., str | None], *args: Any) -> Future[str | None]:
        with self.lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="recollect-offload")
            self._last = self._executor.submit(function, *args)
            return self._last

    def pause(self) -> None:
        """Finish what is under way, and let nothing else begin until :meth:`resume`; for the moment of a fork."""
        self._writing.acquire()
        self.lock.acquire()
        if self._last is not None:
            self._last.result()

    def resume(self) -> None:
        """See :meth:`pause`."""
        self.lock.release()
        self._writing.release()


# Not ctypes arrays: each length is a type of its own, which only the garbage collector frees.
_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_view.restype = ctypes.py_object


def _memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, to read and write; they live as long as the tensor does."""
    memory: memoryview = _view(tensor.data_ptr(), tensor.nbytes, 0x200)
    return memory


# Both take their tensors out of a list: the thread holds on to its arguments until after the result is known.


def _write(path: Path, descriptor: int, staging: list[Tensor]) -> str | None:
    try:
        staged = staging.pop()
        left, position = _memory(staged), 0
        while left:
            done = os.pwrite(descriptor, left, position)
            left, position = left[done:], position + done
    except OSError as error:
        os.ftruncate(descriptor, 0)  # half of it is of no use
        return _wrong(path, "written", error)
    finally:
        os.close(descriptor)
    return None


def _read(wanted: list[tuple[Tensor, _File, int]]) -> str | None:
    while wanted:
        flat, file, position = wanted.pop()
        wrong = file.written.result()
        if wrong is not None:
            return wrong
        try:
            descriptor = os.open(file.path, os.O_RDONLY)
            try:
                left = _memory(flat)
                while left:
                    done = os.preadv(descriptor, [left], position)
                    if not done:
                        raise OSError(f"it ends {len(left)} bytes early: it was cut")
                    left, position = left[done:], position + done
            finally:
                os.close(descriptor)
        except OSError as error:
            return _wrong(file.path, "read back", error)
    return None


_stores: weakref.WeakSet[FileStore] = weakref.WeakSet()
_by_path: weakref.WeakValueDictionary[tuple[Path, int], FileStore] = weakref.WeakValueDictionary()
_making = threading.Lock()
_paused: list[FileStore] = []


def file_store(path: Path) -> FileStore:
    """Return this process's store in a folder: one for all sources that name it."""
    with _making:
        key = (path, os.getpid())
        store = _by_path.get(key)
        if store is None:
            store = _by_path[key] = FileStore(path)
        return store


def _before_fork() -> None:
    _making.acquire()
    _paused.extend(store for store in _stores if store.process == os.getpid())
    for store in _paused:
        store.pause()


def _after_fork() -> None:
    while _paused:
        _paused.pop().resume()
    _making.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
