"""Reading raw files with a library's own dataset class, without letting that class near the user's folder.

The classes of torch_geometric and ogb write beside the raw files, rename some of them, and leave broken
results when they are interrupted. So each works in a *view*: a temporary folder with the layout of ``root``
and links to the files. What it has computed is moved from there to a place to keep, in one step.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from recollect.data import _places
from recollect.data._errors import InvalidRawFilesError, MissingDependencyError, MissingRawFilesError
from recollect.data._fetch import limited_waiting, reach
from recollect.data._foreign import foreign_code, missing_dependency

T = TypeVar("T")
_log = logging.getLogger("recollect.data")


@dataclass(frozen=True)
class RawSource:
    """Where a dataset's files are and come from.

    Attributes:
        name: The dataset's name.
        folder: Its folder, relative to the root.
        files: Files that must be there, relative to the folder.
        processed: Files that the library's class makes in the subfolder ``processed``.
        origin: From where a person gets the files.
        url: An address at which a server answers if the files can be fetched.
        fetch: Fetches the files into a view; None where opening the view does.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    processed: tuple[str, ...]
    origin: str
    url: str
    fetch: Callable[[Path], None] | None = None

    def missing(self, root: Path) -> list[str]:
        """The files that are not under this root."""
        return [file for file in self.files if not (root / self.folder / file).is_file()]


def read(source: RawSource, root: Path, open_view: Callable[[Path], T], *, download: bool) -> T:
    """Open a dataset, from what an earlier call computed if there is such.

    Args:
        source: What to read.
        root: Folder that has, or will have, ``source.folder``.
        open_view: Calls the library's class on a view, and returns what it read. Must not keep files open.
        download: Whether to fetch missing files.

    Raises:
        MissingRawFilesError: Files are missing, and were not to be fetched or could not be.
        InvalidRawFilesError: Files cannot be read.
        MissingDependencyError: The files need a package that is not installed.
    """
    root = root.absolute()
    if missing := source.missing(root):
        if not download:
            hint = "Or pass download=True to let them be fetched."
            raise MissingRawFilesError(_explain(source, root, missing, hint))
        return _fetch_and_read(source, root, open_view)
    home = root / source.folder
    kept_places = _places.kept(home, source.files)
    for place in kept_places:
        if all((place / file).is_file() for file in source.processed):
            try:
                with _places.workshop([]) as view, foreign_code():
                    _link(home, view / source.folder, source.files)
                    _link(place, view / source.folder / "processed", source.processed)
                    return open_view(view)
            except Exception as error:  # whatever a library raises on a broken file: it can be computed again
                _log.info("%s: %s cannot be used (%s); reading the raw files", source.name, place, error)
    return _process(source, root, open_view, kept_places)


def _process(source: RawSource, root: Path, open_view: Callable[[Path], T], places: list[Path]) -> T:
    home = root / source.folder
    _log.info("%s: reading the raw files in %s", source.name, home)
    with _places.workshop([place for place in places if _places.may_fill(place, home)]) as view:
        _link(home, view / source.folder, source.files)
        try:
            with foreign_code():
                result = open_view(view)
        except Exception as error:
            _translate(error, source, home)
        _places.keep(view / source.folder / "processed", view, places, home)
    return result


def _fetch_and_read(source: RawSource, root: Path, open_view: Callable[[Path], T]) -> T:
    home = root / source.folder
    try:
        for folder in (root, home, home / "raw"):
            _places.check_may_write(folder)
        reach(source.url)
        root.mkdir(parents=True, exist_ok=True)
        workshop = _places.temporary(root)
    except OSError as error:
        _cannot_fetch(error, source, root)
    with workshop as name:
        view = Path(name)
        try:
            with foreign_code(), limited_waiting():
                if source.fetch is not None:
                    source.fetch(view)
                result = open_view(view)
        except Exception as error:
            if source.missing(view):
                _cannot_fetch(error, source, root)
            _translate(error, source, home)
        _places.move_files(view / source.folder, home)
    return result


def _link(source: Path, target: Path, files: tuple[str, ...]) -> None:
    # One link per file, not one for the folder: ogb renames raw files, and must rename links only.
    for file in files:
        link = target / file
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            link.symlink_to(source / file)
        except OSError:  # Windows lets not everybody make links
            shutil.copyfile(source / file, link)


def _translate(error: Exception, source: RawSource, home: Path) -> NoReturn:
    if isinstance(error, ModuleNotFoundError):
        raise missing_dependency(error, "graph") from error
    # An errno means that the system refused (disk full, no permission): its own words are the clearest.
    system = isinstance(error, OSError) and error.errno is not None
    if system or isinstance(error, (MemoryError, MissingDependencyError, Warning)):
        raise error
    raise InvalidRawFilesError(
        f"the raw files of {source.name!r} in {home} cannot be read ({type(error).__name__}: {error}); "
        f"replace them by those of {source.origin}: {', '.join(source.files)}"
    ) from error


def _cannot_fetch(error: Exception, source: RawSource, root: Path) -> NoReturn:
    hint = f"Fetching them was tried and failed: {type(error).__name__}: {error}."
    raise MissingRawFilesError(_explain(source, root, source.missing(root), hint)) from None


def _explain(source: RawSource, root: Path, missing: list[str], hint: str) -> str:
    folders: dict[Path, list[str]] = {}
    for file in missing:
        path = root / source.folder / file
        folders.setdefault(path.parent, []).append(path.name)
    lines = [f"  {folder}: {', '.join(names)}" for folder, names in folders.items()]
    return "\n".join(
        [
            f"the raw files of the dataset {source.name!r} are missing. Put these files into these folders:",
            *lines,
            f"They come from {source.origin}.",
            hint,
            "The folder above is chosen by root, or by the environment variable RECOLLECT_DATA.",
        ]
    )
