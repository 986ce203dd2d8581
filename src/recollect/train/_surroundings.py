"""What surrounds a run: device, threads, warnings and logs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from rich.console import Console

from recollect.frames import DriftWarning
from recollect.train._accelerator import fabric_on
from recollect.train._errors import UsageError
from recollect.train._files import replace_file
from recollect.train._settings import Settings

__all__ = ["AtomicCheckpointIO", "drift_told_once", "make_fabric", "threads", "told"]

_SMALL = 2**16  # features of one group of a layer, over all nodes


def make_fabric(settings: Settings) -> Fabric:
    """Fabric on the settings' device.

    Raises:
        UsageError: there is no such device, or it lacks the precision.
    """
    cuda = torch.cuda.is_available()
    for key, device, other in (
        ("device", settings.device, "device=cpu or device=auto"),
        ("training.history_device", settings.training.history_device, "training.history_device=cpu or null"),
    ):
        if device == "cuda" and not cuda:
            raise UsageError(f"{key}=cuda: torch sees no CUDA device here; use {other}")
    own = settings.device not in ("auto", "cpu", "cuda")  # of a kind that Fabric does not know
    accelerator = "cuda" if cuda and settings.device in ("auto", "cuda") else "cpu"
    if accelerator == "cpu" and settings.precision == "16-mixed":
        raise UsageError("precision=16-mixed needs a CUDA device; on others use 32-true or bf16-mixed")
    # One device: a full batch is one piece.
    if own:
        return fabric_on(torch.device(settings.device, 0), settings.precision, AtomicCheckpointIO())
    return Fabric(
        accelerator=accelerator,
        devices=1,
        precision=settings.precision,  # type: ignore[arg-type]  # its values were checked with the settings
        plugins=[AtomicCheckpointIO()],
    )


class AtomicCheckpointIO(TorchCheckpointIO):
    """How Fabric stores checkpoints here: a process that dies while it writes leaves the checkpoint before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Store ``checkpoint``, replacing an older one in one step."""
        replace_file(Path(path), lambda file: torch.save(checkpoint, file))


@contextmanager
def threads(number: int | None, features: int) -> Iterator[None]:
    """Set the CPU threads for the body.

    Args:
        number: of threads; None: as many as the work is worth.
        features: that are computed at a time; 0 if that is unknown.
    """
    before = torch.get_num_threads()
    if number is None:
        # Two threads save a sixth of the time on a graph of this size if they have two idle cores, and where another
        # process takes one of them, they wait for each other for many times what the work takes.
        number = 1 if 0 < features < _SMALL else before
    try:
        torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def drift_told_once(console: Console) -> Iterator[None]:
    """Show the first warning about drift as a line of text: metrics.csv has the drift of every epoch."""
    told = False

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        nonlocal told
        if not issubclass(category, DriftWarning):
            before(message, category, *args, **kwargs)
        elif not told:
            told = True
            console.print(f"warning: {message}", style="yellow", highlight=False, markup=False)

    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always", DriftWarning)
        warnings.showwarning = show
        yield


@contextmanager
def told(console: Console) -> Iterator[None]:
    """Show what the library logs of how it cuts the graph."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(self.format(record), highlight=False, markup=False, soft_wrap=True)

    logger, handler = logging.getLogger("recollect.autoscale"), Told()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
