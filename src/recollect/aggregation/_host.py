"""Between a device and host memory, where weights are computed: one wait on the way there, none on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["fetched"]


def fetched(values: Sequence[Any]) -> list[Any]:
    """Return values with all tensors in host memory; the host waits once for each device that they are on.

    Args:
        values: what is no tensor, or is in host memory, is returned as it is.
    """
    found = list(values)
    places: dict[torch.device, list[int]] = {}
    for k, value in enumerate(values):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            places.setdefault(value.device, []).append(k)
    for indices in places.values():
        for k, tensor in zip(indices, _copies([found[k] for k in indices]), strict=True):
            found[k] = tensor
    return found


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors of one device to host memory, the bytes of all of them at once."""
    if len(tensors) == 1:
        return [tensors[0].cpu()]
    together = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]).cpu()
    parts = torch.split(together, [tensor.numel() * tensor.element_size() for tensor in tensors])
    # A view in a wider type must begin at a multiple of its size, as a copy does.
    return [part.clone().view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
