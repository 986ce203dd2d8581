"""Whether an index is 0, 1, 2 and so on: the only values that the form of a graph depends on."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from recollect._devices import forms_of

__all__ = ["counts_up"]

# Indices on other devices than the CPU that were seen: their version, and whether they count, once that was read.
_seen: MutableMapping[Tensor, tuple[int, bool | None]] = WeakTensorKeyDictionary()
# By device and length: the last one that was new, and how many before it were gone by then.
_new: dict[tuple[torch.device, int], tuple[weakref.ref[Tensor], int]] = {}


def counts_up(index: Tensor) -> bool:
    """Return whether an index, 1-D, is 0, 1, 2 and so on.

    On other devices than the CPU reading waits. There an index is read when it is seen the second time, and anew when
    it has changed. One that is new in each call is never read, and taken for any other.
    """
    if forms_of(index.device).reads_at_once:
        return _read(index)
    version = -1 if index.is_inference() else index._version
    kind = index.device, len(index)
    seen = _seen.get(index)
    if seen is None or seen[0] != version:
        _seen[index] = version, None
        before, gone = _new.get(kind, (None, 0))
        gone += before is not None and before() is None
        _new[kind] = weakref.ref(index), gone
        if gone > 1:
            warnings.warn(
                f"the losses' graph picks entries by an index of {len(index)} entries on {index.device} that is new in "
                "each call. To look whether it is torch.arange would wait for the device, so it is taken for any "
                "index, and what is behind it takes a gradient for each loss. Keep the index between calls (as a "
                "buffer), or use gather or a loss function of torch",
                stacklevel=2,
            )
        return False
    _new.pop(kind, None)
    counts = seen[1]
    if counts is None:
        counts = _read(index)
        _seen[index] = version, counts
    return counts


def _read(index: Tensor) -> bool:
    return bool((index == torch.arange(len(index), device=index.device)).all())
