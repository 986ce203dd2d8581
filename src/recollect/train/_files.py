"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

__all__ = ["AtomicCheckpointIO", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write a file, replacing an older one in one step."""
    _replace(path, lambda file: file.write(text.encode()))


class AtomicCheckpointIO(TorchCheckpointIO):
    """How Fabric stores checkpoints here: a process that dies while it writes leaves the checkpoint before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Store ``checkpoint``, replacing an older one in one step."""
        _replace(Path(path), lambda file: torch.save(checkpoint, file))


def _replace(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    # One name for all attempts, so that one that was cut short leaves nothing that the next does not take over.
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # it may be a link to a file of somebody
    with partial.open("xb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())  # otherwise a power failure could keep the new name and lose the content
    os.replace(partial, path)
