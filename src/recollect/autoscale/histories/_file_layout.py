"""A history's file: made in one go, checked when it is opened, owned by one process at a time."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from recollect.autoscale._stamp import GraphStamp
from recollect.autoscale.histories._codec import codec_for
from recollect.autoscale.histories._table import STAMP, UnderWay

__all__ = [
    "HEADER_BYTES",
    "FileLayout",
    "FileState",
    "HistoryFileError",
    "check_place",
    "close_file",
    "open_file",
    "read_graph",
    "read_state",
    "write_graph",
    "write_state",
]

HEADER_BYTES = 4096
_MAGIC = b"RCLHIST\0"
_VERSION = 1
_FIELDS = struct.Struct("<8sI16sQQ")  # magic, version, dtype, rows, channels
_STATE = struct.Struct("<qqq")  # pushes so far, what is under way, and what stamps are numbers above
_STATE_AT = 64  # their place in the header
_GRAPH = struct.Struct("<QQQ")  # 0 for none, 1 without and 2 with an order; fingerprints of edges and order
_GRAPH_AT = 128


class HistoryFileError(RuntimeError):
    """A file cannot serve this history: name another file, or delete it.

    Example:
        >>> import os, tempfile
        >>> from recollect.autoscale import History, HistoryFileError
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "layer.history")
        ...     history = History(10, 4, path=path)
        ...     del history
        ...     try:
        ...         History(10, 8, path=path)
        ...     except HistoryFileError as error:
        ...         print("8" in str(error))
        True
    """


@dataclass(frozen=True)
class FileLayout:
    """What a file of these rows looks like: header, stamps, and records from the next page on."""

    num_embeddings: int
    embedding_dim: int
    dtype: torch.dtype

    @property
    def header(self) -> bytes:
        """The first bytes of the file."""
        name = str(self.dtype).removeprefix("torch.").encode()
        return _FIELDS.pack(_MAGIC, _VERSION, name, self.num_embeddings, self.embedding_dim)

    @property
    def records_at(self) -> int:
        """Position of the first record."""
        end = HEADER_BYTES + self.num_embeddings * STAMP.itemsize
        return -(-end // HEADER_BYTES) * HEADER_BYTES

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        codec = codec_for(self.dtype, self.embedding_dim)
        return self.records_at + self.num_embeddings * codec.record_width * codec.record_dtype.itemsize


@dataclass(frozen=True)
class FileState:
    """What changes in a header.

    Attributes:
        pushes: so far.
        under_way: what was being written, if anything.
        base: what stamps are numbers above.
    """

    pushes: int
    under_way: UnderWay
    base: int


def read_state(path: Path, descriptor: int) -> FileState:
    """Read what changes in a header.

    Raises:
        HistoryFileError: it cannot be that of any history.
    """
    pushes, under_way, base = _STATE.unpack(os.pread(descriptor, _STATE.size, _STATE_AT))
    if not 0 <= base <= pushes < 2**62 or under_way not in tuple(UnderWay):
        found = f"{pushes} pushes above {base}, and {under_way} under way"
        _refuse(path, "a number of pushes, and 0, 1 or 2 for what is under way, in the header", found)
    return FileState(pushes, UnderWay(under_way), base)


def write_state(descriptor: int, state: FileState) -> None:
    """Write what changes in a header, in one call."""
    os.pwrite(descriptor, _STATE.pack(state.pushes, state.under_way, state.base), _STATE_AT)


def read_graph(descriptor: int, num_nodes: int) -> GraphStamp | None:
    """Read whose nodes the rows are."""
    known, edges, order = _GRAPH.unpack(os.pread(descriptor, _GRAPH.size, _GRAPH_AT))
    return GraphStamp(num_nodes, edges, order if known == 2 else None) if known else None


def write_graph(descriptor: int, graph: GraphStamp | None) -> None:
    """Write whose nodes the rows are."""
    fields = (0, 0, 0) if graph is None else (1 if graph.order is None else 2, graph.edges, graph.order or 0)
    os.pwrite(descriptor, _GRAPH.pack(*fields), _GRAPH_AT)


def check_place(path: Path) -> None:
    """Raise a HistoryFileError if something stands there that is no file and no link to one."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise HistoryFileError(
                f"{path} is a link to {os.readlink(path)}, which is not there; make that, or delete the link"
            ) from None
        return
    if stat.S_ISDIR(mode):
        raise HistoryFileError(f"{path} is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise HistoryFileError(f"{path} is {kind}, but a history needs a file; name another path")


_KINDS = {stat.S_IFIFO: "a fifo", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_file(path: Path, layout: FileLayout) -> int:
    """Open a history's file, or make one of zeros if there is none.

    Returns:
        The descriptor, for reading and writing, locked until `close_file`, or until this process and its children end.

    Raises:
        HistoryFileError: the file is something else, was cut, is in use, or there is no room for it.
        OSError: it cannot be opened or made, for another reason.
    """
    if os.name != "posix":
        raise HistoryFileError(f"{path}: histories in files need a POSIX system (got {os.name!r}); leave path=None")
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        # What stands there may have changed since it was looked at: a fifo is not waited for.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        made = False
    else:
        made = True
    try:
        _lock(path, descriptor)
        _fill(path, descriptor, layout) if made else _check(path, descriptor, layout)
    except BaseException:
        os.close(descriptor)
        if made:
            path.unlink(missing_ok=True)
        raise
    return descriptor


def close_file(descriptor: int, owner: int) -> None:
    """Close what `open_file` opened, and give up the lock if this is the process ``owner`` that it was opened in.

    Closing alone would leave the lock with processes that were forked meanwhile, such as a loader's workers.
    """
    import fcntl

    if os.getpid() == owner:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    import fcntl  # there is none on Windows

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise HistoryFileError(
            f"{path} is in use by another history, of this process or of another: two would overwrite each other's "
            "rows; delete the other one first, or give each its own file"
        ) from error


def _fill(path: Path, descriptor: int, layout: FileLayout) -> None:
    """Take the room at once: writing to a mapped file for which there is none would end the process."""
    free = shutil.disk_usage(path.parent).free
    if layout.file_bytes > free:
        raise HistoryFileError(f"{path}: the history needs {layout.file_bytes} bytes (got {free} bytes of free space)")
    _allocate(path, descriptor, layout)
    os.pwrite(descriptor, layout.header, 0)  # last: what has a header is whole


def _allocate(path: Path, descriptor: int, layout: FileLayout) -> None:
    if not hasattr(os, "posix_fallocate"):
        os.ftruncate(descriptor, layout.file_bytes)
        return
    try:
        os.posix_fallocate(descriptor, 0, layout.file_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise HistoryFileError(
            f"{path}: the history needs {layout.file_bytes} bytes, and there is no room ({error.strerror}); name a "
            "path elsewhere, or take a smaller dtype"
        ) from error


def _check(path: Path, descriptor: int, layout: FileLayout) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        _refuse(path, "a file", "something else")
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, _FIELDS.size, 0)
    if len(head) == _FIELDS.size and head == layout.header:
        if size != layout.file_bytes:
            _refuse(path, f"a history file of {layout.file_bytes} bytes", f"{size} bytes: it was cut or extended")
        if os.fstat(descriptor).st_blocks * 512 < size:  # it has holes, as a copy may have
            _allocate(path, descriptor, layout)
        return
    if len(head) < _FIELDS.size:
        _refuse(path, f"a history file with a header of {HEADER_BYTES} bytes", f"a file of {size} bytes")
    magic, version, name, rows, channels = _FIELDS.unpack(head)
    if magic == bytes(len(_MAGIC)):
        _refuse(path, f"a file that begins with {_MAGIC!r}", "zeros: making it was interrupted")
    if magic != _MAGIC:
        _refuse(path, f"a file that begins with {_MAGIC!r}", f"{magic!r}: it is no history")
    if version != _VERSION:
        _refuse(path, f"version {_VERSION} of the format", f"version {version}")
    expected = f"{layout.num_embeddings} rows of {layout.embedding_dim} channels in {layout.dtype}"
    found = name.rstrip(b"\0").decode(errors="replace")
    _refuse(path, expected, f"{rows} rows of {channels} channels in torch.{found}")


def _refuse(path: Path, expected: str, found: str) -> NoReturn:
    raise HistoryFileError(f"{path}: expected {expected} (got {found}); name another file, or delete this one")
