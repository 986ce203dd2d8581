"""Folders: which may be written, where results are kept, and how they get there whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_may_write(folder: Path) -> None:
    """Refuse a folder that must not be written, or made, by its permission bits or its parent's.

    The bits bind the superuser as well here: in a container everybody is one, and a folder that many share
    is read-only for all of them.

    Raises:
        PermissionError: It must not.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.stat().st_mode & 0o222 or not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing} must not be written")


def kept(home: Path, files: tuple[str, ...]) -> list[Path]:
    """The folders in which computed files of these raw files may be kept, best first.

    The library's own folder, beside the raw files, then one in the user's cache, whose name changes with
    the raw files.
    """
    state = [f"{file} {(s := (home / file).stat()).st_size} {s.st_mtime_ns}" for file in files]
    digest = hashlib.sha256("\n".join([str(home.resolve()), *state]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return [home / "processed", cache / "recollect" / f"{home.name}-{digest}"]


def may_fill(place: Path, home: Path) -> bool:
    """Whether results may be put here: beside raw files only if nothing is there, in the cache always."""
    return place.parent != home or not place.exists()


def temporary(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder that goes away again, inside another one."""
    return tempfile.TemporaryDirectory(prefix=".recollect-", dir=parent)


@contextlib.contextmanager
def workshop(places: list[Path]) -> Iterator[Path]:
    """A temporary folder beside the first of these places that allows it, else anywhere."""
    for place in places:
        try:
            check_may_write(place.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            folder = temporary(place.parent)
        except OSError:
            continue
        break
    else:
        folder = tempfile.TemporaryDirectory(prefix="recollect-")
    with folder as name:
        yield Path(name)


def keep(made: Path, view: Path, places: list[Path], home: Path) -> None:
    """Move what was computed to the place that the view was made for, in one step.

    Not being able to is no error: the next call computes again.
    """
    for place in places:
        if place.parent == view.parent and may_fill(place, home):
            with contextlib.suppress(OSError):  # another process was quicker, or the place is not ours to clear
                if place.exists():
                    shutil.rmtree(place)
                made.rename(place)


def move_files(source: Path, target: Path) -> None:
    """Move raw files and computed ones into place, each in one step; the folders are on one file system."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            path.replace(destination)
