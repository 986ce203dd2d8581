"""Importing and running optional libraries, without their noise."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from recollect.data._errors import MissingDependencyError

# Raised by the libraries' own code on correct use, so that no caller can avoid them.
_FOREIGN_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (DeprecationWarning, r"`torch\.jit\.script` is deprecated"),  # torch_geometric and torch 2.13, on import
    (UserWarning, r"The given NumPy array is not writable"),  # ogb 1.3.6 with pandas 3; what it reads is only read
)


@contextlib.contextmanager
def foreign_code() -> Iterator[None]:
    """Keep an optional library's known warnings and its prints on stdout out of the caller's sight.

    Also undoes what the library does to the warning filters (torch_geometric's Planetoid reader adds one).
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        for category, message in _FOREIGN_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=category)
        yield


def require(module: str, *, extra: str) -> Any:
    """Import an optional library's module.

    Args:
        module: Its full name.
        extra: The extra of recollect that installs it.

    Raises:
        MissingDependencyError: It, or something that it imports, is not installed.
    """
    with foreign_code(), _no_update_check():
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise missing_dependency(error, extra) from error


def missing_dependency(error: ModuleNotFoundError, extra: str) -> MissingDependencyError:
    """Say which extra brings the module that was not found."""
    return MissingDependencyError(
        f'the module {error.name!r} is not installed; run: pip install "torch-recollect[{extra}]"', name=error.name
    )


@contextlib.contextmanager
def _no_update_check() -> Iterator[None]:
    """Keep ogb from asking the package index for news of itself.

    Importing ogb starts a thread that does, if the package `outdated` can be imported; without a network,
    the process would wait for it at its end. A None in `sys.modules` is Python's way to say that a module
    cannot be imported.
    """
    before = sys.modules.pop("outdated", None)
    sys.modules["outdated"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["outdated"]
        if before is not None:
            sys.modules["outdated"] = before
