"""What the machine refuses in the middle of a run, in one line: what failed, what is safe, and how to go on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from recollect.autoscale import HistoryFileError
from recollect.frames import LatticeError
from recollect.train._errors import Interrupted, TrainingError, UsageError
from recollect.train._folder import RunFolder

__all__ = ["buildable", "enough_memory", "explained"]

_REFUSED = "can't allocate memory"  # torch has no type of its own for what the host's allocator refuses
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explained(folder: RunFolder) -> Iterator[None]:
    """Turn what the machine refuses in the body into a `TrainingError`, and Ctrl-C into `Interrupted`.

    Args:
        folder: of the run.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(folder.again) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TrainingError(_memory(error, _safe(folder))) from error
    except OSError as error:
        raise TrainingError(_files(folder, error)) from error
    except LatticeError as error:
        raise TrainingError(f"{error}: try a lower optimizer.lr, or clip_norm=1.0. {_safe(folder)}") from error
    except RuntimeError as error:
        cause = error.__cause__ or error.__context__
        if _REFUSED in str(error):
            raise TrainingError(_memory(error, _safe(folder))) from error
        if isinstance(cause, OSError) and cause.errno in _FULL:  # torch.save finds fewer bytes than it wrote
            raise TrainingError(_files(folder, cause)) from error
        raise


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turn a lack of memory in the body, which is over before the run has a folder, into a `TrainingError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _REFUSED in str(error):
            raise TrainingError(_memory(error, "Nothing was written.")) from error
        raise


@contextmanager
def buildable() -> Iterator[None]:
    """Turn what goes wrong in the body, which makes a network, into a `TrainingError`: settings and files."""
    try:
        yield
    except TrainingError:
        raise
    except OSError as error:
        raise TrainingError(f"a file of the network cannot be made or read: {error}") from error
    except (ImportError, HistoryFileError) as error:
        raise TrainingError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"the model cannot be built: {error}") from error


def _memory(error: BaseException, safe: str) -> str:
    line = str(error).strip().partition("\n")[0]
    return (
        f"there is not enough memory ({line}): try fewer model.hidden_channels, training=autoscale with smaller parts, "
        f"measure.enabled=false or another device. {safe}"
    )


def _files(folder: RunFolder, error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    what = "the disk is full" if error.errno in _FULL else (error.strerror or str(error)).lower()
    return f"the run's files cannot be written: {what}{where}. {_safe(folder)}"


def _safe(folder: RunFolder) -> str:
    if folder.checkpoint.exists():
        return f"The last checkpoint is safe; go on with: {folder.again}"
    return f"No checkpoint was written yet; begin again with: {folder.again}"
