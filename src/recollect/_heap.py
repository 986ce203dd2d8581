"""The C library's heap, which may hold on to what tensors have freed."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["map_large_blocks"]

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def map_large_blocks(threshold: int = 1 << 20) -> bool:
    """Give the memory of freed CPU tensors back to the system at once, where the C library is glibc.

    By default glibc puts blocks of up to 32 MiB into its heap, where the small objects of autograd's graph come to lie
    between the large ones. What a deep network frees is then in too small pieces to be used again: a step of 1,001
    reversible layers, whose tensors never took more than 0.3 GB, was seen to hold 13 GB of the system. Blocks above the
    threshold are mapped one by one instead; in that example this takes about a sixth more time.

    Concerns the whole process, from now on. The environment variable ``MALLOC_MMAP_THRESHOLD_=1048576`` does the same
    from outside.

    Args:
        threshold: in bytes.

    Returns:
        Whether the C library took it; ``False`` where it is not glibc.

    Example:
        >>> import sys
        >>> from recollect.memory import map_large_blocks
        >>> taken = map_large_blocks()  # before the first step of a deep network
        >>> taken if sys.platform != "linux" else isinstance(taken, bool)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, threshold))
