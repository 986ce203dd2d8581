"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["replace_file", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a file, replacing an older one in one step."""
    replace_file(path, lambda file: file.write(text.encode()))


def replace_file(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Write a file by a function, replacing an older one in one step."""
    # One name for all attempts, so that one that was cut short leaves nothing that the next does not take over.
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link to a file of somebody
    with partial.open("xb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())  # otherwise a power failure could keep the new name and lose the content
    os.replace(partial, path)
